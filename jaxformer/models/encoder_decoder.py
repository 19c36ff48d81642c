"""The encoder-decoder Transformer."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.output import LogitFactors, Output
from jaxformer.models.transformer import Transformer, check_length, make_embedding
from jaxformer.nn import Cache
from jaxformer.nn.precision import activation_dtype


class EncoderDecoder(nnx.Module):
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
        x = self.decoder(
            self.embedding(inputs),
            segment_ids=segment_ids,
            source=encoded,
            source_segment_ids=source_segment_ids,
            key=decoder_key,
        )
        return self.output(x, self.embedding)

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

    def cross_attention_weights(
        self,
        source: Int[Array, "B S"],
        inputs: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "L B T N S"]:
        """How much each target place attends to each source token, by layer and head."""
        record: list[Array] = []
        self.decoder(
            self.embedding(inputs),
            source=self.encode(source, source_segment_ids=source_segment_ids),
            source_segment_ids=source_segment_ids,
            record=record,
        )
        return jnp.stack(record)

    def init_cache(
        self, source: Int[Array, "B S"], source_segment_ids: Int[Array, "B S"], length: int
    ) -> Cache:
        """A cache with the source's keys and values and room for `length` target tokens."""
        config = self.config
        check_length(length, config)
        encoded = self.encode(source, source_segment_ids=source_segment_ids)
        cross_keys, cross_values = self.decoder.cross_keys_values(encoded)
        cache = Cache.empty(
            layers=config.layers,
            batch=source.shape[0],
            length=length,
            kv_heads=config.kv_heads or config.heads,
            head_dim=config.head_dim or config.width // config.heads,
            dtype=activation_dtype(config.compute_dtype),
            start=jnp.zeros(source.shape[0], jnp.int32),
        )
        return dataclasses.replace(
            cache,
            cross_keys=cross_keys,
            cross_values=cross_values,
            source_segment_ids=source_segment_ids,
        )

    def extend(
        self, tokens: Int[Array, "B T"], cache: Cache, *, last: bool = False
    ) -> tuple[Float[Array, "B _ V"], Cache]:
        """Logits after each of the next target tokens, and the cache that holds them too.

        With `last`, only the logits after the last of them, [B, 1, V].
        """
        x, cache = self.decoder.extend(self.embedding(tokens), cache)
        if last:
            x = x[:, -1:]
        return self.output(x, self.embedding).logits(), cache
