"""Dropout (Srivastava et al., 2014) as a plain function of a key."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from jaxformer import sharding


def dropout(
    x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None, *, axes: str = "B T D"
) -> Float[Array, "..."]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate).

    The identity where key is None (evaluation) or rate is 0. What is drawn for an element depends
    on the key and on its place in the whole array, however a mesh divides it: `axes` names the
    first axes of x, so that where they are divided by hand a device knows its part.
    """
    if key is None or rate == 0.0:
        return x
    # A counter-based hash of two words of the key: threefry, which draws the words, would take
    # longer for a whole array on CPU than the matrix product before it.
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    bits = _mix(_mix(_places(x.shape, axes) ^ first) + second)
    threshold = min(round(rate * 2**32), 2**32 - 1)
    return jnp.where(bits >= np.uint32(threshold), x / (1 - rate), 0).astype(x.dtype)


def _places(shape: tuple[int, ...], axes: str) -> UInt32[Array, "..."]:
    """The number of every element, in row-major order, in the array that this is a part of."""
    # Axis by axis, for any of them may be divided.
    letters = (*axes.split(), *[""] * len(shape))[: len(shape)]
    count, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis, letter in reversed(list(enumerate(letters))):
        part, parts = sharding.by_hand(letter)
        first = jnp.asarray(part, jnp.uint32) * np.uint32(shape[axis])
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + first
        count = count + place * np.uint32(stride % 2**32)
        stride *= shape[axis] * parts
    return count


def _mix(x):
    """A bijection of uint32 in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
