"""The one entry to context_attention: checks a call, fills in its defaults, and hands it on."""

import difflib

from jax import lax

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.attention.api import check_arrays, check_options
from jaxformer_kernels.attention.mask import Mask
from jaxformer_kernels.context_attention import all_to_all, ring
from jaxformer_kernels.context_attention.order import ORDERS

METHODS = ("ring", "all_to_all")

_EVERYTHING = Mask()


def context_attention(
    q,
    k,
    v,
    *,
    axis_name: str,
    mask=_EVERYTHING,
    sinks=None,
    softcap=None,
    scale=None,
    bias=None,
    dropout=None,
    method: str = "ring",
    order: str = "zigzag",
    implementation: str | None = None,
):
    """Attention over a sequence that C devices hold a part of each: `attention` of the whole.

    To be called where the mesh axis is manual, as inside `jax.shard_map`. Every device passes its
    own tokens and gets their outputs. Lengths are those of the whole sequence:

    Args:
        q: [B, T/C, N, H], floating.
        k, v: [B, S/C, K, H] and [B, S/C, K, Hv]; with a causal mask or a window, S is T.
        axis_name: the mesh axis over which the sequence is split; C is its size.
        mask: causal and window, which speak of places in the whole sequence; segment ids, which
            are those of the device's own tokens, [B, T/C] and [B, S/C].
        sinks, softcap, scale, implementation: as in `attention`; sinks [N] are the same on all.
        bias, dropout: refused.
        method: "ring": keys and values go round, with no limit on C and memory that falls with it
            (Liu et al. 2023, arXiv:2310.01889). "all_to_all": heads are dealt out in place of
            tokens, for a C that divides them (Jacobs et al. 2023, arXiv:2309.14509).
        order: which tokens a device holds. "zigzag": those of `zigzag(C, T)`, of which a causal
            mask gives every device as many to attend to. "contiguous": device i holds the i-th of
            C parts; in a causal ring the last device then has all the work of the last step.

    Returns:
        out [B, T/C, N, Hv] in q's dtype. A query that sees no key has output 0 and passes no
        gradient to anything.

    Raises:
        TypeError, ValueError: an argument of the wrong shape or type; the message names the fix.
        NotImplementedError: bias, dropout, a mask's array, key range or offset; or the named
            implementation cannot do this call.
    """
    check_arrays(q, k, v, sinks=sinks)
    check_options(mask, softcap, scale)
    _check_choice("method", method, METHODS)
    _check_choice("order", order, ORDERS)
    _refuse(mask, bias, dropout)
    _check_axis(axis_name)
    _check_lengths(q.shape[1], k.shape[1], mask, order)
    mask.validate(q.shape[0], q.shape[2], q.shape[1], k.shape[1])

    # The index varies over the axis, and with it whatever is computed from anything here.
    q, k, v, sinks, mask, _ = _compat.vary_alike(q, k, v, sinks, mask, lax.axis_index(axis_name))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    if method == "all_to_all":
        return all_to_all.attend(
            q,
            k,
            v,
            sinks,
            mask,
            axis_name=axis_name,
            order=order,
            softcap=softcap,
            scale=scale,
            implementation=implementation,
        )
    options = ring.Options(
        axis_name,
        order,
        softcap,
        scale,
        implementation,
        dispatch.platform(),
        dispatch.interpreter(),
    )
    return ring.attend(options, q, k, v, sinks, mask)


def _check_choice(name, value, known):
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"context_attention: unknown {name} {value!r}; {hint}Available: {', '.join(known)}."
        )


def _refuse(mask, bias, dropout):
    """Raise for what no method can do."""
    if bias is not None:
        raise NotImplementedError(
            "context_attention: no bias; use attention(bias=) on a mesh whose context axis is 1, "
            "or rotary positions in place of a bias by position."
        )
    if dropout is not None:
        raise NotImplementedError(
            "context_attention: no dropout of probabilities; leave it out (dropout=None), or use "
            "attention(dropout=) on a mesh whose context axis is 1."
        )
    if mask.array is not None:
        raise NotImplementedError(
            "context_attention: no Mask(array=); say it with causal, window and segment ids, or "
            "use attention on a mesh whose context axis is 1."
        )
    if mask.kv_start is not None or mask.kv_end is not None:
        raise NotImplementedError(
            "context_attention: no Mask(kv_start=, kv_end=); give padding a segment id of its own."
        )
    if not isinstance(mask.q_offset, int) or mask.q_offset:
        raise NotImplementedError(
            "context_attention: no Mask(q_offset=): a query's place is that in the whole "
            "sequence; decode with decode_attention."
        )


def _check_axis(axis_name):
    try:
        lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"context_attention: no manual mesh axis {axis_name!r} here; call it inside "
            f"jax.shard_map(..., axis_names={{{axis_name!r}}}), on each device's own tokens."
        ) from None


def _check_lengths(T, S, mask, order):
    if not mask.causal and mask.window is None:
        return
    if T != S:
        raise ValueError(
            f"context_attention: causal and window need as many keys as queries on a device, got "
            f"{T} queries and {S} keys; pad the shorter sequence, with a segment id of its own."
        )
    if order == "zigzag" and T % 2:
        raise ValueError(
            f"context_attention: order='zigzag' needs two chunks of one size on every device, got "
            f"{T} tokens; pad the sequence to a multiple of twice the context axis, or use "
            "order='contiguous'."
        )
