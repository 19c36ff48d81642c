"""A sequence split over devices is attended to as one: outputs and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import Mask, context_attention, interpreting
from jaxformer_kernels.attention import mosaic_tpu_tiles, xla, xla_long
from tests.kernels.attention.calls import plain
from tests.kernels.context_attention.calls import (
    cast,
    draw,
    errors,
    expected,
    make_call,
    outcome,
    ring_mesh,
    split,
    unsplit_errors,
    whole,
)

RING = [
    ("causal", 1, "zigzag"),
    ("causal", 2, "contiguous"),
    ("packed", 2, "zigzag"),
    ("packed", 4, "zigzag"),
    ("packed", 4, "contiguous"),
    ("packed", 8, "zigzag"),
    ("window", 2, "zigzag"),
    ("window", 4, "contiguous"),
    ("everything", 4, "zigzag"),
    ("everything", 2, "contiguous"),
    ("cross", 4, "zigzag"),
    ("cross", 2, "contiguous"),
]
ALL_TO_ALL = [
    ("packed", 1, "zigzag"),
    ("causal", 2, "contiguous"),
    ("window", 4, "contiguous"),
    ("everything", 2, "zigzag"),
    ("everything", 4, "zigzag"),
    ("cross", 4, "zigzag"),
]


def check(run, call):
    operands, options = make_call(call)
    got = outcome(run, cast(operands, jnp.float32), options)
    found, alone = errors(got, expected(call)), unsplit_errors(call)
    for name, error in found.items():
        # Float32 rounding: one part in 2^23 of numbers of about 4, and what one device makes of it.
        assert error <= 3 * alone[name] + 5e-7, name
    return got


@pytest.mark.parametrize(("call", "C", "order"), RING)
def test_a_ring_is_attention_of_the_whole_sequence(call, C, order):
    check(split(C, order), call)


@pytest.mark.parametrize(("call", "C", "order"), ALL_TO_ALL)
def test_all_to_all_is_attention_of_the_whole_sequence(call, C, order):
    check(split(C, order, method="all_to_all"), call)


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
@pytest.mark.parametrize(
    ("check_vma", "axis_names"), [(True, None), (False, None), (True, frozenset({"context"}))]
)
def test_inside_a_larger_mesh(method, check_vma, axis_names):
    """The batch is split too, by the same region or by the partitioner; sinks are replicated."""
    rows = "data" if axis_names is None else None
    run = split(
        2,
        mesh=ring_mesh(2, data=2),
        rows=rows,
        check_vma=check_vma,
        axis_names=axis_names,
        method=method,
    )
    check(run, "cross")


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_queries_that_see_nothing_are_zero_and_pass_no_gradient(method):
    operands, options = make_call("cross")
    mask = options["mask"]
    blind = ~np.isin(mask.q_segment_ids, mask.kv_segment_ids)
    assert blind.any() and not blind.all()
    got = outcome(split(2, method=method), cast(operands, jnp.float32), options)
    assert not np.any(np.asarray(got["out"])[blind])
    assert not np.any(np.asarray(got["dq"])[blind])
    assert all(np.isfinite(x).all() for x in got.values())


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_blocks_of_either_kind_of_backward_pass(implementation, monkeypatch):
    """Parts of several ragged blocks; and the derivative of an implementation with no own one."""
    for module, name, value in (
        (xla, "_SHORT_LOGITS", 0),
        (xla, "_FEW_ROWS", 0),
        (xla_long, "ROWS", 3),
        (xla_long, "COLUMNS", 6),
    ):
        monkeypatch.setattr(module, name, value)
    check(split(2, implementation=implementation), "everything")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of the TPU kernels that small calls fill."""
    for name, value in (("LANES", 2), ("ROWS", 16), ("COLUMNS", 16), ("CHUNK", 8)):
        monkeypatch.setattr(mosaic_tpu_tiles, name, value)


def test_tpu_kernels_in_their_interpreter(small_tiles):
    # Not contiguous: the interpreter has devices wait for one another at every kernel, and there
    # one of them has none to run.
    with interpreting():
        check(split(2, "zigzag", implementation="mosaic_tpu"), "packed")


def test_the_backward_pass_keeps_to_the_interpreter_of_the_forward_pass(small_tiles):
    x, weight = (jnp.asarray(draw(seed, 1, 4, 1, 4), jnp.float32) for seed in (0, 1))
    mask = Mask(causal=True)

    def gradient(run):
        def inside(x):
            with interpreting():
                return run(x, x, x, mask=mask)

        return jax.vjp(jax.jit(inside), x)[1](weight)[0]

    got = gradient(split(1, implementation="mosaic_tpu"))
    np.testing.assert_allclose(got, gradient(whole("reference")), atol=1e-6)


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_bfloat16_is_as_exact_as_a_plain_computation_in_it(method):
    operands, options = make_call("packed")
    x = cast(operands, jnp.bfloat16)
    got = errors(outcome(split(4, method=method), x, options), expected("packed"))
    simple = outcome(lambda *a, **o: plain(*a, **o)[0], x, options)
    for name, limit in errors(simple, expected("packed")).items():
        assert got[name] <= 2 * limit, name


def test_layers_in_a_scan_with_recomputation():
    """As a decoder trains: the ring's own backward pass within those of scan and checkpoint."""
    operands, options = make_call("packed")
    x = cast(operands, jnp.float32)

    def loss(run, x):
        def layer(q, _):
            out = run(q, x["k"], x["v"], **options)
            return q + jnp.pad(out, ((0, 0), (0, 0), (0, 0), (0, q.shape[3] - out.shape[3]))), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x["q"], None, length=2)[0] ** 2)

    got, want = (
        jax.jit(jax.grad(lambda x, run=run: loss(run, x)))(x) for run in (split(2), whole("xla"))
    )
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_the_public_name_takes_local_shards():
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"inside jax\.shard_map"):
        context_attention(q, q, q, axis_name="context", mask=Mask(causal=True))
