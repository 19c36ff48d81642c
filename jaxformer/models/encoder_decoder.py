"""The encoder-decoder Transformer."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.output import LogitFactors, Output
from jaxformer.models.source_decoder import SourceDecoder
from jaxformer.models.transformer import Transformer, make_embedding


class EncoderDecoder(SourceDecoder):
    """Predicts a target from a source (Vaswani et al., 2017)."""

    def __init__(
        self, config: ModelConfig, *, vocabulary: int, source_vocabulary: int, rngs: nnx.Rngs
    ):
        self.config = config
        self.embedding = make_embedding(config, vocabulary, rngs)
        self.source_embedding = (
            None if config.shared_embeddings else make_embedding(config, source_vocabulary, rngs)
        )
        encoder_layers = config.layers if config.encoder_layers is None else config.encoder_layers
        self.encoder = Transformer(
            config, layers=encoder_layers, causal=False, cross=False, rngs=rngs
        )
        self.decoder = Transformer(config, layers=config.layers, causal=True, cross=True, rngs=rngs)
        self.output = Output(config, vocabulary, rngs)

    def __call__(
        self,
        source: Int[Array, "B S"],
        inputs: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next target token at every place, float32.

        A target token attends to source tokens whose segment id equals its own. `key` turns dropout
        on.
        """
        factors = self.predictions(
            source,
            inputs,
            source_segment_ids=source_segment_ids,
            segment_ids=segment_ids,
            key=key,
        )
        return factors.logits()

    def predictions(
        self,
        source: Int[Array, "B S"],
        inputs: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> LogitFactors:
        """The same logits, not multiplied out."""
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        encoded = self.encode(source, source_segment_ids=source_segment_ids, key=encoder_key)
        return self._decode(inputs, encoded, source_segment_ids, segment_ids, decoder_key)

    def encode(
        self,
        source: Int[Array, "B S"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B S D"]:
        """Hidden states of the source."""
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        return self.encoder(embedding(source), segment_ids=source_segment_ids, key=key)

    def _memory(
        self, source: Int[Array, "B S"], source_segment_ids: Int[Array, "B S"] | None
    ) -> tuple[Float[Array, "B S D"], Int[Array, "B S"] | None]:
        return self.encode(source, source_segment_ids=source_segment_ids), source_segment_ids
