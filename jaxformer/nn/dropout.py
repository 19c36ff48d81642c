"""Dropout (Srivastava et al., 2014) as a plain function of a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def dropout(
    x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "..."]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate).

    The identity where key is None (evaluation) or rate is 0.
    """
    if key is None or rate == 0.0:
        return x
    # 16 random bits an element cost half of 32 and resolve the rate to 1.5e-5; the scale uses the
    # rate so resolved, which keeps the expectation exact.
    threshold = round(rate * 65536)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= threshold
    return jnp.where(keep, x * (65536 / (65536 - threshold)), 0).astype(x.dtype)
