"""How many floating-point operations a training step takes, counted from the configuration."""

from dataclasses import dataclass

from jaxformer.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one training step, by what they are spent on."""

    layers: float
    """Products with the layers' matrices."""
    attention: float
    """Scores, and the mixing of values."""
    output: float
    """The output projection, a matrix of its own or the tied embedding."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.output


def training_flops(
    config: ModelConfig,
    *,
    vocabulary: int,
    batch: int,
    length: int,
    source_length: int | None = None,
) -> Flops:
    """Model FLOPs of a training step on `batch` rows of `length` (target) tokens.

    A matrix of n elements costs 2 n a token forward and twice that backward: 6 n. Attention costs
    12 N H for every query and key that it may attend to, a layer, which for a decoder is the usual
    12 T D a token, halved because it is causal; a window counts what it shows. Left out, as in
    published figures: embedding look-ups, norms, activations, softmax, rotations, the optimiser,
    and what rematerialisation computes again. Rows count as full and as one segment each.

    Raises NotImplementedError for models that are no Transformers throughout, and ValueError where
    the lengths are not those of the kind of model.
    """
    if config.kind not in ("decoder", "encoder_decoder"):
        raise NotImplementedError(
            f"FLOPs are counted for model.kind 'decoder' and 'encoder_decoder', not {config.kind!r}"
        )
    if (source_length is None) != (config.kind == "decoder"):
        raise ValueError(f"source_length={source_length} does not fit model.kind={config.kind!r}")
    tokens = batch * length
    heads = config.heads * (config.head_dim or config.width // config.heads)
    query_out, keys_values, feedforward = _matrices(config, heads)
    layer = query_out + keys_values + feedforward
    in_layers = config.layers * layer * tokens
    pairs = config.layers * _pairs(length, config.window, causal=True)
    if source_length is not None:
        encoder_layers = config.layers if config.encoder_layers is None else config.encoder_layers
        in_layers += config.layers * query_out * tokens
        source_tokens = batch * source_length
        in_layers += (encoder_layers * layer + config.layers * keys_values) * source_tokens
        pairs += encoder_layers * _pairs(source_length, config.window, causal=False)
        pairs += config.layers * length * source_length
    return Flops(
        layers=6.0 * in_layers,
        attention=12.0 * heads * batch * pairs,
        output=6.0 * config.width * vocabulary * tokens,
    )


def _matrices(config: ModelConfig, heads: int) -> tuple[int, int, int]:
    """Elements of a layer's matrices: queries and output, keys and values, feed-forward."""
    share = (config.kv_heads or config.heads) / config.heads
    hidden = config.feedforward or 4 * config.width
    gated = config.activation in ("swiglu", "geglu")
    return (
        2 * config.width * heads,
        round(2 * config.width * heads * share),
        (3 if gated else 2) * config.width * hidden,
    )


def _pairs(length: int, window: int | None, *, causal: bool) -> int:
    """Pairs of a query and a key that it may attend to, in one row."""
    reach = length if window is None else min(window, length)
    # All keys before and at a query, less those before its window.
    behind = length * (length + 1) // 2 - (length - reach) * (length - reach + 1) // 2
    return behind if causal else 2 * behind - length
