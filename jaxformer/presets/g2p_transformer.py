"""Spelling to pronunciation by the Transformer: the end of the walk from the LSTM, like g2p.

The same data, size and training as the other models of the walk: the preset g2p by another name.
"""

import dataclasses

from jaxformer.config import Config
from jaxformer.presets import g2p


def config() -> Config:
    """Two encoder and two decoder layers of width 128."""
    return dataclasses.replace(g2p.config(), preset="g2p-transformer")
