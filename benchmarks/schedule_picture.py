"""Draw which blocks of three masks are computed, and in which of them the mask is looked at.

`python -m benchmarks.schedule_picture` writes the picture that kernels/README.md shows, from the
schedule that the kernels themselves follow.
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxformer_kernels import Mask
from jaxformer_kernels.attention.schedule import EMPTY, FULL, PARTIAL, classify

PICTURE = Path(__file__).resolve().parent.parent / "kernels" / "schedule.png"
LENGTH, BLOCK, WINDOW = 2048, 128, 512
DOCUMENTS = (704, 448, 576, 320)
COLORS = {EMPTY: "#eeeeee", PARTIAL: "#f7d9a8", FULL: "#2a6099"}
VISIBLE = "#e08b14"  # the part of a PARTIAL block that is visible


def masks() -> dict[str, Mask]:
    """Title -> mask."""
    ids = np.repeat(np.arange(len(DOCUMENTS)), DOCUMENTS)[None]
    return {
        "causal": Mask(causal=True),
        f"causal, window ({WINDOW - 1}, 0)": Mask(causal=True, window=(WINDOW - 1, 0)),
        f"causal, {len(DOCUMENTS)} documents packed in a row": Mask(
            causal=True, q_segment_ids=ids, kv_segment_ids=ids
        ),
    }


def draw(output: Path) -> None:
    """The picture, as a PNG."""
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    for axes, (title, mask) in zip(figure.subplots(1, 3), masks().items(), strict=True):
        panel(axes, title, mask)
    legend = {
        "empty: skipped, never fetched": COLORS[EMPTY],
        "full: computed without looking at the mask": COLORS[FULL],
        "partial, hidden part": COLORS[PARTIAL],
        "partial, visible part": VISIBLE,
    }
    figure.legend(
        handles=[Patch(facecolor=color, label=label) for label, color in legend.items()],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(output, dpi=150)


def panel(axes, title: str, mask: Mask) -> None:
    """One mask: what the schedule calls its blocks, and its own shape in the partial ones."""
    code = np.asarray(classify(mask, LENGTH, LENGTH, BLOCK, BLOCK))[0]
    visible = np.asarray(mask.as_array(1, 1, LENGTH, LENGTH))[0, 0]
    whole = np.kron(code, np.ones((BLOCK, BLOCK), int))
    palette = ListedColormap([to_rgb(COLORS[kind]) for kind in (EMPTY, PARTIAL, FULL)])
    colors = palette(whole)[..., :3]
    colors[(whole == PARTIAL) & visible] = to_rgb(VISIBLE)
    step = 4  # as fine as the picture can show
    axes.imshow(colors[::step, ::step], extent=(0, LENGTH, LENGTH, 0), interpolation="nearest")
    edges = np.arange(0, LENGTH + 1, BLOCK)
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="both", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(np.arange(0, LENGTH + 1, 512))
    axes.set_yticks(np.arange(0, LENGTH + 1, 512))
    computed, looked = np.sum(code != EMPTY), np.sum(code == PARTIAL)
    axes.set_title(
        f"{title}\n{computed} of {code.size} blocks, {looked} of them partial",
        fontsize=10,
    )
    axes.set(xlabel=f"key (blocks of {BLOCK})", ylabel="query")
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    draw(PICTURE)
    print(PICTURE)
