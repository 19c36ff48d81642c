"""A decoder-only language model."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.output import LogitFactors, Output
from jaxformer.models.transformer import Transformer, check_length, make_embedding
from jaxformer.nn import Block, Cache
from jaxformer.nn.precision import activation_dtype


class DecoderLM(nnx.Module):
    """Predicts each token from those before it (Radford et al., 2018; Touvron et al., 2023)."""

    def __init__(self, config: ModelConfig, *, vocabulary: int, rngs: nnx.Rngs):
        self.config = config
        self.embedding = make_embedding(config, vocabulary, rngs)
        self.decoder = Transformer(
            config, layers=config.layers, causal=True, cross=False, rngs=rngs
        )
        self.output = Output(config, vocabulary, rngs)

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every place, float32.

        Tokens attend to earlier tokens of their own segment. `key` turns dropout on.
        """
        factors = self.predictions(inputs, segment_ids=segment_ids, positions=positions, key=key)
        return factors.logits()

    def predictions(
        self,
        inputs: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> LogitFactors:
        """The same logits, not multiplied out."""
        x = self.decoder(
            self.embedding(inputs), segment_ids=segment_ids, positions=positions, key=key
        )
        return self.output(x, self.embedding)

    def init_cache(self, length: int, start: Int[Array, " B"]) -> Cache:
        """An empty cache of `length` slots; row b's first token will stand in slot `start[b]`."""
        config = self.config
        check_length(length, config)
        return Cache.empty(
            layers=config.layers,
            batch=start.shape[0],
            length=length,
            kv_heads=config.kv_heads or config.heads,
            head_dim=config.head_dim or config.width // config.heads,
            dtype=activation_dtype(config.compute_dtype),
            start=start,
        )

    def unrolled(self) -> list[Block]:
        """The decoder's blocks one by one, for many calls of `extend`."""
        return self.decoder.unrolled()

    def extend(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        last: bool = False,
        blocks: Sequence[Block] | None = None,
    ) -> tuple[Float[Array, "B _ V"], Cache]:
        """Logits after each of the next tokens, and the cache that holds them too.

        With `last`, only the logits after the last of them, [B, 1, V]. `blocks` are those of
        `unrolled`, for a cache that is `unrolled`.
        """
        x, cache = self.decoder.extend(self.embedding(tokens), cache, blocks=blocks)
        if last:
            x = x[:, -1:]
        return self.output(x, self.embedding).logits(), cache
