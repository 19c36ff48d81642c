"""The position-wise feed-forward layer, plain or gated."""

import functools

from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import ModelConfig
from jaxformer.nn import activation
from jaxformer.nn.linear import Linear, together

CURVES = {
    "relu": activation.relu,
    "gelu": activation.gelu,
    "gelu_exact": activation.gelu_exact,
    "swiglu": activation.silu,
    "geglu": activation.gelu,
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
        curve = CURVES[self.activation]
        if self.gate is None:
            return self.down(activation.activate(curve, self.up(x)))
        gate, up = together((self.gate, self.up), x)
        return self.down(activation.gate(curve, up, by=gate))
