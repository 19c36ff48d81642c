"""Decoding: how fast a prompt is read and continued, beside what others offer for it.

`python -m benchmarks.decode` continues prompts of 32 tokens by 224 with a model of 6 layers, 6
heads and width 384 over 65 characters: this library; `transformers`, with its cache; and PyTorch
without a cache, which computes the whole context anew for every token, as nanoGPT does. All have
the same weights, and what they find is compared. Each has a process of its own; they take turns.

The time up to the first new token is that of reading the prompt; the other tokens' share of the
rest is the time of a token.
"""

import argparse
import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.contest import Contender
from benchmarks.decode_contenders import Cell, Shape, answer_file

OURS = "jaxformer"
GROUPED = "jaxformer, grouped heads"
GROUPED_MODEL = {
    "layers": 8,
    "width": 512,
    "heads": 8,
    "kv_heads": 4,
    "position": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
}
SMALL = Shape(layers=2, heads=2, width=32, vocabulary=20, prompt=5, new=12)
SMALL_CELLS: tuple[Cell, ...] = ((2, 1), (2, 3))
CELLS: tuple[Cell, ...] = ((1, 1), (8, 1), (1, 5))
ALL_CELLS: tuple[Cell, ...] = (
    *((batch, 1) for batch in (1, 2, 8, 64)),
    *((1, beam) for beam in (4, 5, 8)),
    (8, 5),
)
LARGEST_RECOMPUTED = 8
"""Rows from which on recomputation takes minutes a turn."""
TOLERANCE = 1e-4
"""Of logits, and of log-probabilities by token."""


class ParityError(AssertionError):
    """A contender that computes something else."""


def contenders(shape: Shape, cells: Sequence[Cell], folder: str) -> dict[str, dict[str, Any]]:
    """What to start, by name: `target` and `options`; only what is installed."""
    options = {"shape": dataclasses.asdict(shape), "folder": folder}
    module = "benchmarks.decode_contenders"
    found = {OURS: {"target": f"{module}:jaxformer", "options": options | {"cells": cells}}}
    if shape != SMALL:
        grouped = options | {"cells": cells, "name": GROUPED, "model": GROUPED_MODEL}
        found[GROUPED] = {"target": f"{module}:jaxformer", "options": grouped}
    if importlib.util.find_spec("torch") is None:
        print("decode: without PyTorch and transformers, which are not installed")
        return found
    if importlib.util.find_spec("transformers") is None:
        print("decode: without transformers, which is not installed")
    else:
        found["transformers"] = {
            "target": f"{module}:transformers",
            "options": options | {"cells": cells},
        }
    recomputed = [
        (batch, beam) for batch, beam in cells if beam == 1 and batch <= LARGEST_RECOMPUTED
    ]
    if recomputed:
        found["recomputation"] = {
            "target": f"{module}:recomputation",
            "options": options | {"cells": recomputed},
        }
    return found


def race(
    entries: dict[str, dict[str, Any]], cells: Sequence[Cell], turns: int
) -> tuple[dict[tuple[str, Cell], list[tuple[float, float]]], dict[tuple[str, Cell], int]]:
    """(seconds to the first token, seconds to the last) by turns, and bytes of cache."""
    taken: dict[tuple[str, Cell], list[tuple[float, float]]] = {}
    cache_bytes: dict[tuple[str, Cell], int] = {}
    running: dict[str, Contender] = {}
    try:
        for name, entry in entries.items():
            running[name] = Contender(entry["target"], entry["options"])
            has = [tuple(cell) for cell in entry["options"]["cells"]]
            for cell, size in zip(has, running[name].facts["cache_bytes"], strict=True):
                taken[name, cell] = []
                cache_bytes[name, cell] = size
        for _ in range(turns):
            for batch, beam in cells:
                for name, contender in running.items():
                    if (name, (batch, beam)) in taken:
                        _, facts = contender.turn(batch=batch, beam=beam)
                        times = facts["first_s"], facts["all_s"]
                        taken[name, (batch, beam)].append(times)
        for contender in running.values():
            contender.stop()
    finally:
        for contender in running.values():
            contender.kill()
    return taken, cache_bytes


def parity(folder: str, name: str, cell: Cell, shape: Shape) -> dict[str, float]:
    """How far a contender's answers are from its own full pass, and from this library's.

    `log_prob_error`: of the log-probabilities that decoding gave, from those of the full pass over
    the same tokens, a token. `regret`: how far below the likeliest token the chosen one is, at most
    (greedy). `equal_tokens`: the share of new tokens that are this library's. `logits_error`: the
    largest difference from its logits, over rows whose tokens are all the same.
    """
    answer = dict(np.load(answer_file(folder, name, cell)))
    tokens, logits = answer["tokens"], answer["logits"][:, :-1].astype(np.float64)
    new = tokens[:, shape.prompt :]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, new[..., None].astype(np.int64), axis=-1)[..., 0]
    found = {}
    if "log_probs" in answer:
        error = np.abs(chosen.sum(1) - answer["log_probs"]).max() / shape.new
        found["log_prob_error"] = float(error)
    if cell[1] == 1:
        found["regret"] = float((log_probs.max(-1) - chosen).max())
    if name in (OURS, GROUPED):
        return found
    ours = dict(np.load(answer_file(folder, OURS, cell)))
    same = tokens == ours["tokens"]
    found["equal_tokens"] = float(same[:, shape.prompt :].mean())
    rows = same.all(1)
    if rows.any():
        error = np.abs(answer["logits"][rows] - ours["logits"][rows]).max()
        found["logits_error"] = float(error)
    return found


def check(name: str, cell: Cell, found: dict[str, float], *, strict: bool) -> None:
    """Raises ParityError where a difference is more than rounding.

    Where not strict, tokens may differ: of thousands, some are a tie but for rounding.
    """
    for key in ("log_prob_error", "logits_error", "regret"):
        if found.get(key, 0.0) > TOLERANCE:
            raise ParityError(f"{name}, batch and beam {cell}: {key} is {found[key]:.2g}")
    if strict and found.get("equal_tokens", 1.0) < 1:
        raise ParityError(f"{name}, batch and beam {cell}: tokens differ from {OURS}'s")


def row(
    name: str,
    cell: Cell,
    times: list[tuple[float, float]],
    ours: list[tuple[float, float]],
    shape: Shape,
    cache_bytes: int,
) -> dict[str, Any]:
    """One line of the table. `over_ours` is how many times our decoding time it takes."""
    batch, beam = cell
    first = measure.Times(tuple(first for first, _ in times))
    steps = shape.new - 1
    token = measure.Times(tuple((whole - first) / steps for first, whole in times))
    our_token = measure.Times(tuple((whole - first) / steps for first, whole in ours))
    ratio, low, high = token.ratio(our_token)
    return {
        "implementation": name,
        "ours": name in (OURS, GROUPED),
        "batch": batch,
        "beam": beam,
        "prefill_tokens_per_s": float(f"{batch * shape.prompt / first.median:.4g}"),
        "decode_tokens_per_s": float(f"{batch / token.median:.4g}"),
        **{f"token_{key}": value for key, value in token.milliseconds().items()},
        "over_ours": float(f"{ratio:.3g}"),
        "over_ours_p20": float(f"{low:.3g}"),
        "over_ours_p80": float(f"{high:.3g}"),
        "cache_mib": float(f"{cache_bytes / 2**20:.4g}"),
    }


def run(shape: Shape, cells: Sequence[Cell], turns: int, *, strict: bool) -> list[dict[str, Any]]:
    """Races every contender through every cell, checks what they found, and makes the table."""
    with tempfile.TemporaryDirectory() as folder:
        taken, cache_bytes = race(contenders(shape, cells, folder), cells, turns)
        rows = []
        for (name, cell), times in taken.items():
            found = parity(folder, name, cell, shape)
            check(name, cell, found, strict=strict)
            line = row(name, cell, times, taken[OURS, cell], shape, cache_bytes[name, cell])
            rows.append(line | {key: float(f"{value:.2g}") for key, value in found.items()})
    return sorted(rows, key=lambda line: (line["beam"], line["batch"]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes: parity, not speed")
    parser.add_argument("--full", action="store_true", help="every batch and beam")
    parser.add_argument("--turns", type=int, help="turns of each contender (5; small: 1)")
    parser.add_argument("--new", type=int, default=Shape.new, help="tokens to generate")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    if options.turns is None:
        options.turns = 1 if options.small else 5
    if options.turns < 1:
        parser.error(f"--turns {options.turns} must be at least 1")
    if options.new < 2:
        parser.error(
            f"--new {options.new} must be at least 2: the first token is the prompt's time"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line."""
    options = parse(arguments)
    shape, cells = dataclasses.replace(Shape(), new=options.new), CELLS
    if options.small:
        shape, cells = SMALL, SMALL_CELLS
    elif options.full:
        cells = ALL_CELLS
    rows = run(shape, cells, options.turns, strict=options.small)
    print(measure.table(rows))
    record = {"rows": rows, "shape": dataclasses.asdict(shape), "turns": options.turns}
    print(f"decode: {measure.write('decode', record, folder=options.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
