"""Attention under JAX's transformations, and what it costs in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxformer_kernels import Dropout, Mask, attention
from jaxformer_kernels.attention import xla_long

B, T, N, K, H = 4, 8, 4, 2, 8


def operands(B=B, T=T, S=T):
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "q": jax.random.normal(keys[0], (B, T, N, H)),
        "k": jax.random.normal(keys[1], (B, S, K, H)),
        "v": jax.random.normal(keys[2], (B, S, K, H)),
        "bias": jax.random.normal(keys[3], (1, N, T, S)),
        "sinks": jax.random.normal(keys[4], (N,)),
    }


def loss(run, operands, mask):
    out, lse = run(**operands, mask=mask, return_lse=True)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) ** 2)


def gradient(run):
    return jax.jit(jax.grad(functools.partial(loss, run)))


def assert_close(got, want):
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture
def mask():
    ids = jnp.array([[1] * 5 + [2] * 3, [1] * 8, [1, 2, 3, 4, 4, 4, 0, 0], [1] * 2 + [3] * 6])
    offset = jnp.array([0, -2, 1, 0])
    return Mask(causal=True, q_offset=offset, q_segment_ids=ids, kv_segment_ids=ids)


def test_vmap_is_a_loop(fast_implementation, mask):
    x = operands()
    per_row = {
        "q": x["q"][:, None],
        "k": x["k"][:, None],
        "v": x["v"][:, None],
        "bias": jnp.stack([x["bias"] + i for i in range(B)]),
        "sinks": jnp.stack([x["sinks"] * i for i in range(B)]),
    }
    masks = jax.tree.map(lambda leaf: leaf[:, None], mask)
    grad = gradient(fast_implementation)
    mapped = jax.vmap(grad)(per_row, masks)
    for i in range(B):
        row = grad(*jax.tree.map(lambda leaf, i=i: leaf[i], (per_row, masks)))
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), row)


def test_remat_and_scan_change_nothing(fast_implementation, mask):
    x = operands()

    def twice(layer, x):
        for _ in range(2):
            x = {**x, "q": layer(x, mask)}
        return jnp.sum(x["q"] ** 2)

    def scanned(x):
        def body(q, _):
            return jax.checkpoint(layer)({**x, "q": q}, mask), None

        return jnp.sum(jax.lax.scan(body, x["q"], None, length=2)[0] ** 2)

    def layer(x, mask):
        return x["q"] + fast_implementation(**x, mask=mask)

    want = jax.jit(jax.grad(lambda x: twice(layer, x)))(x)
    assert_close(jax.jit(jax.grad(scanned))(x), want)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_batch_and_heads_is_the_whole(fast_implementation, mask, check_vma):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads = P("data", None, "tensor", None)
    specs = {
        "q": heads,
        "k": heads,
        "v": heads,
        "bias": P(None, "tensor"),
        "sinks": P("tensor"),
    }
    masks = jax.tree.map(lambda _: P("data"), mask)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs, masks), out_specs=P(), check_vma=check_vma
    )
    def sharded(operands, mask):
        total = loss(fast_implementation, operands, mask)
        return jax.lax.psum(total, ("data", "tensor"))

    x = operands()
    got = jax.jit(jax.grad(sharded))(x, mask)
    assert_close(got, gradient(fast_implementation)(x, mask))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_replicated_keys_under_shard_map_get_the_sum_of_their_gradients(fast_implementation):
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    rows = P(None, "context")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, P(), P()), out_specs=rows)
    def sharded(q, k, v):
        offset = jax.lax.axis_index("context") * q.shape[1]
        mask = Mask(causal=True, q_offset=offset)
        return fast_implementation(q, k, v, mask=mask)

    q, k, v, *_ = operands().values()
    whole = functools.partial(fast_implementation, mask=Mask(causal=True))
    got, want = (
        jax.jit(jax.grad(lambda *x, run=run: jnp.sum(jnp.sin(run(*x))), argnums=(0, 1, 2)))(q, k, v)
        for run in (sharded, whole)
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_partial_results_merge_by_their_log_sum_exp_with_right_gradients(fast_implementation):
    """Half the keys at a time, as in ring attention: right only if the lse cotangent is used."""
    q, k, v, *_ = operands().values()

    def merged(q, k, v):
        halves = [
            fast_implementation(q, k[:, part], v[:, part], mask=mask, return_lse=True)
            for part, mask in (
                (slice(0, 4), Mask(causal=True)),
                (slice(4, 8), Mask(causal=True, q_offset=-4)),
            )
        ]
        outs, lses = zip(*halves, strict=True)
        share = jax.nn.softmax(jnp.stack(lses), axis=0)
        return sum(o * jnp.swapaxes(w, 1, 2)[..., None] for o, w in zip(outs, share, strict=True))

    whole = functools.partial(attention, mask=Mask(causal=True), implementation="reference")
    got, want = (
        jax.jit(jax.grad(lambda *x, run=run: jnp.sum(jnp.sin(run(*x))), argnums=(0, 1, 2)))(q, k, v)
        for run in (merged, whole)
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_decoding_token_by_token_is_the_whole_sequence(fast_implementation):
    q, k, v, *_ = operands().values()
    traced = []

    @jax.jit
    def step(q, k, v, position):
        traced.append(position)
        mask = Mask(causal=True, q_offset=position, kv_end=position + 1)
        return fast_implementation(q, k, v, mask=mask)

    steps = [step(q[:, t : t + 1], k, v, jnp.int32(t)) for t in range(T)]
    assert len(traced) == 1, "one program serves every position"
    want = fast_implementation(q, k, v, mask=Mask(causal=True))
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), want, rtol=1e-5, atol=1e-5)


def temporary_bytes(T, **options):
    def both_passes(q, k, v, weight):
        out, pull = jax.vjp(lambda *x: attention(*x, implementation="xla", **options), q, k, v)
        return out, pull(weight)

    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    compiled = jax.jit(both_passes).lower(x, x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("with_dropout", [False, True])
def test_memory_of_long_sequences_grows_with_the_length_not_its_square(with_dropout):
    options = {"mask": Mask(causal=True)}
    if with_dropout:
        options["dropout"] = Dropout(0.1, jax.random.key(0))
    short, long = temporary_bytes(2048, **options), temporary_bytes(8192, **options)
    assert long < 4.2 * short
    assert long < 8192 * 8192 * 4 / 4


@pytest.mark.parametrize(
    ("mask", "fewer"),
    [
        (Mask(causal=True), [(0, 1), (0, 2), (0, 3), (0, 4)]),
        (Mask(causal=True, q_offset=8), [(0, 3), (0, 4), (0, 4), (0, 4)]),
        (Mask(window=(4, 0)), [(0, 1), (0, 2), (1, 3), (2, 4)]),
        (Mask(kv_start=4, kv_end=9), [(1, 3)] * 4),
        (Mask(kv_end=0), [(0, 0)] * 4),
        (Mask(causal=True, q_offset=jnp.array(4)), [(0, 2), (0, 3), (0, 4), (0, 4)]),
        (
            Mask(
                q_segment_ids=jnp.repeat(jnp.arange(4), 4)[None],
                kv_segment_ids=jnp.repeat(jnp.arange(4), 4)[None],
            ),
            [(0, 1), (1, 2), (2, 3), (3, 4)],
        ),
    ],
)
def test_blocks_that_nobody_sees_are_not_visited(monkeypatch, mask, fewer):
    monkeypatch.setattr(xla_long, "ROWS", 4)
    monkeypatch.setattr(xla_long, "COLUMNS", 4)
    q, k = jnp.zeros((1, 1, 1, 16, 2)), jnp.zeros((1, 1, 16, 2))
    first, stop = xla_long._visits(xla_long._possible(mask, q, k))
    assert list(zip(first.tolist(), stop.tolist(), strict=True)) == fewer
