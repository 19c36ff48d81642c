"""Normalisation of the last axis; statistics in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.nn.parameters import parameter


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba, Kiros & Hinton, 2016)."""

    def __init__(
        self,
        axes: dict[str, int],
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-5,
        bias: bool = True,
        param_dtype: str = "float32",
    ):
        self.epsilon = epsilon
        self.scale = parameter(jax.nn.initializers.ones, axes, rngs=rngs, dtype=param_dtype)
        self.bias = (
            parameter(jax.nn.initializers.zeros, axes, rngs=rngs, dtype=param_dtype)
            if bias
            else None
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang & Sennrich, 2019)."""

    def __init__(
        self,
        axes: dict[str, int],
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-5,
        param_dtype: str = "float32",
    ):
        self.epsilon = epsilon
        self.scale = parameter(jax.nn.initializers.ones, axes, rngs=rngs, dtype=param_dtype)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(x.dtype)
