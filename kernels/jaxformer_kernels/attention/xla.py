"""Attention in plain XLA operations: the CPU's and any GPU's default."""

import jax.numpy as jnp

from jaxformer_kernels import dispatch
from jaxformer_kernels.attention import blocks, xla_long, xla_short
from jaxformer_kernels.attention.call import FEATURES

# Measured on a CPU: of so many logits a head, one pass is the faster regime. So few rows as a
# decoding step has are always done in one pass, the memory of which is linear in S.
_SHORT_LOGITS = 512 * 512
_FEW_ROWS = 16
# On a CPU one pass takes two thirds of the time at 1,024 tokens, too. What it keeps is bounded by
# this many heads of `_SHORT_LOGITS` over all rows.
_SHORT_HEADS = 16


def _is_short(B, N, T, S):
    most = _SHORT_LOGITS
    if dispatch.platform() == "cpu":
        most = max(most, _SHORT_HEADS * _SHORT_LOGITS // max(B * N, 1))
    return T <= _FEW_ROWS or most >= T * S


def xla(q, k, v, bias, sinks, mask, dropout, scale, softcap):
    """Attention by whichever regime suits the lengths.

    Arguments and results are those of `reference`.
    """
    B, T, N = q.shape[:3]
    S, K = k.shape[1:3]
    G = N // K
    options = blocks.Options(scale, softcap, 0.0 if dropout is None else dropout.rate)
    q, k, v = _heads_first(q, K), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if bias is not None:
        bias = blocks.grouped(bias, K, G)
    if sinks is not None:
        sinks = sinks.astype(blocks.wide(q.dtype)).reshape(K, G)
    seed = None if dropout is None else dropout.seed()
    attend = (xla_short if _is_short(B, N, T, S) else xla_long).attend
    out, lse = attend(options, q, k, v, bias, sinks, mask, seed)
    return _heads_last(out), lse.reshape(B, N, T)


def gradients(q, k, v, mask, out, lse, out_gradient, scale, softcap):
    """The backward pass of a part of the keys; arguments and results are those of `part`'s."""
    K = k.shape[2]
    options = blocks.Options(scale, softcap, 0.0)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    q, out, out_gradient = (_heads_first(x, K) for x in (q, out, out_gradient))
    lse = lse.reshape(*q.shape[:4])
    residuals = (q, k, v, None, None, mask, None, out, lse)
    # Probabilities come from the log-sum-exp whatever the length: none were kept of the whole row.
    dq, dk, dv, *_ = xla_long.backward(options, residuals, (out_gradient, jnp.zeros_like(lse)))
    return _heads_last(dq), jnp.swapaxes(dk, 1, 2), jnp.swapaxes(dv, 1, 2)


def _heads_first(x, K):
    """[B, T, N, H] as [B, K, G, T, H]."""
    B, T, N, H = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(B, K, N // K, T, H)


def _heads_last(x):
    """[B, K, G, T, H] as [B, T, N, H]."""
    B, K, G, T, H = x.shape
    return jnp.swapaxes(x.reshape(B, K * G, T, H), 1, 2)


IMPLEMENTATION = dispatch.Implementation(run=xla, supports=FEATURES, gradients=gradients)
