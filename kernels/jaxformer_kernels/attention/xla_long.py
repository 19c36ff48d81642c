"""Attention for long sequences: blocks of queries against blocks of keys, nothing [T, S] in memory.

The forward pass is the online softmax of FlashAttention (Dao et al. 2022, arXiv:2205.14135;
Rabe and Staats 2021, arXiv:2112.05682): a scan over blocks of queries, each of which loops over the
blocks of keys it may see. The backward pass recomputes the probabilities from the log-sum-exp: a
scan over blocks of keys, each of which loops over the blocks of queries that may see it and adds
to their gradient. Blocks hidden by the mask at either end of a loop are not visited.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.attention import blocks, schedule
from jaxformer_kernels.attention.blocks import collect, mix, scores

# At most so many queries and keys are in a block: the larger sizes on a CPU. There jax 0.10's XLA
# computes a product whose matrices are no larger than 256 x 256 on one core, however many they are;
# jax 0.12's divides them, and gains a little from larger blocks still.
ROWS = COLUMNS = 512
_SMALLER = 256
_FEW_LOGITS = 8 * 512 * 512
_MANY_BLOCKS = 4


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(options, q, k, v, bias, sinks, mask, seed):
    """Attention over grouped heads; arguments and results are those of `xla_short.attend`."""
    return _forward(options, q, k, v, bias, sinks, mask, seed)[0]


def _forward(options, q, k, v, bias, sinks, mask, seed):
    T = q.shape[3]
    qs, ks, vs, padded_bias, padded_mask = _blocked(q, k, v, bias, mask)
    first, stop = _visits(_possible(mask, q, k))
    wide = blocks.wide(q.dtype)
    rows, columns = _sizes(q, k)

    def query_block(_, inputs):
        i, qb = inputs
        t = (i * rows, rows)

        def key_block(j, state):
            top, total, acc = state
            s = (j * columns, columns)
            kb, vb = _at(ks, j), _at(vs, j)
            bias_block = blocks.cut(blocks.cut(padded_bias, 3, *t), 4, *s)
            x, _ = blocks.logits(options, qb, kb, bias_block, padded_mask, t, s)
            new_top = jnp.maximum(top, jnp.max(x, axis=-1, keepdims=True))
            finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            weights = jnp.exp(x - finite)
            shrink = jnp.exp(top - finite)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            dropped = blocks.drop(options, seed, weights, t[0], s[0]).astype(vb.dtype)
            return new_top, total, acc * shrink + mix(dropped, vb)

        shape = qb.shape[:-1]
        start = (
            jnp.full((*shape, 1), -jnp.inf, wide),
            jnp.zeros((*shape, 1), wide),
            jnp.zeros((*shape, v.shape[-1]), wide),
        )
        start = _compat.vary(start, _compat.varying_axes(q))
        top, total, acc = lax.fori_loop(first[i], stop[i], key_block, start)
        sees = top != -jnp.inf
        if sinks is not None:
            with_sink = jnp.maximum(top, sinks[..., None, None])
            shrink = jnp.exp(top - with_sink)
            total = total * shrink + jnp.exp(sinks[..., None, None] - with_sink)
            acc, top = acc * shrink, with_sink
        out = acc * jnp.where(sees, 1 / total, 0.0)
        lse = jnp.where(sees, top + jnp.log(total), -jnp.inf)
        return None, (out.astype(q.dtype), lse)

    _, (out, lse) = lax.scan(query_block, None, (jnp.arange(len(qs)), qs))
    out, lse = _whole(out, 3)[:, :, :, :T], _whole(lse, 3)[:, :, :, :T, 0]
    return (out, lse), (q, k, v, bias, sinks, mask, seed, out, lse)


def backward(options, residuals, gradients):
    """Gradients of every operand of `attend`, from its residuals and those of its results."""
    q, k, v, bias, sinks, mask, seed, out, lse = residuals
    out_gradient, lse_gradient = gradients
    T, S = q.shape[3], k.shape[2]
    rows, columns = _sizes(q, k)
    wide = lse.dtype
    delta = blocks.delta(out, out_gradient, lse, lse_gradient)
    qs, ks, vs, padded_bias, padded_mask = _blocked(q, k, v, bias, mask)
    douts, deltas = _split(out_gradient, 3, rows), _split(delta, 3, rows)
    # exp(x - inf) is 0 for every finite x: rows that see nothing have no probabilities.
    lses = _split(jnp.where(lse == -jnp.inf, jnp.inf, lse)[..., None], 3, rows)
    first, stop = _visits(_possible(mask, q, k).T)

    def key_block(state, inputs):
        j, kb, vb = inputs
        s = (j * columns, columns)

        def query_block(i, state):
            dqs, dbias, dk, dv = state
            t = (i * rows, rows)
            qb, dout = _at(qs, i), _at(douts, i)
            bias_block = blocks.cut(blocks.cut(padded_bias, 3, *t), 4, *s)
            x, slope = blocks.logits(options, qb, kb, bias_block, padded_mask, t, s)
            p = jnp.exp(x - _at(lses, i))
            value_gradient = scores(dout, vb)
            before, after = blocks.logit_gradient(
                options, seed, p, slope, value_gradient, _at(deltas, i), t[0], s[0]
            )
            dropped = blocks.drop(options, seed, p, t[0], s[0]).astype(q.dtype)
            before = before.astype(q.dtype)
            dv = dv + collect(dropped, dout)
            dk = dk + collect(before, qb)
            dqs = _add_at(dqs, i, mix(before, kb))
            if bias is not None:
                at_t = 0 if bias.shape[3] == 1 else t[0]
                at_s = 0 if bias.shape[4] == 1 else s[0]
                corner = (0, 0, 0, at_t, at_s)
                block = blocks.sum_to(after, bias_block.shape)
                block = block + lax.dynamic_slice(dbias, corner, block.shape)
                dbias = lax.dynamic_update_slice(dbias, block, corner)
            return dqs, dbias, dk, dv

        zeros = jnp.zeros(kb.shape, wide), jnp.zeros(vb.shape, wide)
        zeros = _compat.vary(zeros, _compat.varying_axes(q))
        dqs, dbias, dk, dv = lax.fori_loop(first[j], stop[j], query_block, (*state, *zeros))
        return (dqs, dbias), (dk.astype(k.dtype), dv.astype(v.dtype))

    start = (
        jnp.zeros(qs.shape, wide),
        None if bias is None else jnp.zeros(padded_bias.shape, wide),
    )
    start = _compat.vary(start, _compat.varying_axes(q))
    (dqs, dbias), (dks, dvs) = lax.scan(key_block, start, (jnp.arange(len(ks)), ks, vs))
    if bias is not None:
        dbias = dbias[:, :, :, : bias.shape[3], : bias.shape[4]].astype(bias.dtype)
    return (
        _whole(dqs, 3)[:, :, :, :T].astype(q.dtype),
        _whole(dks, 2)[:, :, :S],
        _whole(dvs, 2)[:, :, :S],
        dbias,
        None if sinks is None else blocks.sink_gradient(sinks, lse, delta),
        None,
        None,
    )


attend.defvjp(_forward, backward)


def _sizes(q, k):
    """(queries, keys) in a block: as equal as the lengths allow, so that little is padded."""
    T, S = q.shape[3], k.shape[2]
    rows, columns = ROWS, COLUMNS
    on_cpu = dispatch.platform() == "cpu"
    few = math.prod(q.shape[:3]) * rows * columns <= _FEW_LOGITS
    # The logits of many heads leave the caches, and of few large blocks a mask hides none. Narrow
    # products are fast enough on one core.
    if not on_cpu or not few or _MANY_BLOCKS * columns > S:
        columns = min(columns, _SMALLER)
    if not on_cpu or not (few or q.dtype.itemsize >= 4):
        rows = min(rows, _SMALLER)
    return _equal(T, rows), _equal(S, columns)


def _equal(length, most):
    """The size of the fewest equal parts of `length` that have at most `most` each."""
    return -(-length // -(-length // most))


def _blocked(q, k, v, bias, mask):
    """The operands padded to whole blocks; q, k and v with the blocks as their first axis."""
    T, S = q.shape[3], k.shape[2]
    rows, columns = _sizes(q, k)
    bias = _pad(_pad(bias, 3, rows, T), 4, columns, S)
    qs, ks, vs = _split(q, 3, rows), _split(k, 2, columns), _split(v, 2, columns)
    return qs, ks, vs, bias, mask.pad(-T % rows, -S % columns, S)


def _split(x, axis, size):
    """[..., n, ...] as [n / size, ..., size, ...], padded with zeros."""
    x = _pad(x, axis, size, x.shape[axis])
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _whole(x, axis):
    """The inverse of `_split`, padding included."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _pad(x, axis, size, full):
    """Zeros to a multiple of `size`, unless `x` broadcasts along this axis of length `full`."""
    if x is None or full % size == 0 or x.shape[axis] != full:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -full % size)
    return jnp.pad(x, widths)


def _at(x, i):
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _add_at(x, i, addend):
    return lax.dynamic_update_index_in_dim(x, _at(x, i) + addend, i, 0)


def _possible(mask, q, k):
    """Table [blocks of queries, blocks of keys]: False where no row of the batch sees anything.

    A numpy array where the mask's static fields settle it.
    """
    code = schedule.classify(mask, q.shape[3], k.shape[2], *_sizes(q, k))
    return (code != schedule.EMPTY).any(axis=0)


def _visits(possible):
    """[first, stop) of the columns of `possible` to visit in each row."""
    first = possible.argmax(axis=1)
    stop = possible.shape[1] - possible[:, ::-1].argmax(axis=1)
    anything = possible.any(axis=1)
    return jnp.asarray(first * anything), jnp.asarray(stop * anything)
