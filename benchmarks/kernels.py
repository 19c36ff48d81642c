"""Every op on shapes of real models: time, share of the machine's ceiling, memory and error.

`python -m benchmarks.kernels` runs a choice of shapes, each shrunk to what the device does in a
moment; `--op attention --shape llama2-7b --scale 1` runs one as it is. Everyone who can make a
call takes turns: our implementations, jax.nn, tokamax, optax and, in a process of its own, torch;
what is not installed is left out. `--lengths 256 512 1024` runs attention at these lengths and
draws throughput and memory against length. Freed memory stays with the process, as in `train.py`.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import ctc_behaviours, kernel_calls, kernel_race, kernel_shapes, measure, plots
from benchmarks.kernel_competitors import TORCH, installed
from benchmarks.kernel_race import BACKWARD, FORWARD
from benchmarks.kernel_shapes import SHAPES, UnknownName, nearest
from jaxformer.runtime import keep_memory

DEFAULT = {
    "attention": ("characters", "subwords", "llama2_7b"),
    "linear_cross_entropy": ("characters", "gpt2"),
    "decode_attention": ("subwords", "llama3_8b"),
    "ctc_loss": ("phonemes", "word_pieces"),
}
SMALL = {
    "attention": ("subwords",),
    "linear_cross_entropy": ("characters",),
    "decode_attention": ("subwords",),
    "ctc_loss": ("phonemes",),
}
DTYPES = ("float32", "bfloat16")
# What fits into a moment: FLOPs forward, and numbers in the operands.
MOST = {"cpu": (1e10, 64e6), "gpu": (2e12, 4e9), "tpu": (2e12, 2e9)}
SWEPT = "llama2_7b"
COLUMNS = (
    "shape", "dtype", "pass", "contender", "ms", "p20", "p80", "ours_share", "tflops", "roofline",
    "temporaries_mib", "outputs_mib", "error", "plain_error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A call to run, forward and with gradients or one of these.

    Attributes:
        op, name: the op and the shape's name.
        shape: as it is run.
        dtype: of the operands.
        passes: FORWARD, BACKWARD or both.
        scale: how much of the named shape's arithmetic is left.
    """

    op: str
    name: str
    shape: Any
    dtype: str
    passes: tuple[str, ...]
    scale: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write and draw."""
    parser, options = parse(arguments)
    keep_memory()
    try:
        cases = in_breadth(chosen(options))
        contenders = wanted(options, {case.op for case in cases})
    except UnknownName as unknown:
        parser.error(str(unknown))
    if not cases:
        parser.error("decode_attention has no gradients; leave --pass out, or pass --pass forward")
    ceilings = measure.ceilings(256 if options.small else 2048)
    torch = any(TORCH in names for names in contenders.values())
    if not torch and not options.implementation:
        print("torch is not installed: left out", flush=True)
    with kernel_race.torch_process(torch) as served:
        rows, skipped = run(cases, contenders, ceilings, served, options)
    asked = "ctc_loss" in contenders and not options.small
    behaviours = ctc_behaviours.rows() if asked else []
    formulas = {op: kernel_shapes.FORMULAS[op] for op in contenders}
    print(rendered(rows, behaviours, ceilings))
    record = {
        "ceilings": ceilings,
        "formulas": formulas | {"roofline": kernel_shapes.ROOFLINE},
        "turns": options.turns,
        "left_out": skipped,
        "behaviours": behaviours,
        "rows": rows,
    }
    part = "kernels_lengths" if options.lengths else "kernels"
    path = measure.write(part, record, folder=options.output)
    if options.lengths:
        plots.kernels(record, path.with_suffix(".png"))
    print(f"wrote {path}")


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--op", action="append", default=[], help=", ".join(SHAPES))
    parser.add_argument("--shape", action="append", default=[], help="a named shape; repeatable")
    parser.add_argument(
        "--implementation", action="append", default=[], help="a contender; repeatable"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; else both")
    parser.add_argument("--pass", dest="passes", choices=(FORWARD, BACKWARD), help="else both")
    parser.add_argument("--turns", type=int, default=15, help="at most so many (default 15)")
    parser.add_argument(
        "--scale",
        type=float,
        help="share of a shape's arithmetic to run, above 0, at most 1; else what the device does "
        "in a moment",
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=200, help="for all turns and compiles, about"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="of attention")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for checking parity")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder")
    options = parser.parse_args(arguments)
    if options.scale is not None and not 0 < options.scale <= 1:
        parser.error(f"--scale is above 0 and at most 1, got {options.scale}")
    if options.turns < 1:
        parser.error(f"--turns is at least 1, got {options.turns}")
    if any(length < 1 for length in options.lengths):
        parser.error("--lengths are at least 1")
    if options.lengths and set(options.op) - {"attention"}:
        parser.error("--lengths is for attention; leave --op out")
    if options.lengths and len(options.shape) > 1:
        parser.error("--lengths takes one --shape")
    if options.small:
        options.turns = min(options.turns, 2)
    return parser, options


def chosen(options: argparse.Namespace) -> Iterator[Case]:
    """The cases that the options ask for.

    Raises:
        UnknownName: of an op or a shape.
    """
    for op, name, shape in shapes(options):
        passes = (options.passes,) if options.passes else (FORWARD, BACKWARD)
        if options.small and not options.passes and op != "decode_attention":
            passes = (BACKWARD,)  # has the results too
        dtypes = options.dtype or (("float32",) if op == "ctc_loss" else DTYPES)
        possible = tuple(each for each in passes if each == FORWARD or op != "decode_attention")
        scale = kernel_shapes.flops(op, shape) / kernel_shapes.flops(op, SHAPES[op][name])
        for dtype in dtypes if possible else ():
            yield Case(op, name, shape, dtype, possible, float(f"{scale:.3g}"))


def in_breadth(cases: Iterable[Case]) -> list[Case]:
    """A case of every op, then the next of every op: a budget that ends early leaves out no op."""
    of_op: dict[str, list[Case]] = {}
    for case in cases:
        of_op.setdefault(case.op, []).append(case)
    rounds = itertools.zip_longest(*of_op.values())
    return [case for each in rounds for case in each if case is not None]


def shapes(options: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """(op, name, shape as it is run)."""
    if options.lengths:
        name = nearest("shape", (options.shape or [SWEPT])[0], SHAPES["attention"])
        longest = max(options.lengths)
        base = dataclasses.replace(SHAPES["attention"][name], T=longest, S=longest, bias=False)
        base = sized("attention", base, options)
        for length in options.lengths:
            yield "attention", name, kernel_shapes.at_length(base, length)
        return
    ops = [nearest("op", op, SHAPES) for op in options.op] or list(SHAPES)
    if not options.shape:
        default = SMALL if options.small else DEFAULT
        for op in ops:
            for name in default[op]:
                yield op, name, sized(op, SHAPES[op][name], options)
        return
    every = dict.fromkeys(name for op in ops for name in SHAPES[op])
    for name in [nearest("shape", name, every) for name in options.shape]:
        for op in ops:
            if name in SHAPES[op]:
                yield op, name, sized(op, SHAPES[op][name], options)


def sized(op: str, shape, options: argparse.Namespace):
    """The shape as the options and the device want it."""
    if options.small:
        return kernel_shapes.tiny(op, shape)
    if options.scale is not None:
        return kernel_shapes.shrunk(op, shape, options.scale)
    flops, elements = MOST.get(jax.default_backend(), MOST["cpu"])
    # A projection of few tokens is all vocabulary.
    flops *= 2 if op == "linear_cross_entropy" else 1
    return kernel_shapes.fitted(op, shape, most_flops=flops, most_elements=elements)


def wanted(options: argparse.Namespace, ops: set[str]) -> dict[str, list[str]]:
    """Op -> contenders, by their names.

    Raises:
        UnknownName: of a contender.
    """
    every = {op: kernel_race.names(op, installed(TORCH)) for op in SHAPES if op in ops}
    if not options.implementation:
        return {op: [name for name in names if name != "reference"] for op, names in every.items()}
    known = dict.fromkeys(name for names in every.values() for name in names)
    asked = {nearest("implementation", name, known) for name in options.implementation}
    return {op: [name for name in names if name in asked] for op, names in every.items()}


def run(
    cases: Sequence[Case],
    contenders: dict[str, list[str]],
    ceilings: dict[str, float],
    served,
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and the cases that the budget did not reach."""
    rows: list[dict[str, Any]] = []
    skipped = []
    deadline = time.monotonic() + options.budget_seconds
    left = sum(len(case.passes) for case in cases)
    for case in cases:
        if time.monotonic() > deadline:
            skipped.append(f"{case.op} {case.name} {case.dtype}")
            print(f"left out, --budget-seconds are spent: {skipped[-1]}", flush=True)
            continue
        print(f"{case.op} {case.name} {case.dtype} ...", file=sys.stderr, flush=True)
        call = kernel_calls.make(case.op, case.shape, case.dtype)
        known = kernel_race.yardsticks(call, BACKWARD in case.passes)
        for passes in case.passes:
            found = kernel_race.measure(
                call,
                case.dtype,
                passes,
                contenders[case.op],
                known,
                served,
                ceilings=ceilings,
                turns=options.turns,
                seconds=(deadline - time.monotonic()) / left,
            )
            left -= 1
            about = {
                "op": case.op,
                "shape": case.name,
                "run": kernel_shapes.describe(case.shape),
                "scale": case.scale,
                "dtype": case.dtype,
                "pass": passes,
            }
            length = {"length": case.shape.T} if options.lengths else {}
            rows += [about | length | row for row in found]
    return rows, skipped


def rendered(rows, behaviours, ceilings) -> str:
    """Tables in Markdown, the formulas below them, and who refused what."""
    text = []
    for op in SHAPES:
        of_op = [row for row in rows if row["op"] == op]
        if not of_op:
            continue
        timed = [row for row in of_op if "ms" in row]
        text += [f"\n### {op}\n"]
        lines = [{key: row[key] for key in COLUMNS if key in row} for row in timed]
        if "length" in of_op[0]:
            lines = [
                {"length": row["length"]} | line for row, line in zip(timed, lines, strict=True)
            ]
        text += [measure.table(lines), "", f"Counted: {kernel_shapes.FORMULAS[op]}."]
        runs = dict.fromkeys((row["shape"], row["run"], row["scale"]) for row in of_op)
        text += ["As run (share of the named shape's work):"]
        text += [f"- {name}: {run} ({scale:g})" for name, run, scale in runs]
        noted = [row for row in of_op if "note" in row]
        notes = dict.fromkeys(f"{row['contender']}: {row['note']}" for row in noted)
        text += [f"- {note}" for note in notes]
    rates = ", ".join(f"{name} {value}" for name, value in ceilings.items())
    text += [
        "",
        "ours_share: median of our time / this one's, turn by turn.",
        "error: against the next wider dtype, of the result that is worst beside plain_error, that",
        "of the plain computation in the dtype of the operands.",
        f"{kernel_shapes.ROOFLINE}. Rates: {rates}.",
    ]
    if behaviours:
        text += ["\n### ctc_loss where libraries differ\n", measure.table(behaviours)]
    return "\n".join(text)


if __name__ == "__main__":
    main()
