"""decode_attention on NVIDIA GPUs by a Mosaic GPU kernel; only sm_90 (Hopper) has one so far.

This module is what does not depend on the architecture: what a call must look like, how a row's
keys are divided between blocks of the grid, and the merge of what they find.
"""

import math

import jax.numpy as jnp

from jaxformer_kernels import _compat, dispatch, hardware
from jaxformer_kernels.decode_attention import span
from jaxformer_kernels.decode_attention.call import FEATURES

TILE = 64  # keys
ROWS = 64  # queries of a warpgroup
_MOST_OUT_COLUMNS = 128
_SHARED_MEMORY = 232448 - 4096  # bytes a block of threads may have, less barriers and alignment
_MOST_STAGES = 6
_MOST_GROUPS = 2
_PROCESSORS = 132
_MOST_SPLITS = 64
_LEAST_TILES = 4  # of a split
_SMALL_PAGES = (8, 16, 32)


def mosaic_gpu(q, k, v, lengths, starts, page_table, sinks, options):
    """Decoding by a Hopper kernel; arguments and results are those of `reference`."""
    from jaxformer_kernels.decode_attention import mosaic_gpu_sm90

    B, T, N, H = q.shape
    K, Hv = v.shape[2:]
    rows = N // K * T
    groups = -(-rows // ROWS)
    room = k.shape[1] if page_table is None else k.shape[1] * page_table.shape[1]
    padding = ((0, 0), (0, 0), (0, groups * ROWS - rows), (0, 0))
    q = jnp.transpose(q.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4)).reshape(B, K, rows, H)
    operands = {"q": jnp.pad(q, padding), "k": k, "v": v}
    operands |= _visibility(lengths, starts, T, options.left, room, rows, groups * ROWS)
    if page_table is not None:
        operands["table"] = page_table
        pages = span.blocks(lengths, starts, T, options.left, room, k.shape[1])
        operands["pages"] = jnp.stack(pages, axis=1)
    out, lse = mosaic_gpu_sm90.partial_results(
        options,
        operands,
        stages=stages(H, Hv, groups),
        splits=splits(B * K, room if options.left is None else min(room, options.left + T)),
        kept_rows=-(-rows // 8) * 8,
        interpret=_compat.gpu_interpreter(dispatch.interpreter()),
    )
    out, lse = _compat.vary((out, lse), _compat.varying_axes(q))
    out, lse = span.merge(out[..., :rows, :], lse[..., :rows] * math.log(2))
    out, lse = span.with_sinks(out.reshape(B, N, T, Hv), lse.reshape(B, N, T), sinks)
    return jnp.swapaxes(out, 1, 2), lse


def _visibility(lengths, starts, T, left, room, rows, padded_rows):
    """What the kernel needs of the mask.

    Returns:
        by name: q_low and q_high int32 [B, padded_rows], the interval of positions that a row of
        the queries' tile sees; tiles int32 [B, 4]: (first, stop, whole_first, whole_stop) of the
        tiles of keys to visit, and of those of them in which every query sees everything.
    """
    place = lengths[:, None] - T + jnp.arange(padded_rows) % T
    high = jnp.where(jnp.arange(padded_rows) < rows, place + 1, 0)
    low = jnp.zeros_like(high)
    if starts is not None:
        low = jnp.maximum(low, starts[:, None])
    if left is not None:
        low = jnp.maximum(low, place - left)
    first, stop = span.blocks(lengths, starts, T, left, room, TILE)
    whole = -(-jnp.max(low[:, :rows], axis=1) // TILE), jnp.min(high[:, :rows], axis=1) // TILE
    if rows < padded_rows:
        # The rows that pad the tile see nothing, and are thrown away: let them see what may be.
        high = jnp.where(jnp.arange(padded_rows) < rows, high, high[:, :1])
        low = jnp.where(jnp.arange(padded_rows) < rows, low, low[:, :1])
    return {
        "q_low": low.astype(jnp.int32),
        "q_high": high.astype(jnp.int32),
        "tiles": jnp.stack([first, stop, *whole], axis=1).astype(jnp.int32),
    }


def splits(runs, keys):
    """Blocks of the grid that share one key-value head's keys: two for each processor in all."""
    wanted = -(-2 * _PROCESSORS // runs)
    return max(1, min(wanted, -(-keys // (TILE * _LEAST_TILES)), _MOST_SPLITS))


def out_columns(Hv):
    """Columns of the output that leave at once, through a tile of shared memory; divides Hv."""
    return Hv // -(-Hv // _MOST_OUT_COLUMNS)


def stages(H, Hv, groups):
    """Tiles of keys, and of values, in flight: as many as shared memory has room for."""
    fixed = groups * ROWS * (2 * H + 4 * out_columns(Hv) + 4)
    return min(_MOST_STAGES, (_SHARED_MEMORY - fixed) // (TILE * 2 * (H + Hv)))


def _limits(call):
    """What keeps `mosaic_gpu` from doing `call`."""
    yield from hardware.hopper_lacks(call.dtype)
    if call.H % 64 or call.Hv % 64:
        yield f"head dims of {call.H} and {call.Hv} (multiples of 64)"
    groups = -(-call.rows // ROWS)
    if groups > _MOST_GROUPS:
        yield f"{call.rows} queries a key-value head (at most {_MOST_GROUPS * ROWS})"
    elif stages(call.H, call.Hv, groups) < 2:
        yield f"head dims of {call.H} and {call.Hv} with {call.rows} queries a key-value head"
    if call.page_size is None and (call.S % 8 or call.S < TILE):
        # TMA takes the cache in groups of 8 positions; to pad it would copy it at every step.
        yield f"a cache of {call.S} positions a row (a multiple of 8, at least {TILE})"
    elif call.page_size and call.page_size % TILE and call.page_size not in _SMALL_PAGES:
        yield f"pages of {call.page_size} positions (8, 16, 32 or a multiple of {TILE})"


IMPLEMENTATION = dispatch.Implementation(
    run=mosaic_gpu,
    supports=FEATURES - {"float64", "heads_first"},
    limits=lambda call: tuple(_limits(call)),
)
