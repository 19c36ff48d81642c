"""Attention on NVIDIA GPUs by Mosaic GPU kernels, one set of them for each architecture.

This module is what they share: what a call must look like, the operands in the form the kernels
want, and the custom derivative. Only sm_90 (Hopper) has kernels so far.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer_kernels import _compat, dispatch, hardware
from jaxformer_kernels.attention import schedule
from jaxformer_kernels.attention.blocks import delta as row_delta
from jaxformer_kernels.attention.blocks import sum_to
from jaxformer_kernels.attention.call import FEATURES
from jaxformer_kernels.attention.mosaic_gpu_sm90_blocks import ROWS, choose

_HEAD_DIM = 64
_LENGTH = 8
_LARGEST_HEAD_DIM = 256
_LONGEST_TILE = 128


def _limits(call):
    """What keeps `mosaic_gpu` from doing `call`."""
    yield from hardware.hopper_lacks(call.dtype)
    if max(call.H, call.Hv) > _LARGEST_HEAD_DIM:
        yield f"head dim {max(call.H, call.Hv)} (at most {_LARGEST_HEAD_DIM})"


def mosaic_gpu(q, k, v, bias, sinks, mask, dropout, scale, softcap):
    """Attention by Hopper kernels, memory linear in T and S but for a bias.

    Arguments and results are those of `reference`.
    """
    T, Hv = q.shape[1], v.shape[3]
    rate = 0.0 if dropout is None else dropout.rate
    options = _options(T, k.shape[1], scale, softcap, rate, bias_gradient=bias is not None)
    bias, mask = _mask_array_as_bias(bias, mask, q.dtype)
    seed = None if dropout is None else dropout.seed()
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    q, k, v = (_pad(x) for x in (q, k, v))
    axes = _compat.varying_axes(q)
    out, lse = _compat.vary(_attend(options, q, k, v, bias, sinks, mask, seed), axes)
    return out[:, :T, :, :Hv], lse[:, :, :T]


def gradients(q, k, v, mask, out, lse, out_gradient, scale, softcap):
    """The backward pass of a part of the keys; arguments and results are those of `part`'s."""
    options = _options(q.shape[1], k.shape[1], scale, softcap)
    shapes = [x.shape for x in (q, k, v)]
    q, k, v, out, out_gradient = (_pad(x) for x in (q, k, v, out, out_gradient))
    lse = pad_last(lse, _LENGTH, -jnp.inf)
    residuals = (q, k, v, None, None, mask, None, out, lse)
    found = _backward(options, residuals, (out_gradient, jnp.zeros_like(lse)))
    return tuple(x[:, :T, :, :H] for x, (_, T, _, H) in zip(found, shapes, strict=False))


def _options(T, S, scale, softcap, rate=0.0, bias_gradient=False):
    from jaxformer_kernels.attention import mosaic_gpu_sm90_tiles

    return mosaic_gpu_sm90_tiles.Options(
        T=T,
        S=S,
        scale=scale,
        softcap=softcap,
        rate=rate,
        bias_gradient=bias_gradient,
        interpret=_compat.gpu_interpreter(dispatch.interpreter()),
    )


IMPLEMENTATION = dispatch.Implementation(
    run=mosaic_gpu,
    supports=FEATURES - {"float64"},
    limits=lambda call: tuple(_limits(call)),
    gradients=gradients,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, bias, sinks, mask, seed):
    return _forward(options, q, k, v, bias, sinks, mask, seed)[0]


def _forward(options, q, k, v, bias, sinks, mask, seed):
    from jaxformer_kernels.attention import mosaic_gpu_sm90_forward as sm90

    T, S = options.T, options.S
    blocks = choose("forward", q.shape[3], v.shape[3])
    operands = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks, "seed": seed}
    # Keys of a ragged last block are zeros, which would count in the softmax.
    if is_masked(mask) or S % blocks.columns:
        rows = sm90.GROUPS * ROWS
        operands |= mask_operands("q", mask, T, S, rows, blocks.columns)
    operands["bias"] = _pad_to(bias, sm90.GROUPS * ROWS, blocks.columns, T, S)
    out, lse = sm90.forward(options, blocks, given(operands))
    lse = lse[:, :, : q.shape[1]] * np.float32(np.log(2))
    return (out, lse), (q, k, v, bias, sinks, mask, seed, out, lse)


def _backward(options, residuals, gradients):
    from jaxformer_kernels.attention import mosaic_gpu_sm90_dkv as dkv
    from jaxformer_kernels.attention import mosaic_gpu_sm90_dq as dq
    from jaxformer_kernels.attention.mosaic_gpu_sm90_tiles import LOG2E

    q, k, v, bias, sinks, mask, seed, out, lse = residuals
    out_gradient, lse_gradient = gradients
    axes = _compat.varying_axes(q)
    T, S = options.T, options.S
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    delta = row_delta(heads_first(out), heads_first(out_gradient), lse, lse_gradient)[..., 0]
    seen = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    operands = {"q": q, "k": k, "v": v, "dout": out_gradient, "seed": seed}
    operands["lse"] = pad_last(seen * LOG2E, _LONGEST_TILE, jnp.inf)
    operands["delta"] = pad_last(delta, _LONGEST_TILE)

    def with_mask(prefix, rows, columns):
        by_query = prefix == "q"
        extra = {}
        # Keys that fill up a tile have logits 0, whose probability a low lse makes infinite.
        if is_masked(mask) or (by_query and S % columns):
            extra = mask_operands(prefix, mask, T, S, rows, columns)
        if bias is not None and by_query:
            extra["bias"] = _pad_to(bias, rows, columns, T, S)
        elif bias is not None:
            extra["bias_by_key"] = _pad_to(jnp.swapaxes(bias, 2, 3), rows, columns, S, T)
        return given({**operands, **extra})

    blocks = choose("dq", q.shape[3], v.shape[3])
    dq_operands = with_mask("q", blocks.groups * ROWS, blocks.columns)
    q_gradient = dq.query_gradient(options, blocks, dq_operands)
    blocks = choose("dkv", q.shape[3], v.shape[3])
    dkv_operands = with_mask("kv", blocks.groups * ROWS, blocks.columns)
    k_gradient, v_gradient = dkv.key_value_gradients(options, blocks, dkv_operands)
    dbias = None
    if bias is not None:
        dbias = jnp.zeros_like(bias)
        if options.bias_gradient:
            by_tile = with_mask("q", ROWS, ROWS)
            dbias = dq.bias_gradient(options, by_tile, bias.shape)
            dbias = sum_to(dbias, bias.shape).astype(bias.dtype)
    results = (q_gradient, k_gradient, v_gradient, dbias)
    dsinks = None
    if sinks is not None:
        probability = jnp.exp(sinks[:, None] - seen)
        dsinks = -jnp.sum(probability * delta, axis=(0, 2))
    return (*_compat.vary(results, axes), dsinks, None, None)


_attend.defvjp(_forward, _backward)


def given(operands):
    """The operands that are there."""
    return {name: x for name, x in operands.items() if x is not None}


def is_masked(mask) -> bool:
    """Whether anything is hidden by position or segment."""
    return bool(mask.features)


def mask_operands(prefix, mask, T, S, rows, columns):
    """What a kernel needs of the mask, for tiles of `rows` x `columns`.

    Args:
        prefix: "q" where the rows of a tile are queries, "kv" where they are keys.

    Returns:
        by name: `<prefix>_ranges` int32 [B or 1, tiles of rows, 4]: (first, stop, whole_first,
        whole_stop) of the tiles of columns to visit, and of those of them that nothing is hidden
        in; `<prefix>_low` and `<prefix>_high` int32 [B or 1, rows]: the interval of columns that a
        row sees; q_segments and kv_segments int32 [B or 1, padded T or S] where there are any.
    """
    by_query = prefix == "q"
    code = schedule.classify(mask, T, S, *((rows, columns) if by_query else (columns, rows)))
    low, high = schedule.intervals(mask, T, S, by_query)
    result = {
        f"{prefix}_ranges": schedule.ranges(code if by_query else code.swapaxes(1, 2)),
        f"{prefix}_low": pad_last(low, rows),
        f"{prefix}_high": pad_last(high, rows),
    }
    if mask.q_segment_ids is not None:
        sizes = (rows, columns) if by_query else (columns, rows)
        for name, ids, size in zip(
            ("q_segments", "kv_segments"),
            (mask.q_segment_ids, mask.kv_segment_ids),
            sizes,
            strict=True,
        ):
            result[name] = pad_last(ids.astype(jnp.int32), size)
    return {name: jnp.asarray(x, jnp.int32) for name, x in result.items()}


def pad_last(x, size, value=0):
    """`x` with its last axis padded to a multiple of `size`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)], constant_values=value)


def _pad_to(bias, rows, columns, T, S):
    """A bias with the axes that do not broadcast padded to whole tiles."""
    if bias is None:
        return None
    if bias.shape[2] > 1:
        bias = jnp.swapaxes(pad_last(jnp.swapaxes(bias, 2, 3), rows), 2, 3)
    return pad_last(bias, columns) if bias.shape[3] > 1 else bias


def _pad(x):
    """[B, T, N, H] with lengths and head dims that the tiles of a TMA transfer divide."""
    widths = (0, 0), (0, -x.shape[1] % _LENGTH), (0, 0), (0, -x.shape[3] % _HEAD_DIM)
    return jnp.pad(x, widths)


def _mask_array_as_bias(bias, mask, dtype):
    """The mask without its array, which the bias takes over as -inf."""
    if mask.array is None:
        return bias, mask
    array = mask.array.reshape((1,) * (4 - mask.array.ndim) + mask.array.shape)
    shown = jnp.zeros((), dtype) if bias is None else bias
    return jnp.where(array, shown, -jnp.inf), dataclasses.replace(mask, array=None)
