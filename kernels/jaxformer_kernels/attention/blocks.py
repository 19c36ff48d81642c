"""The arithmetic both regimes of the `xla` implementation are made of.

Heads are grouped: q is [B, K, G, T, H] with N = K * G, k and v are [B, K, S, H], and a block of
logits is [B, K, G, T', S'] for T' of the queries and S' of the keys.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import dispatch, products
from jaxformer_kernels.attention import dropout as dropout_lib


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when a call is traced: `scale`, `softcap` and the dropout `rate`."""

    scale: float
    softcap: float | None
    rate: float


def wide(dtype):
    """The dtype to compute and accumulate in."""
    return jnp.promote_types(dtype, jnp.float32)


def scores(q, k):
    """Logits of q [B, K, G, T, H] against k [B, K, S, H]: [B, K, G, T, S], in the wide dtype."""
    return _product("rh,sh->rs", _rows(q), k).reshape(*q.shape[:4], k.shape[2])


def mix(p, v):
    """Values v [B, K, S, H] weighed by p [B, K, G, T, S]: [B, K, G, T, H], in the wide dtype."""
    return _product("rs,sh->rh", _rows(p), v).reshape(*p.shape[:4], v.shape[3])


def collect(p, x):
    """Rows x [B, K, G, T, H] summed into the keys by p [B, K, G, T, S]: [B, K, S, H], wide."""
    p, x = _rows(p), _rows(x)
    if dispatch.platform() != "cpu":
        return _product("rs,rh->sh", p, x)
    # XLA on CPU has no fast product that sums over the rows of both: half as fast, and bfloat16
    # slower than float32. So the smaller operand and the result are turned, as arrays of their own.
    turned = lax.optimization_barrier(jnp.swapaxes(x, 2, 3))
    summed = lax.optimization_barrier(_product("hr,rs->hs", turned, p))
    return jnp.swapaxes(summed, 2, 3)


def _rows(x):
    # With more axes than a batched matrix product has, XLA on CPU copies its operands about.
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _product(matrices, a, b):
    return products.by_heads(matrices, a, b, wide(b.dtype))


def cut(x, axis, start, size):
    """`size` elements of `x` along `axis` from `start`; all of it where it broadcasts."""
    if x is None or x.shape[axis] == 1:
        return x
    if isinstance(start, int):
        return lax.slice_in_dim(x, start, start + size, axis=axis)
    return lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def logits(options, q, k, bias, mask, t, s):
    """One block of masked logits, and their slope.

    Args:
        options: scale and softcap are used.
        q, k: [B, K, G, T', H] and [B, K, S', H].
        bias: already cut to this block, five axes that broadcast to it; or None.
        mask: the whole `Mask`.
        t, s: (start, size) of the block's queries and keys.

    Returns:
        logits [B, K, G, T', S'], -inf where hidden; and d logits / d capped input for the softcap,
        None without one.
    """
    x = options.scale * scores(q, k)
    slope = None
    if options.softcap is not None:
        bent = jnp.tanh(x / options.softcap)
        x, slope = options.softcap * bent, 1 - bent * bent
    if bias is not None:
        x = x + bias.astype(x.dtype)
    visible = mask.cut(t, s).visible(t[0] + jnp.arange(t[1]), s[0] + jnp.arange(s[1]))
    if visible is not None:
        x = jnp.where(grouped(visible, *x.shape[1:3]), x, -jnp.inf)
    return x, slope


def grouped(x, K, G):
    """[B, N, T, S] as [B, K, G, T, S]; a broadcasting N stays broadcasting."""
    heads = (1, 1) if x.shape[1] == 1 else (K, G)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def drop(options, seed, p, t_start, s_start):
    """Dropout of a block of probabilities whose corner is at (t_start, s_start)."""
    if seed is None:
        return p
    b, head, t, s = (lax.broadcasted_iota(jnp.int32, p.shape, axis) for axis in (0, 1, 3, 4))
    head = head * p.shape[2] + lax.broadcasted_iota(jnp.int32, p.shape, 2)
    kept = dropout_lib.keep(seed, options.rate, b, head, t + t_start, s + s_start)
    return jnp.where(kept, p / (1 - options.rate), 0.0)


def logit_gradient(options, seed, p, slope, value_gradient, delta, t_start, s_start):
    """Gradient of one block's logits: (with respect to q . k, with respect to the biased logit).

    Args:
        options, seed, t_start, s_start: as in `drop`.
        p: probabilities before dropout.
        slope: as `logits` gave it.
        value_gradient: d out . v, that is, the gradient of the dropped probabilities.
        delta: [B, K, G, T', 1], sum of out * d out over the head dim, less d lse.
    """
    after = p * (drop(options, seed, value_gradient, t_start, s_start) - delta)
    before = after if slope is None else after * slope
    return before * options.scale, after


def delta(out, out_gradient, lse, lse_gradient):
    """[B, K, G, T, 1]: what the softmax's backward pass subtracts in every row."""
    # By rows: with one head a group, XLA on CPU takes ten times as long for the sum of five axes.
    product = _rows(out).astype(lse.dtype) * _rows(out_gradient).astype(lse.dtype)
    dot = jnp.sum(product, axis=-1).reshape(lse.shape)
    # A row that sees nothing has lse -inf, of which a loss may well have a NaN gradient.
    return (dot - jnp.where(lse == -jnp.inf, 0.0, lse_gradient))[..., None]


def sink_gradient(sinks, lse, row_delta):
    """[K, G]: a sink is a key whose value is 0."""
    seen = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    probability = jnp.exp(sinks[..., None] - seen)
    return -jnp.sum(probability * row_delta[..., 0], axis=(0, 3))


def sum_to(x, shape):
    """Sum the axes of `x` that broadcasting had grown from `shape`."""
    axes = tuple(i for i, size in enumerate(shape) if size == 1 and x.shape[i] != 1)
    return jnp.sum(x, axis=axes, keepdims=True)
