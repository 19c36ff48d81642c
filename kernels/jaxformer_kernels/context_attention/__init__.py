"""Attention over a sequence that is split over devices."""

from jaxformer_kernels.context_attention.api import context_attention
from jaxformer_kernels.context_attention.order import zigzag

__all__ = ["context_attention", "zigzag"]
