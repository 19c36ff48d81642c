"""Attention for TPU: Pallas kernels that Mosaic compiles."""

import functools

import jax
import jax.numpy as jnp

from jaxformer_kernels import dispatch, hardware
from jaxformer_kernels.attention import (
    mosaic_tpu_backward,
    mosaic_tpu_bias,
    mosaic_tpu_forward,
    mosaic_tpu_tiles,
)
from jaxformer_kernels.attention.call import FEATURES


def mosaic_tpu(q, k, v, bias, sinks, mask, dropout, scale, softcap):
    """Attention by fused kernels; arguments and results are those of `reference`."""
    options = mosaic_tpu_tiles.Options(
        scale, softcap, 0.0 if dropout is None else dropout.rate, dispatch.interpreter()
    )
    seed = None if dropout is None else dropout.seed()
    return _attend(options, q, k, v, bias, sinks, mask, seed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, bias, sinks, mask, seed):
    return mosaic_tpu_forward.run(options, q, k, v, bias, sinks, mask, seed)


def _forward(options, q, k, v, bias, sinks, mask, seed):
    out, lse = mosaic_tpu_forward.run(options, q, k, v, bias, sinks, mask, seed)
    return (out, lse), (q, k, v, bias, sinks, mask, seed, out, lse)


def _backward(options, residuals, gradients):
    q, k, v, bias, sinks, mask, seed, out, lse = residuals
    lse_gradient = gradients[1]
    # A row that sees nothing has lse -inf, of which a loss may well have a NaN gradient.
    sees = lse != -jnp.inf
    out, out_gradient = (x.swapaxes(1, 2).astype(jnp.float32) for x in (out, gradients[0]))
    delta = jnp.sum(out * out_gradient, axis=-1) - jnp.where(sees, lse_gradient, 0.0)
    operands = (q, k, v, bias, mask, seed, lse, delta, gradients[0])
    dq, dk, dv = mosaic_tpu_backward.run(options, *operands)
    dbias = None if bias is None else mosaic_tpu_bias.run(options, *operands)
    dsinks = None
    if sinks is not None:
        # A sink is a key whose value is 0.
        wide_sinks = sinks.astype(jnp.float32)[None, :, None]
        probability = jnp.where(sees, jnp.exp(wide_sinks - jnp.where(sees, lse, 0.0)), 0.0)
        dsinks = -jnp.sum(probability * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, dbias, dsinks, None, None


_attend.defvjp(_forward, _backward)


def gradients(q, k, v, mask, out, lse, out_gradient, scale, softcap):
    """The backward pass of a part of the keys; arguments and results are those of `part`'s."""
    options = mosaic_tpu_tiles.Options(scale, softcap, 0.0, dispatch.interpreter())
    residuals = (q, k, v, None, None, mask, None, out, lse)
    return _backward(options, residuals, (out_gradient, jnp.zeros_like(lse)))[:3]


def _limits(call):
    """What keeps `mosaic_tpu` from doing `call`."""
    yield from hardware.tpu_lacks(call.dtype)
    if call.T == 0:
        yield "no queries (T = 0)"
    tiles = mosaic_tpu_tiles.choose(max(call.T, 1), call.S, call.N // call.K, call.dtype)
    blocks = -(-call.T // tiles.rows), -(-call.S // tiles.columns)
    traced = {"segments", "kv_range", "traced_q_offset"} & call.features
    most = mosaic_tpu_tiles.MAX_ROW_BLOCKS, mosaic_tpu_tiles.MAX_COLUMN_BLOCKS
    total = blocks[0] * blocks[1] * (call.B if traced else 1)
    if blocks[0] > most[0] or blocks[1] > most[1] or total > mosaic_tpu_tiles.MAX_STEPS:
        yield f"so many blocks ({blocks[0]} of queries, {blocks[1]} of keys) in one schedule"


IMPLEMENTATION = dispatch.Implementation(
    run=mosaic_tpu,
    supports=FEATURES - {"float64"},
    limits=lambda call: tuple(_limits(call)),
    gradients=gradients,
)
