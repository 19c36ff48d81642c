"""Llama 2 70B (Touvron et al., 2023): 80 layers of width 8,192, 69.0 B parameters; shapes only.

For planning and for import and export: with its tokenizer of 32,000 it has the published
68,976,648,192 parameters. Training it takes a pod, and data of your own: `--data.files`. No score
was measured.
"""

from jaxformer.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def config() -> Config:
    """As 7B, but wider and deeper, and eight query heads share a key-value head."""
    return Config(
        preset="llama2-70b",
        data=DataConfig(kind="text", tokenizer="bpe", vocabulary_size=32000, length=4096),
        model=ModelConfig(
            kind="decoder",
            layers=80,
            width=8192,
            heads=64,
            kv_heads=8,
            feedforward=28672,
            norm="rmsnorm",
            activation="swiglu",
            bias=False,
            position="rotary",
            tied_embeddings=False,
            max_length=4096,
            remat="full",
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-4, warmup_steps=2000, b2=0.95, epsilon=1e-5, weight_decay=0.1
        ),
        train=TrainConfig(steps=500_000, batch_size=1024),
        eval=EvalConfig(every=1000, batch_size=1024, max_batches=1),
    )
