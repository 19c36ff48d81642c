"""Attention dropout from a counter-based generator.

Whether the probability at (b, n, t, s) is kept depends on the key and on those four numbers alone,
so any implementation can recompute any block of the mask, in any order, in either pass.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Drop attention probabilities with probability `rate`, and scale the kept by 1 / (1 - rate).

    The indices it draws from are those of the arrays in the call: under `jax.vmap` and
    `jax.shard_map` give every shard its own key (`jax.random.fold_in` the axis index), as for
    every other use of a random key.

    Attributes:
        rate: Python number in [0, 1).
        key: a jax random key (typed, or raw uint32 words).

    Raises:
        ValueError: `rate` outside [0, 1).
    """

    rate: Any  # what a field must be, __post_init__ and seed say better than a type checker
    key: Any

    def __post_init__(self):
        if not isinstance(self.rate, int | float) or not 0 <= self.rate < 1:
            raise ValueError(
                f"Dropout rate must be a Python float in [0, 1), got {self.rate}; "
                "it is the share of probabilities to drop, not to keep."
            )

    def seed(self):
        """The key as uint32[2], from which `keep` draws."""
        key = self.key
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.key_data(key)
        if key.ndim != 1 or key.dtype != jnp.uint32:
            raise ValueError(
                f"Dropout needs one random key, got {key.dtype}{list(key.shape)}; "
                "pass jax.random.key(seed), or one element of jax.random.split."
            )
        first, second = jnp.uint32(0x243F6A88), jnp.uint32(0x85A308D3)
        for i in range(key.shape[0]):
            first, second = _mix(first ^ key[i]), _mix(second + key[i])
        return jnp.stack([first, second])


def keep(seed, rate, b, n, t, s):
    """True where the probability at (b, n, t, s) is kept.

    Args:
        seed: uint32[2], from `Dropout.seed`.
        rate: share of probabilities to drop.
        b, n, t, s: integer index arrays that broadcast against each other.

    Returns:
        bool array of the broadcast shape.
    """
    return keep_in_rows(*rows(seed, b, n, t), rate, s)


def rows(seed, b, n, t):
    """Two hashes of the row (b, n, t), as uint32: what `keep_in_rows` needs of it.

    Two, so that two rows share a mask only if both collide.
    """
    b, n, t = (jnp.asarray(index).astype(jnp.uint32) for index in (b, n, t))
    return _mix(_mix(_mix(b ^ seed[0]) + n) + t), _mix(_mix(_mix(b + seed[1]) ^ n) + t)


def keep_in_rows(row, other, rate, s):
    """`keep`, for the rows that have these two hashes."""
    s = jnp.asarray(s).astype(jnp.uint32)
    bits = _mix(_mix(row + s * np.uint32(0x9E3779B9)) ^ other)
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x):
    """A bijection of uint32 in which every input bit reaches every output bit (lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
