"""decode_attention in plain XLA operations: the CPU's and any GPU's default.

A loop over blocks of keys with a running maximum, sum and output, from the first block that any
row sees to the last: what a cache has room for beyond its rows' lengths costs nothing.
"""

import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import _compat, dispatch, products
from jaxformer_kernels.decode_attention import span
from jaxformer_kernels.decode_attention.call import FEATURES

# Measured on a CPU: a block's keys, transposed, stay in its second cache.
_BLOCK = 128
# So many positions of heads that stand first are read whole, which takes no copy of any.
_WHOLE = 512


def xla(q, k, v, lengths, starts, page_table, sinks, options):
    """Decoding by blocks of keys.

    Arguments and results are those of `reference`.
    """
    B, T, N, H = q.shape
    K, Hv = v.shape[1 if options.heads_first else 2], v.shape[3]
    rows = jnp.transpose(q.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4)).reshape(B, K, -1, H)
    if options.heads_first:
        S = k.shape[2]
        size = S if S <= _WHOLE else min(_BLOCK, S)
        read_keys, read_values = (_heads_first_reader(x, size) for x in (k, v))
    elif page_table is None:
        S, size = k.shape[1], min(_BLOCK, k.shape[1])
        read_keys, read_values = (_contiguous_reader(x, size) for x in (k, v))
    else:
        S, size = page_table.shape[1] * k.shape[1], max(1, _BLOCK // k.shape[1]) * k.shape[1]
        page = _pages(page_table, lengths, starts, T, options.left, k.shape[1], size)
        read_keys, read_values = (_paged_reader(x, page) for x in (k, v))
    place = lengths[:, None] - T + jnp.tile(jnp.arange(T), N // K)
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def step(block, carry):
        top, total, out = carry
        x = options.scale * products.by_heads("rh,sh->rs", rows, read_keys(block), wide)
        if options.softcap is not None:
            x = options.softcap * jnp.tanh(x / options.softcap)
        s = _positions(block, size, S, page_table is not None)
        seen = _visible(s, block * size, place, starts, options.left)
        x = jnp.where(seen[:, None], x, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(x, axis=-1, keepdims=True))
        finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        p = jnp.exp(x - finite)
        fade = jnp.exp(top - finite)
        total = total * fade + jnp.sum(p, axis=-1, keepdims=True)
        mixed = products.by_heads("rs,sh->rh", p.astype(v.dtype), read_values(block), wide)
        return new_top, total, out * fade + mixed

    first, end = span.blocks(lengths, starts, T, options.left, S, size)
    zero = jnp.zeros((*rows.shape[:3], 1), wide)
    carry = (zero - jnp.inf, zero, jnp.zeros((*rows.shape[:3], Hv), wide))
    carry = _compat.vary(carry, _compat.varying_axes(q))
    if size >= S:
        carry = step(0, carry)
    else:
        # An empty row has first = end = 0, which must not pull the loop's start to 0.
        start = jnp.min(jnp.where(first == end, -(-S // size), first))
        carry = lax.fori_loop(start, jnp.max(end), step, carry)
    top, total, out = carry
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    out = (out / safe).reshape(B, N, T, Hv)
    out, lse = span.with_sinks(out, lse.reshape(B, N, T), sinks)
    return jnp.swapaxes(out, 1, 2), lse


def _positions(block, size, S, paged):
    start = block * size
    if not paged:
        start = jnp.minimum(start, S - size)
    return start + jnp.arange(size)


def _visible(s, block_start, place, starts, left):
    """[B, rows, size]; `block_start` hides what the last block, moved back, has in common."""
    seen = (s >= block_start) & (s <= place[:, :, None])
    if starts is not None:
        seen &= s >= starts[:, None, None]
    if left is not None:
        seen &= s >= place[:, :, None] - left
    return seen


def _heads_first_reader(x, size):
    """block -> [B, K, size, H] of x [B, K, S, H]; the last block is moved back, as below."""
    return (lambda block: x) if size == x.shape[2] else _slices(x, size, axis=2)


def _contiguous_reader(x, size):
    """block -> [B, K, size, H]; the last block is moved back so as to end where `x` does."""
    read = _slices(x, size, axis=1)
    # The barrier makes one transposed copy of the block, which the product then reads.
    return lambda block: lax.optimization_barrier(jnp.swapaxes(read(block), 1, 2))


def _slices(x, size, axis):
    # XLA on CPU converts bfloat16 operands to float32, and would do it ahead of the loop, for the
    # whole cache; it lets integers be.
    halves = x.dtype in (jnp.bfloat16, jnp.float16)
    stored = lax.bitcast_convert_type(x, jnp.uint16) if halves else x

    def read(block):
        start = jnp.minimum(block * size, x.shape[axis] - size)
        part = lax.dynamic_slice_in_dim(stored, start, size, axis=axis)
        return lax.bitcast_convert_type(part, x.dtype) if halves else part

    return read


def _paged_reader(pool, pages):
    """block -> [B, K, size, H], gathered from the pages that `pages(block)` [B, count] names."""

    def read(block):
        part = jnp.take(pool, pages(block), axis=0, mode="clip")
        part = part.reshape(part.shape[0], -1, *pool.shape[2:])
        return lax.optimization_barrier(jnp.swapaxes(part, 1, 2))

    return read


def _pages(page_table, lengths, starts, T, left, page_size, size):
    """block -> [B, size // page_size]: its pages, and where one is not seen, one that is.

    So what the table says of unseen pages is never used.
    """
    count = size // page_size
    S = page_table.shape[1] * page_size
    first, end = span.blocks(lengths, starts, T, left, S, page_size)

    def pages(block):
        slots = jnp.clip(
            block * count + jnp.arange(count), first[:, None], jnp.maximum(end - 1, first)[:, None]
        )
        taken = jnp.take_along_axis(page_table, slots, axis=1)
        return jnp.where((end > first)[:, None], taken, 0)

    return pages


IMPLEMENTATION = dispatch.Implementation(run=xla, supports=FEATURES)
