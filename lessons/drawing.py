"""The look of the figures: colours that everybody can tell apart, axes that say their units."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's palette, in the order of use; markers and dashes repeat what the colours say.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def panels(
    columns: int = 1, rows: int = 1, *, height: float = 3.6, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a page, and its panels in reading order."""
    figure = Figure(figsize=(5.6 if columns * rows == 1 else 8.4, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, list(axes.flat)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, the same bytes for the same figure; titles no larger than axis labels."""
    for axis in figure.axes:
        axis.title.set_fontsize(10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def line(
    axis: Axes,
    x: Sequence[float],
    y: Sequence[float],
    number: int,
    label: str | None = None,
    *,
    error: Sequence[float] | None = None,
    marker: bool = True,
    **options: Any,
) -> None:
    """The curve of the given number: its colour, dashes and marker; `error` shades y ± error."""
    style: dict[str, Any] = {
        "color": COLORS[number],
        "linestyle": DASHES[number],
        "marker": MARKERS[number] if marker else None,
        "markersize": 4,
        "linewidth": 1.6,
    } | options
    axis.plot(x, y, label=label, **style)
    if error is not None:
        low, high = np.subtract(y, error), np.add(y, error)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def legend(axis: Axes, **options: Any) -> None:
    """The names of the curves, small and without a frame of weight."""
    axis.legend(**({"fontsize": 8.5, "framealpha": 0.7, "edgecolor": "none"} | options))
