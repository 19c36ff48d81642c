"""The benchmark of kernels in small: results agree, work is counted right, a record has it all."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ctc_behaviours, kernel_calls, kernel_competitors, kernel_shapes, kernels
from jaxformer_kernels import Mask, ctc_loss
from jaxformer_kernels.attention.shapes import SHAPES as ATTENTION
from jaxformer_kernels.attention.shapes import Shape

pytest.importorskip("optax")


def run(folder, *arguments):
    """The record of a small run."""
    kernels.main(["--small", "--output", str(folder), *arguments])
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def only(*names):
    return [word for name in names for word in ("--implementation", name)]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run(tmp_path_factory.mktemp("kernels"), *only("xla", "jax_nn", "optax"))


def agree(rows):
    """Errors as small as rounding makes them; those of the plain computation stand beside."""
    assert rows
    for row in rows:
        slack = 1e-5 if row["dtype"] == "float32" else 1e-3
        assert row["error"] <= 2 * row["plain_error"] + slack, row


def test_every_op_and_contender_agrees_with_the_reference(record):
    agree(record["rows"])
    found = {(row["op"], row["contender"]) for row in record["rows"]}
    assert found == {
        ("attention", "xla"),
        ("attention", "jax_nn"),
        ("linear_cross_entropy", "xla"),
        ("linear_cross_entropy", "optax"),
        ("decode_attention", "xla"),
        ("decode_attention", "jax_nn"),
        ("ctc_loss", "xla"),
        ("ctc_loss", "optax"),
    }


def test_a_row_says_what_ran_how_long_it_took_and_what_that_is_worth(record):
    assert set(record["formulas"]) == {*kernel_shapes.SHAPES, "roofline"}
    for row in record["rows"]:
        assert row["p20"] <= row["ms"] <= row["p80"]
        assert row["tflops"] > 0
        assert row["roofline"] > 0
        assert row["arguments_mib"] > 0
        assert row["outputs_mib"] > 0
        assert row["run"] and row["scale"] < 1
        assert row["contender"] != "xla" or row["ours_share"] == 1


def test_torch_agrees_and_takes_its_turns_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("torch")
    rows = run(tmp_path, *only("xla", "torch"), "--dtype", "float32")["rows"]
    agree(rows)
    torch = [row["op"] for row in rows if row["contender"] == "torch" and row["ours_share"] > 0]
    assert sorted(torch) == sorted(kernel_shapes.SHAPES)


def test_who_cannot_do_a_call_has_a_row_that_says_why(tmp_path):
    arguments = ("--op", "attention", "--shape", "gemma2-9b-local", "--dtype", "float32")
    wanted = only("xla", "jax_nn", "cudnn")
    rows = run(tmp_path, *arguments, "--pass", "forward", *wanted)["rows"]
    notes = {row["contender"]: row.get("note", "") for row in rows}
    assert notes["xla"] == ""
    assert notes["jax_nn"] == "refused: jax.nn.dot_product_attention has no softcap"
    assert notes["cudnn"].startswith("refused: attention: implementation='cudnn' does not support")
    assert rows[0]["shape"] == "gemma2_9b_local"


def test_lengths_are_swept_at_one_number_of_tokens_and_drawn(tmp_path):
    arguments = ("--lengths", "16", "32", "--dtype", "float32", "--pass", "forward")
    rows = run(tmp_path, *arguments, *only("xla", "jax_nn"))["rows"]
    assert [row["length"] for row in rows] == [16, 16, 32, 32]
    assert rows[0]["run"].startswith("B4 T16 S16") and rows[2]["run"].startswith("B2 T32 S32")
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_spent_budget_leaves_the_rest_out_and_says_so(tmp_path, capsys):
    arguments = ("--op", "attention", "--budget-seconds", "0", *only("xla"))
    found = run(tmp_path, *arguments)
    assert found["rows"] == []
    assert found["left_out"] == ["attention subwords float32", "attention subwords bfloat16"]
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "lama2-7b"], "unknown shape 'lama2-7b'; did you mean 'llama2_7b'?"),
        (["--op", "attenton"], "unknown op 'attenton'; did you mean 'attention'?"),
        (["--implementation", "tosch"], "unknown implementation 'tosch'"),
        (["--op", "decode_attention", "--pass", "forward+backward"], "has no gradients"),
        (["--scale", "2"], "--scale is above 0 and at most 1"),
        (["--lengths", "16", "--op", "ctc_loss"], "--lengths is for attention"),
        (["--lengths", "16", "--shape", "subwords", "--shape", "characters"], "one --shape"),
    ],
)
def test_bad_input_is_refused_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--small", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 9, 9, 2, 1, 4),
        Shape(2, 3, 9, 2, 1, 4),
        Shape(1, 9, 9, 2, 1, 4, window=(3, 0)),
        Shape(1, 9, 9, 2, 1, 4, causal=False, window=(2, 1)),
        Shape(3, 5, 7, 2, 1, 4, causal=False),
    ],
)
def test_only_visible_pairs_count(shape):
    offset = shape.S - shape.T if shape.causal else 0
    mask = Mask(causal=shape.causal, window=shape.window, q_offset=offset)
    visible = np.broadcast_to(
        mask.as_array(shape.B, 1, shape.T, shape.S), (shape.B, 1, shape.T, shape.S)
    )
    counted = kernel_shapes.visible_array("attention", shape)
    assert (np.broadcast_to(counted, visible.shape) == visible).all()
    work = 4 * shape.N * shape.H * visible.sum()
    assert kernel_shapes.flops("attention", shape) == work
    assert kernel_shapes.flops("attention", shape, gradients=True) == 3.5 * work


@pytest.mark.parametrize("op", kernel_shapes.SHAPES)
def test_a_shrunk_shape_has_about_the_share_of_the_work_and_keeps_its_kind(op):
    for shape in kernel_shapes.SHAPES[op].values():
        whole = kernel_shapes.flops(op, shape)
        for share in (0.5, 0.01):
            small = kernel_shapes.shrunk(op, shape, share)
            kept = kernel_shapes.flops(op, small)
            assert kept <= max(1.7 * share * whole, 4e6), (shape, small)
            if hasattr(shape, "K"):
                assert small.N // small.K == shape.N // shape.K and small.H == shape.H
        assert kernel_shapes.shrunk(op, shape, 1) == shape


def test_pages_and_rows_of_a_cache_are_decoded_alike():
    rows = kernel_shapes.SHAPES["decode_attention"]["llama3_8b_pages_of_16"].scaled(48, 2, 16)
    call = kernel_calls.make("decode_attention", rows, "float32")
    want, got = (
        jax.jit(function)(call.operands, call.integers)["out"]
        for function in (call.plain, call.ours("xla"))
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_plain_ctc_is_the_sum_over_all_paths():
    logits = jnp.asarray(kernel_shapes.draw(0, 2, 5, 3))
    labels = jnp.array([[1, 1], [2, 1]])
    lengths = jnp.array([5, 5]), jnp.array([2, 2])
    reference = jax.jit(functools.partial(ctc_loss, implementation="reference"))
    want = reference(logits, lengths[0], labels, lengths[1])
    np.testing.assert_allclose(jax.jit(kernel_calls.plain_ctc)(logits, labels), want, rtol=1e-6)


def test_it_shows_where_libraries_of_ctc_differ(monkeypatch):
    monkeypatch.setattr(ctc_behaviours, "installed", lambda package: False)
    rows = ctc_behaviours.rows()
    ours = [(row["loss"], row["gradient"]) for row in rows if row["library"] == "ctc_loss"]
    assert ours[0] == ("inf", "0")
    assert ours[1] == ("1.686", "not 0")
    assert float(ours[2][0]) >= 0 and ours[2][1] == "not 0"
    optax = [(row["loss"], row["gradient"]) for row in rows if row["library"] == "optax"]
    assert optax[0] == ("1e+05", "not 0") and optax != ours


def temporaries(function, T):
    """Bytes that gradients of causal attention at B2 N8 H64 need beside operands and results."""
    x = jax.ShapeDtypeStruct((2, T, 8, 64), jnp.float32)
    program = jax.jit(functools.partial(kernel_calls.with_gradients, function))
    compiled: Any = program.lower({"q": x, "k": x, "v": x}, {}, {"out": x}).compile()
    return compiled.memory_analysis().temp_size_in_bytes


SWEPT = dataclasses.replace(ATTENTION["subwords"], B=2, T=4096, S=4096, N=8, K=8, H=64)


def ours(T):
    shape = dataclasses.replace(SWEPT, T=T, S=T)
    return kernel_calls.functions("attention", shape)[0]("xla")


def test_memory_of_attention_is_linear_in_the_length():
    assert temporaries(ours(4096), 4096) <= 2.1 * temporaries(ours(2048), 2048)


@pytest.mark.slow
def test_attention_takes_at_most_a_quarter_of_the_memory_that_jax_takes():
    theirs = kernel_competitors.jax_nn_attention(SWEPT)
    assert temporaries(ours(4096), 4096) <= temporaries(theirs, 4096) / 4
