"""Normalisation is held to its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.nn import LayerNorm, RMSNorm, pure


def layer_norm(x, params, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon) * params["scale"]
    return y + params.get("bias", 0)


def rms_norm(x, params, epsilon):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * params["scale"]


CASES = {
    "layernorm": (lambda **options: LayerNorm({"D": 16}, **options), layer_norm),
    "layernorm without bias": (
        lambda **options: LayerNorm({"D": 16}, bias=False, **options),
        layer_norm,
    ),
    "rmsnorm": (lambda **options: RMSNorm({"D": 16}, **options), rms_norm),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_norm_equals_its_formula(name, epsilon):
    make, formula = CASES[name]
    apply, params = pure(make(epsilon=epsilon, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    params = {key: random.normal(size=16).astype(np.float32) for key in params}
    x = (3 + 2 * random.normal(size=(2, 5, 16))).astype(np.float32)
    wide = {key: value.astype(np.float64) for key, value in params.items()}
    found = jax.jit(apply)(params, x)
    np.testing.assert_allclose(found, formula(x.astype(np.float64), wide, epsilon), atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_norm_starts_as_plain_normalisation(name):
    make, formula = CASES[name]
    apply, params = pure(make(rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(apply)(params, x), formula(x, {"scale": 1.0}, 1e-5), atol=1e-5
    )


def test_statistics_of_narrow_inputs_are_taken_in_float32():
    # In bfloat16 the mean of 256 + noise would swallow the noise.
    apply, params = pure(LayerNorm({"D": 16}, rngs=nnx.Rngs(0)))
    x = jnp.asarray(256 + 2 * np.arange(16), jnp.bfloat16)
    y = apply(params, x)
    assert y.dtype == jnp.bfloat16
    exact = layer_norm(np.asarray(x, np.float64), {"scale": 1.0}, 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8)


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_zeros_stays_finite_with_its_gradient(name):
    apply, params = pure(CASES[name][0](rngs=nnx.Rngs(0)))
    y, pull = jax.vjp(apply, params, jnp.zeros((2, 16)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, pull(jnp.ones((2, 16))))))
