"""The benchmark of CTC on the CPU, in small; torch is there or it is not."""

from benchmarks import ctc_cpu
from jaxformer_kernels.ctc.shapes import Shape


def test_every_library_has_a_row_with_its_time_and_its_errors():
    rows = ctc_cpu.measure(Shape(2, 12, 6, 3), turns=2)
    assert [row["library"] for row in rows][:2] == ["ctc_loss", "optax"]
    assert rows[0]["ours_to_this"] == 1
    for row in rows:
        assert row["milliseconds"] > 0 and row["ours_to_this"] > 0
        assert row["loss_error"] < 1e-5 and row["gradient_error"] < 1e-4
    assert ctc_cpu.table(rows).count("\n") == len(rows) + 1


def test_it_shows_where_libraries_differ():
    rows = ctc_cpu.behaviours()
    ours = [(row["loss"], row["gradient"]) for row in rows if row["library"] == "ctc_loss"]
    assert ours[0] == ("inf", "0")
    assert ours[1] == ("1.686", "not 0")
    assert float(ours[2][0]) >= 0 and ours[2][1] == "not 0"
    optax = [(row["loss"], row["gradient"]) for row in rows if row["library"] == "optax"]
    assert optax[0] == ("1e+05", "not 0") and optax != ours
