"""Attention for short sequences: the whole softmax row at once, probabilities kept for backward.

On a CPU this is about as fast as XLA can do it: heads before positions, so that every product is a
plain batched matrix product; probabilities normalised before the product with v, so that the
backward pass reads one array; and, where the mask is causal or a window by itself, a few groups of
queries each of which meets only the keys it may see.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer_kernels.attention import blocks
from jaxformer_kernels.attention.blocks import collect, mix, scores

# Groups of queries: two, and up to four where each still has many rows. XLA on a CPU computes a
# small product on one core, and those of several groups at once.
_GROUPS = 2, 4
_MANY_ROWS = 128
_MIN_ROWS = 32
_WORTHWHILE = 0.8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(options, q, k, v, bias, sinks, mask, seed):
    """Attention over grouped heads.

    Args:
        options: `blocks.Options`.
        q: [B, K, G, T, H].
        k, v: [B, K, S, H] and [B, K, S, Hv].
        bias: five axes that broadcast to [B, K, G, T, S], or None.
        sinks: [K, G] in the wide dtype, or None.
        mask: `Mask`, its array of four axes.
        seed: uint32[2], or None without dropout.

    Returns:
        out [B, K, G, T, Hv] in q's dtype, lse [B, K, G, T] wide.
    """
    return _forward(options, q, k, v, bias, sinks, mask, seed)[0]


def _forward(options, q, k, v, bias, sinks, mask, seed):
    outs, lses, saved = [], [], []
    for t, s in _groups(q.shape[3], k.shape[2], mask):
        qb, kb, vb, bias_block = _cut_operands(q, k, v, bias, t, s)
        x, slope = blocks.logits(options, qb, kb, bias_block, mask, t, s)
        top = jnp.max(x, axis=-1, keepdims=True)
        sees = top != -jnp.inf
        # The barriers keep XLA from working out these row values again for every key.
        top = lax.optimization_barrier(jnp.where(sees, top, 0.0))
        if sinks is not None:
            top = jnp.maximum(top, sinks[..., None, None])
        weights = jnp.exp(x - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sinks[..., None, None] - top)
        inverse = lax.optimization_barrier(jnp.where(sees, 1 / total, 0.0))
        p = weights * inverse
        dropped = blocks.drop(options, seed, p, t[0], s[0])
        outs.append(mix(dropped.astype(vb.dtype), vb).astype(q.dtype))
        lses.append(jnp.where(sees, top + jnp.log(total), -jnp.inf)[..., 0])
        saved.append((p.astype(q.dtype), None if slope is None else slope.astype(q.dtype)))
    out, lse = _join(outs), _join(lses)
    return (out, lse), (q, k, v, bias, sinks, mask, seed, out, lse, saved)


def _backward(options, residuals, gradients):
    q, k, v, bias, sinks, mask, seed, out, lse, saved = residuals
    out_gradient, lse_gradient = gradients
    delta = lax.optimization_barrier(blocks.delta(out, out_gradient, lse, lse_gradient))
    T, S = q.shape[3], k.shape[2]
    zero = jnp.zeros((), delta.dtype)
    dqs, dk, dv, dbias = [], zero, zero, zero
    for (t, s), (p, slope) in zip(_groups(T, S, mask), saved, strict=True):
        qb, kb, vb, bias_block = _cut_operands(q, k, v, bias, t, s)
        dout, row_delta = (blocks.cut(x, 3, *t) for x in (out_gradient, delta))
        p = p.astype(delta.dtype)
        value_gradient = scores(dout, vb)
        before, after = blocks.logit_gradient(
            options, seed, p, slope, value_gradient, row_delta, t[0], s[0]
        )
        before = before.astype(q.dtype)
        dropped = blocks.drop(options, seed, p, t[0], s[0]).astype(q.dtype)
        dqs.append(mix(before, kb))
        dk = dk + _place(collect(before, qb), 2, s[0], S)
        dv = dv + _place(collect(dropped, dout), 2, s[0], S)
        if bias is not None:
            block = blocks.sum_to(after, bias_block.shape)
            block = block if bias.shape[3] == 1 else _place(block, 3, t[0], T)
            dbias = dbias + (block if bias.shape[4] == 1 else _place(block, 4, s[0], S))
    return (
        _join(dqs).astype(q.dtype),
        dk.astype(k.dtype),
        dv.astype(v.dtype),
        None if bias is None else dbias.astype(bias.dtype),
        None if sinks is None else blocks.sink_gradient(sinks, lse, delta),
        None,
        None,
    )


attend.defvjp(_forward, _backward)


def _groups(T, S, mask):
    """[((first query, how many), (first key, how many))], leaving out keys hidden from them all."""
    everything = [((0, T), (0, S))]
    few, many = (-(-T // groups) for groups in _GROUPS)
    rows = max(_MIN_ROWS, min(few, _MANY_ROWS), many)
    left, right = mask.bounds
    if not isinstance(mask.q_offset, int) or rows >= T or (left is None and right is None):
        return everything
    groups, area = [], 0
    for first in range(0, T, rows):
        last = min(first + rows, T) - 1
        start = 0 if left is None else min(max(first + mask.q_offset - left, 0), S - 1)
        stop = S if right is None else min(max(last + mask.q_offset + right + 1, start + 1), S)
        groups.append(((first, last + 1 - first), (start, stop - start)))
        area += (last + 1 - first) * (stop - start)
    return groups if area <= _WORTHWHILE * T * S else everything


def _cut_operands(q, k, v, bias, t, s):
    bias = blocks.cut(blocks.cut(bias, 3, *t), 4, *s)
    return blocks.cut(q, 3, *t), blocks.cut(k, 2, *s), blocks.cut(v, 2, *s), bias


def _join(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)


def _place(x, axis, start, size):
    """`x` within zeros, so that along `axis` it begins at `start` and has `size` elements."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (start, size - start - x.shape[axis])
    return jnp.pad(x, widths)
