"""What one call needs and what it gives, in the words implementations share."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

FEATURES = frozenset({"float64", "label_smoothing", "softcap", "split_w", "transposed", "z_loss"})


class CrossEntropy(NamedTuple):
    """The objective, and what every token contributes.

    Attributes:
        objective: scalar; the weighted sum over tokens that training minimises.
        loss: [...]; -log p[label] in nats, neither smoothed nor weighted.
        lse: [...]; the natural logarithm of the softmax's denominator.
        correct: bool [...]; whether the label is the likeliest token (of equals the first).
    """

    objective: jax.Array
    loss: jax.Array
    lse: jax.Array
    correct: jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when a call is traced; the arguments of `linear_cross_entropy` say of what."""

    softcap: float | None
    label_smoothing: float
    z_loss: float
    transposed: bool
    vocabulary_axis: str | None = None
    width_axis: str | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes, dtypes and features of one call.

    Attributes:
        tokens, D, V: sizes.
        dtype: of x, and of the operands of every product.
        features: names out of `FEATURES`.
    """

    tokens: int
    D: int
    V: int
    dtype: jnp.dtype
    features: frozenset[str]


def describe(x, w, options: Options) -> Call:
    """The `Call` that these arguments, already validated, make."""
    given = {
        "float64": x.dtype == jnp.float64,
        "label_smoothing": options.label_smoothing != 0,
        "softcap": options.softcap is not None,
        "split_w": (options.vocabulary_axis, options.width_axis) != (None, None),
        "transposed": options.transposed,
        "z_loss": options.z_loss != 0,
    }
    features = frozenset(name for name, used in given.items() if used)
    D = x.shape[-1]
    V = w.shape[0 if options.transposed else 1]
    return Call(x.size // max(D, 1), D, V, x.dtype, features)


def wide(dtype):
    """The dtype to compute and accumulate in."""
    return jnp.promote_types(dtype, jnp.float32)
