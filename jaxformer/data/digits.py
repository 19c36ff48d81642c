"""Lines of handwritten digits, and what they spell: images to strings, without an alignment.

The digits are those of scikit-learn's `load_digits`: 1,797 images of 8 x 8 pixels in 0..16, the
test part of the "Optical Recognition of Handwritten Digits" of the UCI repository (CC BY 4.0),
written by 13 people; E. Alpaydin and C. Kaynak, "Cascading Classifiers", Kybernetika 34(4), 1998.

Its description names no writers, image by image. So train, dev and test are parted by image: none
of which a held-out line is strung is ever seen in training, but others of the same hands are
(`split='hash'`). The labels show that the file goes form by form, each beginning with the digits
in order, so the last images of the file are mostly of people who wrote none of the first: these
are the held-out ones of `split='tail'`, which is harder.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from jaxformer.config import DataConfig
from jaxformer.data.corpus import SPLITS, DataError, Example, LineCorpus, Report, require_filled
from jaxformer.data.images import HEIGHT, INK
from jaxformer.data.plan import generator
from jaxformer.data.splits import fractions, wanted_splits

CLASSES = 10
SMALLEST = 9
"""Least height of a digit in pixels; the largest fills the line."""
WIDTHS = (0.85, 1.0, 1.15)
"""How wide a digit is drawn, in its own proportions."""
SLANTS = (-0.2, 0.0, 0.2)
"""Columns by which one row is shifted from the next."""
GAPS = (1, 6)
"""Fewest and most blank columns between two digits, and at either end."""
REPEATS = 0.2
"""Share of digits that are made to repeat the one before: where CTC needs a blank between them."""
LARGEST_VALUE = 16
"""Of a pixel of `load_digits`."""


def load_digits_lines(config: DataConfig) -> LineCorpus:
    """Lines strung from single digits, each an image and its digits between spaces.

    Each digit of a line is drawn anew: which image of its class; its height, from `SMALLEST` pixels
    to all of the line, its width and slant; where it stands between top and bottom, and how much
    paper follows. The lines are made once, and every epoch reads the same ones: they take few
    megabytes, a batch then depends on its number alone, and a hash of them is that of the data. All
    follows from `config.seed`. Raises DataError without scikit-learn, if lines do not fit
    `config.max_source_length` or `max_target_length`, and on an empty split.
    """
    pixels, labels = _digits()
    owners = split_digits(labels, config)
    drawings = draw(pixels)
    report = Report()
    shares = dict(zip(("dev", "test"), fractions(config), strict=True))
    shares["train"] = 1 - sum(shares.values())
    splits: dict[str, tuple[Example, ...]] = {}
    images: dict[str, tuple[np.ndarray, ...]] = {}
    for number, split in enumerate(SPLITS):
        own = owners[split]
        lines = round(config.lines * shares[split]) if len(own) else 0
        random = generator(config.seed, number)
        strung = string_lines(random, lines, own, labels, drawings, config.digits_per_line)
        images[split] = tuple(image for image, _ in strung)
        splits[split] = tuple(
            Example(f"{split} {line}", (" ".join(map(str, labels[members])),))
            for line, (_, members) in enumerate(strung)
        )
        report.count(split, "digit images", len(own))
        report.count(split, "lines", lines)
    fix = "raise data.lines, data.dev_fraction or data.test_fraction"
    _check_room(images, config)
    require_filled(splits, wanted_splits(config), report, fix)
    return LineCorpus(splits, images, report)


def split_digits(labels: np.ndarray, config: DataConfig) -> dict[str, np.ndarray]:
    """The numbers of the digit images of each split, in the order of the file.

    `split='hash'` draws the same share of every class; `split='tail'` takes the last of the file,
    dev before test.
    """
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    random = generator(config.seed, len(SPLITS))
    groups = [np.arange(len(labels))]
    if config.split == "hash":
        groups = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(CLASSES)]
    dev_fraction, test_fraction = fractions(config)
    for group in groups:
        first = len(group) - round(len(group) * test_fraction)
        held_out = first - round(len(group) * dev_fraction)
        for split, part in zip(SPLITS, np.split(group, [held_out, first]), strict=True):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(groups)) for split, groups in parts.items()}


@dataclass(frozen=True)
class Drawing:
    """All digits drawn one way, with the columns of each that hold ink."""

    pixels: np.ndarray
    """uint8[digits, columns, height]."""
    firsts: np.ndarray
    lasts: np.ndarray

    def digit(self, number: int) -> np.ndarray:
        """One digit, uint8[columns, height], blank columns at its sides left out."""
        return self.pixels[number, self.firsts[number] : self.lasts[number]]


def draw(pixels: np.ndarray) -> list[Drawing]:
    """All digits, float[digits, 8, 8] in 0..1, at every height, width and slant."""
    ways = itertools.product(range(SMALLEST, HEIGHT + 1), WIDTHS, SLANTS)
    return [_draw(pixels, *way) for way in ways]


def _draw(pixels: np.ndarray, height: int, width: float, slant: float) -> Drawing:
    rows, columns = resampling(pixels.shape[1], height, width, slant)
    sheared = np.einsum("yr,yxc,nrc->nxy", rows, columns, pixels, optimize=True)
    drawn = np.rint(sheared * INK).astype(np.uint8)
    inked = drawn.any(2)
    return Drawing(drawn, inked.argmax(1), inked.shape[1] - inked[:, ::-1].argmax(1))


def resampling(size: int, height: int, width: float, slant: float) -> tuple[np.ndarray, np.ndarray]:
    """How a digit of `size` x `size` pixels is drawn, linear between pixels.

    Returns the share of every old row in each new one, float[height, size], and that of every old
    column in each new place of each new row, float[height, columns, size]. Rows are shifted by
    `slant` columns each, so that the top leans to the right.
    """
    columns = math.ceil(height * (width + abs(slant)))
    new = (np.arange(height) + 0.5) - height / 2
    places = (np.arange(columns) + 0.5) - columns / 2 + slant * new[:, None]
    old = np.arange(size) + 0.5 - size / 2
    scale = size / height
    edge = (size - 1) / 2
    rows = np.maximum(1 - np.abs((new * scale).clip(-edge, edge)[:, None] - old), 0)
    return rows, np.maximum(1 - np.abs((places * scale / width)[..., None] - old), 0)


def string_lines(
    random: np.random.Generator,
    lines: int,
    own: np.ndarray,
    labels: np.ndarray,
    drawings: list[Drawing],
    digits_per_line: tuple[int, int],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lines, uint8[columns, HEIGHT], each with the numbers of its digit images, all of `own`."""
    fewest, most = digits_per_line
    # All that is random in one go, as if every line had the most digits: a call a digit is slow.
    counts = random.integers(fewest, most, lines, endpoint=True)
    members = _choose_digits(random, (lines, most), own, labels) if lines else []
    heights = np.array([drawing.pixels.shape[2] for drawing in drawings])
    ways = random.integers(0, len(drawings), (lines, most))
    tops = random.integers(0, HEIGHT - heights[ways], endpoint=True)
    gaps = random.integers(*GAPS, (lines, most + 1), endpoint=True)
    strung = []
    for count, *row in zip(counts, members, ways, tops, gaps, strict=True):
        numbers, way, top, gap = (values[:count] for values in row)
        digits = [
            drawings[w].digit(number)
            for w, number in zip(way.tolist(), numbers.tolist(), strict=True)
        ]
        widths = np.array([len(digit) for digit in digits])
        starts = np.cumsum(gap + np.append(0, widths[:-1]))
        line = np.zeros((starts[-1] + widths[-1] + row[-1][count], HEIGHT), np.uint8)
        for start, above, digit in zip(starts, top, digits, strict=True):
            line[start : start + len(digit), above : above + digit.shape[1]] = digit
        strung.append((line, numbers))
    return strung


def _choose_digits(
    random: np.random.Generator, shape: tuple[int, int], own: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Digit images of `own`, int64[lines, digits]; `REPEATS` of them are of the class before."""
    chosen = random.choice(own, shape)
    repeated, shares = random.random(shape) < REPEATS, random.random(shape)
    by_class = own[np.argsort(labels[own], kind="stable")]
    sizes = np.bincount(labels[own], minlength=CLASSES)
    firsts = np.cumsum(sizes) - sizes
    for place in range(1, shape[1]):
        before = labels[chosen[:, place - 1]]
        same = by_class[firsts[before] + (shares[:, place] * sizes[before]).astype(np.int64)]
        chosen[:, place] = np.where(repeated[:, place], same, chosen[:, place])
    return chosen


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits, float64[1797, 8, 8] in 0..1, and what they are, int64[1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data.kind='digits' reads its digits from scikit-learn, which is not installed. "
            "Fix: pip install 'scikit-learn>=1.5', the extra jaxformer[digits]"
        ) from None
    found = load_digits()
    return found.images / LARGEST_VALUE, found.target


def _check_room(images: dict[str, tuple[np.ndarray, ...]], config: DataConfig) -> None:
    most = config.digits_per_line[1]
    rooms = {
        "max_source_length": max((len(i) for own in images.values() for i in own), default=0),
        "max_target_length": most + 1,
    }
    for name, room in rooms.items():
        if getattr(config, name) < room:
            raise DataError(
                f"data.{name}={getattr(config, name)} has no room for lines of {most} digits. "
                f"Fix: at least {room}, or lower the second number of data.digits_per_line"
            )
