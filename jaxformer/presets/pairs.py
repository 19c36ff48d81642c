"""An encoder-decoder for your own TSV of pairs: `--data.files pairs.tsv` (source<TAB>target).

Byte tokens on both sides, so any script and any task work as they are; for long texts take
`--data.tokenizer bpe --data.target-tokenizer bpe`. Repeated sources are several right answers.
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
    """Two encoder and two decoder layers of width 128."""
    return Config(
        preset="pairs",
        data=DataConfig(
            kind="pairs",
            tokenizer="byte",
            target_tokenizer="byte",
            max_source_length=128,
            max_target_length=128,
        ),
        model=ModelConfig(
            kind="encoder_decoder",
            layers=2,
            width=128,
            heads=4,
            max_length=128,
            dropout=0.1,
            scan=False,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=200, weight_decay=0.01),
        train=TrainConfig(steps=2000, batch_size=64, label_smoothing=0.1),
        eval=EvalConfig(every=500),
        decode=DecodeConfig(beam=4),
    )
