"""Losses as plain functions; sums, not means, so that batches of unequal size add up."""

from jaxtyping import Array, Float, Int

from jaxformer.models.output import LogitFactors
from jaxformer_kernels import linear_cross_entropy


def cross_entropy(
    factors: LogitFactors,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The summed training objective, and sums to report; the logits are never in memory at once.

    For each token: -(1 - s) log p[target] - s mean_v log p[v] + z log(Z)^2, times its weight, with
    s the label smoothing (Szegedy et al., 2016), z the z-loss (Chowdhery et al., 2022), Z the
    softmax's denominator. All in nats and float32. A token of weight 0 adds exactly nothing.

    Returns `(objective, {"loss", "correct", "tokens"})`: loss is the plain cross-entropy, correct
    the tokens whose likeliest prediction is right, tokens the sum of the weights.
    """
    found = linear_cross_entropy(
        factors.x.astype(factors.compute_dtype),
        factors.w,
        targets,
        softcap=factors.softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        weights=weights,
        transposed=factors.transposed,
    )
    counted = weights != 0
    sums = {
        "loss": (found.loss * weights).sum(where=counted),
        "correct": (found.correct * weights).sum(where=counted),
        "tokens": weights.sum(),
    }
    return found.objective, sums
