"""The specification of CTC: every path written out, the right ones added up."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer_kernels import dispatch
from jaxformer_kernels.ctc.call import FEATURES, wide

_MOST_PATHS = 2**16


def reference(blank, logits, logit_lengths, labels, label_lengths):
    """Minus the logarithm of the probability of all paths that spell the labels.

    Arguments are those of `ctc_loss`, labels from label_lengths on 0; only for tiny T and V.
    """
    B, T = logits.shape[:2]
    logits = logits.astype(wide(logits.dtype))
    # Logits that have no part must not put a NaN into the gradients of the others.
    in_row = (jnp.arange(T) < logit_lengths[:, None])[..., None]
    logits = jnp.where(in_row, logits, 0.0)
    broken = jnp.any(jnp.isnan(logits) | (logits == jnp.inf), axis=(1, 2))
    known = logits != -jnp.inf
    log_p = jax.nn.log_softmax(jnp.where(known, logits, -1e30), axis=-1)
    loss = jnp.full(B, jnp.inf, logits.dtype)
    for frames in range(T + 1):
        found = _of_length(blank, frames, log_p, known, labels, label_lengths)
        loss = jnp.where(logit_lengths == frames, found, loss)
    return jnp.where(broken, jnp.nan, jnp.maximum(loss, 0.0))


def _of_length(blank, frames, log_p, known, labels, label_lengths):
    """The loss [B] of rows that have so many frames."""
    V, N = log_p.shape[2], labels.shape[1]
    paths = np.array(list(itertools.product(range(V), repeat=frames)), np.int32)
    paths = paths.reshape(V**frames, frames)
    wanted = jnp.where(jnp.arange(N) < label_lengths[:, None], labels, -1)
    right = jnp.all(_spelled(paths, blank, N) == wanted[:, None], axis=-1)
    possible = right & jnp.all(known[:, np.arange(frames), paths], axis=-1)
    any_path = possible.any(axis=1)
    scores = log_p[:, np.arange(frames), paths].sum(axis=-1)
    scores = jnp.where(possible, scores, jnp.where(any_path[:, None], -jnp.inf, 0.0))
    return jnp.where(any_path, -jax.nn.logsumexp(scores, axis=1), jnp.inf)


def _spelled(paths, blank, N):
    """int [paths, N], ended by -1; of paths that spell more than N labels the first is -2."""
    result = np.full((len(paths), N), -1)
    for row, path in zip(result, paths, strict=True):
        labels = [label for label, _ in itertools.groupby(path) if label != blank]
        if len(labels) > N:
            row[0] = -2
        else:
            row[: len(labels)] = labels
    return result


def _limits(call):
    if call.T > 16 or call.V**call.T > _MOST_PATHS:
        return [f"{call.V}^{call.T} paths (it writes out every one, at most {_MOST_PATHS})"]
    return []


IMPLEMENTATION = dispatch.Implementation(run=reference, supports=FEATURES, limits=_limits)
