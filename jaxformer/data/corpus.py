"""What is read: documents or examples by split, the report on them, and DataError."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jaxformer.errors import JaxformerError

SPLITS = ("train", "dev", "test")
LOCATIONS_SHOWN = 3


class DataError(JaxformerError):
    """Data that cannot be used; the message names the file, the line and the fix."""


@dataclass(frozen=True)
class Document:
    """One text, and the name it is reported under."""

    name: str
    text: str


@dataclass(frozen=True)
class Example:
    """A source, every target that is right for it, and `file:line` of each of those targets."""

    source: str
    references: tuple[str, ...]
    locations: tuple[str, ...] = ()

    def location(self, reference: int = 0) -> str:
        """Where a reference was read, for error messages."""
        return self.locations[reference] if self.locations else repr(self.source)


@dataclass
class Skipped:
    """How much was left out for one reason, and where the first of it stood."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Report:
    """The account of a corpus: what each split holds and what was left out, and why.

    `counts[split][what]` are numbers such as documents, examples, tokens; `skipped[reason]` says
    what is not in any split; `notes` are single lines worth printing.
    """

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, Skipped] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self, split: str, what: str, amount: int) -> None:
        """Adds to a number of a split."""
        numbers = self.counts.setdefault(split, {})
        numbers[what] = numbers.get(what, 0) + amount

    def skip(self, reason: str, location: str) -> None:
        """Counts one thing that is left out."""
        skipped = self.skipped.setdefault(reason, Skipped())
        skipped.count += 1
        if len(skipped.first) < LOCATIONS_SHOWN:
            skipped.first.append(location)

    def reject(
        self, on_bad: str, location: str, reason: str, fix: str, *, detail: str = ""
    ) -> None:
        """Stops at bad input (`on_bad='error'`) or counts it as skipped (`on_bad='skip'`).

        `reason` is what equal cases share and are counted under; `detail` belongs to this one.
        Raises DataError.
        """
        if on_bad == "error":
            explanation = f" ({detail})" if detail else ""
            raise DataError(
                f"{location}: {reason}{explanation}. Fix: {fix}; "
                "or leave such input out, counted, with --data.on-bad skip"
            )
        self.skip(reason, location)

    def copy(self) -> "Report":
        """An independent copy, for the next stage to add to."""
        return copy.deepcopy(self)

    def lines(self) -> list[str]:
        """The account as lines to print: one a split, one a reason, then the notes."""
        lines = []
        for split, numbers in self.counts.items():
            if not any(numbers.values()):
                continue
            parts = ", ".join(f"{amount:,} {what}" for what, amount in numbers.items())
            lines.append(f"{split}: {parts}")
        for reason, skipped in sorted(self.skipped.items()):
            more = ", ..." if skipped.count > len(skipped.first) else ""
            where = ", ".join(skipped.first) + more
            lines.append(f"left out: {skipped.count:,} x {reason} ({where})")
        return lines + self.notes

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class TextCorpus:
    """Documents by split (train, dev, test; a split that was not asked for is empty)."""

    splits: dict[str, tuple[Document, ...]]
    report: Report


@dataclass(frozen=True)
class PairCorpus:
    """Examples by split (train, dev, test; a split that was not asked for is empty)."""

    splits: dict[str, tuple[Example, ...]]
    report: Report


@dataclass(frozen=True)
class LineCorpus:
    """Examples by split whose sources are images: `images[split][i]`, uint8[columns, height].

    The `source` of an example is then its image's name.
    """

    splits: dict[str, tuple[Example, ...]]
    images: dict[str, tuple[np.ndarray, ...]]
    report: Report


Corpus = TextCorpus | PairCorpus | LineCorpus
OnBad = Literal["error", "skip"]


def require_filled(
    splits: dict[str, tuple], wanted: Iterable[str], report: Report, fix: str
) -> None:
    """Raises DataError if a wanted split holds nothing."""
    for split in wanted:
        if not splits[split]:
            sizes = ", ".join(f"{name} {len(items)}" for name, items in splits.items())
            left_out = sum(skipped.count for skipped in report.skipped.values())
            raise DataError(
                f"the {split} split is empty (splits: {sizes}; {left_out} left out). Fix: {fix}"
            )
