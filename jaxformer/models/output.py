"""What models predict: logits, multiplied out or not, and the frames that CTC reads."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer.config import ModelConfig
from jaxformer.nn import Embedding
from jaxformer.nn.linear import Linear, matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitFactors:
    """What logits are the product of; a loss that takes it never has all of them in memory."""

    x: Float[Array, "*B D"]
    w: Float[Array, "_ _"]
    """[D, V], or [V, D] where transposed."""
    transposed: bool = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(metadata={"static": True})
    compute_dtype: str = dataclasses.field(metadata={"static": True})
    """Dtype of the product's operands."""

    def logits(self) -> Float[Array, "*B V"]:
        """softcap(x w), float32."""
        rows = self.x.reshape(-1, self.x.shape[-1]).astype(jnp.float32)
        logits = matmul(rows, self.w, self.compute_dtype, self.transposed)
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return logits.reshape(*self.x.shape[:-1], -1)


class Output(nnx.Module):
    """The output projection: the tied embedding (Press & Wolf, 2017), or a matrix of its own."""

    def __init__(self, config: ModelConfig, vocabulary: int, rngs: nnx.Rngs):
        self.config = config
        self.projection = (
            None
            if config.tied_embeddings
            else Linear(
                {"D": config.width},
                {"V": vocabulary},
                bias=False,
                rngs=rngs,
                param_dtype=config.param_dtype,
                compute_dtype=config.compute_dtype,
            )
        )

    def __call__(self, x: Float[Array, "B T D"], embedding: Embedding) -> LogitFactors:
        """The factors of the logits of final hidden states x."""
        config = self.config
        if config.output_scale != 1.0:
            x = x * config.output_scale
        tied = self.projection is None
        return LogitFactors(
            x=x,
            w=embedding.table[...] if tied else self.projection.kernel[...],
            transposed=tied,
            softcap=config.output_softcap,
            compute_dtype=config.compute_dtype,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CTCFrames:
    """What CTC reads: scores of every label, and of the blank (id 0), for each frame."""

    logits: Float[Array, "B F V"]
    """float32; F counts frames."""
    lengths: Int[Array, " B"]
    """Frames of each row that are real; they stand first."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HybridPredictions:
    """The two readings of one encoder: by CTC and by a decoder."""

    frames: CTCFrames
    factors: LogitFactors
    weight: float = dataclasses.field(metadata={"static": True})
    """lambda: the share of CTC in the objective."""
