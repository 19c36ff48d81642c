"""Convolution is held to its definition, a sum over the nine places around, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.nn import Convolution, pure

INPUTS, OUTPUTS = 2, 3


def convolve(x, kernel, bias, strides):
    """The sum, place by place, zeros outside of the image."""
    rows, columns, height, _ = x.shape
    counts = [-(-size // stride) for size, stride in zip((columns, height), strides, strict=True)]
    y = np.zeros((rows, *counts, kernel.shape[-1])) + bias
    for i, j in itertools.product(*map(range, counts)):
        for a, b in itertools.product(range(3), range(3)):
            column, row = i * strides[0] + a - 1, j * strides[1] + b - 1
            if 0 <= column < columns and 0 <= row < height:
                y[:, i, j] += x[:, column, row] @ kernel[a, b]
    return y


def make(strides, bias=True):
    """apply, and parameters away from where they start."""
    module = Convolution(INPUTS, OUTPUTS, strides=strides, bias=bias, rngs=nnx.Rngs(0))
    apply, params = pure(module)
    random = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return jax.jit(apply), jax.tree.map(draw, params)


def images(columns, height):
    random = np.random.default_rng(0)
    return jnp.asarray(random.normal(size=(2, columns, height, INPUTS)), jnp.float32)


@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("size", [(6, 5), (7, 4)])
def test_convolution_and_its_gradients_are_the_sum_over_the_places_around(strides, size):
    apply, params = make(strides)
    x = images(*size)
    y, pull = jax.vjp(apply, params, x)
    wide = [np.asarray(value, np.float64) for value in (x, params["kernel"], params["bias"])]
    np.testing.assert_allclose(y, convolve(*wide, strides), atol=1e-5)
    cotangent = np.random.default_rng(2).normal(size=y.shape)
    gradient, dx = pull(jnp.asarray(cotangent, jnp.float32))
    # The sum is linear in each argument: a gradient times a step is what the step changes.
    for place, found in enumerate((dx, gradient["kernel"], gradient["bias"])):
        step = np.random.default_rng(3).normal(size=wide[place].shape)
        moved = [*wide[:place], wide[place] + step, *wide[place + 1 :]]
        change = (convolve(*moved, strides) - convolve(*wide, strides)) * cotangent
        np.testing.assert_allclose((np.asarray(found) * step).sum(), change.sum(), rtol=1e-4)


@pytest.mark.parametrize("strides", [(1, 2), (2, 2)])
@pytest.mark.parametrize("padding", [1, 4])
def test_columns_of_padding_change_nothing(strides, padding):
    apply, params = make(strides)
    x = images(7, 4)
    y = apply(params, x)
    padded = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)), constant_values=np.nan)
    mask = jnp.broadcast_to(jnp.arange(7 + padding) < 7, (2, 7 + padding))
    found = apply(params, padded, mask=mask)
    assert found.shape[1] == -(-(7 + padding) // strides[0])
    np.testing.assert_allclose(found[:, : y.shape[1]], y, atol=1e-6)


def test_a_new_convolution_keeps_the_size_of_what_a_relu_halves():
    module = Convolution(16, 64, bias=True, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 12, 12, 16))
    y = module(jnp.asarray(x, jnp.float32))
    assert abs(float(jnp.square(jax.nn.relu(y[:, 1:-1, 1:-1])).mean()) - 1) < 0.15
    assert not module.bias[...].any()


def test_products_are_in_the_compute_dtype_and_gradients_in_that_of_the_parameters():
    module = Convolution(INPUTS, OUTPUTS, bias=False, rngs=nnx.Rngs(0), compute_dtype="bfloat16")
    apply, params = pure(module)
    assert set(params) == {"kernel"}
    x = images(6, 4)
    narrow = [np.asarray(value.astype(jnp.bfloat16), np.float64) for value in (x, params["kernel"])]
    np.testing.assert_allclose(apply(params, x), convolve(*narrow, 0, (1, 1)), atol=1e-5)
    gradient = jax.grad(lambda params: apply(params, x).sum())(params)
    assert gradient["kernel"].dtype == jnp.float32
