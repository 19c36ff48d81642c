"""What encoder and decoder share: embedding of tokens and places, and a stack of blocks."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.nn import Block, Cache, Embedding, dropout, run_layers, stack_layers
from jaxformer.nn.block import make_norm
from jaxformer.nn.position import RelativeBias, alibi, sinusoidal, token_places
from jaxformer.nn.stack import unstack_layers
from jaxformer_kernels import Mask


def make_embedding(config: ModelConfig, vocabulary: int, rngs: nnx.Rngs) -> Embedding:
    """A token embedding.

    Its deviation is 0.02, or where embeddings or outputs are scaled, such that they come out of the
    scaling with variance 1 (Vaswani et al., 2017; Raffel et al., 2020).
    """
    scaled = config.embedding_scale or config.output_scale != 1.0
    return Embedding(
        vocabulary,
        config.width,
        rngs=rngs,
        deviation=config.width**-0.5 / config.output_scale if scaled else 0.02,
        param_dtype=config.param_dtype,
        compute_dtype=config.compute_dtype,
    )


def check_length(tokens: int, config: ModelConfig) -> None:
    """Raises ValueError where a sequence is longer than the model takes."""
    if tokens > config.max_length:
        raise ValueError(
            f"a sequence of {tokens} tokens is longer than model.max_length={config.max_length}: "
            "shorten it, or build the model with a larger max_length"
        )


class Transformer(nnx.Module):
    """A stack of blocks over embedded tokens: an encoder, or a decoder with or without a source."""

    def __init__(
        self, config: ModelConfig, *, layers: int, causal: bool, cross: bool, rngs: nnx.Rngs
    ):
        self.config = config
        self.layers = layers
        self.causal = causal
        self.positions = (
            Embedding(
                config.max_length,
                config.width,
                rngs=rngs,
                axes=("T", "D"),
                param_dtype=config.param_dtype,
                compute_dtype=config.compute_dtype,
            )
            if config.position == "learned"
            else None
        )
        self.relative_bias = (
            RelativeBias(
                config.heads,
                buckets=config.relative_buckets,
                max_distance=config.relative_max_distance,
                bidirectional=not causal,
                rngs=rngs,
                param_dtype=config.param_dtype,
            )
            if config.position == "relative"
            else None
        )
        self.blocks = stack_layers(
            lambda rngs: Block(config, cross=cross, layers=layers, rngs=rngs), layers, rngs
        )
        self.norm = make_norm(config, rngs) if config.norm_placement == "pre" else None

    def __call__(
        self,
        embedded: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        source: Float[Array, "B S D"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
        key: PRNGKeyArray | None = None,
        record: list[Array] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of a whole sequence.

        Tokens attend within their segment only. `positions` default to 0, 1, 2, ... Each layer's
        cross-attention weights [B, T, N, S] are appended to `record`, if given.
        """
        tokens = embedded.shape[1]
        check_length(tokens, self.config)
        if positions is None:
            positions = token_places(*embedded.shape[:2], causal=self.causal)
        order = jnp.arange(tokens, dtype=jnp.int32)
        mask = Mask(
            causal=self.causal,
            window=self._window(),
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
        )
        cross_mask = Mask()
        if source_segment_ids is not None:
            if segment_ids is None:
                segment_ids = jnp.ones(embedded.shape[:2], jnp.int32)
            cross_mask = Mask(q_segment_ids=segment_ids, kv_segment_ids=source_segment_ids)
        bias = self._bias(order, order)
        rotated = positions if self.config.position == "rotary" else None
        input_key, layer_keys = self._keys(key)
        x = self._enter(embedded, positions, input_key)

        def layer(block: Block, x: Array, item: Any) -> Array:
            x, _ = block(
                x,
                mask=mask,
                bias=bias,
                positions=rotated,
                source=source,
                cross_mask=cross_mask,
                key=item["key"],
                record=record,
            )
            return x

        x = run_layers(
            layer,
            self.blocks,
            x,
            {"key": layer_keys},
            scan=self.config.scan and record is None,
            remat=self.config.remat if record is None else "none",
        )
        return x if self.norm is None else self.norm(x)

    def unrolled(self) -> list[Block]:
        """The blocks one by one, for many calls of `extend`."""
        return unstack_layers(self.blocks)

    def extend(
        self,
        embedded: Float[Array, "B T D"],
        cache: Cache,
        *,
        blocks: Sequence[Block] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of the next tokens, given a cache of those before; and the new cache.

        `blocks` are those of `unrolled`, for a cache that is `unrolled`.
        """
        tokens = embedded.shape[1]
        positions = cache.positions(tokens)
        mask = Mask(causal=True, window=self._window(), q_offset=cache.index, kv_start=cache.start)
        cross_mask = Mask()
        if cache.source_segment_ids is not None:
            sources = cache.source_segment_ids.shape[0]
            ones = jnp.ones((sources, embedded.shape[0] // sources * tokens), jnp.int32)
            cross_mask = Mask(q_segment_ids=ones, kv_segment_ids=cache.source_segment_ids)
        places = cache.index + jnp.arange(tokens, dtype=jnp.int32)
        bias = self._bias(places, jnp.arange(cache.length, dtype=jnp.int32))
        rotated = positions if self.config.position == "rotary" else None
        x = self._enter(embedded, positions, None)

        def layer(block: Block, carry: tuple[Array, Cache], item: Any) -> tuple[Array, Cache]:
            x, cache = carry
            x, extended = block(
                x,
                mask=mask,
                bias=bias,
                positions=rotated,
                cross_mask=cross_mask,
                cache=cache,
                layer=item["layer"],
            )
            assert extended is not None
            return x, extended

        if blocks is not None:
            for i, block in enumerate(blocks):
                x, cache = layer(block, (x, cache), {"layer": i})
        else:
            layers = {"layer": jnp.arange(self.layers)}
            x, cache = run_layers(layer, self.blocks, (x, cache), layers, scan=self.config.scan)
        return (x if self.norm is None else self.norm(x)), cache.advance(tokens)

    def cross_keys_values(
        self, source: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
        """Every layer's keys and values of the source, computed once before decoding."""
        return jax.vmap(lambda block: block.cross_attention.keys_values(source))(self.blocks)

    def _enter(
        self, embedded: Array, positions: Int[Array, "B T"], key: PRNGKeyArray | None
    ) -> Array:
        config = self.config
        x = embedded * math.sqrt(config.width) if config.embedding_scale else embedded
        if self.positions is not None:
            x = x + self.positions(positions)
        elif config.position == "sinusoidal":
            x = x + sinusoidal(positions, config.width).astype(x.dtype)
        return dropout(x, config.dropout, key)

    def _bias(self, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Array | None:
        distance = keys[None, :] - queries[:, None]
        if self.relative_bias is not None:
            return self.relative_bias(distance)
        if self.config.position == "alibi":
            return alibi(self.config.heads, distance)
        return None

    def _window(self) -> tuple[int, int] | None:
        if self.config.window is None:
            return None
        reach = self.config.window - 1
        return (reach, 0 if self.causal else reach)

    def _keys(self, key: PRNGKeyArray | None) -> tuple[PRNGKeyArray | None, Any]:
        if key is None:
            return None, None
        input_key, layers_key = jax.random.split(key)
        return input_key, jax.random.split(layers_key, self.layers)
