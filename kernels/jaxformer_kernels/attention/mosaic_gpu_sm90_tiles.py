"""What the Hopper attention kernels share: tiles of logits in registers, and products of tiles.

A tile is [rows, columns] in the layout of a wgmma accumulator. In the forward and dQ kernels its
rows are queries and its columns keys; in the dK/dV kernel it is the other way round. Either way
the part of the mask that goes by position is an interval of visible columns for every row.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer_kernels import _compat
from jaxformer_kernels.attention import dropout as dropout_lib
from jaxformer_kernels.attention.mosaic_gpu_sm90_blocks import ROWS

LOG2E = math.log2(math.e)
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when a call is traced.

    Attributes:
        T, S: lengths before padding.
        scale, softcap: as in `attention`.
        rate: of dropout; 0 without.
        bias_gradient: whether the bias is the caller's, and not a mask in disguise.
        interpret: parameters of the interpreter, None on the device.
    """

    T: int
    S: int
    scale: float
    softcap: float | None
    rate: float
    bias_gradient: bool
    interpret: Any


def shared(shape, dtype):
    """A tile in shared memory as wgmma and TMA want it."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zeros(shape):
    """A float32 tile of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def spread(vector, shape, axis=0):
    """A vector that runs along `axis`, repeated along the other."""
    return lax.broadcast_in_dim(vector, shape, (axis,))


def multiply(options, accumulator, a, b):
    """Start to add the product of two tiles in shared memory to a wgmma accumulator."""
    if options.interpret is not None:
        # Its wgmma takes what lies there. A plain read it holds to have been waited for, and, with
        # the fence, to be over before the tile is fetched anew.
        for operand in (a, b):
            _ = operand[...]
        plgpu.commit_smem()
    plgpu.wgmma(accumulator, a, b)


def products(options, shape, *pairs):
    """The float32 products, each of this shape, of pairs of tiles in shared memory."""

    def run(*accumulators):
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            multiply(options, accumulator, a, b)
        return tuple(accumulator[...] for accumulator in accumulators)

    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32),) * len(pairs))


def accumulate(options, accumulator, a, b, staging):
    """`accumulator` plus the product of `a`, in registers, and `b`, in shared memory.

    The interpreter knows no wgmma with an operand in registers, nor one that starts from a value:
    there `a` goes through `staging`, shared memory for it alone; on the device that is None.
    """
    if options.interpret is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(accumulator))
    staging[...] = a
    plgpu.commit_smem()
    (added,) = products(options, accumulator.shape, (staging, b))
    return accumulator + added


def accumulate_and_multiply(options, accumulator, a, b, staging, shape, pair):
    """`accumulate`, and at the same time the product of a pair of tiles in shared memory."""
    if options.interpret is None:

        def run(refs):
            plgpu.wgmma(refs[0], a, b)
            plgpu.wgmma(refs[1], *pair)

        return pl.run_state(run)((plgpu.ACC.init(accumulator), plgpu.ACC.init(zeros(shape))))
    return accumulate(options, accumulator, a, b, staging), *products(options, shape, pair)


def stream(refs, places, steps, stages):
    """Fetch tiles, `steps` of them, through rings of `stages`; what the fetching warpgroup does.

    Args:
        refs: by name: the arrays, and for array x its ring x_tiles and the barriers x_ready and
            x_free.
        places: name of an array -> step -> index of the tile in it.
    """

    def free(step):
        slot = lax.rem(step, jnp.int32(stages))
        for name in places:
            plgpu.barrier_wait(refs[f"{name}_free"].at[slot])

    @pl.loop(0, steps)
    def _fetch(step):
        slot = lax.rem(step, jnp.int32(stages))
        for name, place in places.items():

            @pl.when(step >= stages)
            def _reuse(name=name):
                plgpu.barrier_wait(refs[f"{name}_free"].at[slot])

            source, ring = refs[name].at[place(step)], refs[f"{name}_tiles"].at[slot]
            plgpu.copy_gmem_to_smem(source, ring, refs[f"{name}_ready"].at[slot])

    # No barrier may go while another warpgroup still has to arrive at it.
    pl.loop(jnp.maximum(0, steps - stages), steps)(free)


def load(ref, layout):
    """A small array to registers; from global memory by single elements, if need be."""
    return _compat.load_to_registers(ref, layout)


def own_tile(tiles_of_groups, group, number):
    """The tile of a group, so that step `number` of a loop works out its address anew.

    The compiler would otherwise keep the descriptors of all its parts in registers all through the
    loop, two for every 16 columns. It cannot know that no step is as large as 2^30.
    """
    return tiles_of_groups.at[group + lax.shift_right_logical(number, 30)]


def ring_slot(number, stages):
    """The place of step `number` in a ring; of one stage too, not a constant (see `own_tile`)."""
    if stages == 1:
        return lax.shift_right_logical(number, 30)
    return lax.rem(number, jnp.int32(stages))


def batch_row(ref, b):
    """Index of batch row `b` into an array whose batch axis may be 1."""
    return b if ref.shape[0] > 1 else 0


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a warpgroup holds of its rows while it passes along the columns.

    Attributes:
        low, high: int32 [rows]: the visible columns; None where nothing is masked.
        segments: int32 [rows], or None.
    """

    low: Any = None
    high: Any = None
    segments: Any = None


def load_rows(refs, prefix, b, start):
    """The `Rows` of the 64 queries (prefix "q") or keys ("kv") from `start` on."""

    def vector(name):
        if name not in refs:
            return None
        ref = refs[name]
        return load(ref.at[batch_row(ref, b), pl.ds(start, ROWS)], ROW)

    return Rows(*(vector(f"{prefix}_{name}") for name in ("low", "high", "segments")))


def bent(options, x):
    """Raw products as logits times log2(e), before bias and mask; and the slope of the softcap."""
    if options.softcap is None:
        return x * (options.scale * LOG2E), None
    # By way of exp2, whose approximation is exact to 2^-22; the hardware's tanh is to 2^-11.
    grown = jnp.exp2(x * (2 * LOG2E * options.scale / options.softcap))
    tanh = 1 - 2 / (1 + grown)
    return tanh * (options.softcap * LOG2E), 1 - tanh * tanh


def add_bias(z, refs, name, b, n, row, column):
    """Logits with the tile of the bias added whose corner is (row, column)."""
    if name not in refs:
        return z
    bias = refs[name]
    full_rows, full_columns = bias.shape[2] > 1, bias.shape[3] > 1
    rows = pl.ds(row, z.shape[0]) if full_rows else 0
    columns = pl.ds(column, z.shape[1]) if full_columns else 0
    part = bias.at[batch_row(bias, b), n if bias.shape[1] > 1 else 0, rows, columns]
    if full_rows and full_columns:
        return z + load(part, plgpu.Layout.WGMMA).astype(jnp.float32) * LOG2E
    if full_rows:
        return z + spread(load(part, ROW).astype(jnp.float32) * LOG2E, z.shape)
    if full_columns:
        return z + spread(load(part, COLUMN).astype(jnp.float32) * LOG2E, z.shape, 1)
    return z + part[...].astype(jnp.float32) * LOG2E


def hide(z, rows, refs, column_segments, b, column, needed):
    """Logits with -inf where the mask hides them; `needed` is False where it hides nothing."""
    if rows.low is None:
        return z

    def hidden(z):
        place = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA)
        visible = place >= spread(rows.low - column, z.shape)
        visible &= place < spread(rows.high - column, z.shape)
        if rows.segments is not None:
            ids = refs[column_segments]
            part = load(ids.at[batch_row(ids, b), pl.ds(column, z.shape[1])], COLUMN)
            visible &= spread(rows.segments, z.shape) == spread(part, z.shape, 1)
        return jnp.where(visible, z, -jnp.inf)

    return lax.cond(needed, hidden, lambda z: z, z)


def kept(options, seed, b, n, shape, query, key, query_axis):
    """Dropout of a tile: True where the probability is kept.

    Args:
        seed: reference to uint32[2].
        b, n: indices of the batch row and query head.
        shape: of the tile.
        query, key: position of its first query and key.
        query_axis: the axis along which queries run.
    """
    iota = plgpu.broadcasted_iota
    layout = (ROW, COLUMN)[query_axis]
    t = query + iota(jnp.int32, (shape[query_axis],), 0, layout=layout)
    hashes = dropout_lib.rows((seed[0], seed[1]), b, n, t)
    row, other = (spread(x, shape, query_axis) for x in hashes)
    s = key + iota(jnp.int32, shape, 1 - query_axis, layout=plgpu.Layout.WGMMA)
    return dropout_lib.keep_in_rows(row, other, options.rate, s)


def weights(options, refs, rows, x, lse, corner, query_axis, partial):
    """Probabilities of one tile, recomputed in the backward pass.

    Args:
        rows: the tile's `Rows`.
        x: raw products q . k.
        lse: spread to the tile, in units of log2, inf where a query sees nothing.
        corner: (batch row, query head, first row, first column) of the tile.
        query_axis: 0 where rows are queries.
        partial: whether the mask hides part of the tile.

    Returns:
        probabilities before dropout, negative where dropped, which costs no registers; and the
        same times the slope of the softcap.
    """
    b, n, row, column = corner
    names = ("bias", "kv_segments") if query_axis == 0 else ("bias_by_key", "q_segments")
    z, slope = bent(options, x)
    z = add_bias(z, refs, names[0], b, n, row, column)
    p = jnp.exp2(hide(z, rows, refs, names[1], b, column, partial) - lse)
    if options.rate:
        query, key = (row, column) if query_axis == 0 else (column, row)
        p = jnp.where(kept(options, refs["seed"], b, n, x.shape, query, key, query_axis), p, -p)
    return p, p if slope is None else p * slope


def dropped(options, p):
    """What `weights` gave, after dropout."""
    return jnp.maximum(p, 0.0) * (1 / (1 - options.rate)) if options.rate else p


def logit_gradient(options, p, dp, delta):
    """Gradient of the logits, but for the scale.

    Args:
        p: what `weights` gave, its first result for the biased logits, its second for q . k.
        dp: raw products dout . v.
        delta: spread to the tile.
    """
    if options.rate:
        dp = jnp.where(p > 0, dp * (1 / (1 - options.rate)), 0.0)
        p = jnp.abs(p)
    return p * (dp - delta)


def visits(refs, prefix, b, i, columns):
    """(first, stop, partial): the tiles of columns that row tile `i` visits.

    `partial` tells, for such a tile, whether the mask hides part of it.
    """
    name = f"{prefix}_ranges"
    if name not in refs:
        return 0, columns, lambda j: False
    ranges = refs[name]
    row = batch_row(ranges, b)
    first, stop, whole_first, whole_stop = (ranges[row, i, x] for x in range(4))
    return first, stop, lambda j: (j < whole_first) | (j >= whole_stop)


def along_keys(refs, blocks, b, n, i):
    """How tile `i` of the queries of head `n` passes along the keys.

    Returns:
        first, stop, partial, as of `visits`; and `fetch`, which streams the tiles of k and v.
    """
    tiles_of_keys = pl.cdiv(refs["k"].shape[1], blocks.columns)
    first, stop, partial = visits(refs, "q", b, i, tiles_of_keys)
    head = lax.div(n, jnp.int32(refs["q"].shape[2] // refs["k"].shape[2]))

    def fetch():
        def place(step):
            return b, pl.ds((first + step) * blocks.columns, blocks.columns), head

        stream(refs, {"k": place, "v": place}, stop - first, blocks.stages)

    return first, stop, partial, fetch


def launch(options, body, operands, outputs, scratch, grid, groups):
    """Run a kernel of `groups` computing warpgroups and one that fetches.

    Args:
        body: called in every warpgroup with the dictionary of all references.
        operands: name -> array.
        outputs: name -> ShapeDtypeStruct.
        scratch: name -> type.
        grid: name -> size.

    Returns:
        the outputs, a tuple.
    """
    names = (*operands, *outputs)

    def entry(*refs):
        named = dict(zip(names, refs, strict=True))
        pl.run_scoped(
            lambda **scratch: body({**named, **scratch}), collective_axes="group", **scratch
        )

    entry.__name__ = body.__name__
    return plgpu.kernel(
        entry,
        out_type=tuple(outputs.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=options.interpret,
    )(*operands.values())


def roles(groups, compute, fetch):
    """Run `compute(group)` in the computing warpgroups and `fetch()` in the last."""
    group = lax.axis_index("group")

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        compute(group)

    @pl.when(group == groups)
    def _fetch():
        plgpu.set_max_registers(24, action="decrease")
        fetch()


def barriers(names, stages, groups):
    """The barriers of the rings of `stream`."""
    ready = {f"{name}_ready": plgpu.Barrier(num_barriers=stages) for name in names}
    free = {
        f"{name}_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages) for name in names
    }
    return ready | free
