"""Token embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxformer import sharding
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
        self.axes = axes
        self.compute_dtype = compute_dtype
        self.table = parameter(
            jax.nn.initializers.normal(deviation),
            dict(zip(axes, (vocabulary, width), strict=True)),
            rngs=rngs,
            dtype=param_dtype,
        )

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        table, dtype = self.table[...], activation_dtype(self.compute_dtype)
        if sharding.active() is None:
            return table[tokens].astype(dtype)
        return _look_up(table, tokens, self.axes, dtype)


def _look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "*B"], axes: tuple[str, str], dtype: jnp.dtype
) -> Float[Array, "*B D"]:
    """`table[tokens]` on the active mesh, by hand: the compiler would gather the table, or tokens.

    A device finds the tokens that its part of the vocabulary has; the sum over tensor has all. The
    transpose scatters the table's gradient over fsdp, and sums it over what else divides tokens.
    """
    mesh = sharding.active()
    assert mesh is not None
    letters = " ".join(["B", "T", *["_"] * tokens.ndim][: tokens.ndim])
    places = sharding.spec(letters, tokens.shape, mesh)
    by_vocabulary, by_width = sharding.parameter_spec(axes, table.shape, mesh)
    if by_width not in sharding.axes_in(places):
        by_width = None
    summed = tuple(axis for axis in sharding.axes_in(places) if axis != by_width)

    def run(table: Array, tokens: Array) -> Array:
        # First, so that the transpose sums what is scattered already.
        table = jax.lax.pcast(table, summed, to="varying")
        if by_width is not None:
            table = jax.lax.all_gather(table, by_width, axis=1, tiled=True)
        if by_vocabulary is None:
            return table[tokens].astype(dtype)
        rows = table.shape[0]
        local = tokens - jax.lax.axis_index(by_vocabulary) * rows
        known = (local >= 0) & (local < rows)
        found = jnp.where(known[..., None], table[jnp.where(known, local, 0)], 0)
        return jax.lax.psum(found.astype(dtype), by_vocabulary)

    split = PartitionSpec(by_vocabulary, by_width)
    found = PartitionSpec(*places, None)
    return sharding.on_each_device(run, mesh, (split, places), found)(table, tokens)
