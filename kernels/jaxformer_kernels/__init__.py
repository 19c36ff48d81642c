"""Attention for JAX behind one call: a reference, and implementations held to it.

`attention` states what is needed (mask, bias, sinks, softcap, dropout, log-sum-exp); an
implementation that cannot do it raises, and the automatic choice falls back visibly.
Needs jax alone.
"""

from jaxformer_kernels.attention import Dropout, Mask, attention
from jaxformer_kernels.context_attention import context_attention, zigzag
from jaxformer_kernels.ctc import ctc_loss
from jaxformer_kernels.decode_attention import decode_attention
from jaxformer_kernels.dispatch import compiling_for, interpreting
from jaxformer_kernels.linear_cross_entropy import CrossEntropy, linear_cross_entropy

__all__ = [
    "CrossEntropy",
    "Dropout",
    "Mask",
    "attention",
    "compiling_for",
    "context_attention",
    "ctc_loss",
    "decode_attention",
    "interpreting",
    "linear_cross_entropy",
    "zigzag",
]
