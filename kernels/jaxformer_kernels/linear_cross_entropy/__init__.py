"""An output projection and its cross-entropy in one, without logits [..., V] in memory."""

from jaxformer_kernels.linear_cross_entropy.api import linear_cross_entropy
from jaxformer_kernels.linear_cross_entropy.call import CrossEntropy

__all__ = ["CrossEntropy", "linear_cross_entropy"]
