"""Tiles of tokens against the whole vocabulary, in plain XLA operations.

A tile's logits are one matrix product, and are gone when the next tile begins. Tiles cut the tokens
and never the vocabulary: a product with all of it is what keeps a matrix unit busy. The gradient of
a sum over tokens is known, but for a factor, as soon as the logits are: the forward pass computes
it there and then, with three products in all. Only where a token's own loss or log-sum-exp is
differentiated does the backward pass go through the tiles again.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.linear_cross_entropy import split
from jaxformer_kernels.linear_cross_entropy.call import FEATURES, CrossEntropy, wide

# Tokens of a tile on a device. Adding a tile's share to the gradient of w moves 8 bytes an entry of
# w, for which three products do 6 * TOKENS operations: with 4096 a tenth of their time on an H100.
TOKENS = 4096
CPU_TOKENS = 1024  # measured
# Tiles of fewer logits than this are not worth a loop.
LOGITS = 2**24


def differentiable(statistics):
    """The `run` of an implementation whose pass without gradients is `statistics`.

    `statistics(options, x, w, labels)` gives for every token the log-sum-exp, the label's logit,
    the mean logit (None without label smoothing), whether the label is the likeliest, and the
    largest logit (None unless the vocabulary is split). w has x's dtype and all of D.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(options, x, w, labels, weights):
        labels = split.local(options, labels, _vocabulary(options, w))
        found = statistics(options, x, split.gathered(options, w, x.dtype), labels)
        return _result(options, split.merged(options, labels, found), weights)[0]

    run.defvjp(_forward, _backward, symbolic_zeros=True)
    return run


def statistics(options, x, w, labels):
    """Every token's statistics, tile by tile; see `differentiable`."""

    def tile(x, labels):
        logits = _logits(options, x, w)
        return None, _statistics(options, logits, labels, _softmax(logits))

    return _over_tiles(tile, labels.shape, _vocabulary(options, w), (x, labels))[1]


def _forward(options, x, w, labels, weights):
    wanted = (x.perturbed, w.perturbed)
    x, w, labels, weights = x.value, w.value, labels.value, weights.value
    found, gradients = _gradients(options, x, w, labels, (weights, None, None), wanted)
    result, objectives = _result(options, found, weights)
    return result, (x, w, labels, weights, objectives, gradients)


def _backward(options, saved, cotangent):
    x, w, labels, weights, objectives, (dx, dw) = saved
    factor, of_loss, of_lse = (
        None if isinstance(part, SymbolicZero) else part for part in cotangent[:3]
    )
    if of_loss is not None or of_lse is not None:
        of_objective = jnp.zeros_like(weights) if factor is None else factor * weights
        cotangents = (of_objective, of_loss, of_lse)
        wanted = (dx is not None, dw is not None)
        _, (dx, dw) = _gradients(options, x, w, labels, cotangents, wanted)
    elif factor is not None:
        dx, dw = (None if it is None else (factor * it).astype(it.dtype) for it in (dx, dw))
    else:
        dx = dw = None
    return dx, dw, None, None if factor is None else factor * objectives


def _gradients(options, x, w, labels, cotangents, wanted):
    """(statistics, (dx, dw)) given the cotangents of each token's objective, loss and log-sum-exp.

    Either of the last two may be None, and so is each gradient that is not `wanted`.
    """
    narrow = split.gathered(options, w, x.dtype)
    V = _vocabulary(options, w)
    labels = split.local(options, labels, V)
    for_x, for_w = wanted

    def tile(x, labels, cotangents):
        logits = _logits(options, x, narrow)
        softmax = _softmax(logits)
        found = split.merged(options, labels, _statistics(options, logits, labels, softmax))
        of_logits = _logits_gradient(options, logits, softmax, found[0], labels, cotangents)
        dlogits = of_logits.astype(x.dtype)
        dx = _product(dlogits, narrow, 0 if options.transposed else 1) if for_x else None
        dw = _weight_gradient(options, x, dlogits) if for_w else None
        return dw, (found, None if dx is None else dx.astype(x.dtype))

    dw, (found, dx) = _over_tiles(tile, labels.shape, V, (x, labels, cotangents))
    return found, (dx, None if dw is None else split.scattered(options, dw).astype(w.dtype))


def _logits(options, x, w):
    """Logits [..., V] in the wide dtype, capped."""
    logits = _product(x, w, 1 if options.transposed else 0)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    return logits


def _softmax(logits):
    """exp(logits - their maximum), the sum of that, its log-sum-exp, and the maximum."""
    top = jnp.max(logits, axis=-1)
    raised = jnp.exp(logits - top[..., None])
    total = jnp.sum(raised, axis=-1)
    return raised, total, jnp.log(total) + top, top


def _statistics(options, logits, labels, softmax):
    _, _, lse, top = softmax
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    mean = jnp.mean(logits, axis=-1) if options.label_smoothing else None
    correct = jnp.argmax(logits, axis=-1) == labels
    return lse, of_label, mean, correct, None if options.vocabulary_axis is None else top


def _result(options, found, weights):
    """(the `CrossEntropy` of all tokens, each token's objective)."""
    lse, of_label, mean, correct = found
    loss = lse - of_label
    objectives = loss
    if options.label_smoothing:
        share = options.label_smoothing
        objectives = (1 - share) * loss + share * (lse - mean)
    if options.z_loss:
        objectives = objectives + options.z_loss * jnp.square(lse)
    return CrossEntropy(jnp.sum(weights * objectives), loss, lse, correct), objectives


def _logits_gradient(options, logits, softmax, lse, labels, cotangents):
    """Gradient of the uncapped logits, from that of each token's objective, loss and lse.

    `softmax` is that of these logits, `lse` is the log-sum-exp of the whole vocabulary's.
    """
    raised, total, of_these, _ = softmax
    of_objective, of_loss, of_lse = cotangents
    share = options.label_smoothing
    for_p = of_objective * (1 + 2 * options.z_loss * lse) if options.z_loss else of_objective
    for_label = of_objective * (1 - share) if share else of_objective
    if of_loss is not None:
        for_p, for_label = for_p + of_loss, for_label + of_loss
    if of_lse is not None:
        for_p = for_p + of_lse
    if options.vocabulary_axis is not None:
        for_p = for_p * jnp.exp(of_these - lse)
    token = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    gradient = raised * (for_p / total)[..., None]
    gradient = gradient - jnp.where(token == labels[..., None], for_label[..., None], 0)
    if share:
        V = split.vocabulary(options, logits.shape[-1])
        gradient = gradient - (of_objective * (share / V))[..., None]
    if options.softcap is not None:
        gradient = gradient * (1 - jnp.square(logits / options.softcap))
    return gradient


def _product(a, w, axis):
    """a [..., n] times w along w's `axis`."""
    rows = _rows(a)
    out = _dot(rows, w, (rows.ndim - 1,), (axis,))
    return out.reshape(*a.shape[:-1], out.shape[-1])


def _weight_gradient(options, x, dlogits):
    """The gradient of w, in w's axes and the wide dtype."""
    x, dlogits = _rows(x), _rows(dlogits)
    left, right = (dlogits, x) if options.transposed else (x, dlogits)
    if x.dtype == jnp.bfloat16 and dispatch.platform() == "cpu":
        return _dot(_turned(left), right, (1,), (0,))
    tokens = tuple(range(x.ndim - 1))
    return _dot(left, right, tokens, tokens)


def _rows(x):
    # XLA on CPU multiplies operands of more than two axes far slower. Elsewhere the axes stay, lest
    # two that are spread over devices become one, which XLA would have to gather.
    return x.reshape(-1, x.shape[-1]) if dispatch.platform() == "cpu" else x


def _dot(a, b, of_a, of_b):
    """A matrix product that takes its operands as they are and accumulates wide."""
    return lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=wide(a.dtype))


def _turned(x):
    """x.T as an array of its own.

    XLA takes a plain transpose into the product, and a narrow product that contracts rows misses
    the CPU's matrix unit. It does not see through a transpose in blocks.
    """
    rows, inner = x.shape
    block = math.gcd(rows, 64)
    blocks = x.reshape(rows // block, block, inner)
    return jnp.transpose(blocks, (2, 0, 1)).reshape(inner, rows)


def _over_tiles(tile, shape, V, arrays):
    """The sum of the first results of `tile`, and its other results of all tokens.

    Args:
        tile: function of a tile of `arrays` to (what is summed, a pytree of [tokens, ...]).
        shape: of the tokens, the leading axes of each of `arrays`.
        V: logits a token.
        arrays: pytree of [*shape, ...].
    """
    tokens = math.prod(shape)
    most = max(CPU_TOKENS if dispatch.platform() == "cpu" else TOKENS, LOGITS // V)
    tiles = -(-tokens // (most * _devices()))
    if tiles <= 1:
        return tile(*arrays)
    if tiles > shape[-1]:
        flat = jax.tree.map(lambda it: it.reshape(tokens, *it.shape[len(shape) :]), arrays)
        total, outputs = _over_tiles(tile, (tokens,), V, flat)
        return total, jax.tree.map(lambda it: it.reshape(*shape, *it.shape[1:]), outputs)

    axis = len(shape) - 1
    rows = -(-shape[axis] // tiles)

    # A tile has every tiles-th token of the last axis, so that an axis which is spread over devices
    # stays spread within every tile.
    def cut(array):
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, rows * tiles - shape[axis])
        array = jnp.pad(array, widths)
        array = array.reshape(*shape[:axis], rows, tiles, *array.shape[axis + 1 :])
        return jnp.moveaxis(array, axis + 1, 0)

    def whole(array):
        array = jnp.moveaxis(array, 0, axis + 1)
        array = array.reshape(*shape[:axis], rows * tiles, *array.shape[axis + 2 :])
        return lax.slice_in_dim(array, 0, shape[axis], axis=axis)

    def step(total, arrays):
        addend, outputs = tile(*arrays)
        return jax.tree.map(jnp.add, total, addend), outputs

    inputs = jax.tree.map(cut, arrays)
    first = jax.tree.map(lambda it: it[0], inputs)
    totals = jax.tree.map(
        lambda it: _compat.vary(jnp.zeros(it.shape, it.dtype), _compat.varying_axes(arrays[0])),
        jax.eval_shape(tile, *first)[0],
    )
    total, outputs = lax.scan(step, totals, inputs)
    return total, jax.tree.map(whole, outputs)


def _devices():
    """How many devices share a tile: those of the mesh in context, but for `jax.shard_map`'s."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes)


def _vocabulary(options, w):
    return w.shape[0 if options.transposed else 1]


IMPLEMENTATION = dispatch.Implementation(run=differentiable(statistics), supports=FEATURES)
