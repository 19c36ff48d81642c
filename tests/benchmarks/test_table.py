"""The table of kernels/README.md: what stands in it, and that writing it touches nothing else."""

import json

import pytest

from benchmarks.aot import table

ACCURACY = {
    "date": "2026-01-02",
    "jax": "0.0.1",
    "lengths": {"positions": 200, "head_dim": 64, "tokens": 96},
    "errors": [
        {
            "op": "attention",
            "shapes": ["llama2_7b", "llama3_8b"],
            "implementation": implementation,
            "results": {
                "out": [0.01, 0.02],
                "lse": [0.0, 0.03],
                "dk": [0.05, 0.1],
                "dv": [0.03, 0.04],
            },
        }
        for implementation in ("mosaic_gpu", "mosaic_tpu")
    ],
}


def record(*cases):
    return {"date": "2026-01-03", "jax": "0.0.2", "cases": list(cases)}


def case(call, chip, kernels=(), outcome="ok", passes="forward + backward"):
    name = f"attention {call} bfloat16 {passes}"
    return {"case": name, "chip": chip, "outcome": outcome, "kernels": list(kernels)}


def gpu_kernel(name, spills=0):
    return {"name": name, "registers": 168, "spills": spills, "shared_memory": 2048, "wgmma": 4}


H100 = record(
    case("llama3_8b", "h100", [gpu_kernel("attention_forward")], passes="forward"),
    case("llama3_8b", "h100", [gpu_kernel("attention_forward"), gpu_kernel("attention_dk_dv", 8)]),
    case("odd", "h100", outcome="refused"),
)
TPU = record(
    case("llama3_8b", "v5e", [{"name": "attention_backward", "bundles": 70, "vmem": 3 << 20}]),
    case("llama3_8b", "v6e", [{"name": "attention_backward", "bundles": 50, "vmem": 2 << 20}]),
    case("llama3_8b", "v5p", outcome="failed"),
)


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Writes the table into a README of two sentences, twice; its text."""
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n{table.START}old\n{table.END}After.\n", encoding="utf-8")
    for name, content in (("aot_tpu", TPU), ("aot_h100", H100), ("accuracy", ACCURACY)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(table, "README", readme)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    table.main()
    once = readme.read_text(encoding="utf-8")
    table.main()
    assert readme.read_text(encoding="utf-8") == once
    return once


def test_only_what_stands_between_the_markers_is_replaced(written):
    assert written.startswith(f"Before.\n{table.START}")
    assert written.endswith(f"{table.END}After.\n")
    assert "old" not in written


def test_a_row_has_the_kernel_s_figures_and_the_worst_of_its_own_errors(written):
    rows = written.splitlines()
    assert "| attention llama3_8b | attention_dk_dv | 168 | 8 | 2 | dv 3.0e-02 (4.0e-02) |" in rows
    assert "|  | attention_forward | 168 | 0 | 2 | out 1.0e-02 (2.0e-02) |" in rows
    assert (
        "| attention llama3_8b | attention_backward | 3.0 | 70 | – | 50 | dv 3.0e-02 (4.0e-02) |"
        in rows
    )


def test_what_did_not_compile_is_named(written):
    written = " ".join(written.split())
    assert "refused: attention odd bfloat16 forward + backward (h100)" in written
    assert "1 programs compiled" not in written
    assert "2 programs compiled; failed: attention llama3_8b bfloat16" in written


def test_the_readme_has_the_markers_once():
    text = table.README.read_text(encoding="utf-8")
    assert text.count(table.START) == text.count(table.END) == 1
