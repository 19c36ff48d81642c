"""Spelling to pronunciation by LSTMs with Bahdanau's attention ("additive" scores).

About 0.97 M parameters, CMUdict without stress, split by word.
"""

import dataclasses

from jaxformer.config import Config, RecurrentConfig
from jaxformer.presets import g2p_luong


def config() -> Config:
    """The model and training of g2p-luong, but additive scores."""
    base = g2p_luong.config()
    recurrent = RecurrentConfig(context="additive", input_feeding=True, bidirectional=True)
    return dataclasses.replace(
        base,
        preset="g2p-bahdanau",
        model=dataclasses.replace(base.model, recurrent=recurrent),
    )
