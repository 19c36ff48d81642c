"""CTC by the forward-backward recursion, in plain XLA operations.

The recursion (Graves et al. 2006) goes over frames with a number for each state: for each label,
and for the blank before each label and after the last. A state's number is the probability of all
that the frames so far can be and end there; it soon leaves the range of floats, and `number` keeps
it all the same. A second recursion, from the last frame back, gives the probability of all that
may follow; the product is each state's share in the whole, of which the gradient is made.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.ctc import number
from jaxformer_kernels.ctc.call import FEATURES, wide

CPU_STATES = 512
CPU_PARTS = 4


class Rows(NamedTuple):
    """What the recursions go over.

    Attributes:
        frames: number [T, B, N + 1]; the probability of each label of the row and, last, of blank.
        frame_count, label_count: int32 [B].
        skip: [B, N + 1]; 0 where a label may follow the one before it without a blank, else -inf.
    """

    frames: tuple
    frame_count: jax.Array
    label_count: jax.Array
    skip: jax.Array


def differentiable(ahead, back):
    """The `run` of an implementation whose recursions are `ahead` and `back`, as those below."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(blank, logits, logit_lengths, labels, label_lengths):
        lse, rows = _prepare(blank, logits, logit_lengths, labels, label_lengths)
        last, _ = ahead(rows, keep=False)
        return _loss(_probability(last, label_lengths), _broken(lse, logit_lengths))

    def forward(blank, logits, logit_lengths, labels, label_lengths):
        lse, rows = _prepare(blank, logits, logit_lengths, labels, label_lengths)
        last, path = ahead(rows, keep=True)
        probability = _probability(last, label_lengths)
        broken = _broken(lse, logit_lengths)
        shares = back(rows, path, probability)
        gradient = _gradient(blank, logits, lse, labels, shares)
        used = jnp.arange(logits.shape[1]) < logit_lengths[:, None]
        used &= (probability[0] > 0)[:, None]
        gradient = jnp.where(used[..., None], gradient, 0.0)
        gradient = jnp.where(broken[:, None, None], jnp.nan, gradient)
        saved = _first_derivative(gradient), jnp.zeros((), logits.dtype)
        return _loss(probability, broken), saved

    def backward(blank, saved, cotangent):
        gradient, like = saved
        return (gradient * cotangent[:, None, None]).astype(like.dtype), None, None, None

    run.defvjp(forward, backward)
    return run


def ahead(rows: Rows, keep: bool):
    """(last, path): the states' numbers after the last frame and, if to keep, after every frame.

    Both are (blanks, labels), numbers [B, N + 1] and [T, B, N + 1]. Place k of blanks is the blank
    before label k; the last place of labels is of no meaning.
    """
    state = _compat.vary(beginning(rows.skip), _compat.varying_axes(rows.frames[0]))

    def step(state, inputs):
        time, frame = inputs
        after = advance(state, frame, rows.skip, _up)
        now = (time < rows.frame_count)[:, None]
        state = jax.tree.map(lambda x, y: jnp.where(now, x, y), after, state)
        return state, state if keep else None

    return lax.scan(step, state, (jnp.arange(rows.frames[0].shape[0]), rows.frames))


def back(rows: Rows, path, probability):
    """Each state's share of the row's probability: (of blanks, of labels), [T, B, N + 1].

    Where the row has no such frame or label the shares are of no meaning; their sum is 1 but for
    rounding.
    """
    ending = ending_states(rows.label_count[:, None], rows.skip)
    skip = _down(rows.skip, -jnp.inf)
    whole = jax.tree.map(lambda x: x[:, None], probability)

    def step(state, inputs):
        time, frame, here = inputs
        is_last = (time == rows.frame_count - 1)[:, None]
        rest = jax.tree.map(lambda x, y: jnp.where(is_last, x, y), ending, state)
        shares = tuple(map(functools.partial(share, whole), here, rest))
        return retreat(with_frame(rest, frame), skip, _down), shares

    zero = jnp.zeros_like(rows.skip)
    nothing = zero, zero - jnp.inf
    state = _compat.vary((nothing, nothing), _compat.varying_axes(rows.frames[0]))
    times = jnp.arange(rows.frames[0].shape[0])
    return lax.scan(step, state, (times, rows.frames, path), reverse=True)[1]


def beginning(like):
    """The states' numbers before the first frame, in the shape of `like` [B, N + 1]."""
    zero = jnp.zeros_like(like)
    first = lax.broadcasted_iota(jnp.int32, like.shape, 1) == 0
    blanks = jnp.where(first, 1.0, zero), jnp.where(first, zero, -jnp.inf)
    return blanks, (zero, jnp.full_like(like, -jnp.inf))


def ending_states(label_count, like):
    """1 for the states to end in, as numbers: the last label, and the blank after it."""
    zero = jnp.zeros_like(like)
    place = lax.broadcasted_iota(jnp.int32, like.shape, 1)

    def one_at(chosen):
        return jnp.where(chosen, 1.0, zero), jnp.where(chosen, zero, -jnp.inf)

    return one_at(place == label_count), one_at(place == label_count - 1)


def advance(state, frame, skip, up):
    """The states' numbers one frame on; `up(x, fill)` moves places up by one."""
    blanks, labels = state
    before = up(labels[0], 0.0), up(labels[1], -jnp.inf)
    return with_frame(
        (
            number.total(blanks, before),
            number.total(labels, blanks, (before[0], before[1] + skip)),
        ),
        frame,
    )


def retreat(state, skip, down):
    """The probability of what may follow each state, given that of each state and its rest.

    `down(x, fill)` moves places down by one; so is `skip` already.
    """
    blanks, labels = state
    after = down(labels[0], 0.0), down(labels[1], -jnp.inf)
    blank_after = down(blanks[0], 0.0), down(blanks[1], -jnp.inf)
    return (
        number.total(blanks, labels),
        number.total(labels, blank_after, (after[0], after[1] + skip)),
    )


def with_frame(state, frame):
    """The states' numbers times the probabilities of their classes in a frame."""
    blanks, labels = state
    of_blank = frame[0][:, -1:], frame[1][:, -1:]
    return number.product(blanks, of_blank), number.product(labels, frame)


def share(whole, here, rest):
    """Of the probability `whole`, what goes through a state: a float."""
    exponent = here[1] + rest[1] - whole[1]
    # Impossible rows have no shares; nor have exponents past 2^24 bits for them to be right.
    exponent = jnp.where(whole[0] > 0, jnp.minimum(exponent, 8.0), -jnp.inf)
    mantissa = here[0] * rest[0] / jnp.where(whole[0] > 0, whole[0], 1.0)
    return mantissa * number.power_of_two(exponent)


def _up(x, fill):
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=fill)[:, :-1]


def _down(x, fill):
    return jnp.pad(x, ((0, 0), (0, 1)), constant_values=fill)[:, 1:]


def _prepare(blank, logits, logit_lengths, labels, label_lengths):
    """(the frames' log-sum-exp [B, T], their `Rows`)."""
    logits = logits.astype(wide(logits.dtype))
    lse = jax.nn.logsumexp(logits, axis=-1)
    classes = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=blank)
    scores = jnp.take_along_axis(logits, classes[:, None], axis=2, mode="clip")
    # A frame in which no class is possible has no softmax; no path goes through it.
    log_p = jnp.where(lse[..., None] == -jnp.inf, -jnp.inf, scores - lse[..., None])
    frames = number.from_log(jnp.minimum(log_p, 0.0).swapaxes(0, 1))
    repeated = jnp.pad(classes[:, 1:] == classes[:, :-1], ((0, 0), (1, 0)))
    skip = jnp.where(repeated, -jnp.inf, jnp.zeros(classes.shape, logits.dtype))
    return lse, Rows(frames, logit_lengths, label_lengths, skip)


def _probability(last, label_lengths):
    """Of all paths together: a number [B], from the numbers after the last frame."""

    def at(x, places):
        return jnp.take_along_axis(x, places[:, None], axis=1)[:, 0]

    of_blank = jax.tree.map(lambda x: at(x, label_lengths), last[0])
    of_label = jax.tree.map(lambda x: at(x, jnp.maximum(label_lengths - 1, 0)), last[1])
    some = label_lengths > 0
    of_label = jnp.where(some, of_label[0], 0.0), jnp.where(some, of_label[1], -jnp.inf)
    return number.total(of_blank, of_label)


def _loss(probability, broken):
    # Adding +0 makes the loss of a certainty 0 and not -0.
    loss = jnp.maximum(-number.to_log(probability), 0.0) + 0.0
    return jnp.where(broken, jnp.nan, loss)


def _broken(lse, logit_lengths):
    """bool [B]: whether a logit of the row is NaN or +inf."""
    used = jnp.arange(lse.shape[1]) < logit_lengths[:, None]
    return jnp.any(used & (jnp.isnan(lse) | (lse == jnp.inf)), axis=1)


def _gradient(blank, logits, lse, labels, shares):
    """Softmax minus posteriors, [B, T, V]; of frames that the row does not have, anything.

    Each frame's posteriors are made to sum to 1, in which the rounding of the recursion cancels.
    """
    of_blank = shares[0].sum(axis=2)
    of_labels = shares[1][..., :-1]
    total = of_blank + of_labels.sum(axis=2)
    scale = -1 / jnp.where(total > 0, total, 1.0)
    gradient = jnp.exp(logits.astype(lse.dtype) - lse[..., None])
    gradient = gradient.at[:, :, blank].add((of_blank * scale).T)
    row = jnp.arange(labels.shape[0])[:, None]
    of_labels = (of_labels * scale[..., None]).transpose(1, 2, 0)
    if dispatch.platform() != "cpu":
        labels, of_labels = _each_once(labels, of_labels, logits.shape[2])
    return gradient.at[row, :, labels].add(of_labels, mode="drop")


def _each_once(labels, shares, V):
    """Labels [B, N] and shares [B, N, T] with those of equal labels together, the others at V.

    A GPU adds what falls on one place in any order: of one addend there is only one.
    """
    place = jnp.arange(labels.shape[1])
    first = jnp.argmax(labels[:, :, None] == labels[:, None], axis=2)
    to_first = (first[..., None] == place).astype(shares.dtype)
    shares = jnp.einsum("bnt,bnm->bmt", shares, to_first, precision="highest")
    return jnp.where(first == place, labels, V), shares


@jax.custom_jvp
def _first_derivative(gradient):
    return gradient


@_first_derivative.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "ctc_loss: it has no second derivative; wrap what is differentiated first in "
        "jax.lax.stop_gradient, or take implementation='reference' on tiny shapes."
    )


def _ahead_in_parts(rows: Rows, keep: bool):
    found = [ahead(_rows(rows, part), keep) for part in _parts(rows.skip.shape)]
    last = _joined([last for last, _ in found], axis=0)
    return last, _joined([path for _, path in found], axis=1) if keep else None


def _back_in_parts(rows: Rows, path, probability):
    shares = []
    for part in _parts(rows.skip.shape):
        here = jax.tree.map(lambda x, part=part: x[:, part], path)
        whole = jax.tree.map(lambda x, part=part: x[part], probability)
        shares.append(back(_rows(rows, part), here, whole))
    return _joined(shares, axis=1)


def _parts(shape: tuple[int, ...]) -> list[slice]:
    """Rows to go over apart, of [B, N + 1] states.

    A CPU runs scans of few states side by side, one a core, and takes as long for a step of many
    states as if it ran them one after the other, or longer.
    """
    count = 1
    if dispatch.platform() == "cpu":
        count = max(min(-(-shape[0] * shape[1] // CPU_STATES), CPU_PARTS, shape[0]), 1)
    ends = [shape[0] * number // count for number in range(count + 1)]
    return [slice(*both) for both in itertools.pairwise(ends)]


def _rows(rows: Rows, part: slice) -> Rows:
    frames = jax.tree.map(lambda x: x[:, part], rows.frames)
    return Rows(frames, rows.frame_count[part], rows.label_count[part], rows.skip[part])


def _joined(parts: list, axis: int):
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *parts)


IMPLEMENTATION = dispatch.Implementation(
    run=differentiable(_ahead_in_parts, _back_in_parts), supports=FEATURES
)
