"""Spelling to pronunciation, small: a Transformer that learns CMUdict within minutes on a CPU."""

from jaxformer.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DecodeConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def config() -> Config:
    """Two encoder and two decoder layers of width 128."""
    return Config(
        preset="g2p",
        data=DataConfig(kind="pronunciation", max_source_length=36, max_target_length=36),
        model=ModelConfig(
            kind="encoder_decoder",
            layers=2,
            width=128,
            heads=4,
            activation="gelu",
            position="rotary",
            max_length=40,
            dropout=0.05,
            scan=False,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            schedule="cosine",
            final_fraction=0.02,
            warmup_steps=200,
            weight_decay=0.01,
        ),
        train=TrainConfig(steps=2000, batch_size=256, label_smoothing=0.05),
        eval=EvalConfig(every=500, max_batches=10, final_split="test"),
        decode=DecodeConfig(beam=4),
        checkpoint=CheckpointConfig(every=500),
    )
