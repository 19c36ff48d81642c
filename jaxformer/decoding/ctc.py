"""CTC decoding: the best path, and the best labels by prefix beam search."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformer.decoding.beam import Beams, take_slots
from jaxformer.nn.ctc import collapse

LanguageModel = Callable[[Int[Array, " R"], Any], tuple[Float[Array, "R V"], Any]]
"""`language_model(tokens, state) -> (log_probs, state)`: reads one token a row, and gives the log
probabilities of the next. Pure and traceable; every leaf of `state` has the rows first. At the
start of the sequences `state` is None, and `tokens` mean nothing."""


class BestPath(NamedTuple):
    """What `ctc_greedy` returns.

    Attributes:
        tokens: int32[B, F], the labels, then blanks.
        lengths: int32[B], number of labels.
        path: int32[B, F], the likeliest token of each frame; blank behind the last.
        log_probs: float32[B], nats: of the path, which is one of many that give these labels.
    """

    tokens: Int[Array, "B F"]
    lengths: Int[Array, "B"]
    path: Int[Array, "B F"]
    log_probs: Float[Array, "B"]


class _Prefixes(NamedTuple):
    """The beam of every row after some frames; no two live prefixes of a row are equal."""

    tokens: Int[Array, "B beam max_length"]  # blanks behind the last
    lengths: Int[Array, "B beam"]
    blank: Float[Array, "B beam"]  # log-probability of the prefix's paths that end in a blank
    label: Float[Array, "B beam"]  # ... in the last label; both -inf where there is no prefix
    fusion: Float[Array, "B beam"]  # what language model and bonus add to the score
    next_labels: Float[Array, "B beam V"] | None  # what fusion each label would add
    language: Any  # the language model's state, the beams of a row beside each other


def frame_log_probs(
    logits: Float[Array, "B F V"],
    lengths: Int[Array, "B"],
    *,
    blank: int = 0,
    forbidden: Sequence[int] = (),
) -> Float[Array, "B F V"]:
    """Log-probabilities of the tokens of each frame, float32, with padding made harmless.

    Frames behind a row's last are sure blanks, which change no labels and no probability: what
    reads these needs no lengths. Forbidden tokens are at -inf and keep their share of the rest.

    Raises:
        ValueError: the blank or a forbidden token is no token, or the blank is forbidden.
    """
    frames, vocabulary = logits.shape[1:]
    for name, token in (("blank", blank), *(("forbidden", token) for token in forbidden)):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{name}={token} is no token of the vocabulary of {vocabulary}: "
                f"give an id from 0 to {vocabulary - 1}."
            )
    if blank in forbidden:
        raise ValueError(f"the blank, {blank}, must not be among the forbidden tokens {forbidden}.")
    out = np.zeros(vocabulary, bool)
    out[list(forbidden)] = True
    sure_blank = np.where(np.arange(vocabulary) == blank, 0.0, -np.inf).astype(np.float32)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    real = jnp.arange(frames) < lengths[:, None]
    return jnp.where(real[..., None], jnp.where(out, -jnp.inf, log_probs), sure_blank)


def ctc_greedy(
    logits: Float[Array, "B F V"],
    lengths: Int[Array, "B"],
    *,
    blank: int = 0,
    forbidden: Sequence[int] = (),
) -> BestPath:
    """The labels of the likeliest path: best path decoding (Graves et al., 2006).

    They need not be the likeliest labels, whose probability is spread over many paths. Equal
    probabilities go to the lower token id.

    Args:
        logits: any floating dtype; the softmax is taken in float32.
        lengths: frames of each row.
        blank: the id of the blank.
        forbidden: token ids that are never chosen (<sos>, <eos>).

    Raises:
        ValueError: the blank or a forbidden token is no token, or the blank is forbidden.
    """
    log_probs = frame_log_probs(logits, lengths, blank=blank, forbidden=forbidden)
    path = jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
    tokens, label_lengths = collapse(path, lengths, blank)
    return BestPath(tokens, label_lengths, path, jnp.sum(jnp.max(log_probs, axis=-1), axis=-1))


def ctc_beam_search(
    logits: Float[Array, "B F V"],
    lengths: Int[Array, "B"],
    *,
    beam: int,
    max_length: int,
    n_best: int = 1,
    blank: int = 0,
    forbidden: Sequence[int] = (),
    language_model: LanguageModel | None = None,
    language_model_weight: float = 1.0,
    length_bonus: float = 0.0,
    eos_id: int | None = None,
) -> Beams:
    """The likeliest labels by prefix beam search (Graves, 2012; Hannun et al., 2014).

    Frame by frame the `beam` best prefixes of labels live on, each with the summed probability of
    its paths, those that end in a blank apart from those that end in its last label: what makes a
    label after it a new one, or the same. Where a prefix and one of its one-label extensions are
    both in the beam, the paths from one to the other are counted to the longer one. With a beam
    that holds every prefix the result is exact; a narrower one gives `log_probs` that lack the
    paths through prefixes that had left it.

    A hypothesis Y is ranked by

        log P_ctc(Y) + language_model_weight * log P_lm(Y) + length_bonus * |Y|

    which is `scores`; `log_probs` is the first term. Equal scores rank the prefixes that got no new
    label first, then by the rank of the prefix, then by token id, the lower first. There is no
    <eos> in `tokens`, the padding is the blank, and every hypothesis is finished. Pure and
    traceable: give it to `jax.jit` with the Python values closed over.

    Args:
        logits: any floating dtype; probabilities are summed in float32.
        lengths: frames of each row.
        beam: prefixes a row.
        max_length: most labels a hypothesis: longer ones are not searched.
        n_best: hypotheses to return for a row, at most `beam`.
        blank: the id of the blank.
        forbidden: token ids that are never chosen (<sos>, <eos>).
        language_model: see `LanguageModel`; it is called once a frame with B * beam rows.
            `NGram` is one.
        language_model_weight: of its log-probabilities.
        length_bonus: added for each label; makes up for a language model's liking of short output.
        eos_id: if given, the language model's log-probability that the sequence ends there counts.

    Raises:
        ValueError: an argument out of its range.
    """
    vocabulary = logits.shape[-1]
    _check_search(beam, max_length, n_best, language_model_weight, length_bonus)
    if eos_id is not None and not 0 <= eos_id < vocabulary:
        raise ValueError(f"eos_id={eos_id} is no token of the vocabulary of {vocabulary}.")
    log_probs = frame_log_probs(logits, lengths, blank=blank, forbidden=forbidden)
    rows = logits.shape[0]
    fusion = _Fusion(language_model, language_model_weight, length_bonus)
    next_labels, language = fusion.start(rows, beam)
    start = _Prefixes(
        tokens=jnp.full((rows, beam, max_length), blank, jnp.int32),
        lengths=jnp.zeros((rows, beam), jnp.int32),
        # One empty prefix a row: copies of it would fill the beam with duplicates.
        blank=jnp.full((rows, beam), -jnp.inf, jnp.float32).at[:, 0].set(0.0),
        label=jnp.full((rows, beam), -jnp.inf, jnp.float32),
        fusion=jnp.zeros((rows, beam), jnp.float32),
        next_labels=next_labels,
        language=language,
    )

    def read_frame(prefixes: _Prefixes, frame: Float[Array, "B V"]) -> tuple[_Prefixes, None]:
        return _read_frame(prefixes, frame, blank, fusion), None

    found, _ = jax.lax.scan(read_frame, start, jnp.swapaxes(log_probs, 0, 1))
    total = jnp.logaddexp(found.blank, found.label)
    scores = total + found.fusion
    if eos_id is not None and found.next_labels is not None:
        scores += found.next_labels[..., eos_id] - length_bonus
    scores, order = jax.lax.top_k(jnp.where(total > -jnp.inf, scores, -jnp.inf), n_best)
    alive = scores > -jnp.inf
    return Beams(
        tokens=jnp.where(alive[..., None], take_slots(found.tokens, order), blank),
        lengths=jnp.where(alive, take_slots(found.lengths, order), 0),
        scores=scores,
        log_probs=jnp.where(alive, take_slots(total, order), -jnp.inf),
        finished=alive,
    )


class _Fusion(NamedTuple):
    """What is added to the score of a prefix for each of its labels."""

    model: LanguageModel | None
    weight: float
    bonus: float

    def start(self, rows: int, beam: int) -> tuple[Array | None, Any]:
        """What each first label adds, [B, beam, V], and the language model's state."""
        if self.model is None:
            return None, None
        return self._ask(jnp.zeros((rows, beam), jnp.int32), None)

    def gains(self, prefixes: _Prefixes) -> Array | float:
        """What each next label of each prefix adds."""
        return self.bonus if prefixes.next_labels is None else prefixes.next_labels

    def read(
        self, prefixes: _Prefixes, parents: Array, chosen: Array, extended: Array
    ) -> tuple[Array | None, Any]:
        """`next_labels` and `language` of the new beam: extended prefixes have read a label."""
        if self.model is None:
            return None, None
        rows, beam = parents.shape
        places = (jnp.arange(rows)[:, None] * beam + parents).reshape(-1)
        old = jax.tree.map(lambda leaf: leaf[places], prefixes.language)
        next_labels, new = self._ask(chosen, old)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(extended.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        kept = take_slots(prefixes.next_labels, parents)
        next_labels = jnp.where(extended[..., None], next_labels, kept)
        return next_labels, jax.tree.map(choose, new, old)

    def _ask(self, tokens: Int[Array, "B beam"], state: Any) -> tuple[Array, Any]:
        assert self.model is not None
        log_probs, state = self.model(tokens.reshape(-1), state)
        if self.weight == 0:  # 0 * -inf would be NaN
            log_probs = jnp.zeros_like(log_probs)
        gains = self.weight * log_probs.astype(jnp.float32) + self.bonus
        return gains.reshape(*tokens.shape, -1), state


def _read_frame(
    prefixes: _Prefixes, frame: Float[Array, "B V"], blank: int, fusion: _Fusion
) -> _Prefixes:
    """The best prefixes after one more frame."""
    rows, beam, max_length = prefixes.tokens.shape
    vocabulary = frame.shape[-1]
    row = jnp.arange(rows)[:, None]
    last = _last(prefixes)
    total = jnp.logaddexp(prefixes.blank, prefixes.label)

    # A label equal to the last one is a new label only after a blank.
    labels = jnp.arange(vocabulary)
    before = jnp.where(labels == last[..., None], prefixes.blank[..., None], total[..., None])
    fits = (labels != blank) & (prefixes.lengths < max_length)[..., None]
    extended = jnp.where(fits, before + frame[:, None], -jnp.inf)

    stay_blank = total + frame[:, blank, None]
    stay_label = prefixes.label + jnp.take_along_axis(frame, last, axis=1)
    parent_of, has_parent = _parents(prefixes, total, blank)
    from_parent = jnp.where(has_parent, extended[row, parent_of, last], -jnp.inf)
    stay_label = jnp.logaddexp(stay_label, from_parent)
    extended = extended.at[row, parent_of, last].min(jnp.where(has_parent, -jnp.inf, jnp.inf))

    stays = jnp.logaddexp(stay_blank, stay_label) + prefixes.fusion
    extension_fusion = prefixes.fusion[..., None] + fusion.gains(prefixes)
    extension_fusion = jnp.broadcast_to(extension_fusion, extended.shape).reshape(rows, -1)
    extended = extended.reshape(rows, -1)
    candidates = jnp.concatenate([stays, extended + extension_fusion], axis=1)
    scores, places = jax.lax.top_k(candidates, beam)
    is_extension = places >= beam
    extension = jnp.where(is_extension, places - beam, 0)
    parents = jnp.where(is_extension, extension // vocabulary, places)
    chosen = extension % vocabulary

    lengths = take_slots(prefixes.lengths, parents)
    written = is_extension[..., None] & (jnp.arange(max_length) == lengths[..., None])
    next_labels, language = fusion.read(prefixes, parents, chosen, is_extension)
    new_label = jnp.where(
        is_extension, take_slots(extended, extension), take_slots(stay_label, parents)
    )
    new_blank = jnp.where(is_extension, -jnp.inf, take_slots(stay_blank, parents))
    alive = scores > -jnp.inf
    return _Prefixes(
        tokens=jnp.where(written, chosen[..., None], take_slots(prefixes.tokens, parents)),
        lengths=lengths + is_extension,
        blank=jnp.where(alive, new_blank, -jnp.inf),
        label=jnp.where(alive, new_label, -jnp.inf),
        fusion=jnp.where(
            is_extension,
            take_slots(extension_fusion, extension),
            take_slots(prefixes.fusion, parents),
        ),
        next_labels=next_labels,
        language=language,
    )


def _last(prefixes: _Prefixes) -> Int[Array, "B beam"]:
    """The last label of each prefix, the blank where it is empty."""
    place = jnp.maximum(prefixes.lengths - 1, 0)
    return jnp.take_along_axis(prefixes.tokens, place[..., None], axis=-1)[..., 0]


def _parents(
    prefixes: _Prefixes, total: Float[Array, "B beam"], blank: int
) -> tuple[Int[Array, "B beam"], Bool[Array, "B beam"]]:
    """Where in the beam each prefix without its last label is, and whether it is there."""
    tokens, lengths = prefixes.tokens, prefixes.lengths
    last_place = jnp.arange(tokens.shape[-1]) == lengths[..., None] - 1
    shortened = jnp.where(last_place, blank, tokens)
    equal = jnp.all(tokens[:, :, None] == shortened[:, None], axis=-1)
    # Slots without a prefix hold arbitrary tokens: they are nobody's parent and have none.
    alive = total > -jnp.inf
    equal &= alive[:, :, None] & (alive & (lengths > 0))[:, None]
    return jnp.argmax(equal, axis=1), jnp.any(equal, axis=1)


def _check_search(beam: int, max_length: int, n_best: int, weight: float, bonus: float) -> None:
    if beam < 1:
        raise ValueError(f"beam={beam} must be at least 1; ctc_greedy needs none.")
    if max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no room for a label: give at least 1.")
    if not 1 <= n_best <= beam:
        raise ValueError(f"n_best={n_best} must be from 1 to beam={beam}: raise beam or lower it.")
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"language_model_weight={weight} must be finite and not negative.")
    if not math.isfinite(bonus):
        raise ValueError(f"length_bonus={bonus} must be finite; 0 is none.")
