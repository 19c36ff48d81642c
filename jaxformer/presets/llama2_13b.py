"""Llama 2 13B (Touvron et al., 2023): 40 layers of width 5,120, 13.0 B parameters; shapes only.

For planning and for import and export: with its tokenizer of 32,000 it has the published
13,015,864,320 parameters. Training it takes a pod, and data of your own: `--data.files`. No score
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
    """Pre-norm RMSNorm, rotary positions, SwiGLU, no biases, untied, rows of 4,096 tokens."""
    return Config(
        preset="llama2-13b",
        data=DataConfig(kind="text", tokenizer="bpe", vocabulary_size=32000, length=4096),
        model=ModelConfig(
            kind="decoder",
            layers=40,
            width=5120,
            heads=40,
            feedforward=13824,
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
            learning_rate=3e-4, warmup_steps=2000, b2=0.95, epsilon=1e-5, weight_decay=0.1
        ),
        train=TrainConfig(steps=500_000, batch_size=1024),
        eval=EvalConfig(every=1000, batch_size=1024, max_batches=1),
    )
