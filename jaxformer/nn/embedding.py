"""Token embeddings."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.nn.parameters import parameter
from jaxformer.nn.precision import activation_dtype


class Embedding(nnx.Module):
    """A table [V, D] that maps tokens to vectors; an output projection may share it."""

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
