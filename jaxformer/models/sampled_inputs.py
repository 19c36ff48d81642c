"""The chance in scheduled sampling: which inputs a decoder draws itself, and what it draws."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

_NEVER_DRAWN = 2
"""<pad> and <sos>, the first two ids of every tokenizer."""


@dataclass(frozen=True)
class SampledInputs:
    """What is drawn before decoding starts; time stands first."""

    use: Bool[Array, "T B"]
    """Whether the input is the model's own token; never at the first step."""
    chance: Float[Array, "T B"]
    """In [0, 1): where in the distribution after this step its token is drawn."""

    @staticmethod
    def draw(
        key: PRNGKeyArray,
        inputs: Int[Array, "B T"],
        rate: Float[Array, ""] | float,
        scope: Literal["token", "sequence"],
    ) -> "SampledInputs":
        """Tosses a coin that falls on `use` with probability `rate`, for each token or sequence."""
        coin_key, chance_key = jax.random.split(key)
        rows, steps = inputs.shape
        coins = jax.random.uniform(coin_key, (1 if scope == "sequence" else steps, rows))
        later = jnp.arange(steps)[:, None] > 0
        return SampledInputs(
            use=jnp.broadcast_to(coins < rate, (steps, rows)) & later,
            chance=jax.random.uniform(chance_key, (steps, rows)),
        )


def choose_token(logits: Float[Array, "B V"], chance: Float[Array, " B"]) -> Int[Array, " B"]:
    """The token at which the cumulated softmax passes `chance`; never <pad> or <sos>.

    For a uniform `chance` this draws from the softmax over the other tokens, at one random number a
    row rather than one a logit.
    """
    possible = jnp.arange(logits.shape[-1]) >= _NEVER_DRAWN
    shares = jax.nn.softmax(logits, axis=-1, where=possible)
    passed = jnp.cumsum(shares, axis=-1)
    below = passed <= chance[:, None] * passed[:, -1:]
    return jnp.minimum(jnp.sum(below, axis=-1), logits.shape[-1] - 1).astype(jnp.int32)
