"""The Hopper kernels in the Mosaic GPU interpreter, races detected, against the reference.

They are compiled for the chip itself by `make aot-h100`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxformer_kernels import Dropout, Mask, attention, compiling_for
from jaxformer_kernels.attention import part
from jaxformer_kernels.attention.mosaic_gpu_sm90_blocks import (
    SHARED_BYTES,
    choose,
    fits,
    heuristic,
    shared_bytes,
)
from jaxformer_kernels.attention.shapes import SHAPES
from tests.kernels.attention.calls import cast, compiled, draw, errors, plain, shape_call
from tests.kernels.interpreters import racing_gpu

in_interpreter = pytest.mark.mosaic_gpu


def hopper(*arguments, **options):
    return attention(*arguments, implementation="mosaic_gpu", **options)


def make_call(B, T, S, N, K, H, Hv=None, bias=None, sinks=False, softcap=None, rate=0, **mask):
    operands = {"q": draw(0, B, T, N, H), "k": draw(1, B, S, K, H), "v": draw(2, B, S, K, Hv or H)}
    if bias:
        operands["bias"] = draw(3, *bias)
    if sinks:
        operands["sinks"] = draw(4, N)
    options = {"mask": Mask(**mask)}
    if softcap:
        options["softcap"] = softcap
    if rate:
        options["dropout"] = Dropout(rate, jax.random.key(3))
    return operands, options


def check(operands, options, dtype=jnp.bfloat16):
    """The parity rule: at most twice the error of the plain computation, with a softcap thrice."""
    operands = cast(operands, dtype)
    reference = functools.partial(attention, implementation="reference")
    want = compiled(reference, options)(cast(operands, jnp.float32))
    want = {name: np.asarray(x) for name, x in want.items()}
    with racing_gpu():
        got = jax.block_until_ready(compiled(hopper, options)(operands))
    assert np.array_equal(np.isinf(want["lse"]), np.isinf(got["lse"]))
    allowed = errors(compiled(plain, options)(operands), want)
    factor = 3 if "softcap" in options else 2
    for name, error in errors(got, want).items():
        assert error <= factor * allowed[name] + 1e-6, f"{name}: {error} > {allowed[name]}"


def packed(seed, B, length):
    return jnp.asarray(np.sort(np.random.RandomState(seed).randint(0, 4, (B, length))), jnp.int32)


def scattered(B, T, S):
    return jnp.asarray(np.random.RandomState(5).rand(B, 1, T, S) < 0.7).at[:, :, :, 0].set(True)


CALLS = {
    "everything_visible": lambda: make_call(1, 128, 192, 2, 2, 64),
    "causal_ragged_grouped": lambda: make_call(1, 200, 200, 2, 1, 64, causal=True),
    "groups_of_heads": lambda: make_call(1, 70, 70, 4, 2, 64, causal=True),
    "window_and_offset": lambda: make_call(
        1, 150, 200, 1, 1, 64, causal=True, window=(70, 0), q_offset=3
    ),
    "window_to_both_sides": lambda: make_call(1, 150, 200, 1, 1, 64, window=(30, 20)),
    "packed_documents": lambda: make_call(
        2,
        150,
        150,
        1,
        1,
        64,
        causal=True,
        q_segment_ids=packed(0, 2, 150),
        kv_segment_ids=packed(0, 2, 150),
    ),
    "softcap_sinks_key_range_odd_head_dim": lambda: make_call(
        1, 70, 90, 2, 1, 40, softcap=5.0, sinks=True, kv_start=jnp.array([3]), kv_end=80
    ),
    "traced_offset_and_rows_that_see_nothing": lambda: make_call(
        2, 70, 90, 1, 1, 64, sinks=True, causal=True, q_offset=jnp.array([-5, 20])
    ),
    "bias_by_head_other_value_dim": lambda: make_call(2, 70, 90, 2, 1, 64, 32, bias=(1, 2, 70, 90)),
    "bias_by_batch_and_mask_array": lambda: make_call(
        2, 70, 90, 2, 1, 64, bias=(2, 1, 70, 90), array=scattered(2, 70, 90)
    ),
    "mask_array_alone": lambda: make_call(1, 70, 90, 2, 1, 64, array=scattered(1, 70, 90)),
    "bias_by_key": lambda: make_call(2, 70, 90, 2, 1, 64, bias=(2, 1, 1, 90)),
    "bias_by_query": lambda: make_call(1, 70, 90, 2, 1, 64, bias=(1, 1, 70, 1)),
    "bias_of_one_number_a_head": lambda: make_call(1, 70, 90, 2, 1, 64, bias=(1, 2, 1, 1)),
    "head_dim_128": lambda: make_call(1, 128, 192, 2, 1, 128, causal=True, q_offset=64),
    "head_dim_256": lambda: make_call(1, 100, 64, 1, 1, 256, causal=True, softcap=20.0),
    "one_query_seven_keys": lambda: make_call(2, 1, 7, 2, 1, 64),
}


@in_interpreter
@pytest.mark.parametrize("name", CALLS)
def test_a_call_errs_at_most_twice_as_much_as_plain_bfloat16(name):
    check(*CALLS[name]())


@in_interpreter
def test_float16_errs_at_most_twice_as_much_as_plain_float16():
    check(*CALLS["causal_ragged_grouped"](), dtype=jnp.float16)


@in_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_errs_at_most_twice_as_much_as_plain_bfloat16(name):
    check(*shape_call(SHAPES[name].scaled(length=140, heads=2, head_dim=64)))


@in_interpreter
def test_gradients_through_parts_of_the_keys_add_up_to_the_whole_ones():
    """Given the whole row's output and log-sum-exp, as in ring attention; lengths are ragged."""
    operands, options = CALLS["softcap_sinks_key_range_odd_head_dim"]()
    q, k, v, sinks = cast(operands, jnp.bfloat16).values()
    mask = Mask(q_segment_ids=packed(0, 1, 70), kv_segment_ids=packed(1, 1, 90))
    options = {**options, "mask": mask}

    def found(run, dtype):
        def outputs(q, k, v):
            return run(q, k, v, sinks=sinks, **options, return_lse=True)

        out, pull, lse = jax.vjp(outputs, *(x.astype(dtype) for x in (q, k, v)), has_aux=True)
        return out, lse, dict(zip(("dq", "dk", "dv"), pull(jnp.cos(out)), strict=True))

    out, lse, want = found(functools.partial(attention, implementation="reference"), jnp.float32)
    with racing_gpu():
        parts = [
            part.gradients(
                q,
                k[:, keys],
                v[:, keys],
                out.astype(q.dtype),
                lse,
                jnp.cos(out).astype(q.dtype),
                mask=mask.cut((0, 70), (keys.start, keys.stop - keys.start)),
                softcap=options["softcap"],
                scale=q.shape[3] ** -0.5,
                implementation="mosaic_gpu",
            )
            for keys in (slice(0, 50), slice(50, 90))
        ]
        (dq, dk, dv), (dq_more, *more) = jax.block_until_ready(parts)
    got = {"dq": dq.astype(jnp.float32) + dq_more}
    got["dk"], got["dv"] = (jnp.concatenate(x, axis=1) for x in zip((dk, dv), more, strict=True))
    want = {name: np.asarray(x) for name, x in want.items()}
    for name, allowed in errors(found(plain, jnp.bfloat16)[2], want).items():
        assert errors(got, want)[name] <= 3 * allowed + 1e-6, name


@in_interpreter
@pytest.mark.parametrize("grouped", [False, True])
def test_dropout_drops_what_the_reference_drops(grouped):
    operands, options = make_call(2, 70, 90, 2, 1 if grouped else 2, 64, rate=0.3, causal=True)
    operands = cast(operands, jnp.bfloat16)
    want = compiled(functools.partial(attention, implementation="reference"), options)(
        cast(operands, jnp.float32)
    )
    with racing_gpu():
        got = jax.block_until_ready(compiled(hopper, options)(operands))
    for name, x in want.items():
        # One probability dropped for another is an error of the size of the values themselves.
        np.testing.assert_allclose(
            np.asarray(got[name], np.float32), x, rtol=0.02, atol=0.02, err_msg=name
        )


@in_interpreter
@pytest.mark.parametrize("sink", [-200.0, 200.0])
def test_a_sink_far_from_every_logit_neither_overflows_nor_counts_twice(sink):
    operands, options = make_call(1, 64, 64, 1, 1, 64)
    operands = cast({**operands, "sinks": np.array([sink])}, jnp.bfloat16)
    run = functools.partial(attention, implementation="reference")
    want, want_lse = run(**cast(operands, jnp.float32), **options, return_lse=True)
    with racing_gpu():
        got, lse = jax.block_until_ready(
            jax.jit(lambda operands: hopper(**operands, **options, return_lse=True))(operands)
        )
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.02)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)


@in_interpreter
def test_keys_that_fill_up_the_last_tile_weigh_nothing_where_all_logits_are_low():
    """Their logits are 0: against a log-sum-exp of -300 that would be infinite in the gradient."""
    operands, options = make_call(1, 70, 90, 1, 1, 64)
    operands = cast({**operands, "bias": np.full((1, 1, 1, 90), -300.0)}, jnp.bfloat16)
    reference = functools.partial(attention, implementation="reference")
    want = compiled(reference, options)(cast(operands, jnp.float32))
    with racing_gpu():
        got = jax.block_until_ready(compiled(hopper, options)(operands))
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_allclose(
            np.asarray(got[name], np.float32), want[name], rtol=0.02, atol=0.02, err_msg=name
        )


@in_interpreter
def test_a_rerun_is_bitwise_equal():
    operands, options = make_call(1, 130, 70, 2, 1, 64, bias=(1, 1, 130, 70), sinks=True, rate=0.2)
    operands = cast(operands, jnp.bfloat16)
    with racing_gpu():
        run = compiled(hopper, options)
        first, second = jax.block_until_ready((run(operands), run(operands)))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@in_interpreter
def test_rows_that_see_nothing_give_nothing_and_get_no_gradient():
    operands, options = make_call(2, 70, 90, 2, 1, 64, sinks=True, kv_end=jnp.array([0, 50]))
    with racing_gpu():
        got = jax.block_until_ready(compiled(hopper, options)(cast(operands, jnp.bfloat16)))
    assert not np.any(got["out"][0]) and np.all(got["lse"][0] == -np.inf)
    for name in ("dq", "dk", "dv"):
        assert not np.any(got[name][0]), name
        assert np.all(np.isfinite(np.asarray(got[name], np.float32))), name
    assert not np.any(got["dk"][1, 50:]) and not np.any(got["dv"][1, 50:])
    assert np.all(np.isfinite(got["dsinks"]))


@in_interpreter
def test_one_document_of_a_packed_row_never_touches_another_bitwise():
    operands, _ = make_call(1, 130, 130, 1, 1, 64)
    q, k, v = cast(operands, jnp.bfloat16).values()
    ids = jnp.where(jnp.arange(130) < 70, 1, 2)[None]
    mask = Mask(causal=True, q_segment_ids=ids, kv_segment_ids=ids)
    first = (ids == 1)[:, :, None, None]

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: hopper(q, k, v, mask=mask), q, k, v)
        return out, *pull(jnp.cos(q))

    with racing_gpu():
        before = run(q, k, v)
        after = run(*(jnp.where(first, 3 * x + 1, x) for x in (q, k, v)))
        jax.block_until_ready((before, after))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(jnp.where(first, 0, x), jnp.where(first, 0, y))
        assert np.any(jnp.where(first, x != y, False))


@in_interpreter
def test_vmap_is_a_loop_over_the_axis():
    operands, options = make_call(2, 70, 70, 1, 1, 64, causal=True)
    q, k, v = (x[:, None] for x in cast(operands, jnp.bfloat16).values())
    with racing_gpu():
        run = functools.partial(hopper, **options)
        got = jax.jit(jax.vmap(run))(q, k, v)
        want = jax.jit(run)(q[:, 0], k[:, 0], v[:, 0])
        jax.block_until_ready((got, want))
    np.testing.assert_array_equal(got[:, 0], want)


@in_interpreter
def test_gradients_of_replicated_operands_come_out_of_shard_map():
    """On one device: the interpreter cannot tell two devices' barriers apart."""
    operands, options = make_call(1, 70, 70, 2, 1, 64, sinks=True, causal=True)
    operands = cast(operands, jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: P() if name == "sinks" else P("data") for name in operands}

    def gradients(run):
        def loss(operands):
            return jnp.sum(run(operands).astype(jnp.float32) * jnp.cos(jnp.arange(64)))

        return jax.jit(jax.grad(loss))(operands)

    def run(operands):
        return hopper(**operands, **options)

    with racing_gpu():
        want = gradients(run)
        sharded = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=P("data"))
        got = jax.block_until_ready(gradients(sharded))
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def lowered(T, S, H, **options):
    q = jax.ShapeDtypeStruct((1, T, 4, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, S, 2, H), jnp.bfloat16)

    def loss(q, k, v):
        return hopper(q, k, v, **options).astype(jnp.float32).sum()

    with compiling_for("gpu"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize(("T", "S"), [(1000, 1000), (1, 7)])
def test_forward_and_backward_lower_for_a_gpu_at_any_length(T, S, H):
    text = lowered(T, S, H, mask=Mask(causal=True, q_offset=S - T), softcap=20.0)
    kernels = ["attention_forward", "attention_dq"]
    kernels += ["attention_dk", "attention_dv"] if H == 256 else ["attention_dk_dv"]
    for name in kernels:
        assert name in text


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_blocks_fit_the_chip_for_every_pair_of_head_dims(kernel):
    for H in (64, 128, 192, 256):
        for Hv in (64, 128, 192, 256):
            assert fits(kernel, heuristic(kernel, H, Hv), H, Hv)
            assert shared_bytes(kernel, choose(kernel, H, Hv), H, Hv) <= SHARED_BYTES


def test_what_the_kernels_cannot_do_is_refused_with_the_reason():
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="the cpu platform"):
        hopper(x, x, x)
    with compiling_for("gpu"):
        with pytest.raises(NotImplementedError, match="float32"):
            hopper(*(x.astype(jnp.float32),) * 3)
        wide = jnp.zeros((1, 8, 1, 320), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match="head dim 320"):
            hopper(wide, wide, wide)
