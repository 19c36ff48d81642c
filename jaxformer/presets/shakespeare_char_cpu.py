"""nanoGPT's CPU configuration on Shakespeare, by character: four layers of width 128.

Give the text with `--data.files`: the first 90 % of its characters train, the last 10 % validate.
Measured on Tiny Shakespeare (1,115,394 characters), one seed: validation loss 1.795 over the whole
validation part, after 2,000 steps in 4.7 minutes on two CPU cores that other work shared. nanoGPT
publishes 1.88 for its own. (That run's schedule lagged by one step.)
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
    """4 layers, 4 heads, width 128, rows of 64 characters, batch 12, 2,000 steps, no dropout."""
    return Config(
        preset="shakespeare-char-cpu",
        data=DataConfig(
            kind="text",
            split="tail",
            dev_fraction=0.1,
            test_fraction=0.0,
            tokenizer="character",
            length=64,
        ),
        model=ModelConfig(
            kind="decoder",
            layers=4,
            width=128,
            heads=4,
            position="learned",
            activation="gelu_exact",
            bias=False,
            max_length=64,
            scan=False,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=100,
            b2=0.99,
            epsilon=1e-8,
            weight_decay=0.1,
        ),
        train=TrainConfig(steps=2000, batch_size=12),
        eval=EvalConfig(every=250, max_batches=20, final_split="dev"),
        decode=DecodeConfig(temperature=0.8),
    )
