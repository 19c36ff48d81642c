"""The one entry to attention: checks a call, fills in its defaults, and hands it on."""

import numbers

import jax
import jax.numpy as jnp

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.attention import cudnn, mosaic_gpu, mosaic_tpu, reference, xla
from jaxformer_kernels.attention.call import describe
from jaxformer_kernels.attention.dropout import Dropout
from jaxformer_kernels.attention.mask import Mask

IMPLEMENTATIONS = {
    "xla": xla.IMPLEMENTATION,
    "mosaic_tpu": mosaic_tpu.IMPLEMENTATION,
    "cudnn": cudnn.IMPLEMENTATION,
    "mosaic_gpu": mosaic_gpu.IMPLEMENTATION,
    "reference": reference.IMPLEMENTATION,
}

_EVERYTHING = Mask()

# Fastest first: on a CPU as measured by benchmarks/, on a TPU as the compiler schedules it. GPU
# kernels enter once they are timed there; cuDNN's gradients are not the same in every rerun.
ORDER = {"default": ("xla",), "tpu": ("mosaic_tpu", "xla")}


def attention(
    q,
    k,
    v,
    *,
    bias=None,
    mask=_EVERYTHING,
    sinks=None,
    softcap=None,
    scale=None,
    dropout=None,
    return_lse: bool = False,
    implementation: str | None = None,
):
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762).

    logits = scale * q . k; then softcap * tanh(logits / softcap); then + bias; then the mask; then
    softmax, with the sink in its denominator; then dropout; then times v. Computed and accumulated
    in float32 (float64 for float64 inputs); matrix products take their operands in q's dtype.
    A query that sees no key has output 0, lse -inf, and passes no gradient to anything.

    Args:
        q: [B, T, N, H], floating.
        k: [B, S, K, H], q's dtype. N is a multiple of K: query head n reads key head n // (N // K).
        v: [B, S, K, Hv], q's dtype.
        bias: floating, broadcasts to [B, N, T, S] (and has four axes); added to the logits.
        mask: which keys each query sees.
        sinks: floating [N]; one learned logit a head that joins the softmax's denominator and
            attends to nothing (gpt-oss). `lse` includes it.
        softcap: positive Python float (Gemma 2, arXiv:2408.00118).
        scale: Python float; None means 1 / sqrt(H).
        dropout: on the attention probabilities. lse is that before dropout.
        return_lse: also return the logarithm of the softmax's denominator. Its cotangent is used.
        implementation: one of `IMPLEMENTATIONS`, or None for the platform's best that can do the
            call.

    Returns:
        out [B, T, N, Hv] in q's dtype; with `return_lse`, (out, lse [B, N, T] float32, natural
        logarithm; float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong shape or type; the message names the fix.
        NotImplementedError: the named implementation cannot do this call; names one that can.
    """
    check_arrays(q, k, v, bias, sinks)
    check_options(mask, softcap, scale, dropout)
    B, T, N, H = q.shape
    mask.validate(B, N, T, k.shape[1])
    scale = H**-0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    if dropout is not None and dropout.rate == 0:
        dropout = None

    call = describe(q, k, v, bias, mask, sinks, softcap, dropout, return_lse)
    chosen = dispatch.choose(
        "attention", IMPLEMENTATIONS, ORDER, implementation, call.features, call
    )
    operands = _compat.vary_alike(q, k, v, bias, sinks, mask, dropout)
    out, lse = chosen.run(*operands, scale, softcap)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def check_arrays(q, k, v, bias=None, sinks=None):
    """Raise unless the arrays are as `attention` takes them; the message names the fix."""
    for name, x, axes in (
        ("q", q, "[B, T, N, H]"),
        ("k", k, "[B, S, K, H]"),
        ("v", v, "[B, S, K, Hv]"),
    ):
        if x.ndim != 4:
            raise ValueError(
                f"attention: {name} must be {axes}, got {x.ndim} axes, "
                f"{list(x.shape)}; add the missing ones with {name}[None] or reshape."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"attention: {name} must be floating, got {x.dtype}; "
                f"cast it with {name}.astype(jnp.float32)."
            )
        if x.dtype != q.dtype:
            raise TypeError(
                f"attention: q, k and v must have one dtype, got q {q.dtype} and "
                f"{name} {x.dtype}; cast with {name}.astype(q.dtype)."
            )
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if k.shape[0] != B or v.shape[0] != B:
        raise ValueError(
            f"attention: q, k and v must have one batch size, got {B}, {k.shape[0]} "
            f"and {v.shape[0]}; broadcast them (jnp.broadcast_to) or use jax.vmap."
        )
    if v.shape[1:3] != (S, K):
        raise ValueError(
            f"attention: k and v must agree in [S, K], got {list(k.shape[1:3])} and "
            f"{list(v.shape[1:3])}; the axis order is [B, S, K, H]."
        )
    if k.shape[3] != H:
        raise ValueError(
            f"attention: q and k must have one head dim, got {H} and {k.shape[3]}; "
            "only v may have another."
        )
    if min(N, K, H) == 0 or N % K:
        raise ValueError(
            f"attention: the {N} query heads must be a multiple of the {K} key-value "
            "heads; the axis order is [B, T, N, H]."
        )
    if S == 0:
        raise ValueError(
            "attention: there are no keys (S = 0); hide keys with "
            "mask=Mask(kv_end=...) instead of cutting them off."
        )
    if bias is not None:
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(
                f"attention: bias must be floating, got {bias.dtype}; "
                "to hide keys pass mask=Mask(array=...)."
            )
        full = (B, N, T, S)
        if bias.ndim != 4 or any(
            size not in (1, n) for size, n in zip(bias.shape, full, strict=True)
        ):
            raise ValueError(
                f"attention: bias must have four axes that broadcast to [B, N, T, S] "
                f"= {list(full)}, got {list(bias.shape)}; write axes of 1 out, "
                "as in bias[None, :, None, :]."
            )
    if sinks is not None and (sinks.shape != (N,) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(
            f"attention: sinks must be floating [N] = [{N}], got {sinks.dtype}{list(sinks.shape)}."
        )


def check_options(mask, softcap, scale, dropout=None):
    """Raise unless the options are as `attention` takes them; the message names the fix."""
    if not isinstance(mask, Mask):
        raise TypeError(
            f"attention: mask must be a Mask, got {type(mask).__name__}; "
            "wrap a bool array as Mask(array=...), and say causal as "
            "Mask(causal=True)."
        )
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(
            f"attention: dropout must be a Dropout, got {type(dropout).__name__}; "
            "pass Dropout(rate, key)."
        )
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and (
            isinstance(value, jax.Array) or not isinstance(value, numbers.Real)
        ):
            raise TypeError(
                f"attention: {name} must be a Python float, got "
                f"{type(value).__name__}; to learn the scale, multiply q by it and "
                "pass scale=1.0."
            )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be positive, got {softcap}; None means no cap.")
