"""How a recurrent decoder sees the source: nothing more, its mean, or attention."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.nn.linear import Linear, matmul
from jaxformer.nn.parameters import fan_in_normal, parameter
from jaxformer.nn.scan import Multiply


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

    def matrices(self, memory: Memory) -> dict[str, Array]:
        """What `attend` multiplies by."""
        if self.score == "uniform":
            return {}
        matrices = {"values": memory.values}
        if self.query is None:
            return matrices | {"keys": jnp.swapaxes(memory.keys, 1, 2)}
        return matrices | {"query": self.query.kernel[...]}

    def constants(self, memory: Memory) -> dict[str, Array]:
        """What else `attend` needs."""
        constants = {"real": memory.real}
        if self.score == "uniform":
            weights = masked_softmax(jnp.zeros(memory.real.shape), memory.real)
            return constants | {
                "weights": weights,
                "context": jnp.einsum("bs,bsd->bd", weights, memory.values),
            }
        if self.vector is not None:
            return constants | {"keys": memory.keys, "vector": self.vector[...]}
        return constants


def attend(
    multiply: Multiply, constants: dict[str, Array], h: Float[Array, "B *T D"]
) -> tuple[Float[Array, "B *T D"], Float[Array, "B *T S"]]:
    """Context and weights of decoder states, of one step or of all.

    `multiply(name, x)` multiplies by a matrix of `Alignment.matrices`, `constants` are those of
    `Alignment.constants`.
    """
    real = constants["real"]
    if h.ndim == 3:
        real = real[:, None]
    if "context" in constants:
        context, weights = constants["context"], constants["weights"]
        if h.ndim == 3:
            context, weights = context[:, None], weights[:, None]
        return jnp.broadcast_to(context, h.shape), jnp.broadcast_to(
            weights, (*h.shape[:-1], real.shape[-1])
        )
    if "vector" in constants:
        scores = additive_scores(multiply("query", h), constants["keys"], constants["vector"])
    else:
        scores = multiply("keys", h)
    weights = masked_softmax(scores, real)
    return multiply("values", weights), weights


def multiply_all(matrices: dict[str, Array], compute_dtype: str) -> Multiply:
    """The products of `attend` for states of all steps at once."""

    def multiply(name: str, x: Float[Array, "B T inner"]) -> Float[Array, "B T outer"]:
        matrix = matrices[name]
        if matrix.ndim == 2:
            rows = matmul(x.reshape(-1, x.shape[-1]), matrix, compute_dtype)
            return rows.reshape(*x.shape[:-1], -1)
        return jnp.einsum(
            "bti,bio->bto",
            x.astype(compute_dtype),
            matrix.astype(compute_dtype),
            preferred_element_type=jnp.float32,
        )

    return multiply


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
