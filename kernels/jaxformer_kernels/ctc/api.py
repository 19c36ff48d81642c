"""The one entry to ctc_loss: checks a call, fills in its defaults, hands it on."""

import numbers

import jax
import jax.numpy as jnp

from jaxformer_kernels import _compat, dispatch
from jaxformer_kernels.ctc import mosaic_tpu, reference, xla
from jaxformer_kernels.ctc.call import describe

IMPLEMENTATIONS = {
    "xla": xla.IMPLEMENTATION,
    "mosaic_tpu": mosaic_tpu.IMPLEMENTATION,
    "reference": reference.IMPLEMENTATION,
}

ORDER = {"tpu": ("mosaic_tpu", "xla"), "default": ("xla",)}


def ctc_loss(
    logits,
    logit_lengths,
    labels,
    label_lengths,
    *,
    blank=0,
    zero_infinity=False,
    implementation: str | None = None,
) -> jax.Array:
    """Minus the log-probability of label sequences whose alignment to the frames is not known.

    A path is one class a frame, its probability the product of the frames' softmaxes. It spells the
    labels that are left when repeats are merged and then blanks dropped. The loss of a row is
    -log of the sum over all paths of its frames that spell its labels (Graves et al. 2006,
    "Connectionist temporal classification"). Computed in float32 (float64 for float64 logits),
    exactly so for probabilities far below what float32 can hold. Never negative.

    No path spells labels that need more frames than there are (one a label, one more between equal
    neighbours), or that need a class of logit -inf. Such a row's loss is +inf, or 0 with
    `zero_infinity`, and its gradient exactly 0 either way: no small step makes it possible. A logit
    of -inf elsewhere is a class of probability 0 and changes nothing else. A logit that is NaN or
    +inf, within the row's frames, makes the row's loss and gradient NaN.

    What is not used may be anything: labels from label_lengths on, frames from logit_lengths on
    (whose gradient is exactly 0). A length outside its axis and a label that is the blank or no
    class are errors that compiled code cannot raise: the row's loss is NaN. The gradient, the
    softmax minus the posterior of each class at each frame, comes from the forward and backward
    variables in O(B T N) memory beside the logits, and is computed in the forward pass. There is no
    second derivative: asking for one is an error.

    Args:
        logits: [B, T, V], floating; not normalised.
        logit_lengths: integer [B], 0 to T: the frames of each row, which stand first.
        labels: integer [B, N], without blanks.
        label_lengths: integer [B], 0 to N: the labels of each row, which stand first.
        blank: the class that stands for no label.
        zero_infinity: give 0 instead of +inf to labels that no path spells.
        implementation: "xla", "mosaic_tpu", "reference", or None for the platform's best that can
            do the call.

    Returns:
        [B] float32 (float64 for float64 logits), in nats.

    Raises:
        TypeError, ValueError: an argument of the wrong shape or type; the message names the fix.
        NotImplementedError: the named implementation cannot do this call (names one that can), or
            a second derivative is asked for.
    """
    _check_arrays(logits, labels)
    B, T, V = logits.shape
    N = labels.shape[1]
    logit_lengths = _lengths("logit_lengths", logit_lengths, B)
    label_lengths = _lengths("label_lengths", label_lengths, B)
    _check_options(blank, zero_infinity, V)
    # An axis without a place is one with a place that nobody uses.
    logits = jnp.pad(logits, ((0, 0), (0, T == 0), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, N == 0)))
    call = describe(logits, labels)
    chosen = dispatch.choose(
        "ctc_loss", IMPLEMENTATIONS, ORDER, implementation, call.features, call
    )
    logits, logit_lengths, labels, label_lengths = _compat.vary_alike(
        logits, logit_lengths, labels, label_lengths
    )

    used = jnp.arange(labels.shape[1]) < label_lengths[:, None]
    is_label = (labels >= 0) & (labels < V) & (labels != blank)
    valid = jnp.all(is_label | ~used, axis=1)
    for length, most in ((logit_lengths, T), (label_lengths, N)):
        valid &= (length >= 0) & (length <= most)
    loss = chosen.run(
        int(blank),
        logits,
        jnp.clip(logit_lengths, 0, T),
        jnp.where(used & is_label, labels, 0).astype(jnp.int32),
        jnp.clip(label_lengths, 0, N),
    )
    if zero_infinity:
        loss = jnp.where(loss == jnp.inf, 0, loss)
    return jnp.where(valid, loss, jnp.nan)


def _check_arrays(logits, labels):
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"ctc_loss: logits must be floating, got {logits.dtype}; "
            "cast them with logits.astype(jnp.float32)."
        )
    if logits.ndim != 3 or 0 in (logits.shape[0], logits.shape[2]):
        raise ValueError(
            f"ctc_loss: logits must be [B, T, V] with B and V not 0, got {list(logits.shape)}; "
            "give a single row a leading axis with logits[None]."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"ctc_loss: labels must be integer, got {labels.dtype}; "
            "they are class numbers, not one-hot rows."
        )
    if labels.ndim != 2 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"ctc_loss: labels must be [B, N] with B = {logits.shape[0]} as in logits "
            f"{list(logits.shape)}, got {list(labels.shape)}; pad rows to one length."
        )


def _lengths(name, lengths, B):
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(
            f"ctc_loss: {name} must be integer, got {lengths.dtype}; they count from the first, "
            "they are no mask of padding."
        )
    if lengths.shape != (B,):
        raise ValueError(
            f"ctc_loss: {name} must be [{B}], one a row of logits, got {list(lengths.shape)}; "
            f"jnp.full({B}, n) gives all rows the same."
        )
    return lengths.astype(jnp.int32)


def _check_options(blank, zero_infinity, V):
    if isinstance(blank, bool) or not isinstance(blank, numbers.Integral):
        raise TypeError(f"ctc_loss: blank must be a Python int, got {type(blank).__name__}.")
    if not 0 <= blank < V:
        raise ValueError(
            f"ctc_loss: blank must be one of the {V} classes, 0 to {V - 1}, got {blank}."
        )
    if not isinstance(zero_infinity, bool):
        raise TypeError(
            f"ctc_loss: zero_infinity must be True or False, got {type(zero_infinity).__name__}."
        )
