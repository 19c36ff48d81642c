"""linear_cross_entropy for TPU: a Pallas kernel in which logits never leave the chip's VMEM.

A block of tokens meets the vocabulary block by block, with a running maximum, sum and likeliest
token, as in the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). These are kept lane
by lane, one for every 128th token of the vocabulary, and put together across lanes once, at the
end. The kernel serves calls that nobody differentiates. Gradients come from the tiles of `xla`,
which give statistics too, with three products; after this kernel they would need a fourth.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer_kernels import _compat, dispatch, hardware
from jaxformer_kernels.linear_cross_entropy import xla
from jaxformer_kernels.linear_cross_entropy.call import FEATURES

# Tokens and vocabulary of a block. With so many tokens w is read often enough to keep the matrix
# unit of every TPU busy: 1024 operations a byte, where a v6e needs 560.
ROWS = 1024
COLUMNS = 512
_BYTES = 40 << 20  # of VMEM, as far as they can be foreseen
_MOST_BYTES = 60 << 20  # and with what the compiler adds; a v5p has 63 MiB, a v5e and a v6e 127
PART = 256
_LANES = 128
_GROUP = 32  # rows whose running values fit into registers
# A logit that does not exist; finite, so that lanes without any other logit stay numbers.
_NOTHING = -1e30


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a call is cut up: `rows` tokens, `columns` of the vocabulary, `inner` of D at a time."""

    rows: int
    columns: int
    inner: int
    whole: bool


def _plan(tokens, D, V, dtype):
    """The largest part of D at a time that fits; None where none does."""
    rows = min(ROWS, -(-tokens // _GROUP) * _GROUP)
    columns = min(COLUMNS, -(-V // _LANES) * _LANES)
    for parts in range(1, D // _LANES + 1 if D % _LANES == 0 else 2):
        inner = D // parts
        if parts > 1 and (D % parts or inner % _LANES):
            continue
        # Operands twice, for one is fetched while the other is used; float32 ones are split into
        # bfloat16 parts besides. The product and its copy. The rest is a tile of lanes wide.
        entry = 4 if dtype == jnp.bfloat16 else 16
        operands = entry * (rows + columns) * inner
        if operands + 8 * rows * columns + 44 * rows * _LANES <= _BYTES:
            return _Plan(rows, columns, inner, parts == 1)
    return None


def statistics(options, x, w, labels):
    """Every token's statistics from the kernel; see `xla.differentiable`."""
    shape, D = labels.shape, x.shape[-1]
    V = w.shape[0 if options.transposed else 1]
    x, labels = x.reshape(-1, D), labels.reshape(-1, 1)
    tokens = x.shape[0]
    plan = _plan(tokens, D, V, x.dtype)
    grid = (-(-tokens // plan.rows), -(-V // plan.columns), D // plan.inner)
    if options.transposed:
        w_spec = pl.BlockSpec((plan.columns, plan.inner), lambda i, j, k: (j, k))
    else:
        w_spec = pl.BlockSpec((plan.inner, plan.columns), lambda i, j, k: (k, j))
    running = pltpu.VMEM((plan.rows, _LANES), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_kernel, plan, options, V),
        grid=grid,
        in_specs=[
            pl.BlockSpec((plan.rows, plan.inner), lambda i, j, k: (i, k)),
            w_spec,
            pl.BlockSpec((plan.rows, 1), lambda i, j, k: (i, 0)),
        ],
        out_specs=pl.BlockSpec((plan.rows, _LANES), lambda i, j, k: (i, 0)),
        out_shape=_compat.shape_like((tokens, _LANES), jnp.float32, x),
        scratch_shapes=[
            pltpu.VMEM((plan.rows, plan.columns), jnp.float32),
            *[running] * 4,
            pltpu.VMEM((plan.rows, _LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_MOST_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * D * V,
            transcendentals=tokens * V,
            bytes_accessed=(tokens * D + grid[0] * D * V) * x.dtype.itemsize,
        ),
        interpret=dispatch.interpreter() or False,
        name="linear_cross_entropy",
    )(x, w, labels)
    lse, of_label, mean, correct, top = (found[:, lane].reshape(shape) for lane in range(5))
    return (
        lse,
        of_label,
        mean if options.label_smoothing else None,
        correct == 1,
        None if options.vocabulary_axis is None else top,
    )


def _kernel(plan, options, V, x, w, labels, out, logits, top, total, of_label, summed, best):
    """One block of logits, a part of D at a time; the last part's turn reduces the block."""
    j, k = pl.program_id(1), pl.program_id(2)
    last_j, last_k = pl.num_programs(1) - 1, pl.num_programs(2) - 1

    @pl.when((j == 0) & (k == 0))
    def _():
        top[...] = jnp.full_like(top, _NOTHING)
        best[...] = jnp.zeros_like(best)
        for running in (total, of_label, summed):
            running[...] = jnp.zeros_like(running)

    def reduce(first, width, unroll):
        def rows(i, _):
            some = pl.ds(pl.multiple_of(i * _GROUP, _GROUP), _GROUP)
            part = logits.at[some, pl.ds(first, width)]
            running = (labels, top, total, of_label, summed, best)
            _reduce(plan, options, V, j, first, part, *(ref.at[some] for ref in running))

        lax.fori_loop(0, plan.rows // _GROUP, rows, None, unroll=unroll)

    if plan.whole:
        # Straight-line code: one part is reduced while the next is multiplied.
        for first in range(0, plan.columns, PART):
            width = min(PART, plan.columns - first)
            logits[:, first : first + width] = _product(options, x, w, first, width)
            reduce(first, width, True)
    else:

        @pl.when(k == 0)
        def _():
            logits[...] = _product(options, x, w, 0, plan.columns)

        @pl.when(k > 0)
        def _():
            logits[...] += _product(options, x, w, 0, plan.columns)

        @pl.when(k == last_k)
        def _():
            reduce(0, plan.columns, False)

    @pl.when((j == last_j) & (k == last_k))
    def _():
        out[...] = _across_lanes(V, labels, top, total, of_label, summed, best)


def _product(options, x, w, first, width):
    """x times `width` columns of the vocabulary's block, from `first`."""
    part = pl.ds(first, width)
    return lax.dot_general(
        x[...],
        w[part, :] if options.transposed else w[:, part],
        (((1,), (1 if options.transposed else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _reduce(plan, options, V, j, offset, logits, labels, top, total, of_label, summed, best):
    """Takes some rows of a block of logits into their running values."""
    lane = lax.broadcasted_iota(jnp.int32, top.shape, 1)
    start = j * plan.columns + offset
    chunk = j * (plan.columns // _LANES) + offset // _LANES
    place = labels[...] - start - lane
    chunks = []
    new_top, new_best = top[...], best[...]
    new_of_label, new_sum = of_label[...], summed[...]
    for first in range(0, logits.shape[1], _LANES):
        x = logits[:, first : first + _LANES]
        if options.softcap is not None:
            x = options.softcap * jnp.tanh(x / options.softcap)
        exists = lane < V - start - first
        if options.label_smoothing:
            new_sum += jnp.where(exists, x, 0.0)
        if V % plan.columns:
            x = jnp.where(exists, x, _NOTHING)
        chunks.append(x)
        new_of_label += jnp.where(place == first, x, 0.0)
        ahead = x > new_top
        new_top = jnp.where(ahead, x, new_top)
        new_best = jnp.where(ahead, chunk + first // _LANES, new_best)
    new_total = total[...] * jnp.exp(top[...] - new_top)
    for x in chunks:
        new_total += jnp.exp(x - new_top)
    top[...], best[...], total[...] = new_top, new_best, new_total
    of_label[...], summed[...] = new_of_label, new_sum


def _across_lanes(V, labels, top, total, of_label, summed, best):
    """[rows, lanes]: log-sum-exp, label's and mean logit, 1 where correct, and largest, in turn."""
    lane = lax.broadcasted_iota(jnp.int32, top.shape, 1)
    largest = jnp.max(top[...], axis=1, keepdims=True)
    everything = jnp.sum(total[...] * jnp.exp(top[...] - largest), axis=1, keepdims=True)
    token = jnp.where(top[...] == largest, best[...] * _LANES + lane, V)
    correct = jnp.min(token, axis=1, keepdims=True) == labels[...]
    results = (
        jnp.log(everything) + largest,
        jnp.sum(of_label[...], axis=1, keepdims=True),
        jnp.sum(summed[...], axis=1, keepdims=True) / V,
        jnp.where(correct, 1.0, 0.0),
        largest,
    )
    return functools.reduce(
        lambda left, right: jnp.where(lane == right[0], right[1], left),
        enumerate(results),
        jnp.zeros(top.shape, jnp.float32),
    )


def _limits(call):
    """What keeps `mosaic_tpu` from doing `call`."""
    yield from hardware.tpu_lacks(call.dtype)
    if call.tokens == 0:
        yield "no tokens"
    elif _plan(call.tokens, call.D, call.V, call.dtype) is None:
        yield f"a D of {call.D} (not a multiple of {_LANES}, and too much for one block)"


IMPLEMENTATION = dispatch.Implementation(
    run=xla.differentiable(statistics),
    supports=FEATURES - {"float64"},
    limits=lambda call: tuple(_limits(call)),
)
