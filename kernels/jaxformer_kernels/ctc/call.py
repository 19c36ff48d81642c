"""What one call needs, in the words implementations declare their support in."""

import dataclasses

import jax.numpy as jnp

FEATURES = frozenset({"float64"})


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes, dtype and features of one call.

    Attributes:
        B, T, V, N: sizes of the axes; N is the most labels of a row.
        dtype: of the logits.
        features: names out of `FEATURES`.
    """

    B: int
    T: int
    V: int
    N: int
    dtype: jnp.dtype
    features: frozenset[str]


def describe(logits, labels) -> Call:
    """The `Call` that these arguments, already validated, make."""
    features = frozenset({"float64"} if logits.dtype == jnp.float64 else ())
    return Call(*logits.shape, labels.shape[1], logits.dtype, features)


def wide(dtype):
    """The dtype to compute in."""
    return jnp.promote_types(dtype, jnp.float32)
