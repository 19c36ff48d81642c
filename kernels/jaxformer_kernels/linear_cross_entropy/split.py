"""w split over a mesh, inside `jax.shard_map`: its vocabulary over one axis, its D over another.

Each device has the logits of its own part of the vocabulary, and what it finds in them is merged
(Shoeybi et al. 2019, arXiv:1909.08053). D is gathered for the products, in their dtype, and its
gradient is summed and dealt out again, in w's own.
"""

import jax.numpy as jnp
from jax import lax


def gathered(options, w, dtype):
    """w in the dtype of the products, with all of D."""
    w = w.astype(dtype)
    if options.width_axis is None:
        return w
    return lax.all_gather(w, options.width_axis, axis=_width(options), tiled=True)


def scattered(options, dw):
    """The sum of all devices' gradients of the gathered w, the part of it that is this device's."""
    if options.width_axis is None:
        return dw
    return lax.psum_scatter(dw, options.width_axis, scatter_dimension=_width(options), tiled=True)


def local(options, labels, V: int):
    """Labels as they count in this device's part of the vocabulary, V long; -1 for all others."""
    if options.vocabulary_axis is None:
        return labels
    labels = labels - lax.axis_index(options.vocabulary_axis) * V
    return jnp.where((labels >= 0) & (labels < V), labels, -1)


def merged(options, labels, found):
    """Statistics of every token from those that each device has of its part of the vocabulary.

    Args:
        labels: as `local` gives them.
        found: log-sum-exp, label's logit, mean logit or None, whether the label is the likeliest,
            and the largest logit, of the part.

    Returns:
        The first four, of the whole vocabulary.
    """
    axis = options.vocabulary_axis
    if axis is None:
        return found[:4]
    lse, of_label, mean, correct, top = found
    own = labels >= 0
    parts = [lse, top, jnp.where(own, of_label, 0), jnp.where(own & correct, 1, 0)]
    parts = jnp.stack([part.astype(lse.dtype) for part in (*parts, mean) if part is not None])
    # Every device writes into a row of its own: one sum then tells all of them everything.
    devices = jnp.arange(lax.axis_size(axis))
    mine = (devices == lax.axis_index(axis)).reshape(-1, *(1,) * parts.ndim)
    parts = lax.psum(jnp.where(mine, parts, 0), axis)
    lse, top, of_label, correct = (parts[:, row] for row in range(4))
    highest = lse.max(0)
    whole = jnp.log(jnp.exp(lse - highest).sum(0)) + highest
    # Of equals the first is the likeliest: the label's part must be the first with the largest.
    likeliest = jnp.take_along_axis(correct, top.argmax(0)[None], axis=0)[0] == 1
    return whole, of_label.sum(0), None if mean is None else parts[:, 4].mean(0), likeliest


def vocabulary(options, V: int) -> int:
    """How many tokens the whole vocabulary has, of which a device has V."""
    axis = options.vocabulary_axis
    return V if axis is None else V * lax.axis_size(axis)


def _width(options):
    return 1 if options.transposed else 0
