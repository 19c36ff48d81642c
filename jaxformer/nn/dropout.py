"""Dropout (Srivastava et al., 2014) as a plain function of a key."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate).

    The identity where key is None (evaluation) or rate is 0.
    """
    if key is None or rate == 0.0:
        return x
    # A counter-based hash of two words of the key: threefry, which draws the words, would take
    # longer for a whole array on CPU than the matrix product before it.
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    count = jax.lax.iota(jnp.uint32, x.size)
    bits = _mix(_mix(count ^ first) + second).reshape(x.shape)
    threshold = min(round(rate * 2**32), 2**32 - 1)
    return jnp.where(bits >= np.uint32(threshold), x / (1 - rate), 0).astype(x.dtype)


def _mix(x):
    """A bijection of uint32 in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
