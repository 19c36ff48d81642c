"""Attention with heads dealt out in place of tokens (Jacobs et al. 2023, arXiv:2309.14509).

One all-to-all turns a part of the sequence with all heads into the whole sequence with a part of
the heads, which `attention` then does at once; another turns its output back. Memory is linear in
the whole sequence, and the heads limit the devices.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from jaxformer_kernels.attention.api import attention
from jaxformer_kernels.context_attention.order import straightened, zigzagged


def attend(q, k, v, sinks, mask, *, axis_name, order, **options):
    """Attention of the local queries to the keys of all devices; see `context_attention`."""
    C = lax.axis_size(axis_name)
    N, K = q.shape[2], k.shape[2]
    check_heads(N, K, C)
    repeats = 1 if K % C == 0 else C // K
    # Without position every order is as good, as long as ids and tokens keep the same.
    positional = mask.causal or mask.window is not None
    turned = positional and order == "zigzag"

    def whole_sequence(x):
        x = lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, tiled=True)
        return straightened(x, C) if turned else x

    def whole_ids(ids):
        if ids is None:
            return None
        ids = lax.all_gather(ids, axis_name, axis=1, tiled=True)
        return straightened(ids, C) if turned else ids

    mask = dataclasses.replace(
        mask,
        q_segment_ids=whole_ids(mask.q_segment_ids),
        kv_segment_ids=whole_ids(mask.kv_segment_ids),
    )
    if sinks is not None:
        sinks = lax.dynamic_slice_in_dim(sinks, lax.axis_index(axis_name) * (N // C), N // C)
    k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
    q, k, v = (whole_sequence(x) for x in (q, k, v))
    out = attention(q, k, v, mask=mask, sinks=sinks, **options)
    out = zigzagged(out, C) if turned else out
    return lax.all_to_all(out, axis_name, split_axis=1, concat_axis=2, tiled=True)


def check_heads(N: int, K: int, C: int) -> None:
    """Raise ValueError, naming the fix, unless the heads can be dealt out to C devices."""
    if N % C or (K % C and C % K):
        raise ValueError(
            f"context_attention: method='all_to_all' cannot deal out {N} query heads and {K} "
            f"key-value heads to {C} devices; use method='ring', or a context axis that divides "
            "the heads."
        )
