"""Greedy search and sampling: temperature, top-k, nucleus, min-p."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxformer.decoding.scoring import token_log_probs


class SearchCache(Protocol):
    """What a model remembers of the tokens it was fed: any pytree that can gather its rows.

    It may also have `repeat(count)`, each row `count` times beside each other, and `reorder(rows)`,
    which is `take` of rows that change places only with those repeated from the same row. Beam
    search calls them in place of `take`: what such rows share need then be neither held in copies
    nor moved.
    """

    def take(self, indices: Int[Array, "rows"]) -> "SearchCache":
        """The cache whose row i is row indices[i] of this one; the number of rows may change."""
        ...


Step = Callable[[Int[Array, "B 1"], Any], tuple[Float[Array, "B V"], Any]]
"""`step(tokens, cache) -> (logits, cache)`: feeds one token a row, gives the next one's logits."""


class Sampled(NamedTuple):
    """What `sample` and `greedy` return.

    Attributes:
        tokens: int32[B, max_length]; <eos>, where a row ended, is included, then padding.
        lengths: int32[B], tokens before <eos>: `tokens[b, :lengths[b]]` is the text.
        log_probs: float32[B], nats: the log-probability of the row, <eos> included, under the
            model's own distribution (temperature 1, nothing filtered or forbidden).
        finished: bool[B], whether the row ended in <eos> rather than at its length limit.
    """

    tokens: Int[Array, "B max_length"]
    lengths: Int[Array, "B"]
    log_probs: Float[Array, "B"]
    finished: Bool[Array, "B"]


class _State(NamedTuple):
    position: Int[Array, ""]
    sampled: Sampled
    cache: Any


def filter_logits(
    logits: Float[Array, "B V"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Array, "B V"]:
    """Logits of the distribution that is sampled from: the tokens left out are at -inf.

    The temperature divides the logits first; then each filter looks at the distribution that the
    one before it left, renormalised. Equal logits rank by token id, the lower first. The likeliest
    token always stays.

    Args:
        logits: any floating dtype.
        temperature: softmax temperature; 0 leaves the likeliest token alone.
        top_k: keep the k likeliest tokens (Fan et al. 2018); None, or k above V: all.
        top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least this
            (the nucleus, Holtzman et al. 2020); None or 1: all.
        min_p: keep tokens at least this times as likely as the likeliest (Nguyen et al. 2024);
            None or 0: all.

    Returns:
        float32[B, V], shifted by a constant a row, so that the likeliest token is at 0.

    Raises:
        ValueError: an argument out of its range.
    """
    _check_filters(temperature, top_k, top_p, min_p)
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        temperature, top_k = 1.0, 1
    # Shifted before divided, so that no small temperature overflows the likeliest token. Its ties
    # are all set to +0.0, because `lax.top_k` ranks -0.0 below.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(logits == largest, 0.0, logits - largest) / temperature
    if top_k is not None or (top_p is not None and top_p < 1):
        logits = _filter_ranked(logits, top_k, top_p)
    if min_p:
        logits = jnp.where(logits >= math.log(min_p), logits, -jnp.inf)
    return logits


def _filter_ranked(
    logits: Float[Array, "B V"], top_k: int | None, top_p: float | None
) -> Float[Array, "B V"]:
    """Keeps the first tokens by rank: at most `top_k`, and of those the nucleus of `top_p`."""
    vocabulary = logits.shape[-1]
    kept, tokens = jax.lax.top_k(logits, min(top_k or vocabulary, vocabulary))
    if top_p is not None and top_p < 1:
        probabilities = jax.nn.softmax(kept, axis=-1)
        before = jnp.cumulative_sum(probabilities, axis=-1, include_initial=True)[:, :-1]
        kept = jnp.where(before < top_p, kept, -jnp.inf)
    everything_out = jnp.full_like(logits, -jnp.inf)
    return jnp.put_along_axis(everything_out, tokens, kept, axis=-1, inplace=False)


def sample(
    step: Step,
    cache: Any,
    logits: Float[Array, "B V"],
    *,
    key: Array | None,
    max_length: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    min_length: int = 0,
    row_lengths: Int[Array, "B"] | None = None,
    forbidden: Sequence[int] = (),
) -> Sampled:
    """Draws one continuation a row, token by token, until every row has ended.

    Pure and traceable: give it to `jax.jit` with `step` and the Python numbers closed over. Rows
    are independent, so a batch gives what its rows give one by one with the same keys.

    Args:
        step: feeds one token a row to the model; rows that have ended are fed <eos>,
            then `pad_id`.
        cache: what `step` takes and returns, holding the prompt; it never needs room for more than
            `max_length` - 1 tokens beyond it.
        logits: after the prompt, any floating dtype. Here as in what `step` gives, some token that
            may be drawn must be above -inf.
        key: one typed random key, of which row b uses `fold_in(key, b)`, or a key a row
            (shape [B]). None is enough at temperature 0.
        max_length: most tokens a row, <eos> included.
        eos_id: the token that ends a row.
        pad_id: fills rows after <eos>; it is never drawn, unless it is `eos_id`.
        temperature: as `filter_logits`; 0 is greedy, ties to the lower token id.
        top_k: as `filter_logits`.
        top_p: as `filter_logits`.
        min_p: as `filter_logits`.
        min_length: fewest tokens before <eos>.
        row_lengths: most tokens of each row, <eos> included, where rows have limits of their own
            below `max_length`.
        forbidden: token ids that are never drawn (<sos>). They are taken out before the filters
            look at the distribution.

    Raises:
        ValueError: an argument out of its range, no key for a temperature above 0, or nothing
            left to draw.
    """
    _check_filters(temperature, top_k, top_p, min_p)
    rows, vocabulary = logits.shape
    allowed = allowed_tokens(vocabulary, max_length, min_length, eos_id, pad_id, forbidden)
    keys = None if temperature == 0 else _row_keys(key, rows)
    limits = jnp.full(rows, max_length) if row_lengths is None else row_lengths

    def draw(logits, position):
        logits = jnp.where(allowed(position), logits, -jnp.inf)
        if keys is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filter_logits(logits, temperature, top_k, top_p, min_p)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)

    def is_open(state):
        return ~state.sampled.finished & (state.position < limits)

    def extend(state, logits):
        position, (tokens, lengths, log_probs, finished), cache = state
        chosen = draw(logits, position)
        gained = token_log_probs(logits[:, None], chosen[:, None])[:, 0]
        opened = is_open(state)
        ends = opened & (chosen == eos_id)
        sampled = Sampled(
            tokens=tokens.at[:, position].set(jnp.where(opened, chosen, pad_id)),
            lengths=lengths + (opened & ~ends),
            log_probs=log_probs + jnp.where(opened, gained, 0.0),
            finished=finished | ends,
        )
        return _State(position + 1, sampled, cache)

    def go_on(state):
        return (state.position < max_length) & jnp.any(is_open(state))

    def advance(state):
        last = jax.lax.dynamic_slice_in_dim(state.sampled.tokens, state.position - 1, 1, axis=1)
        logits, cache = step(last, state.cache)
        return extend(state._replace(cache=cache), logits)

    nothing = Sampled(
        tokens=jnp.full((rows, max_length), pad_id, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        log_probs=jnp.zeros(rows, jnp.float32),
        finished=jnp.zeros(rows, bool),
    )
    # The first token is drawn outside the loop, so that no token is fed that nothing follows.
    first = extend(_State(jnp.int32(0), nothing, cache), logits)
    return jax.lax.while_loop(go_on, advance, first).sampled


def greedy(
    step: Step,
    cache: Any,
    logits: Float[Array, "B V"],
    *,
    max_length: int,
    eos_id: int,
    pad_id: int,
    min_length: int = 0,
    row_lengths: Int[Array, "B"] | None = None,
    forbidden: Sequence[int] = (),
) -> Sampled:
    """The likeliest token at every place, ties to the lower id: `sample` at temperature 0."""
    return sample(
        step,
        cache,
        logits,
        key=None,
        max_length=max_length,
        eos_id=eos_id,
        pad_id=pad_id,
        temperature=0.0,
        min_length=min_length,
        row_lengths=row_lengths,
        forbidden=forbidden,
    )


def allowed_tokens(
    vocabulary: int,
    max_length: int,
    min_length: int,
    eos_id: int,
    pad_id: int,
    forbidden: Sequence[int],
) -> Callable[[Int[Array, ""]], Bool[Array, "V"]]:
    """Checks what every search is told of lengths and tokens, and says what may come where.

    Returns:
        A function from the position (tokens already chosen) to a bool[V] mask of the tokens that
        may come there: none that is forbidden, no padding (unless it is <eos>), and no <eos>
        before `min_length` tokens.

    Raises:
        ValueError: a length or token id out of its range, or no token left to choose.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no room for a token: give at least 1.")
    if not 0 <= min_length <= max_length:
        raise ValueError(
            f"min_length={min_length} must lie between 0 and max_length={max_length}: "
            "lower it, or raise max_length."
        )
    for name, token in (
        ("eos_id", eos_id),
        ("pad_id", pad_id),
        *(("forbidden", token) for token in forbidden),
    ):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{name}={token} is no token of the vocabulary of {vocabulary}: "
                f"give an id from 0 to {vocabulary - 1}."
            )
    mask = np.ones(vocabulary, bool)
    mask[list(forbidden)] = False
    if pad_id != eos_id:
        mask[pad_id] = False
    not_eos = np.arange(vocabulary) != eos_id
    if not (mask & not_eos if min_length else mask).any():
        raise ValueError(
            f"No token of {vocabulary} may be chosen"
            f"{' before <eos>' if min_length else ''}: forbid fewer, or lower min_length."
        )
    return lambda position: mask & (not_eos | (position >= min_length))


def _check_filters(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be 0 (greedy) or a positive number; 1 is the model's."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; None keeps all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1; None keeps all tokens.")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must lie between 0 and 1; None keeps all tokens.")


def _row_keys(key: Array | None, rows: int) -> Key[Array, "B"]:
    """A key for each row, from one key or a key a row."""
    if key is None:
        raise ValueError(
            "Sampling at a temperature above 0 needs a key: pass key=jax.random.key(seed), "
            "or temperature=0."
        )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key is {key.dtype}{list(key.shape)}, not a typed random key: "
            "make it with jax.random.key(seed), or convert it with jax.random.wrap_key_data."
        )
    if key.shape == ():
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(
            f"key has shape {key.shape}: pass one key, or one for each of {rows} rows."
        )
    return key
