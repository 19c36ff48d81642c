"""The gradient of the bias on TPU: a kernel of its own, which only calls with a bias pay for.

The bias may broadcast along any axis, so its gradient is a sum over those. The grid runs over them
innermost: a block of the gradient stays in vector memory until it is complete, nothing larger than
the bias is ever in main memory, and the order of the sum is fixed.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxformer_kernels.attention import mosaic_tpu_arithmetic as arithmetic
from jaxformer_kernels.attention import mosaic_tpu_operands as operands
from jaxformer_kernels.attention import mosaic_tpu_tiles as tiles_lib
from jaxformer_kernels.attention import schedule
from jaxformer_kernels.attention.mosaic_tpu_operands import Place


def run(options, q, k, v, bias, mask, seed, lse, delta, out_gradient):
    """The gradient of `bias`, in its shape and dtype; arguments as in the backward pass."""
    B, T, N, _ = q.shape
    S = v.shape[1]
    tiles = tiles_lib.choose(T, S, 1, q.dtype, mask)
    plan = operands.plan(options, tiles, q, v, mask)
    steps = tiles_lib.steps(mask, T, S, tiles)
    codes = schedule.classify(mask, T, S, tiles.rows, tiles.columns)
    inputs = {
        "q": operands.heads_first(q, tiles.rows),
        "k": operands.heads_first(k, tiles.columns),
        "v": operands.heads_first(v, tiles.columns),
        "out_gradient": operands.heads_first(out_gradient, tiles.rows),
        **operands.rows(plan, lse, delta),
        **operands.mask_arrays(mask, plan),
        "bias": operands.turned(bias, plan),
    }
    sizes = (B, N, plan.row_blocks, plan.column_blocks)
    # Axes along which the bias is whole come first, those it is summed over last.
    order = sorted(range(4), key=lambda axis: bias.shape[axis] == 1)
    kept = sum(size != 1 for size in bias.shape)
    locate = functools.partial(_place, plan, order)
    results = operands.call(
        _kernel(plan, order, kept, codes.shape),
        plan,
        grid=tuple(sizes[axis] for axis in order),
        semantics=("parallel",) * kept + ("arbitrary",) * (4 - kept),
        prefetch={
            "codes": jnp.asarray(codes).reshape(-1),
            "numbers": operands.numbers(mask, plan, seed),
        },
        inputs=inputs,
        outputs={"dbias": (inputs["bias"].shape, jnp.float32)},
        scratch={},
        locate=locate,
        products=2,
        steps=steps,
    )
    dbias = results["dbias"].swapaxes(2, 3)[:, :, : bias.shape[2], : bias.shape[3]]
    return dbias.astype(bias.dtype)


def _place(plan, order, *grid):
    """The `Place` that the grid's indices, which come first in `grid`, name."""
    b, n, row, column = (grid[order.index(axis)] for axis in range(4))
    # Not //, which minds signs and so asks which TPU it is compiled for.
    return Place(b, lax.div(n, jnp.int32(plan.N // plan.K)), n, row, column)


def _code_index(shape, place):
    lists, row_blocks, column_blocks = shape
    row = place.row if lists == 1 else place.b * row_blocks + place.row
    return row * column_blocks + place.column


def _kernel(plan, order, kept, shape):
    def attention_bias_gradient(scalars, refs):
        grid = [pl.program_id(axis) for axis in range(4)]
        place = _place(plan, order, *grid)
        code = scalars["codes"][_code_index(shape, place)]
        dbias = refs["dbias"]

        starts = True
        for index in grid[kept:]:
            starts = starts & (index == 0)

        @pl.when(starts)
        def _():
            dbias[...] = jnp.zeros(dbias.shape, jnp.float32)

        def tile(masked, chunk):
            _, _, after = arithmetic.gradients(plan, scalars, refs, place, 0, chunk, masked)
            keys = slice(None) if dbias.shape[1] == 1 else arithmetic.tile(plan, chunk)
            for axis in range(2):
                if dbias.shape[1 + axis] == 1:
                    after = jnp.sum(after, axis=axis, keepdims=True)
            dbias[0, keys, :] += after

        for kind, masked in ((schedule.FULL, False), (schedule.PARTIAL, True)):

            @pl.when(code == kind)
            def _(masked=masked):
                for chunk in range(0, plan.tiles.columns, plan.tiles.chunk):
                    tile(masked, chunk)

    return attention_bias_gradient
