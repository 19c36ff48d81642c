"""Connectionist temporal classification: the loss, with a gradient of its own."""

from jaxformer_kernels.ctc.api import ctc_loss

__all__ = ["ctc_loss"]
