"""How far each implementation in bfloat16 is from float32, beside the plain bfloat16 computation.

`python -m benchmarks.accuracy` writes results/accuracy.json, of which `benchmarks.aot.table` makes
the last columns of its tables. Calls of real models, scaled down, because kernels run in their
interpreter; the Mosaic GPU one needs jax >= 0.11.2 and NPROC=16 (`make kernel-table` sees to
both). The error of a result is its largest absolute difference from what the reference computes in
the next wider dtype from the same operands.
"""

import argparse
import datetime
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_calls, kernel_shapes, records
from benchmarks.kernel_calls import APIS, Arrays, Call, Function
from jaxformer_kernels import interpreting

RESULTS = Path(__file__).resolve().parent / "results" / "accuracy.json"
LENGTH, HEADS, HEAD_DIM = 200, 2, 64
TOKENS, WIDTH, VOCABULARY = 96, 128, 515
ROWS, FRAMES, CLASSES, LABELS = 9, 60, 40, 20


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy")
    parser.add_argument("--only", default="", help="measurements with this in their name")
    parser.add_argument("--output", type=Path, help=f"else {RESULTS.name}, for a whole run")
    options = parser.parse_args()
    if int(os.environ.get("NPROC", "0")) < 8:
        parser.error("set NPROC=16: with few threads the Mosaic GPU interpreter hangs")
    measured = []
    for shapes, call in calls():
        for implementation in APIS[call.op].IMPLEMENTATIONS:
            name = f"{call.op} {shapes[0]} {implementation}"
            if implementation == "reference" or options.only not in name:
                continue
            try:
                results = errors(call, implementation)
            except NotImplementedError as refusal:
                print(f"{name}: {str(refusal)[:60]} ...", flush=True)
                continue
            measured.append(
                {
                    "op": call.op,
                    "shapes": shapes,
                    "implementation": implementation,
                    "results": results,
                }
            )
            found = ", ".join(f"{key} {e:.1e} ({p:.1e})" for key, (e, p) in results.items())
            print(f"{name}: {found}", flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "jax": version("jax"),
        "lengths": {"positions": LENGTH, "head_dim": HEAD_DIM, "tokens": TOKENS, "frames": FRAMES},
        "errors": measured,
    }
    output = options.output or (None if options.only else RESULTS)
    if output:
        records.write(output, record, rows="errors")


def calls() -> Iterator[tuple[list[str], Call]]:
    """(names of the shapes it stands for, the call)."""
    sizes = {
        "attention": {"length": LENGTH, "heads": HEADS, "head_dim": HEAD_DIM},
        "decode_attention": {"length": LENGTH, "groups": HEADS, "head_dim": HEAD_DIM},
        "linear_cross_entropy": {"tokens": TOKENS, "D": WIDTH, "V": VOCABULARY},
        "ctc_loss": {"B": ROWS, "T": FRAMES, "V": CLASSES, "N": LABELS},
    }
    for op, small in sizes.items():
        for shape, names in distinct(kernel_shapes.SHAPES[op], **small).items():
            spelled = op != "ctc_loss" or shape.T >= 2 * shape.N
            if getattr(shape, "page_size", None) is None and spelled:
                yield names, kernel_calls.make(op, shape, "bfloat16", details=True)


def distinct(shapes, **sizes) -> dict:
    """The shapes in small, and the names of those that are then the same."""
    found = {}
    for name, shape in shapes.items():
        found.setdefault(shape.scaled(**sizes), []).append(name)
    return found


def errors(call: Call, implementation: str) -> dict[str, tuple[float, float]]:
    """Result -> (error of the implementation, error of the plain computation)."""
    # The TPU kernel of the projection serves calls that nobody differentiates.
    forward_only = (call.op, implementation) == ("linear_cross_entropy", "mosaic_tpu")
    gradients = call.op != "decode_attention" and not forward_only
    ours = call.ours(implementation)
    cotangents = kernel_calls.cotangents(call.plain, call.operands, call.integers)
    with interpreting():
        ours = results(ours, call.operands, call.integers, cotangents if gradients else None)
    want, plain = yardsticks(call, cotangents if gradients else None)
    return compared(ours, want, plain)


def results(function: Function, operands, integers, cotangents: Arrays | None) -> Arrays:
    """What the call gives, with gradients if there are cotangents."""
    if cotangents is None:
        return jax.jit(function)(operands, integers)
    cotangents = fitting(function, operands, integers, cotangents)
    program = jax.jit(kernel_calls.with_gradients, static_argnums=0)
    return program(function, operands, integers, cotangents)


def fitting(function: Function, operands, integers, cotangents: Arrays) -> Arrays:
    """The cotangents in the dtypes of the results: some are wider than those of the operands."""
    found = jax.eval_shape(function, operands, integers)
    return {name: x.astype(found[name].dtype) for name, x in cotangents.items()}


def yardsticks(call: Call, cotangents: Arrays | None) -> tuple[Arrays, Arrays]:
    """What the reference finds in the next wider dtype, and what the plain computation finds."""
    plain = results(call.plain, call.operands, call.integers, cotangents)
    to_64 = all(x.dtype == jnp.float32 for x in call.operands.values())
    wide = jnp.float64 if to_64 else jnp.float32
    with jax.enable_x64(to_64):
        operands, cotangents = (
            None if arrays is None else {name: x.astype(wide) for name, x in arrays.items()}
            for arrays in (call.operands, cotangents)
        )
        want = results(call.exact, operands, call.integers, cotangents)
    return want, plain


def compared(got: Arrays, want: Arrays, plain: Arrays) -> dict[str, tuple[float, float]]:
    """Result -> (error of `got`, error of the plain computation)."""
    return {
        name: (_error(x, want[name]), _error(plain[name], want[name])) for name, x in got.items()
    }


def _error(x, want) -> float:
    wide = np.asarray(want).astype(np.float64)
    return float(f"{np.abs(np.asarray(x).astype(np.float64) - wide).max():.3g}")


if __name__ == "__main__":
    main()
