"""The arithmetic that the TPU kernels share: one tile of logits, on its side, [keys, queries].

Logits are in units of log2(e), so that the exponential is the hardware's power of two; the factor
goes into the scale, which is multiplied by anyhow.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxformer_kernels.attention import dropout as dropout_lib
from jaxformer_kernels.attention import schedule
from jaxformer_kernels.attention.mosaic_tpu_operands import LOG2_E, PER_ROW


def tile(plan, chunk):
    """The slice of a block's keys that a tile works on, from key `chunk` on."""
    return pl.ds(chunk, plan.tiles.chunk)


def each_head(plan, body):
    """`body(head)` for every head of a block, in order."""

    def of_head(head, _):
        body(head)
        return 0

    lax.fori_loop(0, plan.tiles.heads, of_head, 0)


def by_kind(plan, steps, kind, body):
    """`body(masked, chunks)` for a block that is not empty.

    `masked`, a Python bool, is whether the mask has to be looked at; `chunks` is a range of the
    first key of every chunk that may be visible. A body is compiled for every range that occurs.
    """
    t = plan.tiles
    code, begin, end = kind
    if steps.full:
        every = range(0, t.columns, t.chunk)
        pl.when(code == schedule.FULL)(functools.partial(body, False, every))
    for first, last in steps.partial:
        here = (code == schedule.PARTIAL) & (begin == first) & (end == last)
        some = range(first * t.chunk, last * t.chunk, t.chunk)
        pl.when(here)(functools.partial(body, True, some))


def dot(a, b, contract):
    """Matrix product over axis `contract[0]` of `a` and `contract[1]` of `b`, in float32.

    Float32 operands are multiplied as float32, not in one pass of bfloat16.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def logits(plan, scalars, refs, place, head, chunk, k, q, masked):
    """One tile of logits, and their slope.

    Args:
        plan, scalars, refs: as a kernel gets them.
        place: `Place` of the block.
        head: which of the block's heads.
        chunk: first key of the tile within the block.
        k, q: [keys, H] and [queries, H].
        masked: whether the mask is looked at.

    Returns:
        [keys, queries] in units of log2(e), -inf where hidden; and the softcap's slope, or None.
    """
    x = dot(k, q, (1, 1))
    softcap, scale = plan.options.softcap, plan.options.scale
    slope = None
    if softcap is None:
        x = x * (scale * LOG2_E)
    else:
        bent = jnp.tanh(x * (scale / softcap))
        x, slope = bent * (softcap * LOG2_E), 1 - bent * bent
    if "bias" in refs:
        x = x + cut(refs["bias"], plan, head, chunk).astype(jnp.float32) * LOG2_E
    if masked:
        visible = _visible(plan, scalars, refs, place, head, chunk, x.shape)
        x = x if visible is None else jnp.where(visible, x, -jnp.inf)
    return x, slope


def cut(ref, plan, head, chunk):
    """The tile of a block [heads, keys, queries] in which each axis may be 1 and broadcast."""
    heads, keys, _ = ref.shape
    head = head if heads != 1 else 0
    keys = slice(None) if keys == 1 else tile(plan, chunk)
    return ref[head, keys, :]


def _visible(plan, scalars, refs, place, head, chunk, shape):
    """bool [keys, queries], or None where nothing is hidden."""
    per_row, t = scalars["numbers"], plan.tiles
    first_key = place.column * t.columns + chunk
    key = lax.broadcasted_iota(jnp.int32, shape, 0)
    tests = []
    if plan.left is not None or plan.right is not None:
        # s - t, less what is the same in the whole tile.
        ahead = key - lax.broadcasted_iota(jnp.int32, shape, 1)
        here = place.row * t.rows + per_row[place.b * PER_ROW] - first_key
        if plan.right is not None:
            tests.append(ahead <= here + plan.right)
        if plan.left is not None:
            tests.append(ahead >= here - plan.left)
    if plan.ends:
        tests.append(key >= per_row[place.b * PER_ROW + 1] - first_key)
        tests.append(key < per_row[place.b * PER_ROW + 2] - first_key)
    if "q_ids" in refs:
        tests.append(refs["kv_ids"][tile(plan, chunk), :] == refs["q_ids"][...])
    if "visible" in refs:
        shown = cut(refs["visible"], plan, head, chunk).astype(jnp.float32)
        tests.append(jnp.broadcast_to(shown, shape) != 0)
    if not tests:
        return None
    visible = tests[0]
    for test in tests[1:]:
        visible = visible & test
    return visible


def kept(plan, scalars, place, head, chunk):
    """bool [keys, queries]: the probabilities that dropout keeps."""
    t = plan.tiles
    numbers = scalars["numbers"]
    words = (numbers[plan.B * PER_ROW + i] for i in range(2))
    row = (1, t.rows)
    seed = [lax.bitcast_convert_type(jnp.full(row, word), jnp.uint32) for word in words]
    b = jnp.full(row, place.b)
    n = jnp.full(row, place.head_block * t.heads + head)
    query = lax.broadcasted_iota(jnp.int32, row, 1) + place.row * t.rows
    key = lax.broadcasted_iota(jnp.int32, (t.chunk, 1), 0)
    key = key + (plan.first_key + place.column * t.columns + chunk)
    return dropout_lib.keep(seed, plan.options.rate, b, n, query, key)


def gradients(plan, scalars, refs, place, head, chunk, masked):
    """What the backward pass makes of one tile, from the log-sum-exp of the forward pass.

    Returns:
        [keys, queries] each: the probabilities after dropout; the gradient of scale * q . k; that
        of the logit after softcap and bias.
    """
    keys, rate = tile(plan, chunk), plan.options.rate
    k, v, q = refs["k"][keys, :], refs["v"][keys, :], refs["q"][head]
    x, slope = logits(plan, scalars, refs, place, head, chunk, k, q, masked)
    p = jnp.exp2(x - refs["lse"][head])
    value_gradient = dot(v, refs["out_gradient"][head], (1, 1))
    dropped = p
    if rate:
        keep = kept(plan, scalars, place, head, chunk)
        dropped = jnp.where(keep, p * (1 / (1 - rate)), 0.0)
        value_gradient = jnp.where(keep, value_gradient * (1 / (1 - rate)), 0.0)
    after = p * (value_gradient - refs["delta"][head])
    return dropped, after if slope is None else after * slope, after
