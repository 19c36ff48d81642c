"""Calls of ctc_loss, their outcome, and CTC as one writes it first, to hold it against."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer_kernels import ctc_loss

reference = functools.partial(ctc_loss, implementation="reference")


def make_call(seed, B, T, V, N, blank=0, scale=2.0):
    """(logits in float64, their lengths, labels, their lengths), whatever the lengths are."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, V - 1, (B, N))
    labels += labels >= blank
    return (
        scale * rng.standard_normal((B, T, V)),
        rng.randint(0, T + 1, B),
        labels,
        rng.randint(0, N + 1, B),
    )


def outcome(run, logits, *others, **options):
    """(losses, gradient of a weighted sum of those that are finite)."""

    def total(logits):
        losses = run(logits, *others, **options)
        weights = 1 + jnp.arange(losses.size, dtype=losses.dtype)
        return jnp.sum(jnp.where(jnp.isfinite(losses), losses, 0) * weights), losses

    gradient, losses = jax.grad(total, has_aux=True)(logits)
    return losses, gradient


def exact(run, logits, *others, **options):
    """`outcome` in float64."""
    with jax.enable_x64(True):
        compiled = jax.jit(lambda *arrays: outcome(run, *arrays, **options))
        losses, gradient = compiled(jnp.asarray(logits, jnp.float64), *others)
    return np.asarray(losses), np.asarray(gradient)


def plain(logits, logit_lengths, labels, label_lengths, *, blank=0):
    """The recursion in logarithms over blanks and labels in turn, in the dtype of the logits.

    Of impossible labels the loss is something large.
    """
    nothing = jnp.asarray(-1e9, logits.dtype)
    B, T, _ = logits.shape
    states = 2 * labels.shape[1] + 1
    classes = jnp.full((B, states), blank).at[:, 1::2].set(labels)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), classes[:, None], axis=2)
    place = jnp.arange(states)
    can_skip = (place % 2 == 1) & (classes != jnp.roll(classes, 2, axis=1)) & (place > 1)

    def step(alpha, inputs):
        time, frame = inputs
        one = jnp.where(place > 0, jnp.roll(alpha, 1, axis=1), nothing)
        two = jnp.where(can_skip, jnp.roll(alpha, 2, axis=1), nothing)
        new = jnp.logaddexp(jnp.logaddexp(alpha, one), two) + frame
        return jnp.where((time < logit_lengths)[:, None], new, alpha), None

    alpha = jnp.where(place == 0, 0, nothing) + jnp.zeros((B, 1), logits.dtype)
    alpha = jax.lax.scan(step, alpha, (jnp.arange(T), log_p.swapaxes(0, 1)))[0]
    last = jnp.take_along_axis(alpha, 2 * label_lengths[:, None], axis=1)[:, 0]
    label = jnp.take_along_axis(alpha, jnp.maximum(2 * label_lengths - 1, 0)[:, None], axis=1)
    label = jnp.where(label_lengths > 0, label[:, 0], nothing)
    return -jnp.logaddexp(last, label)
