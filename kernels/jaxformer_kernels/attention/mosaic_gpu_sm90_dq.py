"""The gradient of the queries on Hopper, and that of the bias.

dQ: a block of the grid takes 64 queries a computing warpgroup and passes along the keys, as the
forward pass does. Bias: a block takes one tile of it and passes along the batch rows and heads that
share it. Every sum is in one fixed order, so that a rerun is bitwise equal.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxformer_kernels.attention import mosaic_gpu_sm90_tiles as tiles
from jaxformer_kernels.attention.mosaic_gpu_sm90_tiles import ROW, ROWS


def query_gradient(options, blocks, operands):
    """Gradient of the queries, [B, T, N, H] in q's dtype.

    Args:
        options: `mosaic_gpu_sm90_tiles.Options`.
        blocks: `mosaic_gpu_sm90_blocks.Blocks`.
        operands: by name: q, k, v, and dout [B, T, N, Hv]; lse (units of log2, inf where a query
            sees nothing) and delta, float32 [B, N, padded T]; those of the mask, bias and seed.
    """
    q, v = operands["q"], operands["v"]
    B, T, N, H = q.shape
    Hv = v.shape[3]
    tile = functools.partial(tiles.shared, dtype=q.dtype)
    scratch = {
        "q_tile": tile((blocks.groups, ROWS, H)),
        "dout_tile": tile((blocks.groups, ROWS, Hv)),
        "k_tiles": tile((blocks.stages, blocks.columns, H)),
        "v_tiles": tile((blocks.stages, blocks.columns, Hv)),
        "rows_ready": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.groups),
        **tiles.barriers(("k", "v"), blocks.stages, blocks.groups),
    }
    if options.interpret is not None:
        scratch["ds_tile"] = tile((blocks.groups, ROWS, blocks.columns))
    outputs = {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    grid = {"n": N, "i": pl.cdiv(T, blocks.groups * ROWS), "b": B}

    def attention_dq(refs):
        _query_body(options, blocks, refs)

    return tiles.launch(options, attention_dq, operands, outputs, scratch, grid, blocks.groups)[0]


def _query_body(options, blocks, refs):
    b, n = lax.axis_index("b"), lax.axis_index("n")
    i = pl.cdiv(refs["q"].shape[1], blocks.groups * ROWS) - 1 - lax.axis_index("i")
    first, stop, partial, fetch = tiles.along_keys(refs, blocks, b, n, i)

    def compute(group):
        start = (i * blocks.groups + group) * ROWS
        at = (b, pl.ds(start, ROWS), n)
        q_tile, dout_tile = refs["q_tile"].at[group], refs["dout_tile"].at[group]
        ready = refs["rows_ready"].at[group]
        plgpu.copy_gmem_to_smem(refs["q"].at[at], q_tile, ready)
        plgpu.copy_gmem_to_smem(refs["dout"].at[at], dout_tile, ready)
        rows = tiles.load_rows(refs, "q", b, start)
        shape = (ROWS, blocks.columns)
        lse, delta = (
            tiles.load(refs[name].at[b, n, pl.ds(start, ROWS)], ROW) for name in ("lse", "delta")
        )
        plgpu.barrier_wait(ready)

        def step(number, dq):
            slot = tiles.ring_slot(number, blocks.stages)
            j = first + number
            k_tile, v_tile = refs["k_tiles"].at[slot], refs["v_tiles"].at[slot]
            q_tile, dout_tile = (
                tiles.own_tile(refs[name], group, number) for name in ("q_tile", "dout_tile")
            )
            plgpu.barrier_wait(refs["k_ready"].at[slot])
            plgpu.barrier_wait(refs["v_ready"].at[slot])
            logits = q_tile, k_tile.transpose((1, 0))
            values = dout_tile, v_tile.transpose((1, 0))
            x, *dp = tiles.products(options, shape, logits, *([] if blocks.apart else [values]))
            corner = (b, n, start, j * blocks.columns)
            lse_tile = tiles.spread(lse, shape)
            _, p = tiles.weights(options, refs, rows, x, lse_tile, corner, 0, partial(j))
            (dp,) = dp or tiles.products(options, shape, values)
            plgpu.barrier_arrive(refs["v_free"].at[slot])
            ds = tiles.logit_gradient(options, p, dp, tiles.spread(delta, shape))
            staging = refs["ds_tile"].at[group] if "ds_tile" in refs else None
            dq = tiles.accumulate(options, dq, ds.astype(q_tile.dtype), k_tile, staging)
            plgpu.barrier_arrive(refs["k_free"].at[slot])
            return dq

        dq = lax.fori_loop(0, stop - first, step, tiles.zeros((ROWS, q_tile.shape[1])))
        q_tile[...] = (dq * options.scale).astype(q_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, refs["dq"].at[at])
        plgpu.wait_smem_to_gmem(0)

    tiles.roles(blocks.groups, compute, fetch)


def bias_gradient(options, operands, shape):
    """Gradient of the bias, float32, before the sum over T or S where it broadcasts there.

    Args:
        options, operands: as for `query_gradient`.
        shape: of the bias; only its first two axes matter.

    Returns:
        float32 [*shape[:2], T, S].
    """
    q, k, v = (operands[name] for name in ("q", "k", "v"))
    B, T, N, H = q.shape
    S, Hv = k.shape[1], v.shape[3]
    members_b, members_n = (B if shape[0] == 1 else 1), (N if shape[1] == 1 else 1)
    stages = 1 if max(H, Hv) > 128 else 2
    columns = ROWS
    tile = functools.partial(tiles.shared, dtype=q.dtype)
    wide = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    scratch = {
        **{f"{x}_tiles": tile((stages, ROWS, H)) for x in ("q", "k")},
        **{f"{x}_tiles": tile((stages, ROWS, Hv)) for x in ("v", "dout")},
        "dbias_tile": plgpu.SMEM((ROWS, columns), jnp.float32, transforms=wide),
        **tiles.barriers(("q", "k", "v", "dout"), stages, 1),
    }
    rows_of_tiles, columns_of_tiles = pl.cdiv(T, ROWS), pl.cdiv(S, columns)
    padded = (*shape[:2], rows_of_tiles * ROWS, columns_of_tiles * columns)
    outputs = {"dbias": jax.ShapeDtypeStruct(padded, jnp.float32)}
    grid = {"j": columns_of_tiles, "i": rows_of_tiles, "bn": shape[0] * shape[1]}

    def attention_dbias(refs):
        i, j, bn = (lax.axis_index(axis) for axis in ("i", "j", "bn"))
        bias_n = lax.rem(bn, jnp.int32(shape[1]))
        bias_b = lax.div(bn, jnp.int32(shape[1]))

        def member(step):
            b = bias_b * (B // shape[0] if shape[0] > 1 else 0) + lax.div(
                step, jnp.int32(members_n)
            )
            return b, bias_n + lax.rem(step, jnp.int32(members_n))

        def queries(step):
            b, n = member(step)
            return b, pl.ds(i * ROWS, ROWS), n

        def keys(step):
            b, n = member(step)
            return b, pl.ds(j * columns, columns), lax.div(n, jnp.int32(N // k.shape[2]))

        steps = members_b * members_n

        def fetch():
            places = {"q": queries, "k": keys, "v": keys, "dout": queries}
            tiles.stream(refs, places, steps, stages)

        def compute(group):
            def step(number, dbias):
                b, n = member(number)
                slot = tiles.ring_slot(number, stages)
                for name in ("q", "k", "v", "dout"):
                    plgpu.barrier_wait(refs[f"{name}_ready"].at[slot])
                ring = {name: refs[f"{name}_tiles"].at[slot] for name in ("q", "k", "v", "dout")}
                x, dp = tiles.products(
                    options,
                    (ROWS, columns),
                    (ring["q"], ring["k"].transpose((1, 0))),
                    (ring["dout"], ring["v"].transpose((1, 0))),
                )
                for name in ring:
                    plgpu.barrier_arrive(refs[f"{name}_free"].at[slot])
                lse, delta = (
                    tiles.load(refs[name].at[b, n, pl.ds(i * ROWS, ROWS)], ROW)
                    for name in ("lse", "delta")
                )
                rows, corner = (
                    tiles.load_rows(refs, "q", b, i * ROWS),
                    (b, n, i * ROWS, j * columns),
                )
                lse = tiles.spread(lse, x.shape)
                p, _ = tiles.weights(options, refs, rows, x, lse, corner, 0, True)
                ds = tiles.logit_gradient(options, p, dp, tiles.spread(delta, x.shape))
                return dbias + ds

            dbias = lax.fori_loop(0, steps, step, tiles.zeros((ROWS, columns)))
            refs["dbias_tile"][...] = dbias
            plgpu.commit_smem()
            place = pl.ds(i * ROWS, ROWS), pl.ds(j * columns, columns)
            plgpu.copy_smem_to_gmem(refs["dbias_tile"], refs["dbias"].at[bias_b, bias_n, *place])
            plgpu.wait_smem_to_gmem(0)

        tiles.roles(1, compute, fetch)

    (dbias,) = tiles.launch(options, attention_dbias, operands, outputs, scratch, grid, 1)
    return dbias[:, :, : options.T, : options.S]
