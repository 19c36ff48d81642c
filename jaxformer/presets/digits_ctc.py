"""Lines of handwritten digits to what they spell, by CTC: nobody says where in an image what is.

Digits of scikit-learn's `load_digits`, strung to lines with varying gaps and heights; none of those
in the held-out lines stands in a training line.

0.12 M parameters. Measured, one seed, on 3,000 lines strung from 269 held-out digit images: 7.13 %
of the strings and 1.16 % of the digits wrong (best path), after 2,400 steps in 3.7 minutes on two
CPU cores that had other work beside. The run folder gets alignment.png.
"""

from jaxformer.config import (
    CheckpointConfig,
    Config,
    CTCConfig,
    DataConfig,
    DecodeConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RecurrentConfig,
    TrainConfig,
)


def config() -> Config:
    """Two convolutions with BatchNorm and a bidirectional LSTM of width 128."""
    return Config(
        preset="digits-ctc",
        data=DataConfig(
            kind="digits",
            dev_fraction=0.1,
            test_fraction=0.15,
            max_source_length=256,
            max_target_length=12,
        ),
        model=ModelConfig(
            kind="ctc",
            encoder_layers=1,
            width=128,
            max_length=256,
            dropout=0.2,
            recurrent=RecurrentConfig(bidirectional=True),
            ctc=CTCConfig(encoder="lstm", channels=(16, 32)),
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=3e-3,
            schedule="cosine",
            final_fraction=0.02,
            warmup_steps=100,
            weight_decay=0.01,
        ),
        train=TrainConfig(steps=2400, batch_size=32),
        eval=EvalConfig(every=600, max_batches=4),
        decode=DecodeConfig(beam=1),
        checkpoint=CheckpointConfig(every=600),
    )
