"""Losses as plain functions; sums, not means, so that batches of unequal size add up."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxformer import sharding
from jaxformer.data import is_label
from jaxformer.models.output import CTCFrames, HybridPredictions, LogitFactors
from jaxformer.nn.ctc import collapse
from jaxformer_kernels import CrossEntropy, ctc_loss, linear_cross_entropy

Sums = dict[str, Float[Array, ""]]


def objective(
    predictions: LogitFactors | CTCFrames | HybridPredictions,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Sums]:
    """The summed training objective of whatever a model predicts, and sums to report.

    Smoothing and z-loss are those of `cross_entropy`; CTC has neither. The sums always hold `loss`
    (the objective without smoothing and z-loss), `correct` and `tokens`.
    """
    if isinstance(predictions, CTCFrames):
        return ctc(predictions, targets, weights)
    if isinstance(predictions, LogitFactors):
        return cross_entropy(
            predictions, targets, weights, label_smoothing=label_smoothing, z_loss=z_loss
        )
    total, sums = cross_entropy(
        predictions.factors, targets, weights, label_smoothing=label_smoothing, z_loss=z_loss
    )
    ctc_total, ctc_sums = ctc(predictions.frames, targets, weights)
    share = predictions.weight
    both = {
        "loss": share * ctc_sums["loss"] + (1 - share) * sums["loss"],
        "ctc_loss": ctc_sums["loss"],
    }
    return share * ctc_total + (1 - share) * total, sums | both


def ctc(
    frames: CTCFrames, targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Sums]:
    """The summed CTC loss (Graves et al., 2006), and sums to report.

    `targets` are labels, then <eos>, which CTC has no use for, then padding of weight 0; a row's
    weight is that of its first token. A row whose labels do not fit into its frames adds nothing to
    the loss. Returns `(objective, {"loss", "correct", "tokens"})`: loss is the objective, correct
    the tokens of rows whose best path is right, tokens the sum of the weights: <eos> counts, so
    that losses a token compare with those of a decoder.
    """
    labels = is_label(targets, weights)
    label_lengths = labels.sum(1)
    losses = ctc_loss(frames.logits, frames.lengths, targets, label_lengths, zero_infinity=True)
    row_weights = weights[:, 0]
    loss = (losses * row_weights).sum(where=row_weights != 0)
    found, found_lengths = collapse(jnp.argmax(frames.logits, -1), frames.lengths)
    right = found_lengths == label_lengths
    length = min(found.shape[1], targets.shape[1])
    same = (found[:, :length] == targets[:, :length]) | ~labels[:, :length]
    right &= same.all(1)
    sums = {
        "loss": loss,
        "correct": (weights * right[:, None]).sum(),
        "tokens": weights.sum(),
    }
    return loss, sums


def cross_entropy(
    factors: LogitFactors,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Sums]:
    """The summed training objective, and sums to report; the logits are never in memory at once.

    For each token: -(1 - s) log p[target] - s mean_v log p[v] + z log(Z)^2, times its weight, with
    s the label smoothing (Szegedy et al., 2016), z the z-loss (Chowdhery et al., 2022), Z the
    softmax's denominator. All in nats and float32. A token of weight 0 adds exactly nothing.

    Returns `(objective, {"loss", "correct", "tokens"})`: loss is the plain cross-entropy, correct
    the tokens whose likeliest prediction is right, tokens the sum of the weights.
    """
    found = _linear_cross_entropy(
        factors.x.astype(factors.compute_dtype),
        factors.w,
        targets,
        weights,
        softcap=factors.softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        transposed=factors.transposed,
    )
    counted = weights != 0
    sums = {
        "loss": (found.loss * weights).sum(where=counted),
        "correct": (found.correct * weights).sum(where=counted),
        "tokens": weights.sum(),
    }
    return found.objective, sums


def _linear_cross_entropy(
    x: Float[Array, "B T D"],
    w: Float[Array, "_ _"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    transposed: bool,
    **options: Any,
) -> CrossEntropy:
    """`jaxformer_kernels.linear_cross_entropy`, on whatever mesh is active.

    Every device has its own tokens, and the logits of its own part of the vocabulary; where tensor
    does not divide that, it divides the tokens once more. However many tiles there are, w's
    gradient is reduced over the mesh once.
    """
    mesh = sharding.active()
    if mesh is None:
        return linear_cross_entropy(
            x, w, targets, weights=weights, transposed=transposed, **options
        )
    names = ("V", "D") if transposed else ("D", "V")
    split = dict(zip(names, sharding.parameter_spec(names, w.shape, mesh), strict=True))
    rows, columns = sharding.spec("B T", targets.shape, mesh)
    if split["D"] not in sharding.axes_in([rows]):
        split["D"] = None
    if split["V"] is None and sharding.divides("tensor"):
        further = (*sharding.axes_in([columns]), "tensor")
        if targets.shape[1] % math.prod(mesh.shape[axis] for axis in further) == 0:
            columns = further
    tokens = PartitionSpec(rows, columns)

    def run(x: Array, w: Array, targets: Array, weights: Array) -> tuple[Array, ...]:
        found = linear_cross_entropy(
            x,
            w,
            targets,
            weights=weights,
            transposed=transposed,
            vocabulary_axis=split["V"],
            width_axis=split["D"],
            **options,
        )
        return (jax.lax.psum(found.objective, sharding.axes_in(tokens)), *found[1:])

    of_x, of_w = PartitionSpec(*tokens, None), PartitionSpec(*split.values())
    in_specs, out_specs = (of_x, of_w, tokens, tokens), (PartitionSpec(), tokens, tokens, tokens)
    found = sharding.on_each_device(run, mesh, in_specs, out_specs)(x, w, targets, weights)
    return CrossEntropy(*found)


def expected_risk(
    log_probs: Float[Array, "B M"],
    risks: Float[Array, "B M"],
    present: Bool[Array, "B M"],
    *,
    sharpness: float = 1.0,
) -> Float[Array, " B"]:
    """The mean risk of M candidates a row: minimum risk training (Shen et al., 2016).

    Candidates, such as the hypotheses of a beam search, are weighted by softmax(sharpness *
    log_probs) among those present; `risks` are any costs, such as edit distances. Differentiable in
    the log-probabilities. Float32; 0 for a row without candidates.
    """
    scores = jnp.where(present, sharpness * log_probs.astype(jnp.float32), -jnp.inf)
    some = present.any(1, keepdims=True)
    share = jax.nn.softmax(jnp.where(some, scores, 0.0), axis=1)
    return jnp.where(present, share * risks, 0.0).sum(1)
