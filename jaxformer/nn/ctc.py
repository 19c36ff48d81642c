"""From CTC's paths, one token a frame, to the labels they stand for."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def collapse(
    path: Int[Array, "B F"], lengths: Int[Array, " B"], blank: int = 0
) -> tuple[Int[Array, "B F"], Int[Array, " B"]]:
    """The labels of each path: equal neighbours become one, then blanks go (Graves et al., 2006).

    Args:
        path: a token id a frame.
        lengths: frames of each row; what stands behind them is not read.
        blank: the id of the blank.

    Returns:
        int32[B, F], the labels first and then blanks, and int32[B], the number of labels.
    """
    rows, frames = path.shape
    path = path.astype(jnp.int32)
    before = jnp.pad(path[:, :-1], ((0, 0), (1, 0)), constant_values=blank)
    kept = (path != blank) & (path != before) & (jnp.arange(frames) < lengths[:, None])
    places = jnp.cumsum(kept, axis=1, dtype=jnp.int32)
    empty = jnp.full((rows, frames), blank, jnp.int32)
    # What is not kept is sent behind the last column, where nothing is written.
    target = jnp.where(kept, places - 1, frames)
    labels = empty.at[jnp.arange(rows)[:, None], target].set(path, mode="drop")
    return labels, jnp.sum(kept, axis=1, dtype=jnp.int32)
