"""Pictures of the benchmarks' records, as PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

# Distinct without hue, too: the marker says it again.
STYLES = (
    ("#1b6ca8", "o"),
    ("#d1495b", "s"),
    ("#2e8b57", "^"),
    ("#8e6bbf", "D"),
    ("#c98b1a", "v"),
    ("#5f6b73", "P"),
)


def kernels(record: Mapping[str, Any], path: Path) -> None:
    """Throughput and temporary memory against length, a line a contender, a row a pass and dtype.

    Args:
        record: of `benchmarks.kernels --lengths`.
        path: of the PNG.
    """
    rows = [row for row in record["rows"] if "ms" in row and "length" in row]
    if not rows:
        raise ValueError(
            "no row has a length; run `python -m benchmarks.kernels --lengths 256 512`"
        )
    panels = list(dict.fromkeys((row["pass"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(
        len(panels), 2, figsize=(9, 0.7 + 2.9 * len(panels)), squeeze=False, layout="constrained"
    )
    for (speed, memory), (passes, dtype) in zip(axes, panels, strict=True):
        of_panel = [row for row in rows if (row["pass"], row["dtype"]) == (passes, dtype)]
        for name, (colour, marker) in styles.items():
            line = [row for row in of_panel if row["contender"] == name]
            style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5}
            lengths = [row["length"] for row in line]
            speeds = [row["tflops"] for row in line]
            ours = any(row.get("ours") for row in line)
            label = f"jaxformer, {name}" if ours else name
            speed.errorbar(
                lengths, speeds, yerr=_spread(line), capsize=3, elinewidth=1, label=label, **style
            )
            kept = [row for row in line if row.get("temporaries_mib") is not None]
            memory.plot(
                [row["length"] for row in kept], [row["temporaries_mib"] for row in kept], **style
            )
        speed.set_title(f"{passes}, {dtype}: TFLOP/s", fontsize=10, loc="left")
        memory.set_title("temporary memory, MiB", fontsize=10, loc="left")
        memory.set_yscale("log")
        memory.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        speed.set_ylim(bottom=0)
        for axis in (speed, memory):
            _length_axis(axis, [row["length"] for row in rows])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False)
    figure.supxlabel(f"length\n{_caption(record, rows)}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _spread(line) -> list[list[float]]:
    """How far below and above each throughput its 20th and 80th percentile are."""
    return [
        [row["tflops"] * (1 - min(1.0, row["ms"] / row["p80"])) for row in line],
        [row["tflops"] * (max(1.0, row["ms"] / row["p20"]) - 1) for row in line],
    ]


def _length_axis(axis, lengths) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _caption(record, rows) -> str:
    longest = max(rows, key=lambda row: row["length"])
    where = record.get("processor") or record.get("device", "")
    cores = f", {record['cores']} cores" if "cores" in record else ""
    return (
        f"{longest['op']} {longest['run']}, the same number of tokens at every length; "
        f"median, bars from the 20th to the 80th percentile\n{where}{cores}"
    )


def growth(record: Mapping[str, Any], path: Path) -> None:
    """Time, throughput and temporary memory of a training step, a row for each size that grows.

    Args:
        record: of `benchmarks.train --growth`.
        path: of the PNG.
    """
    fits = record["fits"]
    figure, panels = pyplot.subplots(
        len(fits), 3, figsize=(10, 0.7 + 2.7 * len(fits)), squeeze=False, layout="constrained"
    )
    for (time, speed, memory), fit in zip(panels, fits, strict=True):
        rows = [row for row in record["rows"] if row["axis"] == fit["axis"]]
        sizes = [row["size"] for row in rows]
        below_above = [
            [max(0.0, row["ms"] - row["p20"]) for row in rows],
            [max(0.0, row["p80"] - row["ms"]) for row in rows],
        ]
        colour, marker = STYLES[0]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5}
        time.errorbar(
            sizes, [row["ms"] for row in rows], yerr=below_above, capsize=3, elinewidth=1, **style
        )
        fitted = [fit["factor_ms"] * size ** fit["exponent"] for size in sizes]
        label = f"{fit['axis']} ^ {fit['exponent']:.2f}"
        time.plot(sizes, fitted, color=STYLES[1][0], linestyle="--", linewidth=1, label=label)
        time.legend(frameon=False, fontsize=9)
        speed.plot(sizes, [row["tokens_per_s"] for row in rows], **style)
        memory.plot(sizes, [row["temporary_mib"] for row in rows], **style)
        time.set_title("a step, ms", fontsize=10, loc="left")
        speed.set_title("tokens/s", fontsize=10, loc="left")
        memory.set_title("temporary memory, MiB", fontsize=10, loc="left")
        for axis in (time, memory):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            low, high = axis.get_ylim()
            if high < 10 * low:  # no whole decade to label
                axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            else:
                axis.yaxis.set_minor_formatter(NullFormatter())
        speed.set_ylim(bottom=0)
        speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for axis in (time, speed, memory):
            _length_axis(axis, sizes)
            axis.set_xlabel(fit["axis"], fontsize=9)
    where = record.get("processor") or record.get("device", "")
    cores = f", {record['cores']} cores" if "cores" in record else ""
    figure.supxlabel(
        f"jaxformer's training step, float32; median, bars from the 20th to the 80th percentile\n"
        f"{where}{cores}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
