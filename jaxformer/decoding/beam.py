"""Beam search with a length penalty, n-best, and stopping decided for each row."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformer.decoding.sampling import Step, allowed_tokens


class Beams(NamedTuple):
    """What `beam_search` returns; hypotheses are ordered, the best first.

    Finished hypotheses come before unfinished ones, which only fill what is left of `n_best`. Where
    a row has fewer hypotheses than that, the rest are empty: score and log-probability -inf,
    length 0, nothing but padding, not finished.

    Attributes:
        tokens: int32[B, n_best, max_length]; <eos>, where there is one, is included, then padding.
        lengths: int32[B, n_best], tokens before <eos>: `tokens[b, i, :lengths[b, i]]` is the text.
        scores: float32[B, n_best], `log_probs` over the length penalty.
        log_probs: float32[B, n_best], nats: the model's log-probability of the hypothesis, <eos>
            included.
        finished: bool[B, n_best], whether the hypothesis ended in <eos>.
    """

    tokens: Int[Array, "B n_best max_length"]
    lengths: Int[Array, "B n_best"]
    scores: Float[Array, "B n_best"]
    log_probs: Float[Array, "B n_best"]
    finished: Bool[Array, "B n_best"]


class _State(NamedTuple):
    position: Int[Array, ""]
    tokens: Int[Array, "B beam max_length"]
    log_probs: Float[Array, "B beam"]  # descending; -inf where there is no live hypothesis
    parents: Int[Array, "B beam"]  # where in the last step's beam each live hypothesis was
    ended: Beams  # descending by score, empty slots last
    cache: Any


def beam_search(
    step: Step,
    cache: Any,
    logits: Float[Array, "B V"],
    *,
    beam: int,
    max_length: int,
    eos_id: int,
    pad_id: int,
    min_length: int = 0,
    length_penalty: float = 0.6,
    n_best: int = 1,
    forbidden: Sequence[int] = (),
    normalize: bool = True,
) -> Beams:
    """The hypotheses of the highest score, log P(Y) / ((5 + |Y|) / 6) ** length_penalty.

    |Y| counts every token of the hypothesis, <eos> included (Wu et al. 2016, section 7, without
    the coverage term). Each step ranks all one-token extensions of a row's live hypotheses by
    log-probability. Of the `beam` best, those that end in <eos> leave the search and are kept
    aside; the `beam` best that do not end live on. A row stops when none of its live hypotheses can
    still score above the worst of `n_best` finished ones, whatever the other rows do. A beam of 1
    stops at its first <eos>, and so is greedy search under any length penalty.

    Equal log-probabilities rank by the rank of the hypothesis they extend, then by token id, the
    lower first; equal scores by which finished earlier. Pure and traceable: give it to `jax.jit`
    with `step` and the Python numbers closed over.

    Args:
        step: feeds one token a row to the model, on B * beam rows.
        cache: what `step` takes and returns, holding the prompt, with B rows. Its method
            `take(indices)` gathers rows: here the cache is expanded to B * beam rows, row b's
            beside each other, and then reordered at every step.
        logits: after the prompt, any floating dtype; log-probabilities are summed in float32.
        beam: live hypotheses a row. It may exceed V.
        max_length: most tokens a hypothesis, <eos> included.
        eos_id: the token that ends a hypothesis.
        pad_id: fills hypotheses after <eos>; it is never chosen, unless it is `eos_id`.
        min_length: fewest tokens before <eos>.
        length_penalty: alpha above; 0 compares plain log-probabilities, larger favours longer.
        n_best: hypotheses to return for a row, at most `beam`.
        forbidden: token ids that are never chosen (<sos>).
        normalize: whether log-probabilities are the softmax of `logits` and of what `step` gives.
            If not, they are what each token adds to the score, and must be at most 0: the search
            stops by that.

    Raises:
        ValueError: an argument out of its range, or nothing left to choose.
    """
    if beam < 1:
        raise ValueError(f"beam={beam} must be at least 1, which is greedy search.")
    if not 1 <= n_best <= beam:
        raise ValueError(f"n_best={n_best} must be from 1 to beam={beam}: raise beam or lower it.")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty={length_penalty} must be finite; 0 is no penalty.")
    rows, vocabulary = logits.shape
    allowed = allowed_tokens(vocabulary, max_length, min_length, eos_id, pad_id, forbidden)
    penalties = jnp.asarray(_penalties(max_length, length_penalty))

    def extend(state, logits):
        """Ranks the extensions of the live hypotheses by one token, and sorts them out."""
        gained = logits.astype(jnp.float32)
        if normalize:
            gained = jax.nn.log_softmax(gained)
        gained = gained.reshape(rows, beam, vocabulary)
        log_probs = state.log_probs[..., None]
        possible = (log_probs > -jnp.inf) & allowed(state.position)
        candidates = jnp.where(possible, log_probs + gained, -jnp.inf).reshape(rows, -1)
        # At most one extension of each hypothesis ends, so twice the beam holds a beam that lives.
        log_probs, places = jax.lax.top_k(candidates, min(2 * beam, beam * vocabulary))
        parents, chosen = places // vocabulary, places % vocabulary
        tokens = take_slots(state.tokens, parents).at[:, :, state.position].set(chosen)
        ends = chosen == eos_id

        entering = (ends & (log_probs > -jnp.inf))[:, :beam]
        scores = log_probs[:, :beam] / penalties[state.position + 1]
        new = Beams(
            tokens=tokens[:, :beam],
            lengths=jnp.full((rows, beam), state.position),
            scores=jnp.where(entering, scores, -jnp.inf),
            log_probs=log_probs[:, :beam],
            finished=entering,
        )
        ended = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), state.ended, new)
        _, order = jax.lax.top_k(ended.scores, n_best)
        ended = jax.tree.map(lambda field: take_slots(field, order), ended)

        live = jnp.argsort(ends, axis=1, stable=True)[:, :beam]
        log_probs = take_slots(jnp.where(ends, -jnp.inf, log_probs), live)
        position = state.position + 1
        stops = ended.scores[:, -1] >= log_probs[:, 0] / reachable_penalty(position)
        if beam == 1:
            stops |= ended.finished[:, 0]
        return _State(
            position=position,
            tokens=take_slots(tokens, live),
            # A stopped row has no live hypotheses, so nothing of it can change any more.
            log_probs=jnp.where(stops[:, None], -jnp.inf, log_probs),
            parents=take_slots(parents, live),
            ended=ended,
            cache=state.cache,
        )

    def reachable_penalty(position):
        """The largest penalty at which a live hypothesis of `position` tokens can still finish.

        Gains are at most 0, those of a softmax as those of `joint_gains`: log-probabilities only
        fall, and over this penalty they bound every score to come. The penalty is monotone in the
        length, so its largest value is at an end.
        """
        shortest = jnp.minimum(jnp.maximum(position, min_length) + 1, max_length)
        return jnp.maximum(penalties[shortest], penalties[max_length])

    def go_on(state):
        return (state.position < max_length) & jnp.any(state.log_probs > -jnp.inf)

    def advance(state):
        rows_of_parents = jnp.arange(rows)[:, None] * beam + state.parents
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.position - 1, 1, axis=2)
        reorder = getattr(state.cache, "reorder", state.cache.take)
        logits, cache = step(last.reshape(-1, 1), reorder(rows_of_parents.reshape(-1)))
        return extend(state._replace(cache=cache), logits)

    start = _State(
        position=jnp.int32(0),
        tokens=jnp.full((rows, beam, max_length), pad_id, jnp.int32),
        # One empty hypothesis a row: copies of it would fill the beam with duplicates.
        log_probs=jnp.full((rows, beam), -jnp.inf, jnp.float32).at[:, 0].set(0.0),
        parents=jnp.zeros((rows, beam), jnp.int32),
        ended=_no_hypotheses(rows, n_best, max_length, pad_id),
        cache=repeat_rows(cache, rows, beam),
    )
    # The first tokens are chosen outside the loop, so that none is fed that nothing follows.
    state = extend(start, jnp.repeat(logits, beam, axis=0))
    state = jax.lax.while_loop(go_on, advance, state)
    live = Beams(
        tokens=state.tokens,
        lengths=jnp.full((rows, beam), state.position),
        scores=state.log_probs / penalties[state.position],
        log_probs=state.log_probs,
        finished=jnp.zeros((rows, beam), bool),
    )
    return _fill(state.ended, live, pad_id)


def repeat_rows(cache: Any, rows: int, count: int) -> Any:
    """The cache with each of its rows `count` times, beside each other."""
    if hasattr(cache, "repeat"):
        return cache.repeat(count)
    return cache.take(jnp.repeat(jnp.arange(rows), count))


def _fill(ended: Beams, live: Beams, pad_id: int) -> Beams:
    """The ended hypotheses, and in what slots they leave empty the best of the live ones."""
    rows, n_best, max_length = ended.tokens.shape
    both = jax.tree.map(lambda *fields: jnp.concatenate(fields, axis=1), ended, live)
    empty = both.scores == -jnp.inf
    # Both parts are sorted, so a stable sort by kind keeps the best of each kind first.
    kind = jnp.where(empty, 2, jnp.where(both.finished, 0, 1))
    order = jnp.argsort(kind, axis=1, stable=True)[:, :n_best]
    empty = take_slots(empty, order)
    return jax.tree.map(
        lambda field, nothing: jnp.where(
            jnp.expand_dims(empty, tuple(range(2, field.ndim))), nothing, take_slots(field, order)
        ),
        both,
        _no_hypotheses(rows, n_best, max_length, pad_id),
    )


def _no_hypotheses(rows: int, slots: int, max_length: int, pad_id: int) -> Beams:
    return Beams(
        tokens=jnp.full((rows, slots, max_length), pad_id, jnp.int32),
        lengths=jnp.zeros((rows, slots), jnp.int32),
        scores=jnp.full((rows, slots), -jnp.inf, jnp.float32),
        log_probs=jnp.full((rows, slots), -jnp.inf, jnp.float32),
        finished=jnp.zeros((rows, slots), bool),
    )


def _penalties(max_length: int, alpha: float) -> np.ndarray:
    """The length penalty of 0 to `max_length` tokens, float32[max_length + 1]."""
    return (((5 + np.arange(max_length + 1)) / 6) ** alpha).astype(np.float32)


def take_slots(values, slots: Int[Array, "B n"]):
    """For each row b, values[b, slots[b]]: `values` is [B, m] or [B, m, ...]."""
    return jax.vmap(lambda row, chosen: row[chosen])(values, slots)
