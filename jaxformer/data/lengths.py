"""Length buckets: the few (source, target) shapes that batches of pairs come in."""

import numpy as np

Shape = tuple[int, int]
"""Source length S and target length T of a batch."""

CANDIDATES = 24


def choose_shapes(
    source_lengths: np.ndarray, target_lengths: np.ndarray, buckets: int, limits: Shape
) -> tuple[Shape, ...]:
    """The shapes, at most `buckets` of them, that leave the least padding on these lengths.

    Each shape is at least as large as the one before on both sides, and the last holds every item,
    so an item goes to the first shape that holds it. Candidates are quantiles of the two lengths,
    rounded up to multiples of 4 (8 above 64) but not past `limits`; among the chains of candidates
    the best is found by dynamic programming over the number of items each one holds.
    """
    edges = [
        _edges(lengths, limit)
        for lengths, limit in zip((source_lengths, target_lengths), limits, strict=True)
    ]
    places = [
        np.searchsorted(edge, lengths)
        for edge, lengths in zip(edges, (source_lengths, target_lengths), strict=True)
    ]
    grid = np.zeros((len(edges[0]), len(edges[1])), np.int64)
    np.add.at(grid, tuple(places), 1)
    held = grid.cumsum(0).cumsum(1).ravel()
    source, target = (axis.ravel() for axis in np.meshgrid(*edges, indexing="ij"))
    nested = (source[:, None] <= source) & (target[:, None] <= target)
    added = np.where(
        nested, (held - held[:, None]) * (source + target), np.iinfo(np.int64).max // 2
    )

    cost = held * (source + target)
    previous: list[np.ndarray] = []
    for _ in range(buckets - 1):
        totals = cost[:, None] + added
        previous.append(totals.argmin(0))
        cost = totals.min(0)
    place = len(held) - 1
    chain = [place]
    for choices in reversed(previous):
        place = int(choices[place])
        chain.append(place)
    chain = sorted(set(chain), key=lambda place: (held[place], source[place], target[place]))
    return tuple(
        (int(source[place]), int(target[place]))
        for before, place in zip([None, *chain], chain, strict=False)
        if held[place] > (held[before] if before is not None else 0)
    )


def cover(
    shapes: tuple[Shape, ...],
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    limits: Shape,
) -> tuple[Shape, ...]:
    """The shapes, and one more if they do not hold all items of another split."""
    if not len(source_lengths):
        return shapes
    source = max(shapes[-1][0], int(round_up(source_lengths, limits[0]).max()))
    target = max(shapes[-1][1], int(round_up(target_lengths, limits[1]).max()))
    return shapes if (source, target) == shapes[-1] else (*shapes, (source, target))


def assign(
    source_lengths: np.ndarray, target_lengths: np.ndarray, shapes: tuple[Shape, ...]
) -> np.ndarray:
    """The first shape that holds each item, int64[items]."""
    holds = np.stack([(source_lengths <= s) & (target_lengths <= t) for s, t in shapes])
    return holds.argmax(0)


def padding_share(
    source_lengths: np.ndarray, target_lengths: np.ndarray, shapes: tuple[Shape, ...]
) -> float:
    """The share of the batches' tokens, both sides together, that is padding."""
    sizes = np.array([s + t for s, t in shapes])
    total = sizes[assign(source_lengths, target_lengths, shapes)].sum()
    return float(1 - (source_lengths.sum() + target_lengths.sum()) / total)


def round_up(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Lengths up to the next multiple of 4 (of 8 above 64), but not past the limit."""
    multiple = np.where(lengths > 64, 8, 4)
    return np.minimum(-(-lengths // multiple) * multiple, limit)


def _edges(lengths: np.ndarray, limit: int) -> np.ndarray:
    quantiles = np.quantile(lengths, np.linspace(0, 1, CANDIDATES + 1), method="higher")
    return np.unique(round_up(quantiles, limit))
