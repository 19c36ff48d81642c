"""The one entry to decode_attention: checks a call, fills in its defaults, and hands it on."""

import functools
import numbers

import jax
import jax.numpy as jnp

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.attention.mask import Mask
from jaxformer_kernels.decode_attention import mosaic_gpu, mosaic_tpu, reference, xla
from jaxformer_kernels.decode_attention.call import Options, describe

IMPLEMENTATIONS = {
    "xla": xla.IMPLEMENTATION,
    "mosaic_gpu": mosaic_gpu.IMPLEMENTATION,
    "mosaic_tpu": mosaic_tpu.IMPLEMENTATION,
    "reference": reference.IMPLEMENTATION,
}

# On GPUs `mosaic_gpu` runs where it is named: no GPU has timed it against `xla` yet.
ORDER = {"tpu": ("mosaic_tpu", "xla"), "default": ("xla",)}


def decode_attention(
    q,
    k,
    v,
    lengths,
    *,
    starts=None,
    window=None,
    softcap=None,
    sinks=None,
    scale=None,
    page_table=None,
    heads_first: bool = False,
    return_lse: bool = False,
    implementation: str | None = None,
):
    """Attention of the newest T tokens to a key-value cache that already holds their own keys.

    Row b's queries are the last T of its lengths[b] positions: query t stands at position
    lengths[b] - T + t, sees itself and what came before it, and nothing from lengths[b] on. That
    is `attention` with
    `mask=Mask(causal=True, q_offset=lengths - T, kv_start=starts, kv_end=lengths, window=window)`,
    reading no more of the cache than the rows' keys. A query that sees no key (lengths[b] = 0, or
    a position before 0) has output 0 and lse -inf. Computed and accumulated in float32 (float64
    for float64 inputs). Forward only: to differentiate it is an error that names `attention`.

    Hidden positions may hold anything finite. Of a page table only the entries of pages that some
    query sees are used, so pages before the window or past the length need not exist.
    The split over keys is that of flash-decoding (Dao et al. 2023), the page table that of
    PagedAttention (Kwon et al. 2023, arXiv:2309.06180).

    Args:
        q: [B, T, N, H], floating; T is 1, or a few in speculative decoding.
        k: [B, S, K, H], q's dtype; with `page_table`, [pages, page_size, K, H]. N is a multiple of
            K: query head n reads key head n // (N // K).
        v: [B, S, K, Hv], q's dtype; with `page_table`, [pages, page_size, K, Hv].
        lengths: integer [B], at most S: valid positions of each row, the T new ones included.
        starts: integer [B]: the first valid position of each row (rows padded on the left).
        window: as in `Mask`: (left, right), of which left counts: so many positions before its own
            does a query see.
        softcap: positive Python float (Gemma 2, arXiv:2408.00118).
        sinks: floating [N]: one logit a head that joins the softmax's denominator (gpt-oss). `lse`
            includes it.
        scale: Python float; None means 1 / sqrt(H).
        page_table: integer [B, max_pages]: position s of row b is in page
            page_table[b, s // page_size], at s % page_size.
        heads_first: k is [B, K, S, H] and v [B, K, S, Hv]: what a CPU reads fastest. Not of pages.
        return_lse: also return the logarithm of the softmax's denominator.
        implementation: "xla", "mosaic_tpu", "mosaic_gpu", "reference", or None for the platform's
            best that can do the call.

    Returns:
        out [B, T, N, Hv] in q's dtype; with `return_lse`, (out, lse [B, N, T] float32, natural
        logarithm; float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong shape or type; the message names the fix.
        NotImplementedError: the named implementation cannot do this call (names one that can), or
            a derivative is asked for.
    """
    _check_arrays(q, k, v, page_table, heads_first)
    B, _, N, H = q.shape
    lengths = _integers("lengths", lengths, (B,))
    starts = None if starts is None else _integers("starts", starts, (B,))
    page_table = None if page_table is None else _integers("page_table", page_table, (B, None))
    _check_options(softcap, scale, sinks, N)
    Mask(window=window)  # for its checks
    options = Options(
        scale=H**-0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        left=None if window is None else window[0],
        heads_first=heads_first,
    )
    call = describe(q, v, starts, page_table, sinks, window, softcap, heads_first, return_lse)
    chosen = dispatch.choose(
        "decode_attention", IMPLEMENTATIONS, ORDER, implementation, call.features, call
    )
    arrays = _compat.vary_alike(q, k, v, lengths, starts, page_table, sinks)
    out, lse = _forward_only(chosen.run, options, *arrays)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward_only(run, options, *arrays):
    return run(*arrays, options)


@_forward_only.defjvp
def _refuse(run, options, primals, tangents):
    raise NotImplementedError(
        "decode_attention: it has no derivative; use attention(..., mask=Mask(causal=True, "
        "q_offset=lengths - T, kv_end=lengths)), which has, or jax.lax.stop_gradient its operands."
    )


def _check_arrays(q, k, v, page_table, heads_first):
    if heads_first and page_table is not None:
        raise ValueError(
            "decode_attention: heads_first is of contiguous rows; a pool of pages has its heads "
            "last: [pages, page_size, K, H]."
        )
    cache = "[B, S, K, {}]" if page_table is None else "[pages, page_size, K, {}]"
    if heads_first:
        cache = "[B, K, S, {}]"
    for name, x, axes in (
        ("q", q, "[B, T, N, H]"),
        ("k", k, cache.format("H")),
        ("v", v, cache.format("Hv")),
    ):
        if x.ndim != 4:
            raise ValueError(
                f"decode_attention: {name} must be {axes}, got {x.ndim} axes, {list(x.shape)}; "
                f"add the missing ones with {name}[:, None] or reshape."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise TypeError(
                f"decode_attention: q, k and v must have one floating dtype, got q {q.dtype} and "
                f"{name} {x.dtype}; cast with {name}.astype."
            )
    N, H = q.shape[2:]
    K = k.shape[1 if heads_first else 2]
    if page_table is None and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"decode_attention: q and k must have one batch size, got {q.shape[0]} and "
            f"{k.shape[0]}; a pool of pages needs page_table=."
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"decode_attention: k and v must agree in all but the head dim, got {list(k.shape)} "
            f"and {list(v.shape)}; the axis order is {cache.format('H')}."
        )
    if k.shape[3] != H:
        raise ValueError(
            f"decode_attention: q and k must have one head dim, got {H} and {k.shape[3]}; "
            "only v may have another."
        )
    if min(N, K, H) == 0 or N % K:
        raise ValueError(
            f"decode_attention: the {N} query heads must be a multiple of the {K} key-value "
            "heads; the axis order is [B, T, N, H]."
        )
    if 0 in (q.shape[1], *k.shape[:2]):
        raise ValueError(
            f"decode_attention: no queries or no keys: q {list(q.shape)}, k {list(k.shape)}; "
            "an empty row is one of lengths[b] = 0."
        )


def _integers(name, array, shape):
    """`array` as int32; raises unless it is an integer array of `shape`, None any size but 0."""
    got = getattr(array, "shape", None)
    fits = (
        got is not None
        and len(got) == len(shape)
        and all(
            size == want or (want is None and size) for size, want in zip(got, shape, strict=True)
        )
    )
    if not fits or not jnp.issubdtype(array.dtype, jnp.integer):
        wanted = str(["max_pages" if size is None else size for size in shape]).replace("'", "")
        what = f"{array.dtype}{list(got)}" if got is not None else type(array).__name__
        raise ValueError(f"decode_attention: {name} must be integer {wanted}, got {what}.")
    return jnp.asarray(array, jnp.int32)


def _check_options(softcap, scale, sinks, N):
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and (
            isinstance(value, jax.Array) or not isinstance(value, numbers.Real)
        ):
            raise TypeError(
                f"decode_attention: {name} must be a Python float, got {type(value).__name__}; "
                "to vary the scale, multiply q by it and pass scale=1.0."
            )
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"decode_attention: softcap must be positive, got {softcap}; None means no cap."
        )
    if sinks is not None and (sinks.shape != (N,) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(
            f"decode_attention: sinks must be floating [N] = [{N}], got "
            f"{sinks.dtype}{list(sinks.shape)}."
        )
