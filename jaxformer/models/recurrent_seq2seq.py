"""The recurrent encoder-decoder: LSTMs, and what the decoder sees of the source."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.output import LogitFactors, Output
from jaxformer.models.sampled_inputs import SampledInputs, choose_token
from jaxformer.models.transformer import check_length, make_embedding
from jaxformer.nn import Embedding, Linear, dropout
from jaxformer.nn.alignment import Alignment, Memory
from jaxformer.nn.linear import matmul, project
from jaxformer.nn.recurrent import LSTMLayer, LSTMStack, LSTMState, lstm, lstm_cell

Module = TypeVar("Module")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurrentCache:
    """What a decoder needs to go on: it does not grow with what was decoded."""

    state: LSTMState
    """Of every layer, [L, B, D]."""
    fed: Float[Array, "B D"]
    """The attentional state of the step before (input feeding)."""
    memory: Memory | None
    """The encoded source; None where the decoder sees its final state alone."""

    def take(self, rows: Int[Array, " R"]) -> "RecurrentCache":
        """The cache of these rows, in this order (beam search reorders with it)."""

        def gather(leaf: Array, axis: int) -> Array:
            return jnp.take(leaf, rows, axis=axis, mode="clip")

        return RecurrentCache(
            state=jax.tree.map(lambda leaf: gather(leaf, 1), self.state),
            fed=gather(self.fed, 0),
            memory=jax.tree.map(lambda leaf: gather(leaf, 0), self.memory),
        )


class RecurrentSeq2Seq(nnx.Module):
    """An LSTM reads the source, another writes the target (Sutskever et al., 2014).

    `config.recurrent.context` says what the decoder sees of the source. `final`: it starts from the
    encoder's final state and sees nothing else; logits come from its hidden state h. Otherwise it
    starts there too, and logits come from the attentional state tanh([c; h] W), c being the context
    of `jaxformer.nn.alignment` (Luong et al., 2015). With input feeding, a step is also given the
    attentional state of the step before it.

    All states have width D: each direction of a bidirectional encoder has hidden size D / 2, so
    that encoder and decoder states can be compared and the decoder's layers start from the
    encoder's. Where the encoder has fewer layers, its last serves the rest; where it has more, its
    last ones serve. Raises ValueError where D is odd and the encoder bidirectional.
    """

    def __init__(
        self, config: ModelConfig, *, vocabulary: int, source_vocabulary: int, rngs: nnx.Rngs
    ):
        width, recurrent = config.width, config.recurrent
        if recurrent.bidirectional and width % 2:
            raise ValueError(
                f"a bidirectional encoder needs an even model.width, not {width}: change it, or "
                "set model.recurrent.bidirectional=False"
            )
        self.config = config
        self.feeding = recurrent.input_feeding and recurrent.context != "final"
        self.embedding = make_embedding(config, vocabulary, rngs)
        self.source_embedding = (
            None if config.shared_embeddings else make_embedding(config, source_vocabulary, rngs)
        )

        def make(module: Callable[..., Module], *sizes: Any, **options: Any) -> Module:
            return module(
                *sizes,
                rngs=rngs,
                param_dtype=config.param_dtype,
                compute_dtype=config.compute_dtype,
                **options,
            )

        self.encoder = make(
            LSTMStack,
            width,
            width // 2 if recurrent.bidirectional else width,
            layers=config.layers if config.encoder_layers is None else config.encoder_layers,
            bidirectional=recurrent.bidirectional,
            dropout=config.dropout,
        )
        self.decoder = nnx.Dict(
            {
                str(layer): make(
                    LSTMLayer, 2 * width if layer == 0 and self.feeding else width, width
                )
                for layer in range(config.layers)
            }
        )
        sees = recurrent.context != "final"
        self.alignment = make(Alignment, recurrent.context, width) if sees else None
        self.combine = make(Linear, {"C": 2 * width}, {"D": width}, bias=False) if sees else None
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

        Source tokens are those whose segment id is not 0. Padding of the target must stand after
        its tokens; nothing of it reaches them. `key` turns dropout on.
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
        sampling_rate: Float[Array, ""] | float | None = None,
        sampling_scope: Literal["token", "sequence"] = "token",
    ) -> LogitFactors:
        """The same logits, not multiplied out.

        With `sampling_rate`, scheduled sampling (Bengio et al., 2015): each input but the first is,
        with this probability, not the one given but a token drawn from the model's own softmax
        after the step before (never <pad> or <sos>); one coin decides for a token, or for all
        tokens of a sequence, as `sampling_scope` says. 0 is teacher forcing, 1 is free running.
        No gradient flows through what is drawn. Raises ValueError where `key` is missing.
        """
        del segment_ids
        check_length(inputs.shape[1], self.config)
        keys = _split(key, 4)
        cache = self._start(source, source_segment_ids, keys[0])
        if sampling_rate is None:
            x, _, _ = self._decode(inputs, cache, keys[1])
        elif key is None:
            raise ValueError("sampling_rate draws tokens: give a key too")
        else:
            sampled = SampledInputs.draw(keys[3], inputs, sampling_rate, sampling_scope)
            x = self._decode_sampled(inputs, cache, keys[1], sampled)
        return self.output(dropout(x, self.config.dropout, keys[2]), self.embedding)

    def encode(
        self,
        source: Int[Array, "B S"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B S D"]:
        """Hidden states of the source; 0 on padding."""
        return self._encode(source, source_segment_ids, key)[0]

    def cross_attention_weights(
        self,
        source: Int[Array, "B S"],
        inputs: Int[Array, "B T"],
        *,
        source_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "1 B T 1 S"]:
        """How much each target place attends to each source token: one layer, one head.

        Raises ValueError where the decoder sees the final state alone.
        """
        if self.alignment is None:
            raise ValueError(
                "model.recurrent.context='final' attends to nothing, so it has no attention "
                "weights: train with context additive, dot or general to see an alignment"
            )
        cache = self._start(source, source_segment_ids, None)
        _, _, weights = self._decode(inputs, cache, None)
        assert weights is not None
        return weights[None, :, :, None]

    def init_cache(
        self, source: Int[Array, "B S"], source_segment_ids: Int[Array, "B S"], length: int
    ) -> RecurrentCache:
        """The encoded source and the first state, from which any `length` can be decoded."""
        check_length(length, self.config)
        return self._start(source, source_segment_ids, None)

    def extend(
        self, tokens: Int[Array, "B T"], cache: RecurrentCache, *, last: bool = False
    ) -> tuple[Float[Array, "B _ V"], RecurrentCache]:
        """Logits after each of the next target tokens, and the cache after them.

        With `last`, only the logits after the last of them, [B, 1, V].
        """
        x, cache, _ = self._decode(tokens, cache, None)
        if last:
            x = x[:, -1:]
        return self.output(x, self.embedding).logits(), cache

    def _embed(self, embedding: Embedding, tokens: Array, key: PRNGKeyArray | None) -> Array:
        return dropout(self._scaled(embedding(tokens)), self.config.dropout, key)

    def _scaled(self, embedded: Array) -> Array:
        embedded = embedded.astype(jnp.float32)
        config = self.config
        return embedded * math.sqrt(config.width) if config.embedding_scale else embedded

    def _encode(
        self, source: Array, segment_ids: Array | None, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B S D"], LSTMState]:
        """States of the source, and the final ones [L, directions, B, D / directions]."""
        check_length(source.shape[1], self.config)
        keys = _split(key, 2)
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        return self.encoder(
            self._embed(embedding, source, keys[0]), segment_ids=segment_ids, key=keys[1]
        )

    def _start(
        self, source: Array, segment_ids: Array | None, key: PRNGKeyArray | None
    ) -> RecurrentCache:
        if segment_ids is None:
            segment_ids = jnp.ones(source.shape, jnp.int32)
        states, final = self._encode(source, segment_ids, key)
        last = len(self.encoder.layers) - 1
        shift = max(last + 1 - self.config.layers, 0)
        layers = [min(layer + shift, last) for layer in range(self.config.layers)]

        def start(leaf: Float[Array, "_ R B C"]) -> Float[Array, "L B D"]:
            return jnp.stack([jnp.concatenate(list(leaf[layer]), axis=-1) for layer in layers])

        return RecurrentCache(
            state=jax.tree.map(start, final),
            fed=jnp.zeros((source.shape[0], self.config.width), jnp.float32),
            memory=None
            if self.alignment is None
            else self.alignment.memory(states, segment_ids != 0),
        )

    def _decode(
        self, tokens: Int[Array, "B T"], cache: RecurrentCache, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B T D"], RecurrentCache, Array | None]:
        """What logits are made of, the cache after the tokens, and attention weights [B, T, S]."""
        keys = _split(key, 2)
        y = jnp.swapaxes(self._embed(self.embedding, tokens, keys[0]), 0, 1)
        return (self._decode_fed if self.feeding else self._decode_at_once)(y, cache, keys[1])

    def _decode_at_once(
        self, x: Float[Array, "T B D"], cache: RecurrentCache, key: PRNGKeyArray | None
    ) -> tuple[Array, RecurrentCache, Array | None]:
        """Layer after layer over all steps, then all of attention: no step needs the one before."""
        keys = _split(key, self.config.layers)
        states = _layers(cache.state)
        for number, layer in enumerate(self.decoder.values()):
            if number:
                x = dropout(x, self.config.dropout, keys[number], axes="T B D")
            x, states[number] = lstm(
                layer.project(x),
                layer.recurrent_kernel[...][0],
                initial=states[number],
                compute_dtype=self.config.compute_dtype,
            )
        x, weights = self._attend(cache.memory, jnp.swapaxes(x, 0, 1))
        return x, dataclasses.replace(cache, state=_stacked(states)), weights

    def _decode_fed(
        self, y: Float[Array, "T B D"], cache: RecurrentCache, key: PRNGKeyArray | None
    ) -> tuple[Array, RecurrentCache, Array | None]:
        """Step after step: each is given the attentional state of the one before it."""
        width = self.config.width
        # What tokens add to the first layer's gates is known before; a step multiplies the rest.
        gates = self.decoder["0"].project(y, inputs=slice(width))
        kernels = self._fused_kernels(slice(width, None))

        def step(carry: Any, item: Any) -> Any:
            states, fed = carry
            gates, masks = item
            states = self._advance(kernels, states, fed, gates, masks)
            x, weights = self._attend(cache.memory, states[-1].h)
            return (states, x), (x, weights)

        carry = _layers(cache.state), cache.fed
        masks = self._masks_between(gates.shape[:2], key)
        (states, fed), (x, weights) = jax.lax.scan(step, carry, (gates, masks))
        cache = dataclasses.replace(cache, state=_stacked(states), fed=fed)
        return jnp.swapaxes(x, 0, 1), cache, jnp.swapaxes(weights, 0, 1)

    def _decode_sampled(
        self,
        tokens: Int[Array, "B T"],
        cache: RecurrentCache,
        key: PRNGKeyArray,
        sampled: SampledInputs,
    ) -> Float[Array, "B T D"]:
        """Step after step: where `sampled` says so, one reads what is drawn after the one before.

        Under the same key, dropout leaves out what it does in `_decode`.
        """
        keys = _split(key, 2)
        kernels = self._fused_kernels()
        gates = self.decoder["0"].bias[...][0].astype(jnp.float32)

        def step(carry: Any, item: Any) -> Any:
            states, fed, drawn = carry
            token, use, chance, mask, masks = item
            y = self._scaled(self.embedding(jnp.where(use, drawn, token)))
            inputs = [_masked(y, mask), fed] if self.feeding else [_masked(y, mask)]
            inputs = jnp.concatenate(inputs, axis=-1)
            states = self._advance(kernels, states, inputs, gates, masks)
            x, _ = self._attend(cache.memory, states[-1].h)
            # A draw has no gradient, so nothing that leads to it needs one.
            logits = jax.lax.stop_gradient(self.output(x[:, None], self.embedding)).logits()
            return (states, x, choose_token(logits[:, 0], chance)), x

        rows, steps = tokens.shape
        mask = _dropout_mask((rows, steps, self.config.width), self.config.dropout, keys[0])
        mask = None if mask is None else jnp.swapaxes(mask, 0, 1)
        masks = self._masks_between((steps, rows), keys[1])
        carry = _layers(cache.state), cache.fed, tokens[:, 0]
        items = tokens.T, sampled.use, sampled.chance, mask, masks
        _, x = jax.lax.scan(step, carry, items)
        return jnp.swapaxes(x, 0, 1)

    def _fused_kernels(self, inputs: slice = slice(None)) -> list[Array]:
        """[W; U] of every layer; of the first layer's W only the rows `inputs`."""
        first, *rest = self.decoder.values()
        return [first.fused_kernel(inputs), *(layer.fused_kernel() for layer in rest)]

    def _advance(
        self,
        kernels: list[Array],
        states: list[LSTMState],
        x: Float[Array, "B _"],
        gates: Float[Array, "*B F"],
        masks: list[Array | None],
    ) -> list[LSTMState]:
        """The states of all layers after one more step.

        x is what the first layer multiplies, `gates` what it adds to that: its bias at least.
        """
        after = []
        for number, layer in enumerate(self.decoder.values()):
            if number:
                x = _masked(x, masks[number - 1])
                gates = layer.bias[...][0].astype(jnp.float32)
            h, c = states[number]
            product = matmul(
                jnp.concatenate([x, h], axis=-1), kernels[number], self.config.compute_dtype
            )
            after.append(lstm_cell(gates + product, c))
            x = after[-1].h
        return after

    def _attend(
        self, memory: Memory | None, h: Float[Array, "B *T D"]
    ) -> tuple[Float[Array, "B *T D"], Float[Array, "B *T S"] | None]:
        """The attentional state tanh([c; h] W) and the weights; h where nothing is seen."""
        if self.alignment is None or self.combine is None or memory is None:
            return h, None
        context, weights = self.alignment.attend(memory, h)
        both = jnp.concatenate([context, h], axis=-1)
        kernel = self.combine.kernel[...]
        return jnp.tanh(project(both, kernel, self.config.compute_dtype)), weights

    def _masks_between(
        self, shape: tuple[int, ...], key: PRNGKeyArray | None
    ) -> list[Float[Array, "T B D"] | None]:
        """What dropout multiplies by after each layer but the last, of all steps."""
        keys = _split(key, self.config.layers)[1:]
        return [_dropout_mask((*shape, self.config.width), self.config.dropout, k) for k in keys]


def _dropout_mask(
    shape: tuple[int, ...], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "_ _ D"] | None:
    if key is None or rate == 0.0:
        return None
    return dropout(jnp.ones(shape, jnp.float32), rate, key, axes="T B D")


def _masked(x: Array, mask: Array | None) -> Array:
    return x if mask is None else x * mask


def _split(key: PRNGKeyArray | None, count: int) -> Any:
    return [None] * count if key is None else jax.random.split(key, count)


def _layers(state: LSTMState) -> list[LSTMState]:
    """The state of each layer, [B, D], from that of all, [L, B, D]."""
    return [LSTMState(h, c) for h, c in zip(state.h, state.c, strict=True)]


def _stacked(states: list[LSTMState]) -> LSTMState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
