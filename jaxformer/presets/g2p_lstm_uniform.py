"""Spelling to pronunciation by LSTMs whose decoder sees the mean of the encoder's states.

0.88 M parameters, CMUdict without stress, split by word. Measured, one seed, on the 6,244 test
words with beam 4: 36.61 % word and 9.76 % phoneme error, after 2,400 steps in 4.4 minutes on two
CPU cores that had other work beside.
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
