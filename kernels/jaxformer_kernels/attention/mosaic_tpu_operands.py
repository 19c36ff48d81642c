"""What the TPU kernels read: arrays padded and turned to suit them, and the blocks of each.

Tiles of logits stand on their side, [keys, queries]: what belongs to a query (running maximum, sum,
log-sum-exp, segment id) is then one row of lanes, which costs nothing to keep, to store or to
broadcast. Arrays that run along both, bias and mask, are turned to match.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer_kernels import _compat
from jaxformer_kernels.attention import mosaic_tpu_tiles as tiles_lib
from jaxformer_kernels.attention.mosaic_tpu_tiles import Options, Tiles

LOG2_E = 1.4426950408889634
PER_ROW = 3  # a row of the batch's offset, first visible key, end of the visible keys

# v5p has 64 MiB of vector memory.
MOST_VMEM = 60 * 2**20
_LIVE_TILES = 12
_SLACK = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one kernel.

    Attributes:
        options, tiles: see there.
        B, T, S, N, K, H, Hv: sizes of the axes before padding; S of the keys of this kernel.
        first_key: where these keys stand among all, for dropout.
        left, right: `Mask.bounds`.
        ends: whether the first and last visible key have to be looked at.
    """

    options: Options
    tiles: Tiles
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    first_key: int
    left: int | None
    right: int | None
    ends: bool

    @property
    def head_blocks(self) -> int:
        """Blocks of query heads to a key-value head."""
        return self.N // self.K // self.tiles.heads

    @property
    def row_blocks(self) -> int:
        return -(-self.T // self.tiles.rows)

    @property
    def column_blocks(self) -> int:
        return -(-self.S // self.tiles.columns)


def plan(options, tiles, q, v, mask, first_key=0) -> Plan:
    """The `Plan` for operands laid out as `attention` takes them."""
    B, T, N, H = q.shape
    S, K, Hv = v.shape[1:]
    left, right = mask.bounds
    ranged = mask.kv_start is not None or mask.kv_end is not None
    ends = ranged or S % tiles.columns != 0
    return Plan(options, tiles, B, T, S, N, K, H, Hv, first_key, left, right, ends)


def head_dim(size: int) -> int:
    """The head dim that a kernel works with: a whole or half a vector register's lanes."""
    half = tiles_lib.LANES // 2
    return half if size <= half else tiles_lib.up(size, tiles_lib.LANES)


def heads_first(x, length, turned=False):
    """[B, T, N, H] as [B, N, T', H'], zeros up to whole blocks; `turned`, [B, N, H', T']."""
    widths = ((0, 0), (0, -x.shape[1] % length), (0, 0), (0, head_dim(x.shape[3]) - x.shape[3]))
    x = jnp.pad(x, widths) if any(after for _, after in widths) else x
    return x.transpose((0, 2, 3, 1) if turned else (0, 2, 1, 3))


def heads_last(x, length, size):
    """[B, N, H', T'] as [B, T, N, H]: `heads_first` undone."""
    return x[:, :, :size, :length].transpose(0, 3, 1, 2)


def turned(x, plan, dtype=None):
    """[B, N, T, S], axes of 1 broadcasting, as [B, N, S', T'] padded to whole blocks."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    x = x if dtype is None else x.astype(dtype)
    # A row or column alone is cheap, and only wide types broadcast well in a register.
    x = x if x.shape[2] > 1 and x.shape[3] > 1 else x.astype(jnp.float32)
    rows = 0 if x.shape[2] == 1 else -x.shape[2] % plan.tiles.rows
    columns = 0 if x.shape[3] == 1 else -x.shape[3] % plan.tiles.columns
    x = jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, columns))) if rows or columns else x
    return x.swapaxes(2, 3)


def mask_arrays(mask, plan):
    """{name: array} of the mask's fields that run along queries or keys."""
    padded = mask.pad(-plan.T % plan.tiles.rows, -plan.S % plan.tiles.columns, plan.S)
    arrays = {}
    if mask.array is not None:
        arrays["visible"] = turned(padded.array, plan, jnp.int8)
    if mask.q_segment_ids is not None:
        arrays["q_ids"] = padded.q_segment_ids[:, None, :]
        arrays["kv_ids"] = padded.kv_segment_ids[:, :, None]
    return arrays


def numbers(mask, plan, seed):
    """int32 for scalar memory: `PER_ROW` for every row of the batch, then the dropout seed."""
    start = 0 if mask.kv_start is None else mask.kv_start
    end = plan.S if mask.kv_end is None else jnp.minimum(mask.kv_end, plan.S)
    columns = [
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), (plan.B,)) for x in (mask.q_offset, start, end)
    ]
    flat = jnp.stack(columns, axis=1).reshape(-1)
    if seed is None:
        return flat
    return jnp.concatenate([flat, lax.bitcast_convert_type(seed, jnp.int32)])


@dataclasses.dataclass(frozen=True)
class Place:
    """Which block a grid step works on.

    Attributes:
        b: row of the batch.
        kv_head: key-value head.
        head_block: block of query heads.
        row, column: block of queries, block of keys.
    """

    b: Any
    kv_head: Any
    head_block: Any
    row: Any
    column: Any


def specs(plan, locate, arrays):
    """A `pl.BlockSpec` for every array by its name, at the `Place` that `locate` finds."""
    t = plan.tiles

    def spec(block, index):
        return pl.BlockSpec(block, lambda *grid: index(locate(*grid)))

    def both(x):
        """Of an array [B, N, S, T] with axes of 1 that broadcast."""
        b, n, s, t_ = (size != 1 for size in x.shape)
        block = (None, t.heads if n else 1, t.columns if s else 1, t.rows if t_ else 1)
        return spec(
            block,
            lambda p: (
                p.b if b else 0,
                p.head_block if n else 0,
                p.column if s else 0,
                p.row if t_ else 0,
            ),
        )

    def shared(x, block, index):
        """Of an array the batch axis of which may broadcast."""
        return spec(block, lambda p: (0 if x.shape[0] == 1 else p.b, *index(p)))

    H, Hv = head_dim(plan.H), head_dim(plan.Hv)
    of_queries = {"q": H, "out_gradient": Hv}
    of_queries_turned = {"out_turned": Hv, "dq_turned": H}
    of_keys, of_keys_turned = {"k": H, "v": Hv}, {"k_turned": H, "v_turned": Hv}
    of_all_keys = {"dk": H, "dv": Hv}
    found = {}
    for name, x in arrays.items():
        if name in of_queries:
            block = (None, t.heads, t.rows, of_queries[name])
            found[name] = spec(block, lambda p: (p.b, p.head_block, p.row, 0))
        elif name in of_queries_turned:
            block = (None, t.heads, of_queries_turned[name], t.rows)
            found[name] = spec(block, lambda p: (p.b, p.head_block, 0, p.row))
        elif name in of_keys:
            block = (None, None, t.columns, of_keys[name])
            found[name] = spec(block, lambda p: (p.b, p.kv_head, p.column, 0))
        elif name in of_keys_turned:
            block = (None, None, of_keys_turned[name], t.columns)
            found[name] = spec(block, lambda p: (p.b, p.kv_head, 0, p.column))
        elif name in of_all_keys:
            block = (None, None, x.shape[2], of_all_keys[name])
            found[name] = spec(block, lambda p: (p.b, p.kv_head, 0, 0))
        elif name in ("lse", "delta"):
            block = (None, t.heads, 1, t.rows)
            found[name] = spec(block, lambda p: (p.b, p.head_block, 0, p.row))
        elif name == "q_ids":
            found[name] = shared(x, (None, 1, t.rows), lambda p: (0, p.row))
        elif name == "kv_ids":
            found[name] = shared(x, (None, t.columns, 1), lambda p: (p.column, 0))
        else:
            found[name] = both(x)
    return found


def rows(plan, lse, delta):
    """{name: array} of what the backward pass needs of every query, [B, N, 1, T'].

    The log-sum-exp is in the logits' unit, and +inf where a query sees nothing or is not there:
    exp2(x - inf) is 0 for every finite x.
    """
    past = ((0, 0), (0, 0), (0, -plan.T % plan.tiles.rows))
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)
    lse = jnp.pad(lse, past, constant_values=jnp.inf)
    return {"lse": lse[:, :, None], "delta": jnp.pad(delta, past)[:, :, None]}


def _word_index(steps, b, index):
    return index if steps.lists == 1 else b * steps.count + index


def on_steps(plan, steps):
    """A `locate` for the grid (batch, key-value head, block of its query heads, step)."""

    def locate(b, kv_head, block, index, words, *_):
        (row, column), *_ = tiles_lib.unpack(words[_word_index(steps, b, index)])
        return Place(b, kv_head, kv_head * plan.head_blocks + block, row, column)

    return locate


def step(plan, steps, words):
    """Within a kernel on that grid: `Place`, kind of block, (first, last) of its row of blocks."""
    b, kv_head, block, index = (pl.program_id(axis) for axis in range(4))
    (row, column), kind, ends = tiles_lib.unpack(words[_word_index(steps, b, index)])
    place = Place(b, kv_head, kv_head * plan.head_blocks + block, row, column)
    return place, kind, ends


def call(
    kernel, plan, *, grid, semantics, prefetch, inputs, outputs, scratch, locate, steps, products
):
    """`pl.pallas_call` of `kernel(prefetch, refs)`, both dicts from names to references.

    Args:
        kernel: the body.
        plan: its `Plan`.
        grid, semantics: sizes of the grid and `dimension_semantics`.
        prefetch: {name: array} for scalar memory.
        inputs: {name: array}.
        outputs: {name: (shape, dtype)}.
        scratch: {name: shape} of float32 scratch in vector memory.
        locate: as for `specs`.
        steps: the `Steps` that one head takes.
        products: matrix products for every tile.

    Returns:
        The outputs by name.
    """
    names = list(prefetch)  # the cast sorts them, and `locate` counts on their order
    prefetch, inputs = _compat.vary_alike(prefetch, inputs)
    prefetch = {name: prefetch[name] for name in names}
    like = next(iter(inputs.values()))
    shapes = {
        name: _compat.shape_like(shape, dtype, like) for name, (shape, dtype) in outputs.items()
    }
    arrays = {**inputs, **shapes}
    blocks = specs(plan, locate, arrays)
    names = [*arrays, *scratch]

    def body(*refs):
        scalars = dict(zip(prefetch, refs, strict=False))
        kernel(scalars, dict(zip(names, refs[len(prefetch) :], strict=True)))

    interpret = plan.options.interpret
    if interpret is True and _compat.varying_axes(like):
        # The plain interpreter does not follow arrays that vary over a mesh; this one does.
        interpret = pltpu.InterpretParams()
    results = pl.pallas_call(
        body,
        out_shape=list(shapes.values()),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=grid,
            in_specs=[blocks[name] for name in inputs],
            out_specs=[blocks[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=_vmem_limit(plan, arrays, blocks, scratch),
        ),
        cost_estimate=_cost(plan, steps, arrays, products),
        interpret=False if interpret is None else interpret,
        name=kernel.__name__,
    )(*prefetch.values(), *inputs.values())
    return dict(zip(outputs, results, strict=True))


def _vmem_limit(plan, arrays, blocks, scratch):
    """Bytes of vector memory to allow: blocks twice, scratch, and a few tiles' values."""
    tile = plan.tiles.chunk * plan.tiles.rows * 4
    bytes_ = (
        _SLACK + _LIVE_TILES * tile + sum(_padded_bytes(shape, 4) for shape in scratch.values())
    )
    for name, spec in blocks.items():
        block = [size for size in spec.block_shape if size is not None]
        bytes_ += 2 * _padded_bytes(block, arrays[name].dtype.itemsize)
    return min(max(bytes_, 16 * 2**20), MOST_VMEM)


def _padded_bytes(shape, itemsize):
    """What an array takes in memory that is laid out in tiles of 8 x 128 words."""
    *outer, sublanes, lanes = shape
    per_word = 4 // itemsize
    return (
        math.prod(outer)
        * tiles_lib.up(sublanes, 8 * per_word)
        * tiles_lib.up(lanes, 128)
        * itemsize
    )


def _cost(plan, steps, arrays, products):
    t = plan.tiles
    logits = plan.B * plan.N * steps.count * t.rows * t.columns
    return pl.CostEstimate(
        flops=products * (plan.H + plan.Hv) * logits,
        transcendentals=logits,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values()),
    )
