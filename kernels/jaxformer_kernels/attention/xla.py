"""Attention in plain XLA operations: the CPU's and any GPU's default."""

from jaxformer_kernels import dispatch
from jaxformer_kernels.attention import blocks, xla_long, xla_short
from jaxformer_kernels.attention.call import FEATURES

_SHORT = 512 * 512

def xla(q, k, v, bias, sinks, mask, dropout, scale, softcap):
    """Attention by whichever regime suits the lengths.

    Arguments and results are those of `reference`.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    options = blocks.Options(scale, softcap, 0.0 if dropout is None else dropout.rate)
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    if bias is not None:
        bias = blocks.grouped(bias, K, G)
    if sinks is not None:
        sinks = sinks.astype(blocks.wide(q.dtype)).reshape(K, G)
    seed = None if dropout is None else dropout.seed()
    attend = (xla_short if T * S <= _SHORT else xla_long).attend
    out, lse = attend(options, q, k, v, bias, sinks, mask, seed)
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, v.shape[-1])
    return out, lse.reshape(B, N, T)


IMPLEMENTATION = dispatch.Implementation(run=xla, supports=FEATURES)
