"""Non-linearities against jax's own, with their derivatives, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.nn import activation

OF_JAX = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}
X = np.concatenate([np.linspace(-12, 12, 4002), [1e-3, -1e-3]])


def in_float64(name, x, by=None):
    """Values and derivatives, of f(x) or x f(by), by jax's functions."""
    with jax.enable_x64(True):
        f = OF_JAX[name]
        if by is None:
            function, operands = f, (x,)
        else:
            function, operands = (lambda x, by: x * f(by)), (x, by)
        value, pull = jax.vjp(
            function, *(jnp.asarray(operand, jnp.float64) for operand in operands)
        )
        return [np.asarray(array) for array in (value, *pull(jnp.ones_like(value)))]


@pytest.mark.parametrize("name", OF_JAX)
def test_value_and_slope_are_those_of_the_formula(name):
    curve = getattr(activation, name)
    x = X.astype(np.float32)
    value, pull = jax.jit(jax.vjp, static_argnums=0)(lambda x: activation.activate(curve, x), x)
    wanted = in_float64(name, x)
    np.testing.assert_allclose(value, wanted[0], atol=2e-6, rtol=2e-6)
    # XLA's float32 tanh ends one rounding short of 1, which a slope multiplies by about 50.
    atol = 1e-5 if name == "gelu" else 2e-6
    np.testing.assert_allclose(pull(jnp.ones_like(value))[0], wanted[1], atol=atol, rtol=2e-6)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_gate_and_both_its_derivatives_are_those_of_the_formula(name):
    curve = getattr(activation, name)
    by = X.astype(np.float32)
    x = np.random.default_rng(0).normal(size=by.shape).astype(np.float32)
    value, pull = jax.jit(jax.vjp, static_argnums=0)(
        lambda x, by: activation.gate(curve, x, by), x, by
    )
    found = (value, *pull(jnp.ones_like(value)))
    for array, wanted in zip(found, in_float64(name, x, by), strict=True):
        np.testing.assert_allclose(array, wanted, atol=3e-5 if name == "gelu" else 4e-6, rtol=4e-6)


def test_narrow_operands_are_computed_wide_and_come_out_narrow():
    x = jnp.asarray(X, jnp.bfloat16)
    value, pull = jax.vjp(lambda x: activation.activate(activation.gelu_exact, x), x)
    (slope,) = pull(jnp.ones_like(value))
    assert value.dtype == slope.dtype == jnp.bfloat16
    for array, wanted in zip((value, slope), in_float64("gelu_exact", x), strict=True):
        np.testing.assert_allclose(np.asarray(array, np.float64), wanted, rtol=2**-8, atol=1e-5)
