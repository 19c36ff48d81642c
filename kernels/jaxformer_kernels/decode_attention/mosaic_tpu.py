"""decode_attention for TPU: one Pallas kernel that streams each row's visible keys once.

A cache is read as it lies in memory, which on TPU depends on the head dim.

Heads of a multiple of 128 lie as [S, K, H]. Positions and heads form one axis: a block of it is one
long copy, and one matrix product with the queries of all heads. That product meets each key with
every head's queries and keeps its own head's; the matrix unit's columns for the others would stand
empty, and heads, which are neighbours within a tile, need not be taken apart.

Narrower heads lie as [K, H, S], so that no lane is empty, and each has a product of its own.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer_kernels import _compat, dispatch, hardware
from jaxformer_kernels.decode_attention import span
from jaxformer_kernels.decode_attention.call import FEATURES, Options

_LANES = 128
_BLOCK_BYTES = 1 << 20  # of keys; as many of values, and both twice, are in VMEM at once
_LOGITS = 1 << 18  # a block's, of all heads' queries against all heads' keys
_MOST_PAGES = 32  # in a block: each is a copy of its own
_MOST_ROWS = 512
_MOST_ENTRIES = 1 << 16  # of a page table, which lies in scalar memory


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a call is cut up.

    Attributes:
        T, N, K: sizes of the axes.
        S: positions a row has room for.
        size: positions in a block.
        pages: pages in a block; None where the cache is not paged.
        parts: runs that the blocks of a row are divided into.
        narrow: whether the cache lies as [K, H, S], not as [S, K, H].
        scalars: names of the scalar operands, in order.
    """

    T: int
    N: int
    K: int
    S: int
    size: int
    pages: int | None
    parts: int
    narrow: bool
    scalars: tuple[str, ...]


def mosaic_tpu(q, k, v, lengths, starts, page_table, sinks, options):
    """Decoding by one kernel; arguments and results are those of `reference`."""
    B, T, N, H = q.shape
    K, Hv = v.shape[2:]
    page_size = k.shape[1]
    S = page_size if page_table is None else page_size * page_table.shape[1]
    narrow = H % _LANES != 0
    size = _block_size(S, N * T, k, narrow, paged=page_table is not None)
    # A single long row is divided between a chip's two cores, where it has two.
    parts = 2 if B == 1 and size < S else 1
    first, end = _shares(*span.blocks(lengths, starts, T, options.left, S, size), parts)
    # Not `pl.num_programs` in the kernel: under `jax.vmap` it is not that of the grid it names.
    steps = jnp.maximum(jnp.max(end - first, keepdims=True), 1)
    scalars = {"first": first, "end": end, "steps": steps, "lengths": lengths}
    scalars["starts"] = jnp.zeros_like(lengths) if starts is None else starts
    if page_table is not None:
        seen = span.blocks(lengths, starts, T, options.left, S, page_size)
        scalars |= {"first_page": seen[0], "end_page": seen[1], "table": page_table}
    pages = None if page_table is None else size // page_size
    plan = _Plan(T, N, K, S, size, pages, parts, narrow, tuple(scalars))

    rows = jnp.swapaxes(q, 1, 2).reshape(B, N * T, H)
    if narrow:
        k, v = (jnp.transpose(x, (0, 2, 3, 1)) for x in (k, v))
    else:
        k, v = (x.reshape(x.shape[0], -1, x.shape[-1]) for x in (k, v))
    out, lse = _call(plan, options, scalars, rows, k, v)
    out = jnp.swapaxes(out.reshape(B, parts, N, T, Hv), 0, 1)
    lse = jnp.swapaxes(lse.reshape(B, parts, N, T), 0, 1)
    out, lse = span.merge(out, lse) if parts > 1 else (out[0], lse[0])
    out, lse = span.with_sinks(out, lse, sinks)
    return jnp.swapaxes(out, 1, 2), lse


def _block_size(S, rows, k, narrow, *, paged):
    """Positions in a block: of pages a multiple of a page's, else of what a tile has."""
    page_size, K, H = k.shape[1:]
    columns = min(
        _BLOCK_BYTES // (K * H * k.dtype.itemsize), _LOGITS // rows // (1 if narrow else K)
    )
    size = max(_LANES if narrow else 16, 1 << (max(columns, 1).bit_length() - 1))
    if paged:
        size = max(1, min(size // page_size, _MOST_PAGES)) * page_size
    return min(size, S)


def _shares(first, end, parts):
    """Blocks [B] of a row divided into `parts` runs: [B * parts]; an empty one has first = end."""
    share = -(-(end - first) // parts)[:, None]
    starts = first[:, None] + share * jnp.arange(parts, dtype=jnp.int32)
    starts, ends = (jnp.minimum(x, end[:, None]) for x in (starts, starts + share))
    return starts.reshape(-1), ends.reshape(-1)


def _call(plan, options, scalars, rows, k, v):
    """(out [B * parts, N * T, Hv], lse [B * parts, N * T, 1]) of each part of each row."""
    B, R, H = rows.shape
    Hv = v.shape[2]
    runs = B * plan.parts
    heads = 1 if plan.narrow else plan.K
    columns, row_index = np.arange(plan.size * heads), np.arange(R)
    constants = [
        np.array([columns // heads, columns % heads], np.int32),
        np.array([row_index % plan.T, row_index // (R // plan.K)], np.int32).T,
    ]
    constants = [_compat.vary(jnp.asarray(x), _compat.varying_axes(rows)) for x in constants]
    blocks = [
        (plan.K, width, plan.size) if plan.narrow else (plan.size * plan.K, width)
        for width in (H, Hv)
    ]
    scratch = [pltpu.VMEM((R, width), jnp.float32) for width in (1, 1, Hv)]
    if plan.pages is None:
        index = functools.partial(_cache_index, plan)
        cache_specs = [pl.BlockSpec((1, *block), index) for block in blocks]
    else:
        cache_specs = [pl.BlockSpec(memory_space=pl.ANY)] * 2
        scratch += [pltpu.VMEM((2, *block), k.dtype) for block in blocks]
        scratch += [pltpu.SemaphoreType.DMA((2, 2))]
    # As many steps as the row with most to do; a shorter row's last steps fetch nothing.
    steps = scalars["steps"][0]
    return pl.pallas_call(
        functools.partial(_kernel, plan, options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(runs, steps),
            in_specs=[
                *(pl.BlockSpec(x.shape, lambda *_: (0, 0)) for x in constants),
                pl.BlockSpec((1, R, H), lambda run, *_: (run // plan.parts, 0, 0)),
                *cache_specs,
            ],
            out_specs=[
                pl.BlockSpec((1, R, width), lambda run, *_: (run, 0, 0)) for width in (Hv, 1)
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[_compat.shape_like((runs, R, width), jnp.float32, rows) for width in (Hv, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=dispatch.interpreter() or False,
        name="decode_attention",
    )(*scalars.values(), *constants, rows, k, v)


def _cache_index(plan, run, step, *refs):
    """Which block of the cache step `step` of a run reads."""
    refs = dict(zip(plan.scalars, refs, strict=True))
    # Steps past the end name the last block again, and what is named again is not fetched again.
    block = jnp.minimum(refs["first"][run] + step, jnp.maximum(refs["end"][run] - 1, 0))
    b = run // plan.parts
    return (b, 0, 0, block) if plan.narrow else (b, block, 0)


def _page_copies(plan, scalars, run, step, pools, buffers, semaphores):
    """The copies that bring the pages of a run's step to one half of the buffers."""
    b, block, half = run // plan.parts, scalars["first"][run] + step, step % 2
    first, last = scalars["first_page"][b], scalars["end_page"][b] - 1
    for page in range(plan.pages):
        # In place of a page that no query sees, one that is seen: it is masked, and finite.
        number = scalars["table"][b, jnp.clip(block * plan.pages + page, first, last)]
        for which, (pool, buffer) in enumerate(zip(pools, buffers, strict=True)):
            extent = pool.shape[3 if plan.narrow else 1]
            part = pl.ds(page * extent, extent)
            target = buffer.at[half, :, :, part] if plan.narrow else buffer.at[half, part]
            yield pltpu.make_async_copy(pool.at[number], target, semaphores.at[half, which])


def _read_pages(plan, scalars, run, step, end, pools, scratch):
    """(k, v) of a run's step before its `end`, while those of the next step are on their way."""
    *buffers, semaphores = scratch

    def copies(step):
        return _page_copies(plan, scalars, run, step, pools, buffers, semaphores)

    @pl.when(step == 0)
    def _():
        for copy in copies(step):
            copy.start()

    @pl.when(step + 1 < end)
    def _():
        for copy in copies(step + 1):
            copy.start()

    for copy in copies(step):
        copy.wait()
    return tuple(buffer[step % 2] for buffer in buffers)


def _kernel(plan, options: Options, *refs):
    """One block of keys for all queries of a row."""
    scalars = dict(zip(plan.scalars, refs, strict=False))
    columns, rows, q, k, v, out, lse, top, total, mixed, *buffers = refs[len(plan.scalars) :]
    run, step = pl.program_id(0), pl.program_id(1)
    b = run // plan.parts
    block = scalars["first"][run] + step

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(block < scalars["end"][run])
    def _():
        if plan.pages is None:
            keys, values = k[0], v[0]
        else:
            steps = scalars["end"][run] - scalars["first"][run]
            keys, values = _read_pages(plan, scalars, run, step, steps, (k, v), buffers)
        x = options.scale * _logits(plan, q[0], keys)
        if options.softcap is not None:
            x = options.softcap * jnp.tanh(x / options.softcap)
        s = block * plan.size + columns[:1, :]
        place = scalars["lengths"][b] - plan.T + rows[:, :1]
        seen = (s <= place) & (s >= scalars["starts"][b])
        if not plan.narrow:
            seen &= columns[1:, :] == rows[:, 1:]
        if options.left is not None:
            seen &= s >= place - options.left
        x = jnp.where(seen, x, -jnp.inf)
        new_top = jnp.maximum(top[...], jnp.max(x, axis=1, keepdims=True))
        finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        p = jnp.exp(x - finite)
        fade = jnp.exp(top[...] - finite)
        values = _existing(plan, values, plan.S - block * plan.size)
        top[...] = new_top
        total[...] = total[...] * fade + jnp.sum(p, axis=1, keepdims=True)
        mixed[...] = mixed[...] * fade + _mixed(plan, p.astype(values.dtype), values)

    @pl.when(step == scalars["steps"][0] - 1)
    def _():
        seen = total[...] > 0
        safe = jnp.where(seen, total[...], 1.0)
        out[0] = mixed[...] / safe
        lse[0] = jnp.where(seen, top[...] + jnp.log(safe), -jnp.inf)


def _existing(plan, v, count):
    """`v` with zeros where a block has more positions than `count`, beyond the cache's end.

    What it has there is no number at all, which a weight of 0 would not remove.
    """
    if plan.S % plan.size == 0:
        return v
    axis, count = (2, count) if plan.narrow else (0, count * plan.K)
    return jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, axis) < count, v, 0)


def _logits(plan, q, k):
    """q [N * T, H] against a block of keys: [N * T, positions, or positions times heads]."""
    if not plan.narrow:
        return _product(q, k, ((1,), (1,)))
    per_head = q.shape[0] // plan.K
    parts = [
        _product(q[head * per_head : (head + 1) * per_head], k[head], ((1,), (0,)))
        for head in range(plan.K)
    ]
    return jnp.concatenate(parts, axis=0)


def _mixed(plan, p, v):
    """A block's values weighed by p: [N * T, Hv]."""
    if not plan.narrow:
        return _product(p, v, ((1,), (0,)))
    per_head = p.shape[0] // plan.K
    parts = [
        _product(p[head * per_head : (head + 1) * per_head], v[head], ((1,), (1,)))
        for head in range(plan.K)
    ]
    return jnp.concatenate(parts, axis=0)


def _product(a, b, contracted):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _limits(call):
    """What keeps `mosaic_tpu` from doing `call`."""
    yield from hardware.tpu_lacks(call.dtype)
    if call.N * call.T > _MOST_ROWS:
        yield f"{call.T} queries of {call.N} heads (at most {_MOST_ROWS} together)"
    narrow = call.H % _LANES != 0
    if narrow != (call.Hv % _LANES != 0):
        yield f"head dims of {call.H} and {call.Hv} (both multiples of {_LANES}, or neither)"
    if call.page_size is not None:
        if narrow and call.page_size % _LANES:
            yield (
                f"pages of {call.page_size} positions with a head dim of {call.H} (XLA lays such a "
                f"pool out anew at every step; one of the two must be a multiple of {_LANES})"
            )
        elif call.page_size * call.K % 16:
            yield f"pages of {call.page_size} positions of {call.K} heads (not a multiple of 16)"
        if call.B * call.S // call.page_size > _MOST_ENTRIES:
            yield f"a page table of more than {_MOST_ENTRIES} entries"


IMPLEMENTATION = dispatch.Implementation(
    run=mosaic_tpu,
    supports=FEATURES - {"float64", "heads_first"},
    limits=lambda call: tuple(_limits(call)),
)
