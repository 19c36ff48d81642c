"""An n-gram language model as an automaton, which searches on any device can ask."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NGram:
    """Probabilities of the next token by the last `order` - 1, Kneser-Ney smoothed.

    Every context that was seen is a state with a row of log-probabilities and a row of next states,
    so a call is two look-ups. Memory is 8 bytes a context and token: right for phonemes or
    characters, too much for large vocabularies at a high order. A `LanguageModel` for
    `ctc_beam_search`: give it the object itself.
    """

    log_probs: Float[Array, "C V"]
    """log P(token | context): float32, each row summing to 1; -inf for padding and <sos>."""
    following: Int[Array, "C V"]
    """The state after a token: its longest context that was seen."""
    start: Int[Array, ""]
    """The state after <sos>."""

    def __call__(
        self, tokens: Int[Array, " R"], state: Int[Array, " R"] | None
    ) -> tuple[Float[Array, "R V"], Int[Array, " R"]]:
        """Reads one token a row, or with no state <sos>: log-probabilities of the next, state."""
        if state is None:
            state = jnp.broadcast_to(self.start, tokens.shape)
        else:
            state = self.following[state, tokens]
        return self.log_probs[state], state

    @classmethod
    def train(
        cls,
        sequences: Iterable[Sequence[int]],
        *,
        vocabulary: int,
        order: int,
        sos_id: int,
        eos_id: int,
        pad_id: int,
    ) -> "NGram":
        """Counts the sequences, which have neither <sos> nor <eos>, and smooths the counts.

        Interpolated Kneser-Ney (Kneser & Ney, 1995; Chen & Goodman, 1999) with one discount a
        length, n1 / (n1 + 2 n2): contexts shorter than the longest count in how many different
        longer ones an n-gram stands, and not how often; those that begin with <sos> have no longer
        ones and count how often. The shortest is mixed with the uniform distribution.

        Raises:
            ValueError: an order below 1, no sequences, or a token that has no place in one.
        """
        if order < 1:
            raise ValueError(f"order={order} must be at least 1; 5 looks back at 4 tokens.")
        text = _Text.join(sequences, vocabulary, sos_id, eos_id, pad_id)
        levels = _count(text, vocabulary, order)
        base = np.ones(vocabulary)
        base[[sos_id, pad_id]] = 0
        probabilities = [(base / base.sum())[None]]
        offsets = np.cumsum([0, *(level.contexts for level in levels)])
        following: list[np.ndarray] = []
        for length, level in enumerate(levels):
            # Unseen tokens go where the shorter context would, and have a share of its probability.
            shorter = probabilities[-1][level.shorter]
            probabilities.append(level.smoothed(shorter))
            if length == 0:
                states = np.zeros((1, vocabulary), np.int32)
            else:
                states = following[-1][level.shorter]
            if length + 1 < len(levels):
                longer = levels[length + 1]
                states[longer.prefix, longer.last] = offsets[length + 1] + np.arange(
                    longer.contexts
                )
            following.append(states)
        start = following[0][0, sos_id]
        with np.errstate(divide="ignore"):
            log_probs = np.log(np.concatenate(probabilities[1:])).astype(np.float32)
        return cls(
            jnp.asarray(log_probs), jnp.asarray(np.concatenate(following)), jnp.asarray(start)
        )


@dataclass(frozen=True)
class _Text:
    """All sequences behind each other, each as <sos> tokens <eos>."""

    tokens: np.ndarray
    places: np.ndarray  # of each token within its sequence; that of <sos> is 0
    eos_id: int

    @classmethod
    def join(
        cls,
        sequences: Iterable[Sequence[int]],
        vocabulary: int,
        sos_id: int,
        eos_id: int,
        pad_id: int,
    ) -> "_Text":
        parts = [np.array([sos_id, *sequence, eos_id], np.int64) for sequence in sequences]
        if not parts:
            raise ValueError("a language model needs sequences to count: give at least one.")
        inner = np.concatenate([part[1:-1] for part in parts])
        bad = (inner < 0) | (inner >= vocabulary) | np.isin(inner, [sos_id, eos_id, pad_id])
        if bad.any():
            raise ValueError(
                f"token {inner[bad][0]} cannot stand in a sequence: give ids below "
                f"vocabulary={vocabulary} without <sos>, <eos> and padding."
            )
        places = np.concatenate([np.arange(len(part)) for part in parts])
        return cls(np.concatenate(parts), places, eos_id)


@dataclass(frozen=True)
class _Level:
    """The contexts of one length, and what was counted after them."""

    contexts: int
    shorter: np.ndarray  # the context without its first token, a number among the shorter ones
    prefix: np.ndarray  # the context without its last token, likewise
    last: np.ndarray  # its last token
    pairs: np.ndarray  # context * V + token: every n-gram that was seen, sorted
    counts: np.ndarray

    def smoothed(self, shorter: np.ndarray) -> np.ndarray:
        """P(token | context), [contexts, V], given the same of the contexts made shorter."""
        vocabulary = shorter.shape[1]
        once, twice = (self.counts == 1).sum(), (self.counts == 2).sum()
        discount = once / (once + 2 * twice) if once and twice else 0.5
        context = self.pairs // vocabulary
        total = np.bincount(context, self.counts, self.contexts)[:, None]
        kinds = np.bincount(context, minlength=self.contexts)[:, None]
        found = shorter * (discount * kinds / total)
        found.reshape(-1)[self.pairs] += (self.counts - discount) / total[context, 0]
        return found


def _count(text: _Text, vocabulary: int, order: int) -> list[_Level]:
    """A level for each context length from 0 to `order` - 1, as far as the text has any."""
    size = len(text.tokens)
    # context[i]: the number of the context that ends in token i, of the length in hand.
    context = np.zeros(size, np.int64)
    described = (1, np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    drafts = []
    for length in range(order):
        # What follows token i after a context of this length that begins within the sequence.
        events = np.flatnonzero((text.tokens != text.eos_id) & (text.places >= length - 1))
        pairs = context[events] * vocabulary + text.tokens[events + 1]
        drafts.append((described, events, pairs, text.places[events] == length - 1))
        if length + 1 == order:
            break
        longer = np.flatnonzero((text.tokens != text.eos_id) & (text.places >= length))
        prefix = context[longer - 1] if length else np.zeros(len(longer), np.int64)
        pairs, first, number = np.unique(
            prefix * vocabulary + text.tokens[longer], return_index=True, return_inverse=True
        )
        if not len(pairs):
            break
        described = (len(pairs), context[longer[first]], pairs // vocabulary, pairs % vocabulary)
        context = np.zeros(size, np.int64)
        context[longer] = number
    return _levels(drafts)


def _levels(drafts: list) -> list[_Level]:
    """Kneser-Ney's counts: of all n-grams the longest, of different longer ones the others."""
    levels = []
    once = None  # the events of the longer level, one for each of its n-grams
    for described, events, pairs, after_sos in reversed(drafts):
        counted = np.ones(len(events), bool)
        if once is not None:
            counted = after_sos | np.isin(events, once)
        kept, counts = np.unique(pairs[counted], return_counts=True)
        _, first = np.unique(pairs, return_index=True)
        once = events[first]
        levels.append(_Level(*described, pairs=kept, counts=counts))
    return levels[::-1]
