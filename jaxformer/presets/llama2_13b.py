"""Llama 2 13B (Touvron et al., 2023): 40 layers of width 5,120, 13.0 B parameters; shapes only.

For planning and for import and export: with its tokenizer of 32,000 it has the published
13,015,864,320 parameters. Training it takes a pod, and data of your own: `--data.files`. No score
was measured.
"""

import dataclasses

from jaxformer.config import Config
from jaxformer.presets import llama2_7b


def config() -> Config:
    """As 7B, but wider and deeper."""
    base = llama2_7b.config()
    return dataclasses.replace(
        base,
        preset="llama2-13b",
        model=dataclasses.replace(base.model, layers=40, width=5120, heads=40, feedforward=13824),
    )
