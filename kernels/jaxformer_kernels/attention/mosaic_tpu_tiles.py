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

_COLUMN_SHIFT, _ROW_SHIFT = 4, 17
_FIRST, _LAST = 4, 8
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


def choose(T: int, S: int, G: int) -> Tiles:
    """Sizes for `G` query heads to a key-value head; lengths are cut evenly, to pad the least."""
    rows, columns = _even(T, ROWS), _even(S, COLUMNS)
    chunk = max(
        size for size in range(LANES, min(CHUNK, columns) + 1, LANES) if columns % size == 0
    )
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
        codes: the kinds of block that occur, out of `schedule`'s.
    """

    words: Any
    count: int
    lists: int
    codes: frozenset[int]


def steps(mask: Mask, T: int, S: int, tiles: Tiles) -> Steps:
    """Every block that `mask` does not hide, row after row; a row of hidden ones keeps one."""
    rows, columns = tiles.rows, tiles.columns
    code = schedule.classify(mask, T, S, rows, columns)
    static = schedule.classify(_static(mask), T, S, rows, columns)[0]
    static[static.max(axis=1) == schedule.EMPTY, 0] = schedule.PARTIAL
    row, column = np.nonzero(static)
    count = len(row)
    xp = np if isinstance(code, np.ndarray) else jnp
    leads = np.diff(row, prepend=-1) != 0
    codes = code[:, row, column]
    hidden_row = (code == schedule.EMPTY).all(axis=2)[:, row]
    keep = (codes != schedule.EMPTY) | (leads & hidden_row)

    # The steps to keep, in order, and then the last of them over and over.
    kept = keep.sum(axis=1, keepdims=True)
    order = xp.argsort(~keep, axis=1, stable=True)
    place = xp.minimum(xp.arange(count)[None], kept - 1)
    order = xp.take_along_axis(order, place, axis=1)
    valid = xp.arange(count)[None] < kept
    row, column = xp.asarray(row)[order], xp.asarray(column)[order]
    codes = xp.take_along_axis(codes, order, axis=1) * valid
    changes = xp.ones((len(codes), 1), bool), row[:, 1:] != row[:, :-1]
    first = xp.concatenate(changes, axis=1) & valid
    ends = xp.concatenate((changes[1], changes[0]), axis=1)
    last = (ends | (xp.arange(count)[None] == kept - 1)) & valid
    words = (row << _ROW_SHIFT) | (column << _COLUMN_SHIFT) | codes | first * _FIRST | last * _LAST
    known = xp is np
    return Steps(
        words=words.astype(np.int32).reshape(-1),
        count=count,
        lists=len(codes),
        codes=frozenset(np.unique(codes).tolist())
        if known
        else frozenset({schedule.EMPTY, schedule.PARTIAL, schedule.FULL}),
    )


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
    """(block of queries, block of keys, code, first of its row, last of its row)."""
    row = word >> _ROW_SHIFT
    column = (word >> _COLUMN_SHIFT) & (MAX_COLUMN_BLOCKS - 1)
    return row, column, word & 3, (word & _FIRST) != 0, (word & _LAST) != 0
