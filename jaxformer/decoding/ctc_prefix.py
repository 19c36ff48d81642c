"""CTC's probability of every next label of a prefix, and what a search by it and a decoder adds."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.decoding.beam import repeat_rows
from jaxformer.decoding.sampling import Step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CTCPrefixes:
    """What CTC makes of one prefix a row; R rows, each reading the frames of some batch row."""

    row: Int[Array, " R"]
    """The batch row whose frames are read."""
    last: Int[Array, " R"]
    """The last label; the blank where the prefix is empty."""
    label: Float[Array, "R _"]
    """[R, F + 1]: at f, the log-probability of the paths over the first f frames that give just
    the prefix and end in its last label."""
    blank: Float[Array, "R _"]
    """[R, F + 1]: likewise, of the paths that end in a blank."""
    log_prob: Float[Array, " R"]
    """log P(the labels begin with the prefix)."""

    def take(self, indices: Int[Array, " Q"]) -> "CTCPrefixes":
        """The prefixes of these rows, in this order."""
        return jax.tree.map(lambda leaf: leaf[indices], self)


class CTCPrefixScorer:
    """Scores prefixes by CTC, for searches that go label by label and not frame by frame.

    P(prefix) is the probability of all labels that begin with it (Graves, 2008, section 7.5;
    Watanabe et al., 2017, algorithm 2). For a prefix g and a label v after it that is

        P(g v) = sum over frames f of P(the first f - 1 frames give g, and f is a new v)

    so all labels are scored by one sum, and the forward variables (`CTCPrefixes.label`, `blank`)
    are computed for the chosen label alone, when it is fed. All in log space and float32.

    Args:
        log_probs: of each frame, float32, as `frame_log_probs` makes them: behind a row's last
            frame stand sure blanks.
        blank: the id of the blank.
        eos_id: the token that ends a hypothesis; it is no label.
    """

    def __init__(self, log_probs: Float[Array, "B F V"], *, blank: int, eos_id: int):
        self.log_probs = log_probs
        self.blank = blank
        self.eos_id = eos_id

    def start(self) -> CTCPrefixes:
        """The empty prefix of every row."""
        rows = self.log_probs.shape[0]
        blanks = jnp.cumsum(self.log_probs[:, :, self.blank], axis=1)
        blanks = jnp.pad(blanks, ((0, 0), (1, 0)))
        return CTCPrefixes(
            row=jnp.arange(rows, dtype=jnp.int32),
            last=jnp.full(rows, self.blank, jnp.int32),
            label=jnp.full_like(blanks, -jnp.inf),
            blank=blanks,
            log_prob=jnp.zeros(rows, jnp.float32),
        )

    def extend(self, labels: Int[Array, " R"], prefixes: CTCPrefixes) -> CTCPrefixes:
        """Each prefix with one more label."""
        emitted = self.log_probs[prefixes.row, :, labels]
        blanks = self.log_probs[prefixes.row, :, self.blank]
        before = self._before(prefixes, labels == prefixes.last)
        nothing = jnp.full(labels.shape, -jnp.inf, jnp.float32)

        def read_frame(carry: tuple[Array, Array], frame: tuple[Array, Array, Array]) -> Any:
            label, blank = carry
            before, emitted, blanks = frame
            new = jnp.logaddexp(label, before) + emitted, jnp.logaddexp(label, blank) + blanks
            return new, new

        frames = (before.T, emitted.T, blanks.T)
        _, (label, blank) = jax.lax.scan(read_frame, (nothing, nothing), frames)
        return CTCPrefixes(
            row=prefixes.row,
            last=labels.astype(jnp.int32),
            label=jnp.concatenate([nothing[None], label]).T,
            blank=jnp.concatenate([nothing[None], blank]).T,
            log_prob=_log_sum(before + emitted),
        )

    def next_log_probs(self, prefixes: CTCPrefixes) -> Float[Array, "R V"]:
        """log P(the labels begin with the prefix and v) for every v, impossible for the blank.

        At `eos_id` stands log P(the labels are the prefix). But for what forbidden tokens have, the
        probabilities sum to that of the prefix.
        """
        frames = self.log_probs[prefixes.row]
        found = _log_sum(self._before(prefixes, False)[..., None] + frames)
        # After itself a label is a new one only if a blank was between.
        last = prefixes.last[:, None]
        again = jnp.take_along_axis(frames, last[..., None], axis=2)[..., 0]
        again = _log_sum(self._before(prefixes, True) + again)
        labels = jnp.arange(frames.shape[-1])
        found = jnp.where(labels == last, again[:, None], found)
        ended = jnp.logaddexp(prefixes.label[:, -1], prefixes.blank[:, -1])
        found = jnp.where(labels == self.eos_id, ended[:, None], found)
        return jnp.where(labels == self.blank, -jnp.inf, found)

    def _before(self, prefixes: CTCPrefixes, repeated: Array | bool) -> Float[Array, "R F"]:
        """At f, log P(the frames before f give the prefix, so that f may be a new label)."""
        either = jnp.logaddexp(prefixes.label, prefixes.blank)
        repeated = jnp.asarray(repeated).reshape(-1, 1)
        return jnp.where(repeated, prefixes.blank, either)[:, :-1]


def _log_sum(values: Float[Array, "R F *V"]) -> Float[Array, "R *V"]:
    """log of the sum of exp over axis 1; -inf of nothing."""
    if values.shape[1] == 0:
        return jnp.full((values.shape[0], *values.shape[2:]), -jnp.inf, jnp.float32)
    return jax.nn.logsumexp(values, axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JointCache:
    """What a decoder and CTC remember of the same hypotheses."""

    decoder: Any
    prefixes: CTCPrefixes

    def take(self, indices: Int[Array, " Q"]) -> "JointCache":
        """The cache of these rows, in this order."""
        return JointCache(self.decoder.take(indices), self.prefixes.take(indices))

    def repeat(self, count: int) -> "JointCache":
        """Each row `count` times, beside each other."""
        rows = self.prefixes.row.shape[0]
        indices = jnp.repeat(jnp.arange(rows), count)
        return JointCache(repeat_rows(self.decoder, rows, count), self.prefixes.take(indices))

    def reorder(self, indices: Int[Array, " Q"]) -> "JointCache":
        """`take` where rows change places within their batch row alone."""
        reorder = getattr(self.decoder, "reorder", self.decoder.take)
        return JointCache(reorder(indices), self.prefixes.take(indices))


def joint_gains(
    logits: Float[Array, "R V"],
    prefixes: CTCPrefixes,
    scorer: CTCPrefixScorer,
    weight: float,
) -> Float[Array, "R V"]:
    """What each next token adds to weight * log P_ctc(prefix) + (1 - weight) * log P_decoder.

    Never above 0: P_ctc of a longer prefix is part of that of the shorter one. What rounding puts
    above is cut off, because the search stops by that bound.
    """
    gains = jnp.zeros(logits.shape, jnp.float32)
    if weight < 1:
        gains += (1 - weight) * jax.nn.log_softmax(logits.astype(jnp.float32))
    if weight > 0:
        longer = scorer.next_log_probs(prefixes)
        possible = longer > -jnp.inf  # where the prefix is impossible too, -inf - -inf is NaN
        gains += weight * jnp.where(possible, longer - prefixes.log_prob[:, None], -jnp.inf)
    return jnp.minimum(gains, 0.0)


def joint_search(
    step: Step,
    cache: Any,
    logits: Float[Array, "B V"],
    scorer: CTCPrefixScorer,
    weight: float,
) -> tuple[Step, Any, Float[Array, "B V"]]:
    """Joins CTC to a decoder: the step, cache and first gains to give to `beam_search`.

    Hypotheses are then ranked by weight * log P_ctc + (1 - weight) * log P_decoder, one pass and
    label by label (Watanabe et al., 2017, section IV-B): while a hypothesis grows, P_ctc is that of
    all labels that begin with it, and at <eos> that of just these. Call `beam_search` with
    `normalize=False`, since gains sum to no 1.

    Args:
        step: feeds one token a row to the decoder.
        cache: of the decoder, holding <sos>.
        logits: of the decoder, after <sos>.
        scorer: has the frames of the same rows.
        weight: lambda, from 0 (the decoder alone: beam search as without CTC) to 1.

    Raises:
        ValueError: the weight is out of its range.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} is a share: give a number from 0 (decoder) to 1 (CTC).")

    def joint_step(tokens: Int[Array, "R 1"], cache: JointCache) -> tuple[Array, JointCache]:
        logits, decoder = step(tokens, cache.decoder)
        cache = dataclasses.replace(cache, decoder=decoder)
        if weight > 0:
            prefixes = scorer.extend(tokens[:, 0], cache.prefixes)
            cache = dataclasses.replace(cache, prefixes=prefixes)
        return joint_gains(logits, cache.prefixes, scorer, weight), cache

    start = scorer.start()
    return joint_step, JointCache(cache, start), joint_gains(logits, start, scorer, weight)
