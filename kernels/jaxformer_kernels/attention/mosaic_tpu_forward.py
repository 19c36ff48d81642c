"""The forward kernel for TPU: the online softmax of FlashAttention-2 (Dao 2023, arXiv:2307.08691).

The grid is (batch, key-value heads, blocks of the query heads that share one, steps). In every step
one block of keys and values meets one block of queries of several heads; running maximum, sum and
output stay in vector memory from the first step of a row of blocks to its last.
"""

import functools
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxformer_kernels.attention import mosaic_tpu_arithmetic as arithmetic
from jaxformer_kernels.attention import mosaic_tpu_operands as operands
from jaxformer_kernels.attention import mosaic_tpu_tiles as tiles_lib
from jaxformer_kernels.attention.mosaic_tpu_operands import LOG2_E


def run(options, q, k, v, bias, sinks, mask, seed):
    """Attention's forward pass.

    Args:
        options: `Options`.
        q, k, v, bias, sinks, mask: as in `attention`, bias of four axes.
        seed: uint32[2], or None without dropout.

    Returns:
        out [B, T, N, Hv] in q's dtype, lse [B, N, T] float32.
    """
    B, T, N, _ = q.shape
    S, K, Hv = v.shape[1:]
    tiles = tiles_lib.choose(T, S, N // K, q.dtype, mask)
    plan = operands.plan(options, tiles, q, v, mask)
    steps = tiles_lib.steps(mask, T, S, tiles)
    prefetch = {"words": jnp.asarray(steps.words), "numbers": operands.numbers(mask, plan, seed)}
    if sinks is not None:
        prefetch["sinks"] = sinks.astype(jnp.float32) * LOG2_E
    inputs = {
        "q": operands.heads_first(q, tiles.rows),
        "k": operands.heads_first(k, tiles.columns),
        "v_turned": operands.heads_first(v, tiles.columns, turned=True),
        **operands.mask_arrays(mask, plan),
    }
    if bias is not None:
        inputs["bias"] = operands.turned(bias, plan)
    padded_T, padded_Hv = plan.row_blocks * tiles.rows, operands.head_dim(Hv)
    row = (tiles.heads, 1, tiles.rows)
    results = operands.call(
        _kernel(plan, steps),
        plan,
        grid=(B, K, plan.head_blocks, steps.count),
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        prefetch=prefetch,
        inputs=inputs,
        outputs={
            "out_turned": ((B, N, padded_Hv, padded_T), q.dtype),
            "lse": ((B, N, 1, padded_T), jnp.float32),
        },
        scratch={
            "logits": (2, tiles.chunk, tiles.rows),
            "top": row,
            "total": row,
            "acc": (tiles.heads, padded_Hv, tiles.rows),
        },
        locate=operands.on_steps(plan, steps),
        products=2,
        steps=steps,
    )
    out = operands.heads_last(results["out_turned"], T, Hv)
    return out, results["lse"][:, :, 0, :T]


def _block(plan, scalars, refs, place, masked, chunks, head):
    """One head's block, chunk by chunk of its keys.

    While the vector unit works on one chunk's weights, the matrix unit works on the logits of the
    next. Hence the order below, and the logits' own place in vector memory, from which the compiler
    need not keep them in registers: a fifth to a third fewer cycles.
    """
    q, waiting, acc = refs["q"][head], refs["logits"], refs["acc"]
    rate = plan.options.rate

    def prepare(index):
        """Put a chunk's logits in their place; their maximum, for each query."""
        chunk = chunks[index]
        k = refs["k"][arithmetic.tile(plan, chunk), :]
        x, _ = arithmetic.logits(plan, scalars, refs, place, head, chunk, k, q, masked)
        waiting[index % 2] = x
        return jnp.max(x, axis=0, keepdims=True)

    top, total = refs["top"][head], refs["total"][head]
    best = prepare(0)
    for index, chunk in enumerate(chunks):
        new = jnp.maximum(top, best)
        finite = jnp.where(new == -jnp.inf, 0.0, new)
        shrink = jnp.exp2(top - finite)
        if index + 1 < len(chunks):
            best = prepare(index + 1)
        weights = jnp.exp2(waiting[index % 2] - finite)
        total = total * shrink + jnp.sum(weights, axis=0, keepdims=True)
        if rate:
            keep = arithmetic.kept(plan, scalars, place, head, chunk)
            weights = jnp.where(keep, weights * (1 / (1 - rate)), 0.0)
        v = refs["v_turned"][:, arithmetic.tile(plan, chunk)]
        acc[head] = acc[head] * shrink + arithmetic.dot(v, weights.astype(v.dtype), (1, 0))
        top = new
    refs["top"][head], refs["total"][head] = top, total


def _kernel(plan, steps):
    def attention_forward(scalars, refs):
        place, kind, (first, last) = operands.step(plan, steps, scalars["words"])
        top, total, acc = refs["top"], refs["total"], refs["acc"]

        @pl.when(first)
        def _():
            top[...] = jnp.full(top.shape, -jnp.inf, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)
            acc[...] = jnp.zeros(acc.shape, jnp.float32)

        @functools.partial(arithmetic.by_kind, plan, steps, kind)
        def _(masked, chunks):
            block = functools.partial(_block, plan, scalars, refs, place, masked, chunks)
            arithmetic.each_head(plan, block)

        @pl.when(last)
        def _():
            def finish(head):
                best, sum_, numerator = top[head], total[head], acc[head]
                sees = best != -jnp.inf
                if "sinks" in scalars:
                    sink = scalars["sinks"][place.head_block * plan.tiles.heads + head]
                    with_sink = jnp.maximum(best, sink)
                    finite = jnp.where(with_sink == -jnp.inf, 0.0, with_sink)
                    shrink = jnp.exp2(best - finite)
                    sum_ = sum_ * shrink + jnp.exp2(sink - finite)
                    numerator, best = numerator * shrink, with_sink
                inverse = jnp.where(sees, 1 / sum_, 0.0)
                refs["out_turned"][head] = (numerator * inverse).astype(refs["out_turned"].dtype)
                lse = best * math.log(2) + jnp.log(sum_)
                refs["lse"][head] = jnp.where(sees, lse, -jnp.inf)

            arithmetic.each_head(plan, finish)

    return attention_forward
