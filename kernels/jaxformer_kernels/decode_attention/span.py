"""Where a row's visible keys lie, and what is done to its result once they have been read."""

import jax
import jax.numpy as jnp


def visible(lengths, starts, T, left, S):
    """(first, end) [B]: positions outside first <= s < end are hidden from all T queries.

    Within, every position is visible to the last query or, before its window, to an earlier one.
    """
    end = jnp.clip(lengths, 0, S)
    first = jnp.zeros_like(end)
    if starts is not None:
        first = jnp.maximum(first, starts)
    if left is not None:
        first = jnp.maximum(first, lengths - T - left)
    return jnp.minimum(first, end), end


def blocks(lengths, starts, T, left, S, size):
    """(first, end) [B] int32: blocks of `size` positions that any query sees; empty: first = end.

    Empty, both are 0, so that they are blocks that exist.
    """
    first, end = visible(lengths, starts, T, left, S)
    empty = first >= end
    first_block = jnp.where(empty, 0, first // size)
    end_block = jnp.where(empty, 0, -(-end // size))
    return first_block.astype(jnp.int32), end_block.astype(jnp.int32)


def with_sinks(out, lse, sinks):
    """Give a finished result a sink: one more logit in the denominator, with nothing behind it.

    Args:
        out: [..., N, T, Hv].
        lse: [..., N, T]; -inf, and out 0, where no key is seen, which a sink leaves as it is.
        sinks: [N], or None.
    """
    if sinks is None:
        return out, lse
    sinks = sinks.astype(lse.dtype)[:, None]
    seen = lse != -jnp.inf
    finite = jnp.where(seen, lse, 0.0)
    out = out * jnp.where(seen, jax.nn.sigmoid(finite - sinks), 0.0)[..., None]
    return out, jnp.where(seen, jnp.logaddexp(finite, sinks), -jnp.inf)


def merge(outs, lses):
    """One result of partial ones, each over its own keys, along axis 0.

    Args:
        outs: [parts, ..., Hv], each normalised by itself.
        lses: [parts, ...]; -inf, and out 0, for a part in which no key is seen.
    """
    top = jnp.max(lses, axis=0)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lses - top)
    total = jnp.sum(weights, axis=0)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = jnp.sum(outs * weights[..., None], axis=0) / safe[..., None]
    return out, jnp.where(seen, jnp.log(safe) + top, -jnp.inf)
