"""Losses as plain functions; sums, not means, so that batches of unequal size add up."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The summed training objective, and sums to report.

    For each token: -(1 - s) log p[target] - s mean_v log p[v] + z log(Z)^2, times its weight, with
    s the label smoothing (Szegedy et al., 2016), z the z-loss (Chowdhery et al., 2022), Z the
    softmax's denominator. All in nats and float32.

    Returns `(objective, {"loss", "correct", "tokens"})`: loss is the plain cross-entropy, correct
    the tokens whose likeliest prediction is right, tokens the sum of the weights.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    loss = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    objective = loss
    if label_smoothing:
        spread = log_z - logits.mean(-1)
        objective = (1 - label_smoothing) * loss + label_smoothing * spread
    if z_loss:
        objective = objective + z_loss * jnp.square(log_z)
    correct = (logits.argmax(-1) == targets).astype(jnp.float32)
    sums = {
        "loss": (loss * weights).sum(),
        "correct": (correct * weights).sum(),
        "tokens": weights.sum(),
    }
    return (objective * weights).sum(), sums
