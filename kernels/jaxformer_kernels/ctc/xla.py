"""CTC by the forward-backward recursion, in plain XLA operations.

The recursion adds and multiplies probabilities that fall below anything float32 can hold. In logarithms
every addition would take exponentials; here a number is a float32 mantissa in [1, 2) and an int32
exponent, which costs shifts and comparisons, is never out of range, and keeps 24 bits.

The backward variables are the forward variables of the reversed problem: reversed frames and
reversed labels. Both run as one scan over twice the rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.ctc.call import FEATURES

_NOTHING = -(2**28)  # the exponent of zero; sums of a few of them stay in range


def _split(log2):
    """2 ** log2 as (mantissa, exponent)."""
    seen = log2 > -(2.0**24)
    log2 = jnp.where(seen, log2, 0.0)
    whole = jnp.floor(log2)
    mantissa = jnp.where(seen, jnp.exp2(log2 - whole), 0.0)
    return mantissa, jnp.where(seen, whole.astype(jnp.int32), _NOTHING)


def _power_of_two(exponent):
    """2.0 ** exponent for an exponent not above 0; 0 where it is below float32's."""
    return lax.bitcast_convert_type((jnp.maximum(exponent, -127) + 127) << 23, jnp.float32)


def _normal(mantissa, exponent):
    """The same number with its mantissa in [1, 2)."""
    bits = lax.bitcast_convert_type(mantissa, jnp.int32)
    exponent = exponent + (bits >> 23) - 127
    bits = (bits & 0x7FFFFF) | 0x3F800000
    zero = mantissa == 0
    mantissa = jnp.where(zero, 0.0, lax.bitcast_convert_type(bits, jnp.float32))
    return mantissa, jnp.where(zero, _NOTHING, exponent)


def _add(*numbers):
    """The sum of numbers, its mantissa not normal."""
    top = functools.reduce(jnp.maximum, (exponent for _, exponent in numbers))
    total = sum(mantissa * _power_of_two(exponent - top) for mantissa, exponent in numbers)
    return total, top


def _times(a, b):
    return _normal(a[0] * b[0], a[1] + b[1])


def _shifted(number):
    """Element k - 1 in place of k; zero in place of 0."""
    mantissa, exponent = number
    widths = [(0, 0)] * (mantissa.ndim - 1) + [(1, 0)]
    return (
        jnp.pad(mantissa, widths)[..., :-1],
        jnp.pad(exponent, widths, constant_values=_NOTHING)[..., :-1],
    )


def _pick(condition, a, b):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _variables(frames, active, can_skip, start):
    """Probabilities of all partial alignments that end in each state at each time.

    Args:
        frames: number [T, R, 1 + N]: probability of the blank and of every label at every time.
        active: bool [T, R]: a row starts with its first active time and stops after its last.
        can_skip: bool [R, N]: label k may follow label k - 1 with no blank between.
        start: int [R]: the blank to start in.

    Returns:
        (blanks, labels), numbers [T, R, 1 + N]. Place k of blanks is the blank before label k; the
        last place of labels stays zero.
    """
    R, places = frames[0].shape[1:]
    first = jnp.arange(places) == start[:, None]
    blanks = jnp.where(first, 1.0, 0.0), jnp.where(first, 0, _NOTHING)
    nothing = jnp.zeros((R, places)), jnp.full((R, places), _NOTHING)
    state = _compat.vary((blanks, nothing), _compat.varying_axes(frames[0]))
    may_skip = jnp.pad(can_skip, ((0, 0), (0, 1)))

    def step(state, inputs):
        now, (mantissa, exponent) = inputs
        blanks, labels = state
        before = _shifted(labels)
        label = jnp.pad(mantissa[:, 1:], ((0, 0), (0, 1))), jnp.roll(exponent, -1, axis=1)
        new_blanks = _times(_add(blanks, before), (mantissa[:, :1], exponent[:, :1]))
        new_labels = _times(_add(labels, blanks, (before[0] * may_skip, before[1])), label)
        new = _pick(now[:, None], (new_blanks, new_labels), state)
        return new, new

    return lax.scan(step, state, (active, frames))[1]


def _prepare(logits, labels, label_lengths, blank):
    """(log-sum-exp [B, T], frames as a number [T, B, 1 + N], can_skip [B, N])."""
    wide = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(wide, axis=-1)
    classes = jnp.pad(labels, ((0, 0), (1, 0)), constant_values=blank)
    scores = jnp.take_along_axis(wide, classes[:, None], axis=2, mode="clip")
    frames = _split((scores - lse[..., None]) * math.log2(math.e))
    can_skip = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))
    return lse, jax.tree.map(lambda x: x.swapaxes(0, 1), frames), can_skip


def _at(number, places):
    """The number at `places` [B] of the last axis."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, places[:, None], axis=1)[:, 0], number)


def _probability(blanks, labels, label_lengths):
    """Of all alignments together: a number [B], from the variables after the last frame."""
    of_label = _at(labels, jnp.maximum(label_lengths - 1, 0))
    of_label = of_label[0] * (label_lengths > 0), of_label[1]
    return _normal(*_add(_at(blanks, label_lengths), of_label))


def _loss(probability):
    mantissa, exponent = probability
    log = math.log(2) * exponent.astype(jnp.float32) + jnp.log(mantissa)
    return jnp.where(mantissa == 0, jnp.inf, jnp.maximum(-log, 0.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(blank, logits, logit_lengths, labels, label_lengths):
    _, frames, can_skip = _prepare(logits, labels, label_lengths, blank)
    active = jnp.arange(logits.shape[1])[:, None] < logit_lengths
    path = _variables(frames, active, can_skip, jnp.zeros_like(label_lengths))
    last = jax.tree.map(lambda x: x[-1], path)
    return _loss(_probability(*last, label_lengths))


def _forward(blank, logits, logit_lengths, labels, label_lengths):
    B, T, V = logits.shape
    lse, frames, can_skip = _prepare(logits, labels, label_lengths, blank)
    active = jnp.arange(T)[:, None] < logit_lengths

    # The backward variables are those of the same frames and labels in reverse order.
    def turned(x):
        return jnp.concatenate([x[::-1, :, :1], x[::-1, :, :0:-1]], axis=2)

    both = jax.tree.map(lambda x: jnp.concatenate([x, turned(x)], axis=1), frames)
    skip_back = jnp.pad(can_skip[:, :0:-1], ((0, 0), (1, 0)))
    start = jnp.concatenate([jnp.zeros_like(label_lengths), labels.shape[1] - label_lengths])
    path = _variables(
        both,
        jnp.concatenate([active, active[::-1]], axis=1),
        jnp.concatenate([can_skip, skip_back]),
        start,
    )
    blanks, of_labels = jax.tree.map(lambda x: x[:, :B], path)
    blanks_back, of_labels_back = jax.tree.map(lambda x: x[::-1, B:, ::-1], path)
    of_labels = jax.tree.map(lambda x: x[:, :, :-1], of_labels)
    of_labels_back = jax.tree.map(lambda x: x[:, :, 1:], of_labels_back)
    last = jax.tree.map(lambda x: x[-1, :B], path)
    probability = _probability(*last, label_lengths)

    def posterior(ahead, back, frame):
        """Probability of passing through a state, [T, B, ...]."""
        possible = (ahead[0] > 0) & (back[0] > 0)
        divisor = frame[0] * probability[0][:, None]
        mantissa = ahead[0] * back[0] / jnp.where(possible, divisor, 1.0)
        exponent = ahead[1] + back[1] - frame[1] - probability[1][:, None]
        share = mantissa * 4 * _power_of_two(jnp.minimum(exponent, 2) - 2)
        return jnp.where(possible & active[..., None], share, 0.0)

    blank_frame = jax.tree.map(lambda x: x[:, :, :1], frames)
    label_frames = jax.tree.map(lambda x: x[:, :, 1:], frames)
    of_blank = posterior(blanks, blanks_back, blank_frame).sum(axis=2)
    of_label = posterior(of_labels, of_labels_back, label_frames)
    gradient = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
    gradient = gradient.at[:, :, blank].add(-of_blank.T)
    rows = jnp.arange(B)[:, None]
    gradient = gradient.at[rows, :, labels].add(-of_label.transpose(1, 2, 0), mode="drop")
    seen = active.T & (probability[0] > 0)[:, None]
    gradient = jnp.where(seen[..., None], gradient, 0.0)
    return _loss(probability), (gradient, jnp.zeros((), logits.dtype))


def _backward(blank, saved, cotangent):
    gradient, like = saved
    return (gradient * cotangent[:, None, None]).astype(like.dtype), None, None, None


_run.defvjp(_forward, _backward)

IMPLEMENTATION = dispatch.Implementation(run=_run, supports=FEATURES)
