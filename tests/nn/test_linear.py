"""Linear maps are held to plain float64 products."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.nn import Embedding, Linear, pure
from jaxformer.nn.linear import matmul, together

EIGHTH_BITS = 2.0**-8
"""The rounding of a bfloat16: half a unit in its eighth binary place."""


def operands(rows, inner, columns, transposed=False):
    random = np.random.default_rng([rows, inner, columns])
    shape = (columns, inner) if transposed else (inner, columns)
    x, w = random.normal(size=(rows, inner)), random.normal(size=shape)
    return x.astype(np.float32), w.astype(np.float32), random.normal(size=(rows, columns))


@functools.partial(jax.jit, static_argnums=(3, 4))
def product_and_gradients(x, w, cotangent, dtype, transposed):
    y, pull = jax.vjp(lambda x, w: matmul(x, w, dtype, transposed), x, w)
    return y, *pull(cotangent.astype(y.dtype))


def in_float64(x, w, cotangent, transposed):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    w = w.T if transposed else w
    dw = x.T @ cotangent
    return x @ w, cotangent @ w.T, dw.T if transposed else dw


def magnitudes(x, w, cotangent, transposed):
    """What the terms of each sum add up to: the scale of its rounding."""
    return in_float64(np.abs(x), np.abs(w), np.abs(cotangent), transposed)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("rows", [1, 64, 70, 129])
def test_float32_product_and_gradients_equal_float64(rows, transposed):
    x, w, cotangent = operands(rows, 24, 10, transposed)
    found = product_and_gradients(x, w, cotangent, "float32", transposed)
    for got, wanted in zip(found, in_float64(x, w, cotangent, transposed), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("rows", [1, 64, 70, 129])
def test_bfloat16_product_and_gradients_round_their_operands_and_nothing_else(rows, transposed):
    x, w, cotangent = operands(rows, 24, 10, transposed)
    narrow = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w, cotangent)]
    found = product_and_gradients(x, w, cotangent, "bfloat16", transposed)
    for got, wanted in zip(found, in_float64(*narrow, transposed), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_bfloat16_product_is_within_its_rounding_of_float64_and_not_exact():
    x, w, cotangent = operands(70, 24, 10)
    found = product_and_gradients(x, w, cotangent, "bfloat16", False)
    wanted, scales = in_float64(x, w, cotangent, False), magnitudes(x, w, cotangent, False)
    for got, exact, scale in zip(found, wanted, scales, strict=True):
        error = np.abs(got - exact)
        assert (error <= 2.1 * EIGHTH_BITS * scale).all()
        assert error.max() > 1e-4


@pytest.mark.parametrize(
    ("inputs", "outputs", "formula"),
    [
        ({"D": 6}, {"F": 10}, "btd,df->btf"),
        ({"D": 6}, {"N": 2, "H": 4}, "btd,dnh->btnh"),
        ({"N": 2, "H": 4}, {"D": 6}, "btnh,nhd->btd"),
    ],
    ids=["matrix", "to heads", "from heads"],
)
def test_linear_over_named_axes_equals_the_einsum(inputs, outputs, formula):
    layer = Linear(inputs, outputs, bias=True, rngs=nnx.Rngs(0))
    assert layer.kernel.shape == (*inputs.values(), *outputs.values())
    layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
    apply, params = pure(layer)
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 5, *inputs.values())).astype(np.float32)
    cotangent = random.normal(size=(3, 5, *outputs.values())).astype(np.float32)

    y, pull = jax.vjp(jax.jit(apply), params, x)
    wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
    np.testing.assert_allclose(
        y, np.einsum(formula, x, wide["kernel"]) + wide["bias"], rtol=1e-5, atol=1e-5
    )

    gradients, dx = pull(cotangent)
    x_axes, rest = formula.split(",")
    kernel_axes, y_axes = rest.split("->")
    wanted = {
        "kernel": np.einsum(f"{x_axes},{y_axes}->{kernel_axes}", x, cotangent),
        "bias": cotangent.sum((0, 1)),
    }
    np.testing.assert_allclose(
        dx, np.einsum(f"{y_axes},{kernel_axes}->{x_axes}", cotangent, wide["kernel"]), atol=1e-4
    )
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-5, atol=1e-4)


def test_linear_starts_with_variance_scale_squared_over_inputs_and_no_bias():
    layer = Linear({"N": 8, "H": 32}, {"D": 256}, bias=True, scale=0.5, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...])
    assert kernel.std() == pytest.approx(0.5 * 256**-0.5, rel=0.02)
    assert np.abs(kernel).max() <= 2 * 0.5 * 256**-0.5 / 0.8796 + 1e-6
    assert not layer.bias[...].any()


def test_linear_refuses_one_name_for_an_input_and_an_output():
    with pytest.raises(ValueError, match=r"axes \['D'\] are inputs and outputs"):
        Linear({"D": 2}, {"D": 2}, bias=False, rngs=nnx.Rngs(0))


def test_linear_without_bias_has_a_kernel_alone():
    _, params = pure(Linear({"D": 2}, {"F": 3}, bias=False, rngs=nnx.Rngs(0)))
    assert set(params) == {"kernel"}


def test_narrow_parameters_get_narrow_gradients():
    layer = Linear({"D": 6}, {"F": 4}, bias=True, rngs=nnx.Rngs(0), param_dtype="bfloat16")
    apply, params = pure(layer)
    gradients = jax.grad(lambda params: apply(params, jnp.ones((3, 6))).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("bfloat16")}


def test_embedding_looks_rows_up():
    module = Embedding(12, 8, rngs=nnx.Rngs(0))
    table = np.asarray(module.table[...])
    tokens = jnp.array([[3, 11], [0, 3]])
    np.testing.assert_array_equal(module(tokens), table[np.asarray(tokens)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_together_give_what_each_gives_alone_with_all_gradients(dtype):
    make = functools.partial(Linear, bias=True, compute_dtype=dtype)
    layers = [
        make({"D": 24}, {"N": 4, "H": 6}, rngs=nnx.Rngs(0)),
        make({"D": 24}, {"K": 2, "H": 6}, rngs=nnx.Rngs(1)),
        make({"D": 24}, {"F": 5}, rngs=nnx.Rngs(2)),
    ]
    x = jax.random.normal(jax.random.key(0), (3, 70, 24))

    def alone(layers, x):
        return [layer(x) for layer in layers]

    def total(function):
        return lambda *operands: sum(jnp.sum(jnp.sin(y)) for y in function(*operands))

    chex.assert_trees_all_close(together(layers, x), alone(layers, x), atol=1e-6)
    wanted = jax.jit(jax.grad(total(alone), argnums=(0, 1)))(layers, x)
    found = jax.jit(jax.grad(total(together), argnums=(0, 1)))(layers, x)
    # The gradient of x is one sum here and three there, each rounded to its operands.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    chex.assert_trees_all_close(found, wanted, atol=tolerance, rtol=tolerance)
