"""Attention of the newest tokens to a key-value cache: one call, several implementations."""

from jaxformer_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
