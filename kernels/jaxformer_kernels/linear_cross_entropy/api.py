"""The one entry to linear_cross_entropy: checks a call, fills in its defaults, hands it on."""

import numbers

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.linear_cross_entropy import mosaic_tpu, reference, split, xla
from jaxformer_kernels.linear_cross_entropy.call import CrossEntropy, Options, describe, wide

IMPLEMENTATIONS = {
    "xla": xla.IMPLEMENTATION,
    "mosaic_tpu": mosaic_tpu.IMPLEMENTATION,
    "reference": reference.IMPLEMENTATION,
}

ORDER = {"tpu": ("mosaic_tpu", "xla"), "default": ("xla",)}


def linear_cross_entropy(
    x,
    w,
    labels,
    *,
    softcap=None,
    label_smoothing=0.0,
    z_loss=0.0,
    weights=None,
    transposed: bool = False,
    vocabulary_axis: str | None = None,
    width_axis: str | None = None,
    implementation: str | None = None,
) -> CrossEntropy:
    """Cross-entropy of the logits x @ w, which are never in memory as a whole.

    logits = x @ w; then softcap * tanh(logits / softcap); p their softmax, Z its denominator. For
    each token: -(1 - s) log p[label] - s mean_v log p[v] + z log(Z)^2, times its weight, with s the
    label smoothing (Szegedy et al. 2016, arXiv:1512.00567) and z the z-loss (Chowdhery et al. 2022,
    arXiv:2204.02311). Computed and accumulated in float32 (float64 for float64 inputs); matrix
    products take their operands in x's dtype. Memory is that of w's gradient and of one tile of
    logits; the idea is that of Liger (Hsu et al. 2024, arXiv:2410.10989).

    A label outside [0, V) is an error that compiled code cannot raise: the token's loss, and with
    it the objective, is NaN. To ignore a token give it the weight 0: it then adds exactly 0 to the
    objective and to every gradient whatever its label is, as long as its x is finite.

    Args:
        x: [..., D], floating.
        w: [D, V], floating, cast to x's dtype for the products; its gradient comes in w's own.
        labels: integer [...].
        softcap: positive Python float (Gemma 2, arXiv:2408.00118).
        label_smoothing: Python float, at least 0 and below 1.
        z_loss: Python float, not negative.
        weights: floating [...]; None means 1 everywhere.
        transposed: w is [V, D], as a tied embedding is; it is not copied.
        vocabulary_axis, width_axis: inside `jax.shard_map`, the mesh axes over which w's V and D
            are split. Labels count through the whole vocabulary, and x, labels and weights are the
            same for all of vocabulary_axis. D is gathered for the products, and w's gradient
            summed over width_axis.
        implementation: "xla", "mosaic_tpu", "reference", or None for the platform's best that can
            do the call.

    Returns:
        `CrossEntropy(objective [], loss [...], lse [...], correct [...])`: objective, loss and lse
        float32 (float64 for float64 inputs), correct bool. Gradients reach x, w and weights.
        Where only the objective is differentiated, its gradients are computed in the forward pass
        and kept, w's with them: inside a loop, take the gradient inside it too. Where loss or lse
        are, the backward pass computes the logits again.

    Raises:
        TypeError, ValueError: an argument of the wrong shape or type; the message names the fix.
        NotImplementedError: the named implementation cannot do this call; names one that can.
    """
    _check_split(w, vocabulary_axis, width_axis)
    _check_arrays(x, w, labels, weights, transposed, width_axis)
    _check_options(softcap, label_smoothing, z_loss)
    softcap = None if softcap is None else float(softcap)
    options = Options(
        softcap,
        float(label_smoothing),
        float(z_loss),
        transposed,
        vocabulary_axis,
        width_axis,
    )
    call = describe(x, w, options)
    chosen = dispatch.choose(
        "linear_cross_entropy", IMPLEMENTATIONS, ORDER, implementation, call.features, call
    )
    x, w, labels, weights = _vary(vocabulary_axis, x, w, labels, weights)

    dtype = wide(x.dtype)
    known = (labels >= 0) & (labels < split.vocabulary(options, call.V))
    weights = jnp.ones(labels.shape, dtype) if weights is None else weights.astype(dtype)
    weights = jnp.where(known | (weights == 0), weights, jnp.nan)
    found = chosen.run(options, x, w, jnp.where(known, labels, 0).astype(jnp.int32), weights)
    return found._replace(loss=jnp.where(known, found.loss, jnp.nan), correct=found.correct & known)


def _vary(vocabulary_axis, x, w, labels, weights):
    """The operands, so that each varies over all axes that any does, for gradients to match.

    Labels and weights, and with them the results, are the same for all of vocabulary_axis; of x
    each device has a part of the gradient, and the transpose of the cast sums the parts.
    """
    x, w = _compat.vary_alike(x, w, (labels, weights))[:2]
    own = _compat.varying_axes(x) - {vocabulary_axis}
    return x, w, _compat.vary(labels, own), _compat.vary(weights, own)


def _check_split(w, vocabulary_axis, width_axis):
    for name, axis in (("vocabulary_axis", vocabulary_axis), ("width_axis", width_axis)):
        if axis is not None and axis not in _compat.varying_axes(w):
            raise ValueError(
                f"linear_cross_entropy: {name}={axis!r}, but w is not split over it; call it "
                "inside jax.shard_map (with check_vma=True) and name the axis in w's in_specs."
            )


def _check_arrays(x, w, labels, weights, transposed, width_axis):
    for name, array in (("x", x), ("w", w)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"linear_cross_entropy: {name} must be floating, got {array.dtype}; "
                f"cast it with {name}.astype(jnp.float32)."
            )
    if x.ndim == 0:
        raise ValueError("linear_cross_entropy: x must be [..., D], got a scalar.")
    D = x.shape[-1]
    axes = "[V, D]" if transposed else "[D, V]"
    if width_axis is not None:
        D //= lax.axis_size(width_axis)
    if w.ndim != 2 or w.shape[1 if transposed else 0] != D:
        turned = w.ndim == 2 and w.shape[0 if transposed else 1] == D
        fix = f"; pass transposed={not transposed}" if turned else ""
        raise ValueError(
            f"linear_cross_entropy: w must be {axes} with D = {D} as in x {list(x.shape)}, got "
            f"{list(w.shape)}{fix}."
        )
    if 0 in w.shape:
        raise ValueError(f"linear_cross_entropy: w must not be empty, got {list(w.shape)}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"linear_cross_entropy: labels must be integer, got {labels.dtype}; they are token "
            "numbers, not one-hot rows or probabilities."
        )
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels must be {list(x.shape[:-1])}, as x {list(x.shape)} "
            f"without its last axis, got {list(labels.shape)}."
        )
    if weights is None:
        return
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(
            f"linear_cross_entropy: weights must be floating, got {weights.dtype}; cast them with "
            "weights.astype(jnp.float32)."
        )
    if weights.shape != labels.shape:
        raise ValueError(
            f"linear_cross_entropy: weights must be {list(labels.shape)} as labels are, got "
            f"{list(weights.shape)}; broadcast them with jnp.broadcast_to(weights, labels.shape)."
        )


def _check_options(softcap, label_smoothing, z_loss):
    for name, value in (
        ("softcap", softcap),
        ("label_smoothing", label_smoothing),
        ("z_loss", z_loss),
    ):
        if name == "softcap" and value is None:
            continue
        if isinstance(value, jax.Array) or not isinstance(value, numbers.Real):
            raise TypeError(
                f"linear_cross_entropy: {name} must be a Python float, got {type(value).__name__}."
            )
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"linear_cross_entropy: softcap must be positive, got {softcap}; None means no cap."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            "linear_cross_entropy: label_smoothing must be at least 0 and below 1, got "
            f"{label_smoothing}."
        )
    if not z_loss >= 0:
        raise ValueError(f"linear_cross_entropy: z_loss must not be negative, got {z_loss}.")
