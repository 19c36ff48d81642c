"""Non-linearities of the feed-forward layer, with derivatives of their own.

The backward pass keeps the operands and nothing else, and finds value and slope anew: what it would
save instead takes longer to write and to read than to compute. Forward-mode derivatives are not
defined.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Without it XLA would find the forward pass's intermediate arrays of use after all, and keep them.
apart = jax.lax.optimization_barrier

# x in float32 -> (value, slope)
Curve = Callable[[Array], tuple[Array, Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(curve: Curve, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The curve's value at x, in x's dtype."""
    return curve(x.astype(jnp.float32))[0].astype(x.dtype)


def _activate_forward(curve, x):
    return activate(curve, x), x


def _activate_backward(curve, x, cotangent):
    x = apart(x)
    slope = curve(x.astype(jnp.float32))[1]
    return ((cotangent.astype(jnp.float32) * slope).astype(x.dtype),)


activate.defvjp(_activate_forward, _activate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate(curve: Curve, x: Float[Array, "..."], by: Float[Array, "..."]) -> Float[Array, "..."]:
    """The curve's value at `by`, times x, in x's dtype."""
    return (curve(by.astype(jnp.float32))[0] * x.astype(jnp.float32)).astype(x.dtype)


def _gate_forward(curve, x, by):
    return gate(curve, x, by), (x, by)


def _gate_backward(curve, saved, cotangent):
    x, by = (apart(array).astype(jnp.float32) for array in saved)
    value, slope = curve(by)
    wide = cotangent.astype(jnp.float32)
    return (wide * value).astype(saved[0].dtype), (wide * slope * x).astype(saved[1].dtype)


gate.defvjp(_gate_forward, _gate_backward)


def relu(x: Array) -> tuple[Array, Array]:
    """max(x, 0); its slope at 0 is 0."""
    return jnp.maximum(x, 0), (x > 0).astype(x.dtype)


def gelu(x: Array) -> tuple[Array, Array]:
    """x times the normal distribution function at x, in tanh form (Hendrycks & Gimpel, 2016)."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = jnp.tanh(scale * (x + cubic * x * x * x))
    share = 0.5 * (1 + t)
    return x * share, share + 0.5 * x * (1 - t * t) * scale * (1 + 3 * cubic * x * x)


def gelu_exact(x: Array) -> tuple[Array, Array]:
    """x times the normal distribution function at x (Hendrycks & Gimpel, 2016)."""
    # By erf: by erfc, which keeps the relative precision of values near 0, it takes three times
    # as long on a CPU, a tenth of a whole training step.
    share = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * share, share + x * density


def silu(x: Array) -> tuple[Array, Array]:
    """x times its logistic function (Elfwing et al., 2018)."""
    share = jax.nn.sigmoid(x)
    return x * share, share * (1 + x * (1 - share))
