"""Spelling to pronunciation, small: a Transformer that learns CMUdict within minutes on a CPU.

0.94 M parameters, CMUdict without stress, split by word. Measured, one seed, on the 6,244 test
words with beam 4: 30.25 % word and 7.56 % phoneme error, after 2,400 steps in 5.2 minutes on two
CPU cores (scoring included).
"""

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
            scan=False,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=3e-3,
            schedule="linear",
            final_fraction=0.02,
            warmup_steps=200,
            b1=0.95,
            weight_decay=0.01,
        ),
        train=TrainConfig(steps=2400, batch_size=128, label_smoothing=0.05),
        eval=EvalConfig(every=600, max_batches=10),
        decode=DecodeConfig(beam=4),
        checkpoint=CheckpointConfig(every=600),
    )
