"""decode_attention on Hopper: a split over keys, as in flash-decoding (Dao et al. 2023).

A block of the grid takes one split of one key-value head of one row of the batch. One warpgroup
does nothing but fetch: it streams tiles of k and v from the cache, or from the pages that the
table names, through a ring of stages by TMA. One or two warpgroups compute, each with 64 rows of a
tile whose rows are the queries of all heads that share the key-value head.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer_kernels import _compat
from jaxformer_kernels.attention import mosaic_gpu_sm90_tiles as tiles
from jaxformer_kernels.attention.mosaic_gpu_sm90_tiles import ROW
from jaxformer_kernels.decode_attention.mosaic_gpu import ROWS, TILE, out_columns


@dataclasses.dataclass(frozen=True)
class _Options:
    """What the shared tiles need to know: the numbers, and the interpreter's parameters or None."""

    scale: float
    softcap: float | None
    interpret: Any


def partial_results(options, operands, *, stages, splits, kept_rows, interpret):
    """Attention of each split by itself.

    Args:
        options: `call.Options`.
        operands: by name: q [B, K, 64 * groups, H]; k and v; q_low, q_high and tiles as in
            `mosaic_gpu`; and where the cache is paged, table [B, max_pages] and pages [B, 2], the
            (first, end) of the pages that a row needs.
        stages: tiles in flight.
        splits: blocks of the grid for each key-value head and row of the batch.
        kept_rows: rows of q that are any head's, rounded up to a multiple of 8.
        interpret: parameters of the interpreter, None on the device.

    Returns:
        out float32 [splits, B, K, rows, Hv] and lse float32 [splits, B, K, rows] in units of
        log2, at least `kept_rows` of the rows.
    """
    q, k, v = (operands[name] for name in "qkv")
    B, K, padded_rows, H = q.shape
    Hv = v.shape[3]
    groups = padded_rows // ROWS
    kept_rows = kept_rows if groups == 1 else padded_rows
    ring = functools.partial(tiles.shared, dtype=q.dtype)
    pieces = 1 if "table" not in operands else max(1, TILE // k.shape[1])
    scratch = {
        "q_tile": ring((groups, ROWS, H)),
        "k_tiles": ring((stages, TILE, H)),
        "v_tiles": ring((stages, TILE, Hv)),
        "out_tile": plgpu.SMEM((groups, ROWS, out_columns(Hv)), jnp.float32),
        "lse_tile": plgpu.SMEM((groups, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=groups),
        **tiles.barriers(("k", "v"), stages, groups),
    }
    for name in ("k_ready", "v_ready"):
        scratch[name] = plgpu.Barrier(num_arrivals=pieces, num_barriers=stages)
    if interpret is not None:
        scratch["p_tile"] = ring((groups, ROWS, TILE))
    outputs = {
        "out": jax.ShapeDtypeStruct((splits, B, K, kept_rows, Hv), jnp.float32),
        "lse": jax.ShapeDtypeStruct((splits, B, K, kept_rows), jnp.float32),
    }
    grid = {"split": splits, "head": K, "row": B}
    options = _Options(options.scale, options.softcap, interpret)

    def decode_attention(refs):
        _body(options, refs, splits, stages, groups, min(ROWS, kept_rows))

    return tiles.launch(options, decode_attention, operands, outputs, scratch, grid, groups)


def _body(options, refs, splits, stages, groups, kept_rows):
    split, head, b = (lax.axis_index(name) for name in ("split", "head", "row"))
    first, stop = refs["tiles"][b, 0], refs["tiles"][b, 1]
    share = pl.cdiv(stop - first, jnp.int32(splits))
    first = jnp.minimum(first + split * share, stop)
    steps = jnp.minimum(first + share, stop) - first

    def fetch():
        _fetch(refs, b, head, first, steps, stages)

    def compute(group):
        _compute(options, refs, (split, head, b, group), first, steps, stages, kept_rows)

    tiles.roles(groups, compute, fetch)


def _fetch(refs, b, head, first, steps, stages):
    """Stream the tiles of k and v that begin at tile `first`."""

    @pl.loop(0, steps)
    def _tile(step):
        slot = lax.rem(step, jnp.int32(stages))
        places = _places(refs, b, first + step)
        for name in "kv":

            @pl.when(step >= stages)
            def _reuse(name=name):
                plgpu.barrier_wait(refs[f"{name}_free"].at[slot])

            for place, part in places:
                plgpu.copy_gmem_to_smem(
                    refs[name].at[(*place, head)],
                    refs[f"{name}_tiles"].at[slot, part]
                    if len(places) > 1
                    else refs[f"{name}_tiles"].at[slot],
                    refs[f"{name}_ready"].at[slot],
                )

    # No barrier may go while another warpgroup still has to arrive at it.
    @pl.loop(jnp.maximum(0, steps - stages), steps)
    def _drain(step):
        slot = lax.rem(step, jnp.int32(stages))
        for name in "kv":
            plgpu.barrier_wait(refs[f"{name}_free"].at[slot])


def _places(refs, b, tile):
    """[(where in the cache, which rows of the tile)] of a tile's pieces."""
    if "table" not in refs:
        return [((b, pl.ds(tile * TILE, TILE)), pl.ds(0, TILE))]
    page_size = refs["k"].shape[1]
    low, high = refs["pages"][b, 0], refs["pages"][b, 1]

    def page(slot):
        # What a tile has beyond the pages that are needed, it takes from one of them: masked, and
        # finite. A row without any is never fetched.
        return refs["table"][b, jnp.clip(slot, low, high - 1)]

    if page_size >= TILE:
        tiles_a_page = jnp.int32(page_size // TILE)
        start = lax.rem(tile, tiles_a_page) * TILE
        return [((page(lax.div(tile, tiles_a_page)), pl.ds(start, TILE)), pl.ds(0, TILE))]
    pieces = TILE // page_size
    return [
        ((page(tile * pieces + i), pl.ds(0, page_size)), pl.ds(i * page_size, page_size))
        for i in range(pieces)
    ]


def _compute(options, refs, place, first, steps, stages, kept_rows):
    split, head, b, group = place
    start = group * ROWS
    q_tile, out_tile = refs["q_tile"].at[group], refs["out_tile"].at[group]
    lse_tile = refs["lse_tile"].at[group]
    whole_first, whole_stop = refs["tiles"][b, 2], refs["tiles"][b, 3]
    plgpu.copy_gmem_to_smem(
        refs["q"].at[b, head, pl.ds(start, ROWS)], q_tile, refs["q_ready"].at[group]
    )
    low, high = (
        _compat.load_to_registers(refs[name].at[b, pl.ds(start, ROWS)], ROW)
        for name in ("q_low", "q_high")
    )
    plgpu.barrier_wait(refs["q_ready"].at[group])

    def step(number, carry):
        acc, top, total = carry
        slot = lax.rem(number, jnp.int32(stages))
        tile = first + number
        plgpu.barrier_wait(refs["k_ready"].at[slot])
        keys = refs["k_tiles"].at[slot].transpose((1, 0))
        (x,) = tiles.products(options, (ROWS, TILE), (q_tile, keys))
        plgpu.barrier_arrive(refs["k_free"].at[slot])
        z, _ = tiles.bent(options, x)
        partial = (tile < whole_first) | (tile >= whole_stop)
        z = lax.cond(partial, lambda z: _hide(z, low - tile * TILE, high - tile * TILE), _same, z)
        new_top = jnp.maximum(top, z.max(axis=1))
        finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        p = jnp.exp2(z - tiles.spread(finite, z.shape))
        fade = jnp.exp2(top - finite)
        total = total * fade + p.sum(axis=1)
        acc = acc * tiles.spread(fade, acc.shape)
        plgpu.barrier_wait(refs["v_ready"].at[slot])
        staging = None if options.interpret is None else refs["p_tile"].at[group]
        acc = tiles.accumulate(
            options, acc, p.astype(q_tile.dtype), refs["v_tiles"].at[slot], staging
        )
        plgpu.barrier_arrive(refs["v_free"].at[slot])
        return acc, new_top, total

    nothing = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
    none = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
    Hv = refs["v"].shape[3]
    acc, top, total = lax.fori_loop(0, steps, step, (tiles.zeros((ROWS, Hv)), nothing, none))
    sees = top != -jnp.inf
    inverse = jnp.where(sees, 1 / total, 0.0)
    kept = pl.ds(0, kept_rows)
    lse_tile[...] = jnp.where(sees, top + jnp.log2(total), -jnp.inf)
    plgpu.commit_smem()
    at = (split, b, head, pl.ds(start, kept_rows))
    plgpu.copy_smem_to_gmem(lse_tile.at[kept], refs["lse"].at[at])
    acc = acc * tiles.spread(inverse, acc.shape)
    width = out_tile.shape[1]
    for column in range(0, Hv, width):
        out_tile[...] = acc[:, column : column + width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile.at[kept], refs["out"].at[(*at, pl.ds(column, width))])
        plgpu.wait_smem_to_gmem(0)


def _hide(z, low, high):
    """Logits with -inf but for columns low <= s < high of each row."""
    s = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA)
    seen = (s >= tiles.spread(low, z.shape)) & (s < tiles.spread(high, z.shape))
    return jnp.where(seen, z, -jnp.inf)


def _same(z):
    return z
