"""Scaled dot-product attention: one call, one mask type, several implementations."""

from jaxformer_kernels.attention.api import attention
from jaxformer_kernels.attention.dropout import Dropout
from jaxformer_kernels.attention.mask import Mask

__all__ = ["Dropout", "Mask", "attention"]
