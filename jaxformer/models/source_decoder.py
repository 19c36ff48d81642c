"""A Transformer decoder over an encoded source, whatever encodes it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.output import LogitFactors, Output
from jaxformer.models.transformer import Transformer, check_length
from jaxformer.nn import Block, Cache, Embedding
from jaxformer.nn.precision import activation_dtype


class SourceDecoder(nnx.Module):
    """What models with a decoder over an encoded source share.

    A subclass makes `config`, `embedding`, `decoder` and `output`, and says in `_memory` what its
    decoder attends to.
    """

    config: ModelConfig
    embedding: Embedding
    decoder: Transformer
    output: Output

    def _memory(
        self, source: Any, source_segment_ids: Int[Array, "B S"] | None
    ) -> tuple[Float[Array, "B Z D"], Int[Array, "B Z"] | None]:
        """Hidden states of the source, and the segment of each."""
        raise NotImplementedError

    def cross_attention_weights(
        self,
        source: Any,
        inputs: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "L B T N Z"]:
        """How much each target place attends to each place of the source, by layer and head."""
        memory, memory_segment_ids = self._memory(source, source_segment_ids)
        record: list[Array] = []
        self.decoder(
            self.embedding(inputs),
            source=memory,
            source_segment_ids=memory_segment_ids,
            record=record,
        )
        return jnp.stack(record)

    def init_cache(self, source: Any, source_segment_ids: Int[Array, "B S"], length: int) -> Cache:
        """A cache with the source's keys and values and room for `length` target tokens."""
        return self._new_cache(*self._memory(source, source_segment_ids), length)

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
        """Logits after each of the next target tokens, and the cache that holds them too.

        With `last`, only the logits after the last of them, [B, 1, V]. `blocks` are those of
        `unrolled`, for a cache that is `unrolled`.
        """
        x, cache = self.decoder.extend(self.embedding(tokens), cache, blocks=blocks)
        if last:
            x = x[:, -1:]
        return self.output(x, self.embedding).logits(), cache

    def _decode(
        self,
        inputs: Int[Array, "B T"],
        memory: Float[Array, "B Z D"],
        memory_segment_ids: Int[Array, "B Z"] | None,
        segment_ids: Int[Array, "B T"] | None,
        key: PRNGKeyArray | None,
    ) -> LogitFactors:
        x = self.decoder(
            self.embedding(inputs),
            segment_ids=segment_ids,
            source=memory,
            source_segment_ids=memory_segment_ids,
            key=key,
        )
        return self.output(x, self.embedding)

    def _new_cache(
        self,
        memory: Float[Array, "B Z D"],
        memory_segment_ids: Int[Array, "B Z"] | None,
        length: int,
    ) -> Cache:
        config = self.config
        check_length(length, config)
        cross_keys, cross_values = self.decoder.cross_keys_values(memory)
        cache = Cache.empty(
            layers=config.layers,
            batch=memory.shape[0],
            length=length,
            kv_heads=config.kv_heads or config.heads,
            head_dim=config.head_dim or config.width // config.heads,
            dtype=activation_dtype(config.compute_dtype),
            start=jnp.zeros(memory.shape[0], jnp.int32),
        )
        return dataclasses.replace(
            cache,
            cross_keys=cross_keys,
            cross_values=cross_values,
            source_segment_ids=memory_segment_ids,
        )
