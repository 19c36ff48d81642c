"""nanoGPT's GPU configuration on Shakespeare, by character: six layers of width 384.

Give the text with `--data.files`: the first 90 % of its characters train, the last 10 % validate.
nanoGPT publishes a best validation loss of 1.4697. Meant for an accelerator: 5,000 steps take hours
on a laptop's CPU, and no score was measured.
"""

import dataclasses

from jaxformer.config import Config, EvalConfig
from jaxformer.presets import shakespeare_char_cpu


def config() -> Config:
    """6 layers, 6 heads, width 384, rows of 256 characters, batch 64, 5,000 steps, dropout 0.2."""
    base = shakespeare_char_cpu.config()
    return dataclasses.replace(
        base,
        preset="shakespeare-char",
        data=dataclasses.replace(base.data, length=256),
        model=dataclasses.replace(
            base.model,
            layers=6,
            heads=6,
            width=384,
            max_length=256,
            dropout=0.2,
            attention_dropout=0.2,
        ),
        train=dataclasses.replace(base.train, steps=5000, batch_size=64),
        eval=EvalConfig(every=250, final_split="dev"),
    )
