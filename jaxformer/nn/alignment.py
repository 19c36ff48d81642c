"""How a recurrent decoder sees the source: nothing more, its mean, or attention."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.nn.linear import Linear, project
from jaxformer.nn.parameters import fan_in_normal, parameter


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """An encoded source, as a decoder looks at it at every step."""

    values: Float[Array, "B S D"]
    keys: Float[Array, "B S D"]
    """What queries are compared with: W values for additive and general scores, else values."""
    real: Bool[Array, "B S"]
    """False on padding."""


class Alignment(nnx.Module):
    """Attention of one head between decoder states and encoder states, both of width D.

    The weights are the softmax over a source's tokens of one of these scores of decoder state h and
    encoder state m; the context is the mean of the m by these weights:

        uniform   0, so that the context is the plain mean, the same at every step
        dot       h · m                      (Luong et al., 2015)
        general   h · (m W)                  (Luong et al., 2015)
        additive  v · tanh(h Q + m W)        (Bahdanau et al., 2015)
    """

    def __init__(
        self,
        score: str,
        width: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: str = "float32",
        compute_dtype: str = "float32",
    ):
        self.score, self.compute_dtype = score, compute_dtype

        def linear() -> Linear:
            return Linear(
                {"C": width},
                {"D": width},
                bias=False,
                rngs=rngs,
                param_dtype=param_dtype,
                compute_dtype=compute_dtype,
            )

        self.key = linear() if score in ("general", "additive") else None
        self.query = linear() if score == "additive" else None
        self.vector = (
            parameter(fan_in_normal(width), {"D": width}, rngs=rngs, dtype=param_dtype)
            if score == "additive"
            else None
        )

    def memory(self, values: Float[Array, "B S D"], real: Bool[Array, "B S"]) -> Memory:
        """What decoding needs of the encoder's states; the keys are computed once."""
        return Memory(values, values if self.key is None else self.key(values), real)

    def attend(
        self, memory: Memory, h: Float[Array, "B *T D"]
    ) -> tuple[Float[Array, "B *T D"], Float[Array, "B *T S"]]:
        """Context and weights, float32, of the decoder states of one step, [B, D], or of all."""
        real = memory.real if h.ndim == 2 else memory.real[:, None]
        weights = masked_softmax(self.scores(memory, h), real)
        return self._contract("b...s,bsd->b...d", weights, memory.values), weights

    def scores(self, memory: Memory, h: Float[Array, "B *T D"]) -> Float[Array, "B *T S"]:
        """What the softmax is taken of, float32."""
        if self.score == "uniform":
            return jnp.zeros((*h.shape[:-1], memory.real.shape[1]), jnp.float32)
        if self.query is not None and self.vector is not None:
            queries = project(h, self.query.kernel[...], self.compute_dtype)
            return additive_scores(queries, memory.keys, self.vector[...])
        return self._contract("b...d,bsd->b...s", h, memory.keys)

    def _contract(self, formula: str, a: Array, b: Array) -> Array:
        a, b = a.astype(self.compute_dtype), b.astype(self.compute_dtype)
        return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def additive_scores(
    queries: Float[Array, "B *T D"], keys: Float[Array, "B S D"], vector: Float[Array, " D"]
) -> Float[Array, "B *T S"]:
    """v · tanh(query + key), float32; step by step, so that [B, T, S, D] is never in memory."""

    @jax.checkpoint
    def scores(query: Float[Array, "B D"]) -> Float[Array, "B S"]:
        mixed = jnp.tanh(query[:, None].astype(jnp.float32) + keys.astype(jnp.float32))
        return jnp.sum(mixed * vector.astype(jnp.float32), axis=-1)

    if queries.ndim == 2:
        return scores(queries)
    return jnp.swapaxes(jax.lax.map(scores, jnp.swapaxes(queries, 0, 1)), 0, 1)


def masked_softmax(
    scores: Float[Array, "*B S"], real: Bool[Array, "*#B S"]
) -> Float[Array, "*B S"]:
    """The softmax over what is real, float32: 0 elsewhere, and 0 throughout where nothing is."""
    scores = jnp.where(real, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    return jnp.where(real, jax.nn.softmax(scores, axis=-1), 0.0)
