"""Modules that are pure functions of (parameters, inputs).

Axis letters, used in names, annotations and docstrings of the whole project:

    B batch               T query / target length   S key / source length
    D model width         N query heads             K key-value heads
    H head dimension      F feed-forward width      V vocabulary
    L layers              E experts               R reading directions

Modules are Flax NNX modules that hold parameters, and BatchNorm its running statistics, and nothing
else: no random state (a dropout key is an argument), no caches. `pure` splits one into a function
and its parameters, `statistics` reads out the running statistics.
"""

from jaxformer.nn.attention import Attention
from jaxformer.nn.block import Block
from jaxformer.nn.cache import Cache
from jaxformer.nn.convolution import Convolution
from jaxformer.nn.dropout import dropout
from jaxformer.nn.embedding import Embedding
from jaxformer.nn.feedforward import FeedForward
from jaxformer.nn.linear import Linear
from jaxformer.nn.norm import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from jaxformer.nn.parameters import (
    count,
    parameter_axes,
    pure,
    statistics,
    with_statistics,
)
from jaxformer.nn.recurrent import LSTMStack
from jaxformer.nn.stack import run_layers, stack_layers

__all__ = [
    "Attention",
    "BatchNorm",
    "Block",
    "Cache",
    "Convolution",
    "Embedding",
    "FeedForward",
    "GroupNorm",
    "LSTMStack",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "count",
    "dropout",
    "parameter_axes",
    "pure",
    "run_layers",
    "stack_layers",
    "statistics",
    "with_statistics",
]
