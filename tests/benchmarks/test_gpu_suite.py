"""The GPU suite on a CPU: its plumbing, its counting, and that it notices what is wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    gpu_calls,
    gpu_cases,
    gpu_check,
    gpu_process,
    gpu_sanitize,
    gpu_suite,
    gpu_trainer,
    gpu_tune,
)
from benchmarks.gpu_cases import Case
from jaxformer_kernels.attention.mosaic_gpu_sm90_blocks import Blocks, choose, fits
from jaxformer_kernels.attention.shapes import Shape

# In small most of them are the same.
KINDS = {
    case.tiny().short(): case.tiny()
    for cases in (*gpu_cases.CHECKS.values(), gpu_cases.RERUNS, gpu_cases.table())
    for case in cases
    if case.dtype == "bfloat16"
}


@pytest.fixture
def settings(tmp_path):
    return gpu_process.Settings(tmp_path, deadline=np.inf, dry=True, turns=1, repeats=1)


@pytest.mark.parametrize("kind", KINDS)
def test_visible_pairs_are_those_of_the_mask(kind):
    case = KINDS[kind]
    mask = gpu_calls.options(case)["mask"]
    assert case.pairs() == np.sum(mask.as_array(case.B, 1, case.T, case.keys))


def test_the_table_has_the_published_sizes():
    for case in gpu_cases.table():
        assert case.B * case.T == gpu_cases.TOKENS
        assert case.N * case.H == gpu_cases.WIDTH


@pytest.mark.slow
def test_every_part_runs_dry_and_writes_its_record(tmp_path, capsys):
    arguments = ["--dry", "--output", str(tmp_path), "--only", "", "--budget-seconds", "600"]
    parts = ["rerun", "attention", "decode", "trainer", "tune", "sanitize"]
    assert gpu_suite.main([*parts, *arguments]) == 0
    for part in parts:
        (path,) = tmp_path.glob(f"*_gpu_{part}_*.json")
        record = json.loads(path.read_text())
        assert record["rows"], part
        assert not any({"failed", "hung"} & set(row) for row in record["rows"]), part
    said = capsys.readouterr().out
    assert all(f"### {part}" in said for part in parts)


def test_a_check_runs_dry_and_is_written_with_every_row(settings):
    settings = dataclasses.replace(settings, only="float16,decode,yardstick")
    rows, facts = gpu_suite.run("check", settings)
    assert {row["verdict"] for row in rows} == {"right"}
    assert {row["group"] for row in rows} == {"float16", "decode", "yardstick"}
    (path,) = settings.output.glob("*_gpu_check_*.json")
    assert json.loads(path.read_text())["rows"] == json.loads(json.dumps(rows))
    assert "rule" in facts


def test_a_kernel_that_is_off_is_called_wrong(monkeypatch):
    def off(case, implementation, *, lse=False):
        right = ours(case, implementation, lse=lse)

        def call(operands, integers):
            found = right(operands, integers)
            return found | {"out": found["out"] * jnp.where(implementation == "xla", 1.0, 1.1)}

        return call

    ours = gpu_calls.ours
    monkeypatch.setattr(gpu_calls, "ours", off)
    case = gpu_cases.CHECKS["features"][0].tiny()
    arguments = {"case": case.as_json(), "group": "features", "dry": True}
    row = gpu_check.answer({}, kernel="reference", **arguments)
    assert row["verdict"].startswith("wrong:")
    assert "out" in row["verdict"]
    assert gpu_suite.is_bad(row)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_infinite_error(bad):
    want = {"out": jnp.array([1.0, -jnp.inf])}
    assert gpu_calls.errors({"out": jnp.array([1.0, -jnp.inf])}, want)["out"] == 0
    assert gpu_calls.errors({"out": jnp.array([bad, -jnp.inf])}, want)["out"] == np.inf
    assert gpu_calls.errors({"out": jnp.array([1.0, 0.0])}, want)["out"] == np.inf


def test_a_child_that_hangs_is_killed_and_the_next_case_is_answered(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text(
        "import time\n"
        "def answer(state, nap):\n"
        "    state['asked'] = state.get('asked', 0) + 1\n"
        "    time.sleep(nap)\n"
        "    return {'asked': state['asked'], 'inverse': 1 / nap}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = gpu_process.Settings(tmp_path, deadline=np.inf)
    with gpu_process.Process("sleeper", settings) as process:
        assert process.ask(60, nap=0.01)["asked"] == 1
        assert "ZeroDivisionError" in process.ask(60, nap=0)["failed"]
        assert process.ask(60, nap=0.01)["asked"] == 3
        assert "killed" in process.ask(0.5, nap=60)["hung"]
        assert process.ask(60, nap=0.01)["asked"] == 1
    over = gpu_process.Settings(tmp_path, deadline=-np.inf)
    with gpu_process.Process("sleeper", over) as process:
        assert "cut_off" in process.ask(0.5, nap=60)


def test_a_part_whose_time_is_over_begins_nothing(tmp_path):
    over = gpu_process.Settings(tmp_path, deadline=-np.inf, dry=True)
    rows, _ = gpu_suite.run("rerun", over)
    assert [row["verdict"] for row in rows] == ["left out"]
    _, facts = gpu_suite.run("attention", over)
    assert facts["left_out"]


@pytest.mark.parametrize("H", gpu_tune.HEAD_DIMS)
@pytest.mark.parametrize("kernel", gpu_tune.KERNELS)
def test_candidates_fit_and_begin_with_the_blocks_in_use(kernel, H):
    every = gpu_tune.candidates(kernel, H)
    assert every[0] == choose(kernel, H, H)
    assert len(set(every)) == len(every) > 1
    assert all(fits(kernel, blocks, H, H) for blocks in every[1:])


def test_the_fastest_right_blocks_are_written_as_tuning_reads_them():
    slow = {"columns": 64, "stages": 2, "groups": 2, "apart": False, "right": True}
    slow |= {"causal_ms": 2.0, "full_ms": 3.0}
    fast = slow | {"groups": 1, "apart": True, "causal_ms": 1.0}
    wrong = slow | {"columns": 128, "right": False, "causal_ms": 0.1}
    best = gpu_tune.fastest([slow, wrong, fast, {"hung": "it"}])
    text = gpu_tune.rendered({"found": "here", "dq": {"64,64": best}})
    assert Blocks(**json.loads(text)["dq"]["64,64"]) == Blocks(64, 2, 1, True)
    assert gpu_tune.fastest([wrong]) is None


@pytest.mark.parametrize("kernel", gpu_tune.KERNELS)
def test_a_kernel_alone_lowers_for_a_gpu(kernel):
    from jaxformer_kernels import compiling_for

    case = Case("tuned", 1, 256, 2, 2, 64)
    given = jax.eval_shape(lambda: gpu_calls.operands(case))
    rows = jax.ShapeDtypeStruct((1, 2, 256), jnp.float32)
    operands = given | {"dout": given["q"], "lse": rows, "delta": rows}
    with compiling_for("gpu"):
        launch = gpu_tune._launcher(kernel, choose(kernel, 64, 64), case, False)
        text = jax.jit(launch).trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


def test_a_missing_sanitizer_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sanitize.shutil, "which", lambda *_, **__: None)
    settings = gpu_process.Settings(tmp_path, deadline=np.inf)
    (row,) = gpu_sanitize.rows(settings, {})
    assert row["verdict"].startswith("missing")


def test_packed_documents_are_whole_and_positions_start_anew():
    shape = gpu_trainer.named("llama_1b", 3, dry=True)
    batch = gpu_trainer.batch_of(shape, packed=True)
    for ids, places in zip(batch["segment_ids"], batch["positions"], strict=True):
        for document in np.unique(ids):
            np.testing.assert_array_equal(places[ids == document], np.arange(sum(ids == document)))


def test_torch_makes_the_same_call_and_its_error_is_small():
    pytest.importorskip("torch")
    from benchmarks import gpu_torch

    state = {}
    case = Case("causal", 1, 64, 4, 2, 16)
    arguments = {"case": case.as_json(), "gradients": True, "dry": False}
    row = gpu_torch.answer(state, "prepare", contender="torch_flash", **arguments)
    assert row["error"] < 0.1, row
    assert gpu_torch.answer(state, "turn", contender="torch_flash")["seconds"] > 0


def test_torch_trains_the_model_of_the_same_size():
    pytest.importorskip("torch")
    from benchmarks import gpu_trainer_torch

    options = {"name": "llama_1b", "batch": 2, "dry": True}
    theirs = gpu_trainer_torch.answer({}, "prepare", **options)
    ours = gpu_trainer.answer({}, "prepare", attention="xla", **options)
    assert theirs["parameters"] == ours["parameters"]
    assert 0 < theirs["loss"] < 10
    assert 0 < ours["loss"] < 10


def test_a_shape_of_the_competitors_is_the_case():
    case = Case("window", 2, 64, 8, 2, 16, window=7, softcap=3.0)
    assert case.shape() == Shape(2, 64, 64, 8, 2, 16, True, (7, 0), 3.0)
