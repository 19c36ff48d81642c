"""Whole models: NNX modules built from `jaxformer.nn`."""

from flax import nnx

from jaxformer.config import ModelConfig
from jaxformer.models.decoder import DecoderLM
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.inputs import model_inputs

__all__ = ["DecoderLM", "EncoderDecoder", "abstract", "build", "model_inputs"]


def build(
    config: ModelConfig, *, vocabulary: int, source_vocabulary: int | None = None, seed: int = 0
) -> DecoderLM | EncoderDecoder:
    """The model that the configuration describes, with parameters drawn from the seed.

    `vocabulary` is the number of target tokens, `source_vocabulary` that of source tokens (equal
    to it if None). Raises ValueError where embeddings are shared between unequal vocabularies.
    """
    rngs = nnx.Rngs(params=seed)
    if config.kind == "decoder":
        return DecoderLM(config, vocabulary=vocabulary, rngs=rngs)
    if source_vocabulary is None:
        source_vocabulary = vocabulary
    if config.shared_embeddings and source_vocabulary != vocabulary:
        raise ValueError(
            f"model.shared_embeddings needs one vocabulary, not {source_vocabulary} source and "
            f"{vocabulary} target tokens: set data.shared_vocabulary"
        )
    return EncoderDecoder(
        config, vocabulary=vocabulary, source_vocabulary=source_vocabulary, rngs=rngs
    )


def abstract(
    config: ModelConfig, *, vocabulary: int, source_vocabulary: int | None = None
) -> DecoderLM | EncoderDecoder:
    """The same model with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(
        lambda: build(config, vocabulary=vocabulary, source_vocabulary=source_vocabulary)
    )
