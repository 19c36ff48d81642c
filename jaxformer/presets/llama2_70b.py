"""Llama 2 70B (Touvron et al., 2023): 80 layers of width 8,192, 69.0 B parameters; shapes only.

For planning and for import and export: with its tokenizer of 32,000 it has the published
68,976,648,192 parameters. Training it takes a pod, and data of your own: `--data.files`. No score
was measured.
"""

import dataclasses

from jaxformer.config import Config
from jaxformer.presets import llama2_7b


def config() -> Config:
    """As 7B, but wider and deeper, and eight query heads share a key-value head."""
    base = llama2_7b.config()
    return dataclasses.replace(
        base,
        preset="llama2-70b",
        model=dataclasses.replace(
            base.model, layers=80, width=8192, heads=64, kv_heads=8, feedforward=28672
        ),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1.5e-4),
    )
