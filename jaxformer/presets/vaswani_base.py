"""The base Transformer of "Attention Is All You Need" (Vaswani et al., 2017).

63 M parameters, which the paper calls 65 M. Post-norm, sinusoidal positions, ReLU, one shared
vocabulary of 37,000 BPE tokens for source, target and output, label smoothing 0.1, Adam with
warm-up and inverse square root (Noam). Needs `--data.files pairs.tsv`; made for accelerators. Held
to its size by a test; no score was measured.
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
    """6 + 6 layers, width 512, 8 heads, feed-forward 2,048, 100,000 steps."""
    return Config(
        preset="vaswani-base",
        data=DataConfig(
            kind="pairs",
            tokenizer="bpe",
            target_tokenizer="bpe",
            shared_vocabulary=True,
            vocabulary_size=37000,
            max_source_length=256,
            max_target_length=256,
            buckets=8,
        ),
        model=ModelConfig(
            kind="encoder_decoder",
            layers=6,
            width=512,
            heads=8,
            feedforward=2048,
            activation="relu",
            norm_placement="post",
            position="sinusoidal",
            embedding_scale=True,
            shared_embeddings=True,
            max_length=256,
            dropout=0.1,
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(
            # The paper's width ** -0.5 * warmup ** -0.5 at its peak.
            learning_rate=512**-0.5 * 4000**-0.5,
            schedule="inverse_sqrt",
            warmup_steps=4000,
            b2=0.98,
            epsilon=1e-9,
            clip_norm=None,
        ),
        train=TrainConfig(steps=100_000, batch_size=256, label_smoothing=0.1),
        eval=EvalConfig(every=2000),
        decode=DecodeConfig(beam=4, length_penalty=0.6),
    )
