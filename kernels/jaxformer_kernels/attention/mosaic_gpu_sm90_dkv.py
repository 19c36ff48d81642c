"""The gradients of keys and values on Hopper.

A block of the grid takes 64 keys a computing warpgroup, and passes along the queries of all the
heads that share them, so that grouped heads are summed in registers. Logits are computed as
k . q: their rows are keys. Every sum is in one fixed order, so that a rerun is bitwise equal.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer_kernels.attention import mosaic_gpu_sm90_tiles as tiles
from jaxformer_kernels.attention.mosaic_gpu_sm90_tiles import COLUMN, ROWS


def key_value_gradients(options, blocks, operands):
    """(dk [B, S, K, H], dv [B, S, K, Hv]) in k's dtype; arguments as of `query_gradient`."""
    if not blocks.apart:
        return _launch(options, blocks, operands, ("dk", "dv"))
    (dk,) = _launch(options, blocks, operands, ("dk",))
    (dv,) = _launch(options, blocks, operands, ("dv",))
    return dk, dv


def _launch(options, blocks, operands, wanted):
    q, k, v = (operands[name] for name in ("q", "k", "v"))
    H, Hv = k.shape[3], v.shape[3]
    tile = functools.partial(tiles.shared, dtype=q.dtype)
    vectors = plgpu.SMEM((blocks.stages, blocks.columns), jnp.float32)
    scratch = {
        "k_tile": tile((blocks.groups, ROWS, H)),
        "v_tile": tile((blocks.groups, ROWS, Hv)),
        "q_tiles": tile((blocks.stages, blocks.columns, H)),
        "dout_tiles": tile((blocks.stages, blocks.columns, Hv)),
        "lse_tiles": vectors,
        "delta_tiles": vectors,
        "rows_ready": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.groups),
        **tiles.barriers(("q", "dout", "lse", "delta"), blocks.stages, blocks.groups),
    }
    if options.interpret is not None:
        names = {"dv": "p_tile", "dk": "ds_tile"}
        scratch |= {names[x]: tile((blocks.groups, ROWS, blocks.columns)) for x in wanted}
    of = {"dk": k, "dv": v}
    outputs = {name: jax.ShapeDtypeStruct(of[name].shape, q.dtype) for name in wanted}
    grid = {"kv": k.shape[2], "j": pl.cdiv(k.shape[1], blocks.groups * ROWS), "b": k.shape[0]}

    def body(refs):
        _body(options, blocks, refs, wanted)

    body.__name__ = "attention_" + "_".join(wanted)
    return tiles.launch(options, body, operands, outputs, scratch, grid, blocks.groups)


def _body(options, blocks, refs, wanted):
    b, kv, j = (lax.axis_index(axis) for axis in ("b", "kv", "j"))
    heads = refs["q"].shape[2] // refs["k"].shape[2]
    steps_of_queries = pl.cdiv(refs["q"].shape[1], blocks.columns)
    first, stop, partial = tiles.visits(refs, "kv", b, j, steps_of_queries)
    count = jnp.int32(stop - first)

    def where(step):
        """(query head, tile of queries) of a step."""
        safe = jnp.maximum(count, 1)
        return kv * heads + lax.div(step, safe), first + lax.rem(step, safe)

    def fetch():
        def queries(step):
            n, i = where(step)
            return b, pl.ds(i * blocks.columns, blocks.columns), n

        def numbers(step):
            n, i = where(step)
            return b, n, pl.ds(i * blocks.columns, blocks.columns)

        places = {"q": queries, "dout": queries, "lse": numbers, "delta": numbers}
        tiles.stream(refs, places, count * heads, blocks.stages)

    def compute(group):
        _compute(options, blocks, refs, wanted, (b, kv, j, group), count * heads, where, partial)

    tiles.roles(blocks.groups, compute, fetch)


def _compute(options, blocks, refs, wanted, place, steps, where, partial):
    b, kv, j, group = place
    start = (j * blocks.groups + group) * ROWS
    at = (b, pl.ds(start, ROWS), kv)
    k_tile, v_tile = refs["k_tile"].at[group], refs["v_tile"].at[group]
    ready = refs["rows_ready"].at[group]
    plgpu.copy_gmem_to_smem(refs["k"].at[at], k_tile, ready)
    plgpu.copy_gmem_to_smem(refs["v"].at[at], v_tile, ready)
    rows = tiles.load_rows(refs, "kv", b, start)
    plgpu.barrier_wait(ready)
    shape = (ROWS, blocks.columns)
    staging = {
        name: refs[f"{name}_tile"].at[group] if f"{name}_tile" in refs else None
        for name in ("p", "ds")
    }

    def step(number, gradients):
        slot = tiles.ring_slot(number, blocks.stages)
        k_tile, v_tile = (
            tiles.own_tile(refs[name], group, number) for name in ("k_tile", "v_tile")
        )
        n, i = where(number)
        names = ("q", "dout", "lse", "delta")
        for name in names:
            plgpu.barrier_wait(refs[f"{name}_ready"].at[slot])
        q_tile, dout_tile, lse, delta = (refs[f"{name}_tiles"].at[slot] for name in names)
        (x,) = tiles.products(options, shape, (k_tile, q_tile.transpose((1, 0))))
        lse = tiles.spread(tiles.load(lse, COLUMN), shape, 1)
        plgpu.barrier_arrive(refs["lse_free"].at[slot])
        corner = (b, n, start, i * blocks.columns)
        p, bent_p = tiles.weights(options, refs, rows, x, lse, corner, 1, partial(i))
        result, pair = {}, (v_tile, dout_tile.transpose((1, 0)))
        if "dv" in wanted:
            mixed = tiles.dropped(options, p).astype(v_tile.dtype)
            operands = (options, gradients["dv"], mixed, dout_tile, staging["p"])
        if wanted == ("dk", "dv"):
            result["dv"], dp = tiles.accumulate_and_multiply(*operands, shape, pair)
        elif wanted == ("dv",):
            result["dv"] = tiles.accumulate(*operands)
        else:
            (dp,) = tiles.products(options, shape, pair)
        plgpu.barrier_arrive(refs["dout_free"].at[slot])
        if "dk" in wanted:
            delta = tiles.spread(tiles.load(delta, COLUMN), shape, 1)
            ds = tiles.logit_gradient(options, bent_p, dp, delta).astype(k_tile.dtype)
            result["dk"] = tiles.accumulate(options, gradients["dk"], ds, q_tile, staging["ds"])
        plgpu.barrier_arrive(refs["delta_free"].at[slot])
        plgpu.barrier_arrive(refs["q_free"].at[slot])
        return result

    own = {"dk": k_tile, "dv": v_tile}
    start_values = {name: tiles.zeros((ROWS, own[name].shape[1])) for name in wanted}
    gradients = lax.fori_loop(0, steps, step, start_values)
    for name, gradient in gradients.items():
        factor = options.scale if name == "dk" else 1.0
        own[name][...] = (gradient * factor).astype(own[name].dtype)
    plgpu.commit_smem()
    for name in wanted:
        plgpu.copy_smem_to_gmem(own[name], refs[name].at[at])
    plgpu.wait_smem_to_gmem(0)
