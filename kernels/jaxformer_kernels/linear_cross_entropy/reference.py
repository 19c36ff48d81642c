"""The specification of linear_cross_entropy: float32 or float64, slow, obviously right."""

import jax
import jax.numpy as jnp

from jaxformer_kernels import dispatch
from jaxformer_kernels.linear_cross_entropy.call import FEATURES, CrossEntropy, wide


def reference(options, x, w, labels, weights):
    """The formulas as they stand, with all logits [..., V] in memory.

    Args:
        options: `Options`.
        x: [..., D].
        w: [D, V], or [V, D] where transposed.
        labels: int32 [...], each in [0, V).
        weights: [...] in the wide dtype.
    """
    x, w = x.astype(wide(x.dtype)), w.astype(wide(x.dtype))
    if options.transposed:
        w = w.T
    logits = jnp.einsum("...d,dv->...v", x, w, precision="highest")
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - lse[..., None]
    loss = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    spread = -log_p.mean(axis=-1)
    smooth = options.label_smoothing
    objective = (1 - smooth) * loss + smooth * spread + options.z_loss * lse**2
    correct = jnp.argmax(logits, axis=-1) == labels
    return CrossEntropy(jnp.sum(weights * objective), loss, lse, correct)


IMPLEMENTATION = dispatch.Implementation(run=reference, supports=FEATURES - {"split_w"})
