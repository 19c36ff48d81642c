"""A small language model of your own text files; without any, of Python's standard library.

`python train.py text --data.files 'notes/*.txt'`. Byte tokens, four layers of width 256, rotary
positions. Documents are packed; a token never attends across a document border.
"""

from jaxformer.config import (
    Config,
    DataConfig,
    DecodeConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def config() -> Config:
    """Four layers of width 256 on rows of 256 bytes."""
    return Config(
        preset="text",
        data=DataConfig(kind="text", tokenizer="byte", length=256),
        model=ModelConfig(
            kind="decoder",
            layers=4,
            width=256,
            heads=4,
            norm="rmsnorm",
            activation="swiglu",
            feedforward=704,
            bias=False,
            position="rotary",
            max_length=256,
            scan=False,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, b2=0.95, weight_decay=0.1),
        train=TrainConfig(steps=1000, batch_size=16),
        eval=EvalConfig(every=250, max_batches=8),
        decode=DecodeConfig(temperature=0.8),
    )
