"""T5 small (Raffel et al., 2020): 6 + 6 layers of width 512, 60.5 M parameters.

Relative position biases, RMSNorm, no biases, ReLU, one shared vocabulary, attention without scaling
and an output scaled by width ** -0.5. With 32,128 tokens it has the published 60,506,624
parameters. Needs `--data.files pairs.tsv`; made for accelerators; no
score was measured.
"""

import dataclasses

from jaxformer.config import Config, OptimizerConfig
from jaxformer.presets import vaswani_base


def config() -> Config:
    """Width 512, 8 heads of 64, feed-forward 2,048, Adafactor with inverse square root."""
    base = vaswani_base.config()
    return dataclasses.replace(
        base,
        preset="t5-small",
        data=dataclasses.replace(base.data, vocabulary_size=32128),
        model=dataclasses.replace(
            base.model,
            norm="rmsnorm",
            norm_placement="pre",
            norm_epsilon=1e-6,
            bias=False,
            position="relative",
            embedding_scale=False,
            attention_scale=1.0,
            output_scale=512**-0.5,
        ),
        optimizer=OptimizerConfig(
            name="adafactor",
            learning_rate=1e-2,
            schedule="inverse_sqrt",
            warmup_steps=10_000,
            clip_norm=None,
        ),
        train=dataclasses.replace(base.train, label_smoothing=0.0, z_loss=1e-4),
    )
