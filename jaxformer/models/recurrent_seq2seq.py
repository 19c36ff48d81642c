"""The recurrent encoder-decoder: LSTMs, and what the decoder sees of the source."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxformer.config import ModelConfig
from jaxformer.models.output import LogitFactors, Output
from jaxformer.models.sampled_inputs import SampledInputs, choose_token
from jaxformer.models.transformer import check_length, make_embedding
from jaxformer.nn import Embedding, Linear, dropout
from jaxformer.nn.alignment import Alignment, Memory, attend, multiply_all
from jaxformer.nn.recurrent import LSTMLayer, LSTMStack, LSTMState, lstm, lstm_cell
from jaxformer.nn.scan import Multiply, scan_products

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
        sampled = None
        if sampling_rate is not None:
            if key is None:
                raise ValueError("sampling_rate draws tokens: give a key too")
            sampled = SampledInputs.draw(keys[3], inputs, sampling_rate, sampling_scope)
        cache = self._start(source, source_segment_ids, keys[0])
        x, _, _ = self._decode(inputs, cache, key=keys[1], sampled=sampled)
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
        _, _, weights = self._decode(inputs, cache, record=True)
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
        x, cache, _ = self._decode(tokens, cache)
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
        self,
        tokens: Int[Array, "B T"],
        cache: RecurrentCache,
        *,
        key: PRNGKeyArray | None = None,
        sampled: SampledInputs | None = None,
        record: bool = False,
    ) -> tuple[Float[Array, "B T D"], RecurrentCache, Array | None]:
        """What logits are made of, the cache after the tokens, and attention weights [B, T, S]."""
        keys = _split(key, 2)
        if self.feeding or sampled is not None:
            return self._decode_stepwise(tokens, cache, keys, sampled, record)
        return self._decode_at_once(tokens, cache, keys)

    def _decode_at_once(
        self, tokens: Array, cache: RecurrentCache, keys: Any
    ) -> tuple[Array, RecurrentCache, Array | None]:
        """Layer after layer over all steps, then all of attention: no step needs the one before."""
        x = jnp.swapaxes(self._embed(self.embedding, tokens, keys[0]), 0, 1)
        layer_keys = _split(keys[1], self.config.layers)
        states = _layers(cache.state)
        for number, layer in enumerate(self.decoder.values()):
            if number:
                x = dropout(x, self.config.dropout, layer_keys[number])
            x, states[number] = lstm(
                layer.project(x),
                layer.recurrent_kernel[...][0],
                initial=states[number],
                compute_dtype=self.config.compute_dtype,
            )
        h = jnp.swapaxes(x, 0, 1)
        cache = dataclasses.replace(cache, state=_stacked(states))
        matrices, constants = self._source(cache.memory)
        x, weights = _look(multiply_all(matrices, self.config.compute_dtype), constants, h)
        return x, cache, weights

    def _decode_stepwise(
        self,
        tokens: Array,
        cache: RecurrentCache,
        keys: Any,
        sampled: SampledInputs | None,
        record: bool,
    ) -> tuple[Array, RecurrentCache, Array | None]:
        """One step after the other: a step's input is made of what came out before it."""
        config = self.config
        matrices, source = self._source(cache.memory)
        constants: dict[str, Any] = {
            "source": source,
            "biases": [layer.bias[...][0].astype(jnp.float32) for layer in self.decoder.values()],
        }
        for number, layer in enumerate(self.decoder.values()):
            kernel = layer.kernel[...][0]
            if number == 0 and sampled is None:
                kernel = kernel[config.width :]
            # Inputs and hidden state side by side: one product a step.
            matrices[f"layer{number}"] = jnp.concatenate([kernel, layer.recurrent_kernel[...][0]])
        xs: dict[str, Any] = {"kept": self._kept(tokens, keys[1])}
        logits = None
        if sampled is None:
            embedded = jnp.swapaxes(self._embed(self.embedding, tokens, keys[0]), 0, 1)
            xs["gates"] = self._project_tokens(embedded)
        else:
            matrices["table"] = self.embedding.table[...]
            factors = self.output(cache.fed[None], self.embedding)
            constants["output"] = jax.lax.stop_gradient(factors.w)
            logits = _logits(factors, config.output_scale)
            xs |= {"tokens": tokens.T, "use": sampled.use, "chance": sampled.chance}
            kept = _kept((*tokens.shape, config.width), config.dropout, keys[0])
            xs["kept_inputs"] = None if kept is None else jnp.swapaxes(kept, 0, 1)
        plan = _Plan(
            layers=config.layers,
            feeding=self.feeding,
            dropout=config.dropout,
            embedding_scale=math.sqrt(config.width) if config.embedding_scale else 1.0,
            logits=logits,
            record=record,
        )
        carry = _Carry(_layers(cache.state), cache.fed, tokens[:, 0])
        carry, (x, weights) = scan_products(
            functools.partial(_step, plan), config.compute_dtype, matrices, constants, carry, xs
        )
        cache = dataclasses.replace(cache, state=_stacked(carry.states), fed=carry.fed)
        weights = None if weights is None else jnp.swapaxes(weights, 0, 1)
        return jnp.swapaxes(x, 0, 1), cache, weights

    def _source(self, memory: Memory | None) -> tuple[dict[str, Array], dict[str, Array]]:
        """What `_look` multiplies by, and what else it needs; nothing where it sees nothing."""
        if self.alignment is None or self.combine is None or memory is None:
            return {}, {}
        matrices = self.alignment.matrices(memory) | {"combine": self.combine.kernel[...]}
        return matrices, self.alignment.constants(memory)

    def _project_tokens(self, embedded: Float[Array, "T B D"]) -> Float[Array, "T B F"]:
        """The first layer's product with the tokens, which are known, of all steps."""
        layer = self.decoder["0"]
        return layer.project(embedded, inputs=slice(0, self.config.width))

    def _kept(self, tokens: Array, key: PRNGKeyArray | None) -> list[Array | None]:
        """Which elements dropout between layers keeps, by layer, of all steps."""
        shape = (tokens.shape[1], tokens.shape[0], self.config.width)
        keys = _split(key, self.config.layers)
        return [None, *(_kept(shape, self.config.dropout, key) for key in keys[1:])]


class _Plan(NamedTuple):
    """What a step is to do, known before anything is traced."""

    layers: int
    feeding: bool
    dropout: float
    embedding_scale: float
    logits: Callable[[Array, Array], Array] | None
    """Of an attentional state and the output matrix, where tokens are drawn from them."""
    record: bool


class _Carry(NamedTuple):
    states: list[LSTMState]
    """Of every layer."""
    fed: Float[Array, "B D"]
    token: Int[Array, " B"]
    """Drawn after the step before."""


def _step(
    plan: _Plan, multiply: Multiply, constants: Any, carry: _Carry, item: Any
) -> tuple[_Carry, tuple[Array, Array | None]]:
    """One target token: through the layers, then a look at the source."""
    inputs = []
    gates = item.get("gates")
    if gates is None:
        token = jnp.where(item["use"], carry.token, item["tokens"])
        embedded = multiply("table", token) * plan.embedding_scale
        inputs.append(_drop(embedded, item["kept_inputs"], plan.dropout))
    if plan.feeding:
        inputs.append(carry.fed)
    states = []
    for layer in range(plan.layers):
        before = carry.states[layer]
        product = multiply(f"layer{layer}", jnp.concatenate([*inputs, before.h], axis=-1))
        known = gates if layer == 0 and gates is not None else constants["biases"][layer]
        states.append(lstm_cell(product + known, before.c))
        if layer + 1 < plan.layers:
            inputs = [_drop(states[-1].h, item["kept"][layer + 1], plan.dropout)]
    x, weights = _look(multiply, constants["source"], states[-1].h)
    token = carry.token
    if plan.logits is not None:
        logits = plan.logits(jax.lax.stop_gradient(x), constants["output"])
        token = choose_token(logits, item["chance"])
    return _Carry(states, x, token), (x, weights if plan.record else None)


def _look(multiply: Multiply, source: dict[str, Array], h: Array) -> tuple[Array, Array | None]:
    """The attentional state tanh([c; h] W) and the attention weights; h where nothing is seen."""
    if not source:
        return h, None
    context, weights = attend(multiply, source, h)
    return jnp.tanh(multiply("combine", jnp.concatenate([context, h], axis=-1))), weights


def _logits(factors: LogitFactors, scale: float) -> Callable[[Array, Array], Array]:
    """The function that these factors stand for; of their arrays it holds none."""
    softcap, transposed, dtype = factors.softcap, factors.transposed, factors.compute_dtype

    def logits(x: Float[Array, "B D"], w: Float[Array, "_ _"]) -> Float[Array, "B V"]:
        product = LogitFactors(
            x=x * scale, w=w, transposed=transposed, softcap=softcap, compute_dtype=dtype
        )
        return product.logits()

    return logits


def _kept(
    shape: tuple[int, ...], rate: float, key: PRNGKeyArray | None
) -> Bool[Array, "_ _ D"] | None:
    if key is None or rate == 0.0:
        return None
    return dropout(jnp.ones(shape, jnp.float32), rate, key) > 0


def _drop(x: Array, kept: Array | None, rate: float) -> Array:
    return x if kept is None else jnp.where(kept, x / (1 - rate), 0)


def _split(key: PRNGKeyArray | None, count: int) -> Any:
    return [None] * count if key is None else jax.random.split(key, count)


def _layers(state: LSTMState) -> list[LSTMState]:
    """The state of each layer, [B, D], from that of all, [L, B, D]."""
    return [LSTMState(h, c) for h, c in zip(state.h, state.c, strict=True)]


def _stacked(states: list[LSTMState]) -> LSTMState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
