"""How the TPU kernels cut an attention call into blocks, and the order in which they visit them.

A step of a kernel's grid works on one block of queries against one block of keys. The steps are a
list that is made before the kernel starts: blocks that the mask hides are not on it, so a static
mask has a shorter grid; where the mask is only known at run time, the steps left over stand at the
end, name the block that is already there, and so fetch nothing and compute nothing.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxformer_kernels.attention import schedule
from jaxformer_kernels.attention.mask import Mask

LANES = 128
ROWS = 512
COLUMNS = 1024
CHUNK = 512
# Query heads that share a key-value head are taken together up to this many rows.
SHARED_ROWS = 2048

# A step's word, from the lowest bit: code 2, first 1, last 1, begin 2, end - 1 2, column, row.
_FIRST, _LAST = 4, 8
_BEGIN_SHIFT, _END_SHIFT, _COLUMN_SHIFT, _ROW_SHIFT = 4, 6, 8, 20
_MOST_CHUNKS = 1 << (_END_SHIFT - _BEGIN_SHIFT)
MAX_COLUMN_BLOCKS = 1 << (_ROW_SHIFT - _COLUMN_SHIFT)
MAX_ROW_BLOCKS = 1 << (31 - _ROW_SHIFT)
# The list lies in scalar memory, which has 1 MiB.
MAX_STEPS = 1 << 17


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when a call is traced: `scale`, `softcap`, the dropout `rate`, the interpreter.

    `interpret` is kept here because a backward pass may be traced outside the context that set it.
    """

    scale: float
    softcap: float | None
    rate: float
    interpret: Any


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a block.

    Attributes:
        rows: queries.
        columns: keys; fetched together.
        chunk: keys worked on at once, a divisor of `columns`.
        heads: query heads of one key-value head, worked on one after the other.
    """

    rows: int
    columns: int
    chunk: int
    heads: int


def choose(T: int, S: int, G: int, dtype, mask: Mask | None = None) -> Tiles:
    """Sizes for `G` query heads to a key-value head; lengths are cut evenly, to pad the least.

    A window that is narrower than a block makes the blocks smaller.
    """
    left, right = (None, None) if mask is None else mask.bounds
    reach = max(ROWS, COLUMNS)
    if left is not None and right is not None:
        reach = max(up(left + right + 1, LANES), 2 * LANES)
    # A product of float32 takes several passes, each of which the compiler writes out.
    share = max(jnp.dtype(dtype).itemsize // 2, 1)
    rows = _even(T, min(ROWS // share, reach))
    columns = _even(S, min(COLUMNS // share, reach))
    sizes = [columns // n for n in range(1, _MOST_CHUNKS + 1) if columns % (n * LANES) == 0]
    chunk = next((size for size in sizes if size <= CHUNK // share), sizes[-1])
    heads = max(n for n in range(1, G + 1) if G % n == 0 and (n == 1 or n * rows <= SHARED_ROWS))
    return Tiles(rows, columns, chunk, heads)


def _even(length, most):
    """The size of equal blocks, none above `most`, that cover `length` with the least padding."""
    count = -(-length // most)
    return up(-(-length // count), LANES)


def up(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Steps:
    """The blocks that one head visits, in order.

    Attributes:
        words: int32 [lists * count]: one packed word a step; see `unpack`.
        count: steps in a list.
        lists: 1, or one for every row of the batch.
        full: whether there may be full blocks.
        partial: every (begin, end) that a partial block may have: the chunks of it that what is
            known of the mask when it is traced does not hide.
    """

    words: Any
    count: int
    lists: int
    full: bool
    partial: tuple[tuple[int, int], ...]


def steps(mask: Mask, T: int, S: int, tiles: Tiles) -> Steps:
    """Every block that `mask` does not hide, row after row; a row of hidden ones keeps one."""
    rows, columns = tiles.rows, tiles.columns
    code = schedule.classify(mask, T, S, rows, columns)
    begin, end = _spans(mask, T, S, tiles)
    shown = end > begin
    shown[~shown.any(axis=1), 0] = True
    row, column = np.nonzero(shown)
    count = len(row)
    xp = _library(code)
    leads = np.diff(row, prepend=-1) != 0
    codes = code[:, row, column]
    hidden_row = (code == schedule.EMPTY).all(axis=2)[:, row]
    keep = (codes != schedule.EMPTY) | (leads & hidden_row)
    begin, end = begin[row, column], np.maximum(end[row, column], 1)
    where = (row << _ROW_SHIFT) | (column << _COLUMN_SHIFT)
    where = where | (begin << _BEGIN_SHIFT) | (end - 1 << _END_SHIFT)

    # The steps to keep, in order, and then the last of them over and over.
    kept = keep.sum(axis=1, keepdims=True)
    order = xp.argsort(~keep, axis=1, stable=True)
    order = xp.take_along_axis(order, xp.minimum(xp.arange(count)[None], kept - 1), axis=1)
    valid = xp.arange(count)[None] < kept
    codes = xp.take_along_axis(codes, order, axis=1) * valid
    where, row = xp.asarray(where)[order], xp.asarray(row)[order]
    edge, changes = xp.ones((len(codes), 1), bool), row[:, 1:] != row[:, :-1]
    first = xp.concatenate((edge, changes), axis=1) & valid
    last = xp.concatenate((changes, edge), axis=1) | (xp.arange(count)[None] == kept - 1)
    words = where | codes | first * _FIRST | (last & valid) * _LAST
    partial = np.ones(count, bool) if xp is jnp else (codes == schedule.PARTIAL)[0]
    return Steps(
        words=words.astype(np.int32).reshape(-1),
        count=count,
        lists=len(codes),
        full=xp is jnp or bool((codes == schedule.FULL).any()),
        partial=tuple(
            sorted(set(zip(begin[partial].tolist(), end[partial].tolist(), strict=True)))
        ),
    )


def _library(array) -> Any:
    """numpy for its arrays, else jax.numpy."""
    return np if isinstance(array, np.ndarray) else jnp


def _spans(mask, T, S, tiles):
    """(begin, end) of the chunks of every block that what is known when tracing does not hide."""
    chunks = schedule.classify(_static(mask), T, S, tiles.rows, tiles.chunk)[0] != schedule.EMPTY
    each = tiles.columns // tiles.chunk
    chunks = np.pad(chunks, ((0, 0), (0, -chunks.shape[1] % each)))
    chunks = chunks.reshape(len(chunks), -1, each)
    begin, end = chunks.argmax(axis=2), each - chunks[:, :, ::-1].argmax(axis=2)
    return begin, np.where(chunks.any(axis=2), end, begin)


def _static(mask):
    """What of `mask` is known when it is traced: a mask that hides no more than it does."""
    known = dataclasses.replace(mask, q_segment_ids=None, kv_segment_ids=None, array=None)
    if not isinstance(mask.q_offset, int):
        known = dataclasses.replace(known, causal=False, window=None, q_offset=0)
    for name in ("kv_start", "kv_end"):
        if not isinstance(getattr(mask, name), int):
            known = dataclasses.replace(known, **{name: None})
    return known


def unpack(word):
    """Parts of a step's word.

    Returns:
        (block of queries, block of keys), (code, begin, end), (first of its row, last of its row).
    """
    row = word >> _ROW_SHIFT
    column = (word >> _COLUMN_SHIFT) & (MAX_COLUMN_BLOCKS - 1)
    begin = (word >> _BEGIN_SHIFT) & (_MOST_CHUNKS - 1)
    end = ((word >> _END_SHIFT) & (_MOST_CHUNKS - 1)) + 1
    return (row, column), (word & 3, begin, end), ((word & _FIRST) != 0, (word & _LAST) != 0)
