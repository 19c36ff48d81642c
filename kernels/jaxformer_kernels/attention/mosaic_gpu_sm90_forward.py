"""The forward pass on Hopper: warp-specialised FlashAttention (Shah et al. 2024, arXiv:2407.08608).

A block of the grid takes 128 queries of one head. One warpgroup does nothing but fetch: it streams
tiles of k and v through a ring of stages by TMA. Two warpgroups compute, 64 queries each, out of
phase: while one multiplies on the tensor cores, the other takes its exponentials.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer_kernels.attention import mosaic_gpu_sm90_tiles as tiles
from jaxformer_kernels.attention.mosaic_gpu_sm90_tiles import LOG2E, ROW, ROWS

GROUPS = 2  # they take turns, so it must be two


def forward(options, blocks, operands):
    """Attention, and its log-sum-exp in units of log2.

    Args:
        options: `mosaic_gpu_sm90_tiles.Options`.
        blocks: `mosaic_gpu_sm90_blocks.Blocks`.
        operands: by name, as `mosaic_gpu.prepare` makes them: q [B, T, N, H], k [B, S, K, H],
            v [B, S, K, Hv], head dims multiples of 64; and those of bias, sinks, seed, q_ranges,
            q_low, q_high, q_segments and kv_segments that the call has.

    Returns:
        out [B, T, N, Hv] in q's dtype; lse float32 [B, N, T to the next multiple of 128].
    """
    q, v = operands["q"], operands["v"]
    B, T, N, H = q.shape
    Hv = v.shape[3]
    steps_of_queries = pl.cdiv(T, GROUPS * ROWS)
    tile = functools.partial(tiles.shared, dtype=q.dtype)
    scratch = {
        "q_tile": tile((GROUPS, ROWS, H)),
        "k_tiles": tile((blocks.stages, blocks.columns, H)),
        "v_tiles": tile((blocks.stages, blocks.columns, Hv)),
        "lse_tile": plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=GROUPS),
        "turn": plgpu.Barrier(num_arrivals=GROUPS),
        **tiles.barriers(("k", "v"), blocks.stages, GROUPS),
    }
    if Hv != H:
        scratch["out_tile"] = tile((GROUPS, ROWS, Hv))
    if options.interpret is not None:
        scratch["p_tile"] = tile((GROUPS, ROWS, blocks.columns))
    outputs = {
        "out": jax.ShapeDtypeStruct((B, T, N, Hv), q.dtype),
        "lse": jax.ShapeDtypeStruct((B, N, steps_of_queries * GROUPS * ROWS), jnp.float32),
    }
    grid = {"n": N, "i": steps_of_queries, "b": B}

    def attention_forward(refs):
        _body(options, blocks, refs)

    return tiles.launch(options, attention_forward, operands, outputs, scratch, grid, GROUPS)


def _body(options, blocks, refs):
    b, n = lax.axis_index("b"), lax.axis_index("n")
    # Under a causal mask the last queries have the most keys: they start first.
    i = pl.cdiv(refs["q"].shape[1], GROUPS * ROWS) - 1 - lax.axis_index("i")
    first, stop, partial, fetch = tiles.along_keys(refs, blocks, b, n, i)

    def compute(group):
        _compute(options, blocks, refs, (b, n, i, group), first, stop, partial)

    tiles.roles(GROUPS, compute, fetch)


def _compute(options, blocks, refs, place, first, stop, partial):
    b, n, i, group = place
    start = (i * GROUPS + group) * ROWS
    Hv = refs["v"].shape[3]
    q_tile, lse_tile = refs["q_tile"].at[group], refs["lse_tile"].at[group]
    # Where it fits, the output leaves by the way the queries came.
    out_tile = refs["out_tile"].at[group] if "out_tile" in refs else q_tile
    at = (b, pl.ds(start, ROWS), n)
    plgpu.copy_gmem_to_smem(refs["q"].at[at], q_tile, refs["q_ready"].at[group])
    rows = tiles.load_rows(refs, "q", b, start)
    plgpu.barrier_wait(refs["q_ready"].at[group])
    steps = stop - first

    def rendezvous():
        plgpu.barrier_arrive(refs["turn"])
        plgpu.barrier_wait(refs["turn"])

    @pl.when(steps > 0)
    def _first_keys():
        plgpu.barrier_wait(refs["k_ready"].at[0])

    # From here on the second group is half a step behind the first.
    pl.when(group == 1)(rendezvous)

    def step(number, carry):
        acc, top, total = carry
        slot = tiles.ring_slot(number, blocks.stages)
        j = first + number

        def logits(accumulator):
            q_tile = tiles.own_tile(refs["q_tile"], group, number)
            k_tile = refs["k_tiles"].at[slot].transpose((1, 0))
            tiles.multiply(options, accumulator, q_tile, k_tile)
            rendezvous()
            return accumulator[...]

        x = pl.run_scoped(logits, plgpu.ACC((ROWS, blocks.columns), jnp.float32))
        plgpu.barrier_arrive(refs["k_free"].at[slot])
        state = acc, top, total
        p, acc, top, total = _softmax(options, refs, rows, (b, n, start, j), x, state, partial(j))
        p = p.astype(q_tile.dtype)
        acc, top, total, p = lax.optimization_barrier((acc, top, total, p))
        plgpu.barrier_arrive(refs["turn"])
        plgpu.barrier_wait(refs["v_ready"].at[slot])
        plgpu.barrier_wait(refs["turn"])
        staging = None if options.interpret is None else refs["p_tile"].at[group]
        acc = tiles.accumulate(options, acc, p, refs["v_tiles"].at[slot], staging)
        plgpu.barrier_arrive(refs["v_free"].at[slot])

        @pl.when(number + 1 < steps)
        def _next_keys():
            plgpu.barrier_wait(refs["k_ready"].at[lax.rem(number + 1, jnp.int32(blocks.stages))])

        return acc, top, total

    nothing = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
    none = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
    carry = tiles.zeros((ROWS, Hv)), nothing, none
    acc, top, total = lax.fori_loop(0, steps, step, carry)
    pl.when(group == 0)(rendezvous)

    sees = top != -jnp.inf
    shrink = 1.0
    if "sinks" in refs:
        sink = refs["sinks"][n] * LOG2E
        with_sink = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - with_sink)
        total, top = total * shrink + jnp.exp2(sink - with_sink), with_sink
    inverse = jnp.where(sees, shrink / total, 0.0)
    out_tile[...] = (acc * tiles.spread(inverse, acc.shape)).astype(out_tile.dtype)
    lse_tile[...] = jnp.where(sees, top + jnp.log2(total), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, refs["out"].at[at])
    plgpu.copy_smem_to_gmem(lse_tile, refs["lse"].at[b, n, pl.ds(start, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _softmax(options, refs, rows, place, x, state, partial):
    """One step of the online softmax: probabilities after dropout, and the state rescaled."""
    b, n, start, j = place
    acc, top, total = state
    column = j * x.shape[1]
    z, _ = tiles.bent(options, x)
    z = tiles.add_bias(z, refs, "bias", b, n, start, column)
    z = tiles.hide(z, rows, refs, "kv_segments", b, column, partial)
    new_top = jnp.maximum(top, z.max(axis=1))
    finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    p = jnp.exp2(z - tiles.spread(finite, z.shape))
    shrink = jnp.exp2(top - finite)
    total = total * shrink + p.sum(axis=1)
    acc = acc * tiles.spread(shrink, acc.shape)
    if options.rate:
        keep = tiles.kept(options, refs["seed"], b, n, z.shape, start, column, 0)
        p = jnp.where(keep, p * (1 / (1 - options.rate)), 0.0)
    return p, acc, new_top, total
