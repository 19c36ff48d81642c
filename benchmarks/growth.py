"""How our training step grows with length, width, depth and batch: `benchmarks.train --growth`.

One size of shape `small` is changed, the others stay (width keeps heads of 32, length has one row).
Time and temporary memory are fitted to a power of the size: least squares of their logarithms. All
sizes are compiled first and take turns.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure, train_contenders, train_shapes
from benchmarks.train_shapes import SHAPES, Shape
from jaxformer.runtime import keep_memory
from jaxformer.training.flops import training_flops

AXES = ("length", "width", "depth", "batch")
SIZES = {
    "length": (256, 512, 1024, 2048, 4096, 8192),
    "width": (64, 128, 256, 512, 1024),
    "depth": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8, 16, 32, 64),
}
TINY_SIZES = {"length": (16, 32), "width": (32, 64), "depth": (1, 2), "batch": (1, 4)}
HEAD_DIM = 32
SECONDS_A_TURN = 0.3


def of_size(axis: str, size: int, *, tiny: bool = False) -> Shape:
    """Shape `small` with one size changed; one layer of it if `tiny`."""
    small = SHAPES["small"].with_model(layers=1) if tiny else SHAPES["small"]
    if axis == "length":
        longer = small.with_model(max_length=size)
        return dataclasses.replace(longer, batch=1, length=size)
    if axis == "width":
        return small.with_model(width=size, heads=size // HEAD_DIM)
    if axis == "depth":
        return small.with_model(layers=size)
    return dataclasses.replace(small, batch=size)


def measured(axis: str, *, tiny: bool) -> list[dict[str, Any]]:
    """A row a size."""
    sizes = (TINY_SIZES if tiny else SIZES)[axis]
    shapes = {size: of_size(axis, size, tiny=tiny) for size in sizes}
    programs, memory = {}, {}
    for size, shape in shapes.items():
        programs[size], memory[size] = _program(shape)
    once = measure.in_turns({str(size): f for size, f in programs.items()}, turns=1)
    steps = {size: max(1, round(SECONDS_A_TURN / once[str(size)].median)) for size in sizes}
    times = measure.in_turns(
        {str(size): _repeated(programs[size], steps[size]) for size in sizes},
        turns=2 if tiny else 5,
    )
    rows = []
    for size, shape in shapes.items():
        taken = measure.Times(tuple(s / steps[size] for s in times[str(size)].seconds))
        flops = training_flops(
            shape.model, vocabulary=shape.vocabulary, batch=shape.batch, length=shape.length
        )
        row = {"axis": axis, "size": size} | taken.milliseconds()
        row["tokens_per_s"] = round(shape.tokens / taken.median)
        row["tflops"] = float(f"{flops.total / taken.median / 1e12:.4g}")
        rows.append(row | {"temporary_mib": round(memory[size] / 2**20, 2)})
    return rows


def _program(shape: Shape) -> tuple[Callable[[], None], int]:
    """One training step on a batch of its own, and the bytes that it needs beside its operands."""
    train_step, state = train_contenders.make_step(shape)
    (batch,) = train_shapes.batches(shape, 1)
    compiled = train_step.lower(state, batch).compile()

    def program() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return program, compiled.memory_analysis().temp_size_in_bytes


def _repeated(program: Callable[[], None], count: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            program()

    return repeated


def fit(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(factor, exponent) of factor * size ** exponent, by least squares of the logarithms."""
    exponent, logarithm = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(np.exp(logarithm)), float(exponent)


def fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each axis the powers that time and memory grow with, and time over its last doubling."""
    found = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        of_axis = [row for row in rows if row["axis"] == axis]
        sizes = [row["size"] for row in of_axis]
        factor, exponent = fit(sizes, [row["ms"] for row in of_axis])
        last = fit(sizes[-2:], [row["ms"] for row in of_axis[-2:]])[1]
        memory = fit(sizes, [row["temporary_mib"] for row in of_axis])[1]
        found.append(
            {
                "axis": axis,
                "factor_ms": float(f"{factor:.4g}"),
                "exponent": round(exponent, 3),
                "exponent_of_last_two": round(last, 3),
                "memory_exponent": round(memory, 3),
            }
        )
    return found


def run(axes: Sequence[str], *, small: bool, output: Path) -> int:
    """Measures, prints, writes the record and its picture. Returns the exit status."""
    keep_memory()
    rows = []
    for axis in AXES if "all" in axes else axes:
        rows += measured(axis, tiny=small)
    found = fits(rows)
    print(measure.table(rows))
    for line in found:
        print(
            f"{line['axis']}: a step takes {line['factor_ms']:.3g} ms * size ^ "
            f"{line['exponent']:.2f} ({line['exponent_of_last_two']:.2f} over the last two sizes), "
            f"temporary memory grows as size ^ {line['memory_exponent']:.2f}"
        )
    path = measure.write("growth", {"fits": found, "rows": rows}, folder=output)
    print(path)
    _draw(path)
    return 0


def _draw(path: Path) -> None:
    # Matplotlib is loaded only where something is drawn.
    from benchmarks import plots

    picture = path.with_suffix(".png")
    plots.growth(json.loads(path.read_text(encoding="utf-8")), picture)
    print(picture)
