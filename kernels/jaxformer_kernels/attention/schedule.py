"""Which blocks of a mask are worth computing, known before the kernel starts.

A block of queries against a block of keys is empty (skip it), full (compute it without looking at
the mask) or partial. The answer is a numpy array where the mask's static fields settle it, so that
a kernel's grid can shrink when it is traced.
"""

import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2


def classify(mask, T: int, S: int, rows: int, columns: int):
    """int32 [B or 1, blocks of queries, blocks of keys]: EMPTY, PARTIAL or FULL.

    EMPTY and FULL are certain; a PARTIAL block may be either (a mask's `array` is not looked at).
    Keys from S on, in a ragged last block, are hidden; queries from T on may do anything.
    """
    possible, certain = _possible(mask, T, S, rows, columns), _certain(mask, T, S, rows, columns)
    code = 1 * possible + 1 * (possible & certain)
    code = code.reshape((1,) * (3 - code.ndim) + code.shape)
    return code.astype(np.int32 if isinstance(code, np.ndarray) else jnp.int32)


def _possible(mask, T, S, rows, columns):
    """[(B,) blocks of queries, blocks of keys]: False where no query can see any key."""
    t, t_last, s, s_last = _edges(T, S, rows, columns)
    left, right = mask.bounds
    possible = np.ones((t.shape[0], s.shape[1]), bool)
    offset = _column(mask.q_offset)
    if right is not None:
        possible = possible & (s <= t_last + offset + right)
    if left is not None:
        possible = possible & (s_last >= t + offset - left)
    if mask.kv_start is not None:
        possible = possible & (s_last >= _column(mask.kv_start))
    if mask.kv_end is not None:
        possible = possible & (s < _column(mask.kv_end))
    if mask.q_segment_ids is not None:
        q_low, q_high, kv_low, kv_high = _segment_extremes(mask, rows, columns)
        possible = possible & (q_low <= kv_high) & (kv_low <= q_high)
    return possible


def _certain(mask, T, S, rows, columns):
    """[(B,) blocks of queries, blocks of keys]: True where every query sees every key."""
    t, t_last, s, s_last = _edges(T, S, rows, columns)
    left, right = mask.bounds
    certain = np.broadcast_to(s + columns <= S, (t.shape[0], s.shape[1]))
    offset = _column(mask.q_offset)
    if right is not None:
        certain = certain & (s_last <= t + offset + right)
    if left is not None:
        certain = certain & (s >= t_last + offset - left)
    if mask.kv_start is not None:
        certain = certain & (s >= _column(mask.kv_start))
    if mask.kv_end is not None:
        certain = certain & (s_last < _column(mask.kv_end))
    if mask.q_segment_ids is not None:
        q_low, q_high, kv_low, kv_high = _segment_extremes(mask, rows, columns)
        certain = certain & (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
    if mask.array is not None:
        certain = certain & False
    return certain


def _edges(T, S, rows, columns):
    """First and last query of every block as columns, first and last key as rows."""
    t, s = np.arange(0, T, rows)[:, None], np.arange(0, S, columns)[None]
    return t, np.minimum(t + rows, T) - 1, s, np.minimum(s + columns, S) - 1


def _column(position):
    """A position, scalar or [B], as something that broadcasts against [blocks, blocks]."""
    return position if np.ndim(position) == 0 else position[:, None, None]


def _segment_extremes(mask, rows, columns):
    q_low, q_high = _extremes(mask.q_segment_ids, rows)
    kv_low, kv_high = _extremes(mask.kv_segment_ids, columns)
    return q_low[:, :, None], q_high[:, :, None], kv_low[:, None], kv_high[:, None]


def _extremes(ids, size):
    """(lowest, highest) segment id in every block, each [B, blocks]."""
    padded = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge")
    padded = padded.reshape(ids.shape[0], -1, size)
    return padded.min(axis=-1), padded.max(axis=-1)


def intervals(mask, T: int, S: int, by_query: bool = True):
    """What the mask hides by position, as one interval of visible places for every row.

    Segments and `array` are left out.

    Args:
        by_query: rows are queries and an interval is of keys; else the other way round.

    Returns:
        (low, high), each int32 [B or 1, T] (or S): low <= place < high is visible.
    """
    left, right = mask.bounds
    offset = _row(mask.q_offset)
    kv_start = 0 if mask.kv_start is None else _row(mask.kv_start)
    kv_end = S if mask.kv_end is None else _row(mask.kv_end)
    if by_query:
        place = np.arange(T, dtype=np.int32)[None] + offset
        low = jnp.maximum(kv_start, 0 if left is None else place - left)
        high = jnp.minimum(kv_end, S if right is None else place + right + 1)
        low, high = jnp.maximum(low, 0), jnp.minimum(high, S)
    else:
        place = np.arange(S, dtype=np.int32)[None]
        low = jnp.maximum(0, 0 if right is None else place - offset - right)
        high = jnp.minimum(T, T if left is None else place - offset + left + 1)
        high = jnp.where((place >= kv_start) & (place < kv_end), high, 0)
    shape = np.broadcast_shapes(low.shape, high.shape, (1, T if by_query else S))
    return jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape)


def ranges(code):
    """The columns of a table of `classify` to visit, as ranges for every row.

    Returns:
        int32 [B or 1, rows, 4]: first, stop of the columns that are not EMPTY; and whole_first,
        whole_stop of the longest run of FULL ones from the first of them on.
    """
    count = code.shape[2]
    place = np.arange(count)
    some, full = code != EMPTY, code == FULL
    first = jnp.min(jnp.where(some, place, count), axis=2)
    stop = jnp.max(jnp.where(some, place + 1, 0), axis=2)
    whole_first = jnp.min(jnp.where(full, place, count), axis=2)
    broken = ~full & (place >= whole_first[..., None])
    whole_stop = jnp.min(jnp.where(broken, place, count), axis=2)
    first = jnp.minimum(first, stop)
    return jnp.stack([first, stop, whole_first, whole_stop], axis=2).astype(jnp.int32)


def _row(position):
    """A position, scalar or [B], as something that broadcasts against [B, length]."""
    return position if np.ndim(position) == 0 else position[:, None]
