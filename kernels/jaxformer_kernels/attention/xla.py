"""Attention in plain XLA operations: the CPU's and any GPU's default."""

import jax.numpy as jnp

from jaxformer_kernels import dispatch
from jaxformer_kernels.attention import blocks, xla_long, xla_short
from jaxformer_kernels.attention.call import FEATURES

# Measured on a CPU: below this many logits a head, one pass is the faster regime. So few rows as a
# decoding step has are always done in one pass, the memory of which is linear in S.
_SHORT_LOGITS = 512 * 512
_FEW_ROWS = 16


def _is_short(T, S):
    return T * S <= _SHORT_LOGITS or T <= _FEW_ROWS


def xla(q, k, v, bias, sinks, mask, dropout, scale, softcap):
    """Attention by whichever regime suits the lengths.

    Arguments and results are those of `reference`.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    options = blocks.Options(scale, softcap, 0.0 if dropout is None else dropout.rate)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    q = q.reshape(B, K, G, T, H)
    if bias is not None:
        bias = blocks.grouped(bias, K, G)
    if sinks is not None:
        sinks = sinks.astype(blocks.wide(q.dtype)).reshape(K, G)
    seed = None if dropout is None else dropout.seed()
    attend = (xla_short if _is_short(T, S) else xla_long).attend
    out, lse = attend(options, q, k, v, bias, sinks, mask, seed)
    out = jnp.swapaxes(out.reshape(B, N, T, v.shape[-1]), 1, 2)
    return out, lse.reshape(B, N, T)


IMPLEMENTATION = dispatch.Implementation(run=xla, supports=FEATURES)
