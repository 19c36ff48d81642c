"""What is trained in benchmarks of training: named models with their batches, the same for all.

No jax and no torch here: a contender's process loads only what it runs on.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxformer import presets
from jaxformer.config import ConfigError, ModelConfig, OptimizerConfig, TrainConfig

OPTIMIZER = OptimizerConfig(
    name="adamw",
    learning_rate=1e-3,
    schedule="constant",
    warmup_steps=0,
    b1=0.9,
    b2=0.99,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
)
TRAIN = TrainConfig()


@dataclass(frozen=True)
class Shape:
    """A model and the batches it is trained on."""

    model: ModelConfig
    vocabulary: int
    batch: int
    length: int
    source_length: int | None = None
    source_vocabulary: int | None = None
    optimizer: OptimizerConfig = OPTIMIZER
    train: TrainConfig = TRAIN

    @property
    def tokens(self) -> int:
        """Target tokens a step."""
        return self.batch * self.length

    def with_model(self, **changed) -> "Shape":
        """The same with other fields of the model."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, **changed))

    def tiny(self) -> "Shape":
        """The same kind of model at a size that takes no time."""
        model = self.model
        grouped = model.kv_heads not in (None, model.heads)
        return dataclasses.replace(
            self.with_model(
                layers=2,
                width=32,
                heads=4,
                kv_heads=2 if grouped else None,
                feedforward=48 if model.feedforward else None,
                max_length=16,
            ),
            vocabulary=min(self.vocabulary, 67),
            batch=3,
            length=12,
            source_length=10 if self.source_length else None,
        )


_NANOGPT = ModelConfig(
    kind="decoder",
    layers=4,
    width=128,
    heads=4,
    position="learned",
    activation="gelu_exact",
    bias=False,
    max_length=64,
    scan=False,
)

SHAPES = {
    "small": Shape(
        _NANOGPT,
        vocabulary=65,
        batch=12,
        length=64,
    ),
    "baby": Shape(
        dataclasses.replace(_NANOGPT, layers=6, width=384, heads=6, max_length=256),
        vocabulary=65,
        batch=8,
        length=256,
    ),
    "llama": Shape(
        ModelConfig(
            kind="decoder",
            layers=8,
            width=512,
            heads=8,
            kv_heads=4,
            feedforward=1536,
            activation="swiglu",
            norm="rmsnorm",
            bias=False,
            position="rotary",
            tied_embeddings=False,
            max_length=512,
            scan=False,
        ),
        vocabulary=4096,
        batch=4,
        length=512,
    ),
    "encdec": Shape(
        ModelConfig(
            kind="encoder_decoder",
            layers=3,
            width=256,
            heads=4,
            position="rotary",
            max_length=40,
            scan=False,
        ),
        vocabulary=43,
        batch=128,
        length=24,
        source_length=24,
        source_vocabulary=32,
    ),
}


def named(name: str, *, precision: str = "float32", tiny: bool = False) -> Shape:
    """A shape by its name, or that of a preset, computing in `precision`.

    A preset keeps its optimiser and dropout, and has full rows of the longest length.
    """
    if name in SHAPES:
        shape = SHAPES[name]
    else:
        shape = _of_preset(name)
    if tiny:
        shape = shape.tiny()
    return shape.with_model(compute_dtype=precision)


def batches(shape: Shape, count: int = 8) -> list[dict[str, np.ndarray]]:
    """Host batches as the data pipeline makes them: full rows, one segment a row.

    Small ids are more frequent, so that there is something to learn.
    """
    random = np.random.default_rng(0)
    return [dict(_arrays(shape, random)) for _ in range(count)]


def _arrays(shape: Shape, random: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    rows = shape.batch * shape.train.accumulation

    def tokens(vocabulary: int, length: int) -> np.ndarray:
        share = 1 / np.arange(1, vocabulary + 1)
        drawn = random.choice(vocabulary, (rows, length), p=share / share.sum())
        return drawn.astype(np.int32)

    line = tokens(shape.vocabulary, shape.length + 1)
    ones = np.ones((rows, shape.length), np.int32)
    yield "inputs", np.ascontiguousarray(line[:, :-1])
    yield "targets", np.ascontiguousarray(line[:, 1:])
    yield "weights", ones.astype(np.float32)
    if shape.source_length is None:
        yield "segment_ids", ones
        yield "positions", np.arange(shape.length, dtype=np.int32) * ones
    else:
        assert shape.source_vocabulary is not None
        source = tokens(shape.source_vocabulary, shape.source_length)
        yield "source", source
        yield "source_segment_ids", np.ones_like(source)
        yield "segment_ids", ones


# Tokens that the published data of a preset has; it need not be there to be timed.
_VOCABULARIES = {"pronunciation": (32, 43), "character": (69, 69), "byte": (260, 260)}


def _of_preset(name: str) -> Shape:
    config = presets.get(name)
    data = config.data
    if data.kind == "digits":
        raise ConfigError(f"--preset {name} reads images, which this benchmark has none of")
    vocabulary = data.vocabulary_size
    source_vocabulary = vocabulary
    key = data.kind if data.kind == "pronunciation" else data.tokenizer
    if key in _VOCABULARIES:
        source_vocabulary, vocabulary = _VOCABULARIES[key]
    if config.model.shared_embeddings:
        source_vocabulary = vocabulary
    paired = data.kind != "text"
    return Shape(
        config.model,
        vocabulary=vocabulary,
        batch=config.train.batch_size,
        length=data.max_target_length if paired else data.length,
        source_length=data.max_source_length if paired else None,
        source_vocabulary=source_vocabulary if paired else None,
        optimizer=config.optimizer,
        train=config.train,
    )
