"""What decode_attention accepts, and how it says what it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxformer_kernels import compiling_for, decode_attention

Q = jnp.ones((2, 1, 4, 8))
K = jnp.ones((2, 5, 2, 8))
LENGTHS = jnp.array([5, 3])
TABLE = jnp.array([[0], [1]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[:, 0]}, ValueError, r"q must be \[B, T, N, H\], got 3 axes"),
        ({"k": K.astype(jnp.bfloat16)}, TypeError, "one floating dtype, got q float32 and k bfl"),
        ({"v": K[:, :4]}, ValueError, "agree in all but the head dim"),
        ({"k": K[..., :7]}, ValueError, "one head dim, got 8 and 7"),
        ({"q": Q[:, :, :3]}, ValueError, "3 query heads must be a multiple of the 2"),
        ({"q": Q[:1]}, ValueError, "page_table="),
        ({"q": Q[:, :0]}, ValueError, "no queries or no keys"),
        ({"lengths": None}, ValueError, r"lengths must be integer \[2\], got NoneType"),
        ({"lengths": LENGTHS[:1]}, ValueError, r"lengths must be integer \[2\], got int32\[1\]"),
        ({"lengths": LENGTHS * 1.0}, ValueError, r"integer \[2\], got float32\[2\]"),
        ({"starts": LENGTHS[:1]}, ValueError, r"starts must be integer \[2\]"),
        ({"page_table": LENGTHS}, ValueError, r"page_table must be integer \[2, max_pages\]"),
        (
            {"page_table": TABLE, "heads_first": True},
            ValueError,
            "heads_first is of contiguous rows",
        ),
        ({"k": K[0], "heads_first": True}, ValueError, r"k must be \[B, K, S, H\], got 3 axes"),
        ({"heads_first": True}, ValueError, "4 query heads must be a multiple of the 5 key-value"),
        ({"window": 4}, ValueError, r"\(left, right\)"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"scale": jnp.ones(())}, TypeError, "scale must be a Python float"),
        ({"sinks": jnp.ones(2)}, ValueError, r"sinks must be floating \[N\] = \[4\]"),
        ({"implementation": "xal"}, ValueError, "did you mean 'xla'"),
    ],
)
def test_a_wrong_argument_is_named_with_its_fix(change, error, message):
    call = {"q": Q, "k": K, "v": K, "lengths": LENGTHS, **change}
    with pytest.raises(error, match=message):
        decode_attention(**call)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_derivative_is_refused_and_attention_named(implementation):
    def loss(q):
        out = decode_attention(q, K, K, LENGTHS, implementation=implementation)
        return jnp.sum(out)

    with pytest.raises(NotImplementedError, match="no derivative; use attention"):
        jax.grad(loss)(Q)
    with pytest.raises(NotImplementedError, match="no derivative"):
        jax.jvp(jax.jit(loss), (Q,), (Q,))
    jax.grad(lambda q: loss(jax.lax.stop_gradient(q)) + jnp.sum(q))(Q)


def test_lengths_of_any_integer_dtype_count_alike():
    want = decode_attention(Q, K, K, LENGTHS)
    for dtype in (np.uint8, np.int64):
        got = decode_attention(Q, K, K, np.array([5, 3], dtype))
        np.testing.assert_array_equal(got, want)


def test_the_window_is_that_of_a_mask_and_its_right_side_changes_nothing():
    want = decode_attention(Q, K, K, LENGTHS, window=(2, 0))
    for right in (None, 7):
        np.testing.assert_array_equal(decode_attention(Q, K, K, LENGTHS, window=(2, right)), want)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "mosaic_gpu"])
def test_a_kernel_that_reads_heads_last_refuses_heads_first(implementation):
    k = jnp.swapaxes(K, 1, 2)
    with pytest.raises(NotImplementedError, match=r"does not support heads_first.*use .*'xla'"):
        decode_attention(Q, k, k, LENGTHS, heads_first=True, implementation=implementation)


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("length", [5, 700])
def test_heads_first_is_the_same_cache_turned(target, length):
    k = jnp.sin(jnp.arange(2 * length * 2 * 8.0)).reshape(2, length, 2, 8)
    lengths = jnp.array([length, 3])
    want = decode_attention(Q, k, k, lengths, implementation="reference")
    turned = jnp.swapaxes(k, 1, 2)
    with compiling_for(target):
        got = decode_attention(Q, turned, turned, lengths, heads_first=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_it_maps_over_an_axis():
    q = jnp.cos(jnp.arange(3 * Q.size)).reshape(3, *Q.shape)
    got = jax.vmap(lambda q: decode_attention(q, K, K, LENGTHS))(q)
    for x, y in zip(q, got, strict=True):
        np.testing.assert_allclose(y, decode_attention(x, K, K, LENGTHS), rtol=1e-6)


def test_every_platform_has_an_implementation():
    for target in ("cpu", "gpu", "tpu"):
        with compiling_for(target):
            jax.eval_shape(decode_attention, Q, K, K, LENGTHS)
            jax.eval_shape(lambda q, k: decode_attention(q, k, k, LENGTHS, page_table=TABLE), Q, K)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("axis", [0, 2])
def test_it_runs_in_shards_of_rows_or_heads(axis, heads_first):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    k = jnp.sin(jnp.arange(2 * 300 * 2 * 8.0)).reshape(2, 300, 2, 8)
    lengths = jnp.array([300, 140])
    heads = P(*("x" if i == axis else None for i in range(4)))
    rows = P("x") if axis == 0 else P()
    cache = P(heads[0], heads[2], None, None) if heads_first else heads
    sharded = jax.shard_map(
        functools.partial(decode_attention, heads_first=heads_first),
        mesh=mesh,
        in_specs=(heads, cache, cache, rows),
        out_specs=heads,
    )
    stored = jnp.swapaxes(k, 1, 2) if heads_first else k
    got = jax.jit(sharded)(Q, stored, stored, lengths)
    np.testing.assert_allclose(got, decode_attention(Q, k, k, lengths), rtol=1e-5, atol=1e-6)
