"""Spelling to pronunciation by LSTMs whose decoder sees the mean of the encoder's states.

About 0.88 M parameters, CMUdict without stress, split by word.
"""

import dataclasses

from jaxformer.config import Config, RecurrentConfig
from jaxformer.presets import g2p_luong


def config() -> Config:
    """The model and training of g2p-luong, but every letter weighs the same at every step."""
    base = g2p_luong.config()
    recurrent = RecurrentConfig(context="uniform", input_feeding=True, bidirectional=True)
    return dataclasses.replace(
        base,
        preset="g2p-lstm-uniform",
        model=dataclasses.replace(base.model, recurrent=recurrent),
    )
