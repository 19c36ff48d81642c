"""Whole models: NNX modules built from `jaxformer.nn`."""

from flax import nnx

from jaxformer.config import ModelConfig
from jaxformer.models.decoder import DecoderLM
from jaxformer.models.encoder_ctc import EncoderCTC
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.hybrid import Hybrid
from jaxformer.models.inputs import model_inputs
from jaxformer.models.recurrent_seq2seq import RecurrentSeq2Seq

__all__ = [
    "DecoderLM",
    "EncoderCTC",
    "EncoderDecoder",
    "Hybrid",
    "Model",
    "RecurrentSeq2Seq",
    "abstract",
    "build",
    "model_inputs",
]

Model = DecoderLM | EncoderDecoder | RecurrentSeq2Seq | EncoderCTC | Hybrid


def build(
    config: ModelConfig,
    *,
    vocabulary: int,
    source_vocabulary: int | None = None,
    image_height: int | None = None,
    seed: int = 0,
    axis_name: str | tuple[str, ...] | None = None,
) -> Model:
    """The model that the configuration describes, with parameters drawn from the seed.

    `vocabulary` is the number of target tokens, `source_vocabulary` that of source tokens (equal
    to it if None); a model of images has their height in pixels in its place. `axis_name` names the
    mesh axes over which BatchNorm shares its statistics where the model runs inside `shard_map` or
    `pmap`. Raises ValueError where embeddings are shared between unequal vocabularies, or the kind
    of model does not read such sources.
    """
    rngs = nnx.Rngs(params=seed)
    reads_frames = config.kind in ("ctc", "hybrid")
    if image_height is not None:
        _check_images(config, image_height, source_vocabulary)
    elif source_vocabulary is None:
        source_vocabulary = vocabulary
    if config.shared_embeddings and reads_frames:
        raise ValueError(
            "model.shared_embeddings is for encoder_decoder: what a frame holds is no target token"
        )
    if config.shared_embeddings and source_vocabulary != vocabulary:
        raise ValueError(
            f"model.shared_embeddings needs one vocabulary, not {source_vocabulary} source and "
            f"{vocabulary} target tokens: set data.shared_vocabulary"
        )
    if config.kind == "decoder":
        return DecoderLM(config, vocabulary=vocabulary, rngs=rngs)
    if reads_frames:
        return (EncoderCTC if config.kind == "ctc" else Hybrid)(
            config,
            vocabulary=vocabulary,
            source_vocabulary=source_vocabulary,
            image_height=image_height,
            rngs=rngs,
            axis_name=axis_name,
        )
    assert source_vocabulary is not None
    return (RecurrentSeq2Seq if config.kind == "recurrent" else EncoderDecoder)(
        config, vocabulary=vocabulary, source_vocabulary=source_vocabulary, rngs=rngs
    )


def abstract(
    config: ModelConfig,
    *,
    vocabulary: int,
    source_vocabulary: int | None = None,
    image_height: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Model:
    """The same model with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(
        lambda: build(
            config,
            vocabulary=vocabulary,
            source_vocabulary=source_vocabulary,
            image_height=image_height,
            axis_name=axis_name,
        )
    )


def _check_images(config: ModelConfig, height: int, source_vocabulary: int | None) -> None:
    if config.kind not in ("ctc", "hybrid"):
        raise ValueError(
            f"model.kind={config.kind!r} does not read images: set model.kind to 'ctc' or 'hybrid'"
        )
    if source_vocabulary is not None:
        raise ValueError(
            f"a source is images {height} pixels high or one of {source_vocabulary} tokens: give "
            "image_height or source_vocabulary, not both"
        )
    if height < 1:
        raise ValueError(f"image_height={height} must be positive")
