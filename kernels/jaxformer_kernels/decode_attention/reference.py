"""The specification of decode_attention: a mask, and the reference of attention."""

import jax.numpy as jnp

from jaxformer_kernels import dispatch
from jaxformer_kernels.attention import reference as attention_reference
from jaxformer_kernels.attention.mask import Mask
from jaxformer_kernels.decode_attention import span
from jaxformer_kernels.decode_attention.call import FEATURES


def reference(q, k, v, lengths, starts, page_table, sinks, options):
    """Decoding as attention of T queries that stand at the end of `lengths` keys.

    Arguments and results are those of `jaxformer_kernels.decode_attention` once its defaults are
    filled in: the numbers in `options`, a `call.Options`.
    """
    T = q.shape[1]
    if options.heads_first:
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if page_table is not None:
        k, v = (contiguous(pool, page_table, lengths, starts, T, options.left) for pool in (k, v))
    mask = Mask(
        causal=True,
        q_offset=lengths - T,
        kv_start=starts,
        kv_end=lengths,
        window=None if options.left is None else (options.left, 0),
    )
    return attention_reference.reference(
        q, k, v, None, sinks, mask, None, options.scale, options.softcap
    )


def contiguous(pool, page_table, lengths, starts, T, left):
    """[B, max_pages * page_size, ...]: each row's pages in order, zeros for those no query sees."""
    page_size = pool.shape[1]
    B, max_pages = page_table.shape
    first, end = span.visible(lengths, starts, T, left, max_pages * page_size)
    page = jnp.arange(max_pages)
    seen = (page * page_size < end[:, None]) & ((page + 1) * page_size > first[:, None])
    pages = jnp.take(
        pool, jnp.where(seen, page_table, pool.shape[0]), axis=0, mode="fill", fill_value=0
    )
    return pages.reshape(B, max_pages * page_size, *pool.shape[2:])


IMPLEMENTATION = dispatch.Implementation(run=reference, supports=FEATURES)
