"""Training steps beside the same models written plainly in PyTorch: time, MFU, memory, agreement.

`python -m benchmarks.train` takes minutes. All contenders start from the same weights, see the same
batches and use AdamW with the same settings; each has a process and they take turns. A step is
whole: gradients set to zero, forward, cross-entropy, backward, clipping by norm, update. Times are
medians, p20 and p80 are percentiles of turns.

- `ours_to_this`: our time, in the same precision, over this one's, turn by turn.
- `to_torch_float32`: this one's time over that of eager PyTorch in float32.
- `mfu`: model FLOPs of a step (`jaxformer.training.flops`) a second, over those of a large matmul
  of the same precision that was timed in the same run: "peak" in the record names it.
- `loss_difference`: of the first batch's loss to ours in float32, relative; `after_3_steps`: the
  same of the fourth batch's. Float32 must agree to 1e-5 and 1e-4, or the run fails.
- `first_step_s`: from the start of a process to the end of its first step, cold and with compiled
  code from an earlier process in a cache. Ours is all of `train.py`, with its data.
- `--growth` times our step against length, width, depth or batch; see `benchmarks.growth`.
"""

import argparse
import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import contest, first_step, growth, measure, train_contenders, train_shapes
from benchmarks.train_shapes import SHAPES, Shape
from jaxformer import presets
from jaxformer.errors import JaxformerError
from jaxformer.training.flops import training_flops

OURS = "jaxformer"
EAGER = "torch eager"
COMPILED = "torch compile"
PRECISIONS = ("float32", "bfloat16")
TOLERANCES = {"loss_difference": 1e-5, "after_3_steps": 1e-4}
FIRST_STEPS = 4
SECONDS_A_TURN = 2.0


class DisagreementError(RuntimeError):
    """Two contenders do not compute the same model."""


def targets(torch: bool, compiled: bool) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    """(contender, precision) -> the contest's function and its options."""
    found: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for precision in PRECISIONS:
        options = {"precision": precision}
        found[OURS, precision] = ("benchmarks.train_contenders:jaxformer_trainer", options)
        if torch:
            found[EAGER, precision] = ("benchmarks.torch_models:trainer", options)
        if torch and compiled:
            compiling = options | {"compile": True}
            found[COMPILED, precision] = ("benchmarks.torch_models:trainer", compiling)
    return found


def race(
    name: str, *, torch: bool, compiled: bool, turns: int, tiny: bool, peaks: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each contender and precision of a shape or preset."""
    shape = train_shapes.named(name, tiny=tiny)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stopping:
        weights = str(Path(folder) / "weights.npz")
        train_contenders.save_weights(shape, weights)
        steps = 1 if tiny else _steps_a_turn(shape, peaks)
        options = {
            "shape": name,
            "tiny": tiny,
            "weights": weights,
            "steps_per_turn": steps,
            "first_steps": FIRST_STEPS,
        }
        racing: dict[Any, contest.Contender] = {}
        for key, (target, own) in targets(torch, compiled).items():
            racing[key] = contest.Contender(target, options | own)
            stopping.callback(racing[key].kill)
            print(f"{name}: {' '.join(key)} is ready", file=sys.stderr)
        times, _ = contest.race(racing, turns=turns, rest=0.0 if tiny else 0.05)
        rows = []
        for key, contender in racing.items():
            row = _row(name, key, shape, times, steps, peaks)
            row |= _agreement(contender.facts, racing[OURS, "float32"].facts)
            rows.append(row | contender.stop())
    _check(rows)
    return rows


def _row(
    name: str,
    key: tuple[str, str],
    shape: Shape,
    times: dict[Any, measure.Times],
    steps: int,
    peaks: dict[str, float],
) -> dict[str, Any]:
    contender, precision = key
    step = measure.Times(tuple(seconds / steps for seconds in times[key].seconds))
    row = {"shape": name, "contender": contender, "precision": precision} | step.milliseconds()
    row["steps_per_s"] = _short(1 / step.median)
    row["tokens_per_s"] = round(shape.tokens * shape.train.accumulation / step.median)
    row["mfu"] = _mfu(shape, step.median, peaks[precision])
    ratios = times[OURS, precision].ratio(times[key])
    row |= dict(zip(("ours_to_this", "ratio_p20", "ratio_p80"), map(_short, ratios), strict=True))
    if (EAGER, "float32") in times:
        row["to_torch_float32"] = _short(times[key].ratio(times[EAGER, "float32"])[0])
    return row


def _mfu(shape: Shape, seconds: float, peak: float) -> float | None:
    if shape.model.kind not in ("decoder", "encoder_decoder"):
        return None
    flops = flops_of(shape)
    return _short(flops / seconds / (peak * 1e12))


def flops_of(shape: Shape) -> float:
    """Model FLOPs of one step."""
    return training_flops(
        shape.model,
        vocabulary=shape.vocabulary,
        batch=shape.batch * shape.train.accumulation,
        length=shape.length,
        source_length=shape.source_length,
    ).total


def _steps_a_turn(shape: Shape, peaks: dict[str, float]) -> int:
    """As many as take seconds at a third of the float32 peak, at most as many as are logged."""
    if shape.model.kind not in ("decoder", "encoder_decoder"):
        return 1
    seconds = 3 * flops_of(shape) / (peaks["float32"] * 1e12)
    return max(1, min(shape.train.log_every, round(SECONDS_A_TURN / seconds)))


def _agreement(facts: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    differences = [
        abs(a - b) / abs(b) for a, b in zip(facts["losses"], ours["losses"], strict=True)
    ]
    return {
        "loss_difference": float(f"{differences[0]:.2g}"),
        "after_3_steps": float(f"{differences[-1]:.2g}"),
    }


def _check(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        for name, tolerance in TOLERANCES.items():
            if row["precision"] == "float32" and not row[name] <= tolerance:
                raise DisagreementError(
                    f"{row['shape']}: the losses of {OURS} and {row['contender']} differ by "
                    f"{row[name]} ({name}), more than {tolerance}: they train different models"
                )


def _add_first_steps(rows: list[dict[str, Any]], *, torch: bool, compiled: bool) -> None:
    found = first_step.seconds(torch=torch, compiled=compiled, repeats=3)
    for row in rows:
        if row["shape"] == "small" and row["precision"] == "float32":
            row |= found[row["contender"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.growth:
        return growth.run(options.growth, small=options.small, output=options.output)
    torch = importlib.util.find_spec("torch") is not None
    if not torch:
        print("torch is not installed: ours alone (pip install torch)")
    size = 256 if options.small else 2048
    measured = measure.ceilings(size, turns=3 if options.small else 7)
    peaks = {precision: measured[f"matmul_{precision}_tflops"] for precision in PRECISIONS}
    turns = options.turns or (2 if options.small else 7)
    compiled = not options.small if options.compile is None else options.compile
    starts = not options.small if options.first_step is None else options.first_step
    names = list(SHAPES) if "all" in options.shape else options.shape
    rows = []
    try:
        for name in names if not options.preset else []:
            rows += race(
                name,
                torch=torch,
                compiled=compiled,
                turns=turns,
                tiny=options.small,
                peaks=peaks,
            )
        for name in options.preset:
            rows += race(
                name, torch=False, compiled=False, turns=turns, tiny=options.small, peaks=peaks
            )
        if starts and "small" in names and not options.preset:
            _add_first_steps(rows, torch=torch, compiled=compiled)
    except (JaxformerError, DisagreementError, contest.ContestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = {
        "peak": f"a matmul of {size} x {size}, in this run",
        "flops": "6 a matrix element and token, 12 N H a visible query and key of a layer",
        "ceilings": measured,
        "turns": turns,
        "rows": rows,
    }
    print(measure.table(rows))
    print(f"\nceilings: {measured}\n{measure.write('train', record, folder=options.output)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", nargs="+", choices=[*SHAPES, "all"], default=["small", "baby"], metavar="SHAPE"
    )
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=presets.names(),
        default=[],
        metavar="PRESET",
        help="time our step of these presets in place of the shapes",
    )
    parser.add_argument(
        "--growth",
        nargs="+",
        choices=[*growth.AXES, "all"],
        metavar="AXIS",
        help=f"growth curves, and nothing else: {', '.join(growth.AXES)}, all",
    )
    parser.add_argument("--turns", type=int, help="turns of each contender")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile too (default: unless --small)",
    )
    parser.add_argument(
        "--first-step",
        action=argparse.BooleanOptionalAction,
        help="time processes from start to first step, shape small (default: unless --small)",
    )
    parser.add_argument("--small", action="store_true", help="tiny models; checks agreement")
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    return parser


def _short(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main())
