"""GPT-2 small (Radford et al., 2019): 12 layers of width 768, 124 M parameters.

With a byte-level BPE of 50,257 tokens trained on the files you give it has the published
124,439,808 parameters; on smaller texts fewer, as the vocabulary shrinks. Learning rate, schedule,
batch (about 0.5 M tokens) and dropout follow the reproduction of GPT-2 124M by nanoGPT. For
accelerators: one step is 0.4 PFLOP. No score was measured.
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
    """Pre-norm, learned positions, GELU, tied embeddings, rows of 1,024 tokens."""
    return Config(
        preset="gpt2-small",
        data=DataConfig(kind="text", tokenizer="bpe", vocabulary_size=50257, length=1024),
        model=ModelConfig(
            kind="decoder",
            layers=12,
            width=768,
            heads=12,
            position="learned",
            activation="gelu",
            max_length=1024,
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, warmup_steps=2000, b2=0.95, epsilon=1e-8, weight_decay=0.1
        ),
        train=TrainConfig(steps=600_000, batch_size=12, accumulation=40),
        eval=EvalConfig(every=1000, batch_size=12, max_batches=200),
    )
