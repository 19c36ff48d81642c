"""CTC by the forward-backward recursion, in plain XLA operations.

The recursion (Graves et al. 2006) goes over frames with a number for each state: for each label,
and for the blank before each label and after the last. A state's number is the probability of all
that the frames so far can be and end there; it soon leaves the range of floats, and `number` keeps
it all the same. The backward variables are the forward variables of the problem turned round, the
last frame and the last label first, so that one scan over twice the rows finds both.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.ctc import number
from jaxformer_kernels.ctc.call import FEATURES, wide


class Rows(NamedTuple):
    """What the recursion goes over.

    Attributes:
        frames: number [T, R, N + 1]; the probability of each label of the row and, last, of blank.
        begin, end: int32 [R]; the row's frames are those from begin on, before end.
        start: int32 [R]; the blank to start in, counted from the one before the first label.
        can_skip: bool [R, N + 1]; whether a label may follow the one before it without a blank.
    """

    frames: tuple
    begin: jax.Array
    end: jax.Array
    start: jax.Array
    can_skip: jax.Array


def differentiable(variables):
    """The `run` of an implementation whose recursion is `variables`; see `variables` below."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(blank, logits, logit_lengths, labels, label_lengths):
        lse, rows = _prepare(blank, logits, logit_lengths, labels, label_lengths)
        last, _ = variables(rows)
        return _loss(_probability(last, label_lengths), _broken(lse, logit_lengths))

    def forward(blank, logits, logit_lengths, labels, label_lengths):
        B, T = logits.shape[:2]
        lse, rows = _prepare(blank, logits, logit_lengths, labels, label_lengths)
        both = jax.tree.map(_beside, rows, _turned(rows, label_lengths))
        last, path = variables(both)
        probability = _probability(jax.tree.map(lambda x: x[:B], last), label_lengths)
        broken = _broken(lse, logit_lengths)

        shares = _posteriors(path, rows.frames)
        gradient = jnp.exp(logits.astype(lse.dtype) - lse[..., None])
        of_labels, of_blank = (share.swapaxes(0, 1) for share in shares)
        gradient = gradient.at[:, :, blank].add(-of_blank)
        each = jnp.arange(B)[:, None]
        gradient = gradient.at[each, :, labels].add(-of_labels.swapaxes(1, 2), mode="drop")
        possible = probability[0] > 0
        used = (jnp.arange(T) < logit_lengths[:, None]) & possible[:, None]
        gradient = jnp.where(used[..., None], gradient, 0.0)
        gradient = jnp.where(broken[:, None, None], jnp.nan, gradient)
        saved = _first_derivative(gradient), jnp.zeros((), logits.dtype)
        return _loss(probability, broken), saved

    def backward(blank, saved, cotangent):
        gradient, like = saved
        return (gradient * cotangent[:, None, None]).astype(like.dtype), None, None, None

    run.defvjp(forward, backward)
    return run


def variables(rows: Rows):
    """(last, path): the variables after the last frame, and after every frame.

    Both are (blanks, labels), numbers [R, N + 1] and [T, R, N + 1]. Place k of blanks is the blank
    before label k; the last place of labels is of no meaning.
    """
    state = _compat.vary(_beginning(rows), _compat.varying_axes(rows.frames[0]))

    def step(state, inputs):
        time, frame = inputs
        now = (rows.begin <= time) & (time < rows.end)
        after = _advance(state, frame, rows.can_skip, _shifted)
        state = jax.tree.map(lambda x, y: jnp.where(now[:, None], x, y), after, state)
        return state, state

    times = jnp.arange(rows.frames[0].shape[0])
    return lax.scan(step, state, (times, rows.frames))


def _beginning(rows):
    """The variables before the first frame."""
    mantissa, exponent = rows.frames
    shape = exponent.shape[1:]
    started = jnp.arange(shape[1]) == rows.start[:, None]
    zero = jnp.zeros(shape, mantissa.dtype)
    blanks = jnp.where(started, 1.0, zero), jnp.where(started, zero, -jnp.inf)
    return blanks, (zero, zero - jnp.inf)


def _advance(state, frame, can_skip, shifted):
    """The variables one frame on; `shifted(x, fill)` moves places up by one."""
    blanks, labels = state
    before = shifted(labels[0], 0.0), shifted(labels[1], -jnp.inf)
    of_blank = frame[0][:, -1:], frame[1][:, -1:]
    skipping = jnp.where(can_skip, before[0], 0.0), before[1]
    return (
        number.times(number.add(blanks, before), of_blank),
        number.times(number.add(labels, blanks, skipping), frame),
    )


def _shifted(x, fill):
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=fill)[:, :-1]


def _prepare(blank, logits, logit_lengths, labels, label_lengths):
    """(the frames' log-sum-exp [B, T], their `Rows`)."""
    logits = logits.astype(wide(logits.dtype))
    lse = jax.nn.logsumexp(logits, axis=-1)
    classes = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=blank)
    scores = jnp.take_along_axis(logits, classes[:, None], axis=2, mode="clip")
    # A frame in which no class is possible has no softmax; no path goes through it.
    log_p = jnp.where(lse[..., None] == -jnp.inf, -jnp.inf, scores - lse[..., None])
    frames = number.from_log(jnp.minimum(log_p, 0.0).swapaxes(0, 1))
    repeated = classes[:, 1:] == classes[:, :-1]
    can_skip = jnp.pad(~repeated, ((0, 0), (1, 0)))
    begin = jnp.zeros_like(logit_lengths)
    return lse, Rows(frames, begin, logit_lengths, begin, can_skip)


def _turned(rows, label_lengths):
    """The same rows with the last frame and the last label first."""
    T, _, places = rows.frames[0].shape
    N = places - 1

    def turn(x):
        return jnp.concatenate([x[::-1, :, :N][..., ::-1], x[::-1, :, N:]], axis=2)

    # Of labels k - 1 and k, turned round, the first comes second.
    can_skip = jnp.pad(rows.can_skip[:, 1:N][:, ::-1], ((0, 0), (1, 1)))
    return Rows(
        jax.tree.map(turn, rows.frames),
        T - rows.end,
        T - rows.begin,
        N - label_lengths,
        can_skip,
    )


def _beside(a, b):
    """Rows of `a`, then rows of `b`; of frames they are the second axis, of the rest the first."""
    return jnp.concatenate([a, b], axis=1 if a.ndim == 3 else 0)


def _probability(last, label_lengths):
    """Of all paths together: a number [B], from the variables after the last frame."""

    def at(x, places):
        return jnp.take_along_axis(x, places[:, None], axis=1)[:, 0]

    of_blank = jax.tree.map(lambda x: at(x, label_lengths), last[0])
    of_label = jax.tree.map(lambda x: at(x, jnp.maximum(label_lengths - 1, 0)), last[1])
    some = label_lengths > 0
    of_label = jnp.where(some, of_label[0], 0.0), jnp.where(some, of_label[1], -jnp.inf)
    return number.normal(number.add(of_blank, of_label))


def _loss(probability, broken):
    # Adding the +0 makes the loss of a certainty 0 and not -0.
    loss = jnp.maximum(-number.to_log(probability), 0.0) + 0.0
    return jnp.where(broken, jnp.nan, loss)


def _broken(lse, logit_lengths):
    """bool [B]: whether a logit of the row is NaN or +inf."""
    used = jnp.arange(lse.shape[1]) < logit_lengths[:, None]
    return jnp.any(used & (jnp.isnan(lse) | (lse == jnp.inf)), axis=1)


def _posteriors(path, frames):
    """Probabilities, given the labels, of each label [T, B, N] and of the blank [T, B].

    Each frame's are made to sum to 1, in which the rounding of a long recursion cancels.
    """
    B = frames[0].shape[1]
    blanks, labels = jax.tree.map(lambda x: x[:, :B], path)
    blanks_back, labels_back = jax.tree.map(lambda x: x[::-1, B:, ::-1], path)

    def joined(ahead, back, frame):
        # Both have the frame's own probability in them.
        possible = (ahead[0] > 0) & (back[0] > 0) & (frame[0] > 0)
        mantissa = ahead[0] * back[0] / jnp.where(possible, frame[0], 1.0)
        exponent = jnp.where(possible, ahead[1] + back[1] - frame[1], -jnp.inf)
        return jnp.where(possible, mantissa, 0.0), exponent

    def part(numbers, places):
        return jax.tree.map(lambda x: x[..., places], numbers)

    labels = part(labels, slice(None, -1))
    labels_back = part(labels_back, slice(1, None))
    of_labels = joined(labels, labels_back, part(frames, slice(None, -1)))
    of_blanks = joined(blanks, blanks_back, part(frames, slice(-1, None)))
    top = jnp.maximum(of_labels[1].max(axis=2), of_blanks[1].max(axis=2))
    top = jnp.maximum(top, jnp.finfo(top.dtype).min)[..., None]
    of_labels, of_blanks = (m * number.power_of_two(e - top) for m, e in (of_labels, of_blanks))
    of_blank = of_blanks.sum(axis=2)
    total = of_labels.sum(axis=2) + of_blank
    scale = 1 / jnp.where(total > 0, total, 1.0)
    return of_labels * scale[..., None], of_blank * scale


@jax.custom_jvp
def _first_derivative(gradient):
    return gradient


@_first_derivative.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "ctc_loss: it has no second derivative; wrap what is differentiated first in "
        "jax.lax.stop_gradient, or take implementation='reference' on tiny shapes."
    )


IMPLEMENTATION = dispatch.Implementation(run=differentiable(variables), supports=FEATURES)
