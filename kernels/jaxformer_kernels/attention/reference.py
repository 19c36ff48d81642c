"""The specification of attention: a few lines, float32 or float64, slow, obviously right."""

import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import dispatch
from jaxformer_kernels.attention import dropout as dropout_lib
from jaxformer_kernels.attention.call import FEATURES


def reference(q, k, v, bias, sinks, mask, dropout, scale, softcap):
    """Attention as the formulas say it, with the whole [B, N, T, S] in memory.

    Arguments and results are those of `jaxformer_kernels.attention` once its defaults are filled
    in: `scale` a float, `bias` of four axes.
    """
    B, T, N = q.shape[:3]
    S, K = k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.astype(wide) for x in (q, k, v))
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))

    logits = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.astype(wide)
    visible = mask.as_array(B, N, T, S)
    logits = jnp.where(visible, logits, -jnp.inf)

    # A row that sees nothing has maximum -inf; from there on it is treated as if its maximum were
    # 0 and its sum 1, so that no NaN can enter the gradient.
    top = logits.max(axis=-1)
    sees = top != -jnp.inf
    top = jnp.where(sees, top, 0.0)
    if sinks is not None:
        sinks = sinks.astype(wide)[None, :, None]
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(top)
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    total = jnp.where(sees, total, 1.0)
    probabilities = weights / total[..., None]
    if dropout is not None:
        index = jnp.ix_(*(jnp.arange(size) for size in (B, N, T, S)))
        kept = dropout_lib.keep(dropout.seed(), dropout.rate, *index)
        probabilities = jnp.where(kept, probabilities / (1 - dropout.rate), 0.0)
    out = jnp.einsum("bnts,bsnh->btnh", probabilities, v, precision="highest")
    lse = jnp.where(sees, jnp.log(total) + top, -jnp.inf)
    return out, lse


IMPLEMENTATION = dispatch.Implementation(run=reference, supports=FEATURES)
