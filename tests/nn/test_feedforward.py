"""The feed-forward layer, held to its formula in float64."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import ModelConfig
from jaxformer.nn import FeedForward, pure

erf = np.vectorize(math.erf)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "gelu_exact": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": gelu,
}
GATED = ("swiglu", "geglu")


@pytest.mark.parametrize("activation", FORMULAS)
def test_layer_equals_its_formula(activation):
    config = ModelConfig(width=6, feedforward=10, activation=activation)
    apply, shapes = pure(nnx.eval_shape(lambda: FeedForward(config, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    assert ("gate" in params) == (activation in GATED)
    x = random.normal(size=(2, 3, 6)).astype(np.float32)

    def linear(name, inputs):
        layer = params[name]
        return inputs @ layer["kernel"].astype(np.float64) + layer["bias"]

    first = FORMULAS[activation](linear("gate" if activation in GATED else "up", x))
    hidden = first * linear("up", x) if activation in GATED else first
    np.testing.assert_allclose(
        jax.jit(apply)(params, x), linear("down", hidden), rtol=1e-5, atol=1e-4
    )


def test_width_of_four_times_the_model_is_the_default():
    module = nnx.eval_shape(lambda: FeedForward(ModelConfig(width=6), rngs=nnx.Rngs(0)))
    assert module.up.kernel.shape == (6, 24)
