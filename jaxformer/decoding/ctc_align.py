"""Forced alignment: at which frames the labels that were given stand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.decoding.ctc import frame_log_probs


class Alignment(NamedTuple):
    """What `ctc_align` returns. Frames are counted from 0; label n stands in starts[n] to ends[n],
    the latter not included.

    Where no path of the frames gives the labels, `log_probs` is -inf, the path all blanks, and the
    rest 0. Labels behind a row's last have empty spans and zeros.

    Attributes:
        starts: int32[B, N], the first frame of each label.
        ends: int32[B, N], the frame behind its last.
        path: int32[B, F], the likeliest path: a token a frame, blank behind the last frame.
        log_probs: float32[B], nats: of that path.
        label_log_probs: float32[B], nats: of the labels, by all their paths.
        posteriors: float32[B, F, N], P(frame f emits label n | these labels). What is missing to
            1 in a frame is the blank's share.
        confidences: float32[B, N], the mean posterior of each label over its span.
    """

    starts: Int[Array, "B N"]
    ends: Int[Array, "B N"]
    path: Int[Array, "B F"]
    log_probs: Float[Array, "B"]
    label_log_probs: Float[Array, "B"]
    posteriors: Float[Array, "B F N"]
    confidences: Float[Array, "B N"]


class _Lattice(NamedTuple):
    """What a path goes through: a blank, the first label, a blank, ..., the last label, a blank."""

    emissions: Float[Array, "F B Z"]  # Z = 2 N + 1 states
    may_skip: Bool[Array, "B Z"]  # the state can follow the one two before
    ends: Bool[Array, "B Z"]  # a path ends in the last label or the blank behind it
    tokens: Int[Array, "B Z"]


def ctc_align(
    logits: Float[Array, "B F V"],
    lengths: Int[Array, "B"],
    labels: Int[Array, "B N"],
    label_lengths: Int[Array, "B"],
    *,
    blank: int = 0,
) -> Alignment:
    """Aligns given labels to the frames: the likeliest path (Viterbi), and how sure each frame is.

    The path is one of those whose collapsed form is the labels; posteriors come from the forward
    and backward variables (Graves et al., 2006, section 4.1). Of equally likely paths the one that,
    seen from the last frame, stays longest in a state, and that ends in the blank. Pure and
    traceable; O(B F N) memory.

    Args:
        logits: any floating dtype; all sums are in float32 and log space.
        lengths: frames of each row.
        labels: token ids; what stands behind a row's last is not read.
        label_lengths: number of labels of each row; no labels align to nothing but blanks.
        blank: the id of the blank. A row with a blank, or with no token, among its labels is an
            impossible one.

    Raises:
        ValueError: the blank is no token.
    """
    places = labels.shape[1]
    frames, vocabulary = logits.shape[1:]
    log_probs = frame_log_probs(logits, lengths, blank=blank)
    used = jnp.arange(places) < label_lengths[:, None]
    is_label = (labels != blank) & (labels >= 0) & (labels < vocabulary)
    lattice = _lattice(log_probs, jnp.where(used & is_label, labels, blank), label_lengths, blank)
    valid = jnp.all(is_label | ~used, axis=1)

    best, states = _viterbi(lattice)
    posteriors, total = _posteriors(lattice)
    possible = valid & (best > -jnp.inf)
    real = jnp.arange(frames) < lengths[:, None]
    # Odd states are labels. A path that is not there goes through no state at all.
    states = jnp.where(real & possible[:, None], states, 0)
    emits = states[..., None] == 2 * jnp.arange(places) + 1
    ends = jnp.max(jnp.where(emits, jnp.arange(frames)[:, None] + 1, 0), axis=1, initial=0)
    counts = jnp.sum(emits, axis=1)
    posteriors = jnp.where((possible[:, None] & real)[..., None] & used[:, None], posteriors, 0.0)
    confidences = jnp.sum(jnp.where(emits, posteriors, 0.0), axis=1) / jnp.maximum(counts, 1)
    return Alignment(
        # A label's frames stand beside each other.
        starts=(ends - counts).astype(jnp.int32),
        ends=ends.astype(jnp.int32),
        path=jnp.take_along_axis(lattice.tokens, states, axis=1),
        log_probs=jnp.where(possible, best, -jnp.inf),
        label_log_probs=jnp.where(possible, total, -jnp.inf),
        posteriors=posteriors,
        confidences=confidences,
    )


def _lattice(
    log_probs: Float[Array, "B F V"],
    labels: Int[Array, "B N"],
    label_lengths: Int[Array, "B"],
    blank: int,
) -> _Lattice:
    rows, places = labels.shape
    labels = labels.astype(jnp.int32)
    tokens = jnp.full((rows, 2 * places + 1), blank, jnp.int32).at[:, 1::2].set(labels)
    state = jnp.arange(tokens.shape[1])
    two_before = jnp.pad(tokens[:, :-2], ((0, 0), (2, 0)), constant_values=blank)
    last = 2 * label_lengths[:, None]
    emissions = jnp.take_along_axis(log_probs, tokens[:, None], axis=2)
    return _Lattice(
        emissions=jnp.swapaxes(emissions, 0, 1),
        # The blank between two labels can be left out, unless they are equal.
        may_skip=(state % 2 == 1) & (state > 1) & (tokens != two_before),
        ends=(state == last) | (state == last - 1),
        tokens=tokens,
    )


def _moves(lattice: _Lattice, scores: Float[Array, "B Z"]) -> Float[Array, "3 B Z"]:
    """The scores of the states that each state may follow: itself, the one before, two before."""
    one = _shift(scores, 1)
    two = jnp.where(lattice.may_skip, _shift(scores, 2), -jnp.inf)
    return jnp.stack([scores, one, two])


def _shift(scores: Float[Array, "B Z"], by: int) -> Float[Array, "B Z"]:
    """Every score `by` states later, or earlier if negative; -inf comes in."""
    size = scores.shape[1]
    if by > 0:
        return jnp.pad(scores, ((0, 0), (by, 0)), constant_values=-jnp.inf)[:, :size]
    return jnp.pad(scores, ((0, 0), (0, -by)), constant_values=-jnp.inf)[:, -by:]


def _before_start(lattice: _Lattice) -> Float[Array, "B Z"]:
    """Before the first frame: as if in the first blank, from which one move leads to all starts."""
    first = jnp.arange(lattice.tokens.shape[1]) == 0
    return jnp.broadcast_to(jnp.where(first, 0.0, -jnp.inf), lattice.tokens.shape)


def _viterbi(lattice: _Lattice) -> tuple[Float[Array, "B"], Int[Array, "B F"]]:
    """The log-probability of the likeliest path, and its states."""

    def read_frame(scores: Array, emissions: Array) -> tuple[Array, Array]:
        moves = _moves(lattice, scores)
        # argmax takes the first of equals: to stay.
        return jnp.max(moves, axis=0) + emissions, jnp.argmax(moves, axis=0).astype(jnp.int8)

    scores, moves = jax.lax.scan(read_frame, _before_start(lattice), lattice.emissions)
    scores = jnp.where(lattice.ends, scores, -jnp.inf)
    # The blank is the later of the two states at the end; of equals it is taken.
    size = scores.shape[1]
    last = size - 1 - jnp.argmax(scores[:, ::-1], axis=1)

    def go_back(state: Array, moves: Array) -> tuple[Array, Array]:
        move = jnp.take_along_axis(moves, state[:, None], axis=1)[:, 0]
        return jnp.maximum(state - move, 0), state

    _, states = jax.lax.scan(go_back, last, moves, reverse=True)
    return jnp.max(scores, axis=1), states.T


def _posteriors(lattice: _Lattice) -> tuple[Float[Array, "B F N"], Float[Array, "B"]]:
    """P(state | frame, labels) of the states that are labels, and log P(labels)."""

    def forward(scores: Array, emissions: Array) -> tuple[Array, Array]:
        scores = jax.nn.logsumexp(_moves(lattice, scores), axis=0) + emissions
        return scores, scores

    skip_next = jnp.pad(lattice.may_skip[:, 2:], ((0, 0), (0, 2)))

    def backward(scores: Array, emissions: Array) -> tuple[Array, Array]:
        """From the scores of what follows a frame to those of what follows the one before."""
        entered = scores + emissions
        two = jnp.where(skip_next, _shift(entered, -2), -jnp.inf)
        moves = jnp.stack([entered, _shift(entered, -1), two])
        return jax.nn.logsumexp(moves, axis=0), scores

    start = _before_start(lattice)
    last, alphas = jax.lax.scan(forward, start, lattice.emissions)
    end = jnp.where(lattice.ends, 0.0, -jnp.inf)
    _, betas = jax.lax.scan(backward, end, lattice.emissions, reverse=True)
    total = jax.nn.logsumexp(jnp.where(lattice.ends, last, -jnp.inf), axis=1)
    joint = alphas + betas - jnp.where(total > -jnp.inf, total, 0.0)[:, None]
    return jnp.swapaxes(jnp.exp(joint[:, :, 1::2]), 0, 1), total
