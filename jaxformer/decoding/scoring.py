"""Log-probabilities of given targets (teacher forcing)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def token_log_probs(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """The log-probability, in nats, that the model gives each target token.

    Args:
        logits: any floating dtype; the softmax is taken in float32.
        targets: token ids in [0, V). Places without a target (padding) must hold some valid id;
            what comes out there means nothing and is left out by the weights of
            `sequence_log_probs`.

    Returns:
        float32[B, T], log softmax(logits)[target].
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def sequence_log_probs(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weights: Shaped[Array, "B T"],
) -> Float[Array, "B"]:
    """The log-probability, in nats, that the model gives each row's whole target.

    Args:
        logits: any floating dtype.
        targets: token ids in [0, V), valid ids at padding too.
        weights: a mask (bool) or a weight a token; 0 leaves a token out, even an impossible one.

    Returns:
        float32[B], the weighted sum of `token_log_probs` over each row.
    """
    log_probs = token_log_probs(logits, targets)
    # Selected before multiplied: 0 * -inf, of a padding token the model rules out, would be NaN.
    return jnp.sum(jnp.where(weights != 0, log_probs * weights, 0.0), axis=-1)
