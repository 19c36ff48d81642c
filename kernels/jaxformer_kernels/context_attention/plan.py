"""Who computes what at each step of the ring: static, known before anything runs.

At shift r, device i holds the keys of device (i - r) mod C. Of its own queries against those keys
it computes what the mask may show, as a few rectangles whose own mask is static too. A shift at
which no device has anything to do, as beyond a window, is left out of the ring.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from jaxformer_kernels.attention import schedule
from jaxformer_kernels.attention.mask import Mask
from jaxformer_kernels.context_attention.order import chunks_of


class Part(NamedTuple):
    """Some of a device's queries against some of the keys that it holds.

    Attributes:
        t, s: (start, size) of the queries and of the keys.
        offset: the place of the first of these queries among these keys, for the mask; None where
            position hides nothing.
    """

    t: tuple[int, int]
    s: tuple[int, int]
    offset: int | None


class Step(NamedTuple):
    """What the devices do while they hold one another's keys.

    Attributes:
        came: how many devices on these keys have moved since the step before.
        goes: how many devices on they move after this step; 0 after the last.
        alternatives: the different work that devices have in this step, each a tuple of `Part`s.
    """

    came: int
    goes: int
    alternatives: tuple[tuple[Part, ...], ...]


class Stretch(NamedTuple):
    """Steps that follow one another and differ only in which device takes which alternative.

    Attributes:
        step: what they have in common.
        choices: int [steps, C], which of its alternatives each device takes.
    """

    step: Step
    choices: np.ndarray


@functools.lru_cache(maxsize=64)
def stretches(causal, window, order: str, C: int, T: int, S: int) -> tuple[Stretch, ...]:
    """The whole walk round the ring.

    Args:
        causal, window: as in `Mask`.
        order: "zigzag" or "contiguous".
        C: devices in the ring.
        T, S: queries and keys on each of them; the same where position counts.
    """
    work = _work(causal, window, order, C, T, S)
    shifts = [shift for shift in range(C) if any(work[shift])]
    steps = []
    for before, shift, after in zip([0, *shifts], shifts, [*shifts[1:], None], strict=False):
        alternatives = tuple(dict.fromkeys(work[shift]))
        goes = 0 if after is None else after - shift
        choices = [alternatives.index(parts) for parts in work[shift]]
        steps.append((Step(shift - before, goes, alternatives), choices))
    return tuple(
        Stretch(step, np.array([choices for _, choices in alike], np.int32))
        for step, alike in itertools.groupby(steps, key=lambda pair: pair[0])
    )


def _work(causal, window, order, C, T, S):
    """[shift][device]: the device's parts at that shift."""
    if not causal and window is None:
        return [[(Part((0, T), (0, S), None),)] * C for _ in range(C)]
    held = [chunks_of(order, C, device) for device in range(C)]
    size = T // len(held[0])
    code = schedule.classify(Mask(causal=causal, window=window), C * T, C * T, size, size)[0]
    own = [_parts(code, size, chunks, chunks) for chunks in held]
    if window is None or order == "contiguous":
        # One after another, a device's own chunks are a sequence under the same mask.
        own = [(Part((0, T), (0, T), 0),)] * C
    others = [
        [_parts(code, size, held[device], held[(device - shift) % C]) for device in range(C)]
        for shift in range(1, C)
    ]
    return [own, *others]


def _parts(code, size, queries, keys):
    """What the chunks `queries` see of the chunks `keys`: one rectangle if it is, else squares."""
    pairs = list(itertools.product(range(len(queries)), range(len(keys))))
    codes = {(a, b): code[queries[a], keys[b]] for a, b in pairs}
    seen = [pair for pair in pairs if codes[pair] != schedule.EMPTY]
    rows, columns = ({pair[side] for pair in seen} for side in (0, 1))
    full = all(codes[pair] == schedule.FULL for pair in seen)
    if seen and full and len(seen) == len(rows) * len(columns):
        t, s = (min(rows) * size, len(rows) * size), (min(columns) * size, len(columns) * size)
        return (Part(t, s, None),)
    return tuple(
        Part(
            (a * size, size),
            (b * size, size),
            None if codes[a, b] == schedule.FULL else (queries[a] - keys[b]) * size,
        )
        for a, b in seen
    )
