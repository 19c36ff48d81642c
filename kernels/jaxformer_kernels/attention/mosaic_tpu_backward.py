"""The backward kernel for TPU: the gradients of q, k and v in one pass of five products a tile.

It visits the blocks in the forward kernel's order. The gradient of a block of queries is summed in
vector memory over one row of blocks; those of all the keys stay there until every query head that
shares them has been through. So nothing is added up in main memory, and the order of every sum is
fixed. When the keys are too many to stay, they are taken in parts, and only the partial gradients
of q are added up outside.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxformer_kernels.attention import mosaic_tpu_arithmetic as arithmetic
from jaxformer_kernels.attention import mosaic_tpu_operands as operands
from jaxformer_kernels.attention import mosaic_tpu_tiles as tiles_lib

# Bytes of vector memory for the gradients of the keys and values that stay there.
RESIDENT_BYTES = 24 * 2**20


def run(options, q, k, v, bias, mask, seed, lse, delta, out_gradient):
    """Gradients of q, k and v.

    Args:
        options, q, k, v, bias, mask, seed: as in the forward pass.
        lse: [B, N, T] float32, as the forward pass gave it.
        delta: [B, N, T] float32: sum of out * d out over the head dim, less d lse.
        out_gradient: [B, T, N, Hv].
    """
    S = k.shape[1]
    part = _keys_at_once(q, v)
    if part >= S:
        return _run_part(options, q, k, v, bias, mask, seed, lse, delta, out_gradient, 0, q.dtype)
    dq, dks, dvs = jnp.zeros((), jnp.float32), [], []
    for first in range(0, S, part):
        keys = slice(first, min(first + part, S))
        part_bias = bias if bias is None or bias.shape[3] == 1 else bias[..., keys]
        dq_part, dk, dv = _run_part(
            options,
            q,
            k[:, keys],
            v[:, keys],
            part_bias,
            from_key(mask, q.shape[1], first, keys.stop - first),
            seed,
            lse,
            delta,
            out_gradient,
            first,
            jnp.float32,
        )
        dq = dq + dq_part
        dks.append(dk)
        dvs.append(dv)
    return dq.astype(q.dtype), jnp.concatenate(dks, axis=1), jnp.concatenate(dvs, axis=1)


def _keys_at_once(q, v):
    """How many keys' gradients may stay in vector memory: float32, and twice for the way out."""
    dims = operands.head_dim(q.shape[3]) + operands.head_dim(v.shape[3])
    fitting = RESIDENT_BYTES // (dims * (4 + 2 * q.dtype.itemsize))
    return max(fitting // tiles_lib.COLUMNS, 1) * tiles_lib.COLUMNS


def from_key(mask, T, first, count):
    """The mask as keys first ... first + count see it, which are then counted from 0."""
    moved = {
        name: getattr(mask, name) - first
        for name in ("q_offset", "kv_start", "kv_end")
        if getattr(mask, name) is not None
    }
    return dataclasses.replace(mask.cut((0, T), (first, count)), **moved)


def _run_part(options, q, k, v, bias, mask, seed, lse, delta, out_gradient, first_key, dq_dtype):
    B, T, N, H = q.shape
    S, K, Hv = v.shape[1:]
    tiles = tiles_lib.choose(T, S, N // K, q.dtype, mask)
    plan = operands.plan(options, tiles, q, v, mask, first_key)
    steps = tiles_lib.steps(mask, T, S, tiles)
    inputs = {
        "q": operands.heads_first(q, tiles.rows),
        "k": operands.heads_first(k, tiles.columns),
        "v": operands.heads_first(v, tiles.columns),
        "k_turned": operands.heads_first(k, tiles.columns, turned=True),
        "out_gradient": operands.heads_first(out_gradient, tiles.rows),
        **operands.rows(plan, lse, delta),
        **operands.mask_arrays(mask, plan),
    }
    if bias is not None:
        inputs["bias"] = operands.turned(bias, plan)
    padded_T = plan.row_blocks * tiles.rows
    padded_S = plan.column_blocks * tiles.columns
    padded_H, padded_Hv = operands.head_dim(H), operands.head_dim(Hv)
    results = operands.call(
        _kernel(plan, steps),
        plan,
        grid=(B, K, plan.head_blocks, steps.count),
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        prefetch={
            "words": jnp.asarray(steps.words),
            "numbers": operands.numbers(mask, plan, seed),
        },
        inputs=inputs,
        outputs={
            "dq_turned": ((B, N, padded_H, padded_T), dq_dtype),
            "dk": ((B, K, padded_S, padded_H), k.dtype),
            "dv": ((B, K, padded_S, padded_Hv), v.dtype),
        },
        scratch={
            "dq_sum": (tiles.heads, padded_H, tiles.rows),
            "dk_sum": (padded_S, padded_H),
            "dv_sum": (padded_S, padded_Hv),
        },
        locate=operands.on_steps(plan, steps),
        products=5,
        steps=steps,
    )
    dq = operands.heads_last(results["dq_turned"], T, H)
    dk = results["dk"][:, :, :S, :H].swapaxes(1, 2)
    return dq, dk, results["dv"][:, :, :S, :Hv].swapaxes(1, 2)


def _kernel(plan, steps):
    t, options = plan.tiles, plan.options

    def attention_backward(scalars, refs):
        place, kind, (first, last) = operands.step(plan, steps, scalars["words"])
        block, step = pl.program_id(2), pl.program_id(3)
        dq_sum, dk_sum, dv_sum = refs["dq_sum"], refs["dk_sum"], refs["dv_sum"]

        def each_block_of_keys(body):
            def at(index, _):
                body(pl.ds(pl.multiple_of(index * t.columns, t.columns), t.columns))
                return 0

            lax.fori_loop(0, plan.column_blocks, at, 0)

        @pl.when((block == 0) & (step == 0))
        def _():
            def clear(keys):
                dk_sum[keys, :] = jnp.zeros((t.columns, dk_sum.shape[1]), jnp.float32)
                dv_sum[keys, :] = jnp.zeros((t.columns, dv_sum.shape[1]), jnp.float32)

            each_block_of_keys(clear)

        @pl.when(first)
        def _():
            dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)

        def tile(masked, head, chunk):
            keys = arithmetic.tile(plan, chunk)
            q, out_gradient = refs["q"][head], refs["out_gradient"][head]
            dropped, before, _ = arithmetic.gradients(
                plan, scalars, refs, place, head, chunk, masked
            )
            dropped, before = dropped.astype(q.dtype), before.astype(q.dtype)
            start = place.column * t.columns + chunk
            sums = pl.ds(pl.multiple_of(start, t.chunk), t.chunk)
            dv_sum[sums, :] += arithmetic.dot(dropped, out_gradient, (1, 0))
            dk_sum[sums, :] += arithmetic.dot(before, q, (1, 0))
            dq_sum[head] += arithmetic.dot(refs["k_turned"][:, keys], before, (1, 0))

        @functools.partial(arithmetic.by_kind, plan, steps, kind)
        def _(masked, chunks):
            def of_head(head):
                for chunk in chunks:
                    tile(masked, head, chunk)

            arithmetic.each_head(plan, of_head)

        @pl.when(last)
        def _():
            refs["dq_turned"][...] = (dq_sum[...] * options.scale).astype(refs["dq_turned"].dtype)

        @pl.when((block == plan.head_blocks - 1) & (step == steps.count - 1))
        def _():
            def write(keys):
                dk = dk_sum[keys, :] * options.scale
                refs["dk"][keys, :] = dk.astype(refs["dk"].dtype)
                refs["dv"][keys, :] = dv_sum[keys, :].astype(refs["dv"].dtype)

            each_block_of_keys(write)

    return attention_backward
