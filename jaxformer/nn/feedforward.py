"""The position-wise feed-forward layer, plain or gated."""

import functools

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import ModelConfig
from jaxformer.nn.linear import Linear

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
}
GATED = ("swiglu", "geglu")


class FeedForward(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, *, scale: float = 1.0, rngs: nnx.Rngs):
        width, hidden = {"D": config.width}, {"F": config.feedforward or 4 * config.width}
        linear = functools.partial(
            Linear,
            bias=config.bias,
            rngs=rngs,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
        )
        self.activation = config.activation
        self.gate = linear(width, hidden) if config.activation in GATED else None
        self.up = linear(width, hidden)
        self.down = linear(hidden, width, scale=scale)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(activation(self.up(x)))
        return self.down(activation(self.gate(x)) * self.up(x))
