"""Token embeddings, and the output projection that may share them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.nn.linear import matmul
from jaxformer.nn.parameters import parameter
from jaxformer.nn.precision import activation_dtype


class Embedding(nnx.Module):
    """A table [V, D] that maps tokens to vectors, and vectors to logits when tied."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        deviation: float = 0.02,
        axes: tuple[str, str] = ("V", "D"),
        param_dtype: str = "float32",
        compute_dtype: str = "float32",
    ):
        self.compute_dtype = compute_dtype
        self.table = parameter(
            jax.nn.initializers.normal(deviation),
            dict(zip(axes, (vocabulary, width), strict=True)),
            rngs=rngs,
            dtype=param_dtype,
        )

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.table[...][tokens].astype(activation_dtype(self.compute_dtype))

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits, float32: inner products of x with the rows of the table (Press & Wolf, 2017)."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        logits = matmul(rows, self.table[...], self.compute_dtype, True)
        return logits.reshape(*x.shape[:-1], -1)
