"""The measurement of errors: what is compared with what."""

import pytest

from benchmarks import accuracy
from jaxformer_kernels.attention.shapes import SHAPES


def test_every_shape_is_measured_once():
    found = accuracy.distinct(SHAPES, length=16, heads=2, head_dim=8)
    assert sorted(name for names in found.values() for name in names) == sorted(SHAPES)
    assert ["llama2_70b", "llama3_8b"] in list(found.values())


@pytest.mark.parametrize(
    "op", ["attention", "decode_attention", "linear_cross_entropy", "ctc_loss"]
)
def test_errors_are_against_float32_and_those_of_plain_bfloat16_stand_beside(monkeypatch, op):
    for size in ("LENGTH", "HEAD_DIM", "TOKENS", "WIDTH", "FRAMES"):
        monkeypatch.setattr(accuracy, size, 8)
    monkeypatch.setattr(accuracy, "LABELS", 4)
    call = next(call for _, call in accuracy.calls() if call.op == op)
    errors = accuracy.errors(call, "xla")
    gradients = {f"d{name}" for name in call.operands} if op != "decode_attention" else set()
    assert {name for name in errors if name.startswith("d")} == gradients
    for mine, plain in errors.values():
        assert 0 <= mine <= 2 * plain
        assert plain > 0
