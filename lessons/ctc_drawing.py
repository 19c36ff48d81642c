"""The figures of the lesson on CTC."""

from typing import Any

import numpy as np

from jaxformer.data import PAD
from lessons.drawing import COLORS, legend, line, panels


def draw_lattice(found: dict[str, Any]) -> Any:
    """Posteriors of labels by frame, and the likeliest path."""
    figure, [axis] = panels(1, height=3.0)
    figure.set_figwidth(8.4)
    labels, frames = found["labels"], found["frames"]
    posteriors = np.array(found["posteriors"])
    # From bottom to top as the path goes: a blank, the first label, a blank, ...
    axis.imshow(
        posteriors.T, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower",
        extent=(-0.5, frames - 0.5, -0.5, len(labels) - 0.5),
    )  # fmt: skip
    heights = np.full(frames, -0.5)
    current = -0.5
    for frame in range(frames):
        for number, (start, end) in enumerate(zip(found["starts"], found["ends"], strict=True)):
            if start <= frame < end:
                current = number
            elif frame >= end:
                current = max(current, number + 0.5)
        heights[frame] = current
    axis.plot(range(frames), heights, color=COLORS[1], marker="o", markersize=4, linewidth=1.2)
    letters = [*found["word"], "·"]
    per_letter = found["per_letter"]
    axis.set_xticks(
        [per_letter * (i + 0.5) - 0.5 for i in range(len(letters))], letters, fontsize=10
    )
    for i in range(len(letters) + 1):
        axis.axvline(per_letter * i - 0.5, color="0.85", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels, fontsize=10)
    axis.set_ylim(-0.8, len(labels) - 0.2)
    axis.grid(visible=False)
    axis.set_xlabel(f"frames, {per_letter} a letter (between two labels: the blank)")
    return figure


def draw_order(found: dict[str, Any]) -> Any:
    """Losses forwards and backwards; the share of blank frames in training."""
    figure, axes = panels(2, height=3.1)
    number = 0
    for kind, name in (("ctc", "CTC"), ("attention", "attention")):
        for direction in ("forwards", "backwards"):
            curve = found[kind][direction]["curve"]
            places = (np.arange(len(curve)) + 0.5) * found["steps"] / len(curve)
            line(axes[0], places.tolist(), curve, number, f"{name}, {direction}", marker=False)
            number += 1
    axes[0].set(title="loss (nats a phoneme)", xlabel="training step", ylim=(0, None))
    legend(axes[0], fontsize=7.5)
    blanks = found["blanks"]
    line(
        axes[1],
        blanks["steps"],
        [100 * s for s in blanks["share"]],
        0,
        "frames that say blank",
        marker=False,
    )
    line(
        axes[1],
        blanks["steps"],
        [100 * s for s in blanks["sure"]],
        1,
        "largest probability",
        marker=False,
    )
    axes[1].set(title="CTC, forwards (%)", xlabel="training step", ylim=(0, 105))
    legend(axes[1])
    return figure


def draw_digits(found: dict[str, Any]) -> Any:
    """A line of digits with the spans of its labels, and what each frame says."""
    figure, axes = panels(1, 2, height=3.2, sharex=True)
    image = np.array(found["image"])
    columns = found["columns"]
    axes[0].imshow(image.T, cmap="Greys", aspect="auto", extent=(0, len(image), image.shape[1], 0))
    digits = found["predicted"].split()
    probabilities = np.array(found["probabilities"])
    middles = (np.arange(len(probabilities)) + 0.5) * columns
    axes[1].plot(middles, probabilities[:, PAD], color="0.7", linewidth=1.2)
    for token in sorted(set(found["labels"])):
        axes[1].plot(middles, probabilities[:, token], linewidth=1.4)
    for digit, (start, end) in zip(digits, found["spans"], strict=True):
        axes[0].axvspan(start * columns, end * columns, color=COLORS[1], alpha=0.35, linewidth=0)
        axes[1].annotate(
            digit, ((start + end) / 2 * columns, 1.02), ha="center", fontsize=10, color="0.2"
        )
    axes[0].set_yticks([])
    axes[0].grid(visible=False)
    axes[1].set(ylabel="probability", xlabel="column of pixels (grey: the blank)", ylim=(0, 1.2))
    return figure
