"""Attention for JAX behind one call: a reference, and implementations held to it.

`attention` states what is needed (mask, bias, sinks, softcap, dropout, log-sum-exp); an
implementation that cannot do it raises, and the automatic choice falls back visibly.
Needs jax alone.
"""

from jaxformer_kernels.attention import Dropout, Mask, attention

__all__ = ["Dropout", "Mask", "attention"]
