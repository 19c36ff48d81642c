"""`ctc_loss` on the CPU beside `optax.ctc_loss` and `torch.nn.CTCLoss`: time, error, behaviour.

`python -m benchmarks.ctc_cpu` times losses with their gradient of the logits, all by turns, and
prints the median of each and of our share of its time turn by turn; torch is left out where it is
not installed. Errors are against optax's recursion in float64. Below stand three calls that
libraries answer differently.
"""

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import records
from jaxformer_kernels import ctc_loss
from jaxformer_kernels.ctc.shapes import SHAPES, Shape

RESULT = Path(__file__).parent / "results" / "ctc_cpu.json"
NAMES = ("phonemes", "word_pieces", "characters")
OURS = "ctc_loss"


def make_call(shape: Shape) -> tuple[np.ndarray, ...]:
    """Random logits and labels of rows that are used whole."""
    rng = np.random.RandomState(0)
    return (
        rng.standard_normal((shape.B, shape.T, shape.V)).astype(np.float32),
        np.full(shape.B, shape.T, np.int32),
        rng.randint(1, shape.V, (shape.B, shape.N)).astype(np.int32),
        np.full(shape.B, shape.N, np.int32),
    )


def optax_loss(logits, logit_lengths, labels, label_lengths):
    """`optax.ctc_loss`, which takes masks for lengths."""

    def padding(size, lengths):
        return (jnp.arange(size) >= lengths[:, None]).astype(logits.dtype)

    return optax.ctc_loss(
        logits,
        padding(logits.shape[1], logit_lengths),
        labels,
        padding(labels.shape[1], label_lengths),
    )


def jax_program(function, call):
    """() -> (losses, gradient of their sum), of a function of `call`."""

    @jax.jit
    def program(logits, *others):
        def total(logits):
            losses = function(logits, *others)
            return losses.sum(), losses

        gradient, losses = jax.grad(total, has_aux=True)(logits)
        return losses, gradient

    arrays = [jnp.asarray(array) for array in call]
    return lambda: jax.block_until_ready(program(*arrays))


def torch_program(call):
    """The same of log_softmax and CTCLoss, by torch."""
    torch: Any = importlib.import_module("torch")  # no dependency: checked where it is there
    logits, logit_lengths, labels, label_lengths = map(torch.tensor, call)
    logits.requires_grad_()
    loss = torch.nn.CTCLoss(reduction="none")

    def program():
        log_p = logits.log_softmax(-1).transpose(0, 1)
        losses = loss(log_p, labels, logit_lengths, label_lengths)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        return losses.detach().numpy(), gradient.numpy()

    return program


def programs(call) -> dict:
    """Library -> its program; those that are installed."""
    found = {
        OURS: jax_program(functools.partial(ctc_loss, implementation="xla"), call),
        "optax": jax_program(optax_loss, call),
    }
    if importlib.util.find_spec("torch"):
        found["torch"] = torch_program(call)
    return found


def in_float64(call):
    """Losses and gradient by optax in float64."""
    with jax.enable_x64(True):
        losses, gradient = jax_program(optax_loss, (call[0].astype(np.float64), *call[1:]))()
    return np.asarray(losses), np.asarray(gradient)


def measure(shape: Shape, turns: int) -> list[dict]:
    """A row a library: milliseconds, our share of its time, errors of loss and gradient."""
    call = make_call(shape)
    want = in_float64(call)
    contenders = programs(call)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    errors = {}
    for turn in range(turns + 1):
        for name, program in contenders.items():
            start = time.perf_counter()
            losses, gradient = program()
            taken = 1000 * (time.perf_counter() - start)
            if turn:  # the first compiles
                times[name].append(taken)
            else:
                errors[name] = (
                    float(np.max(np.abs(np.asarray(losses) - want[0]) / want[0])),
                    float(np.max(np.abs(np.asarray(gradient) - want[1]))),
                )
    return [
        {
            "shape": [shape.B, shape.T, shape.V, shape.N],
            "library": name,
            "milliseconds": round(statistics.median(times[name]), 2),
            "ours_to_this": round(
                statistics.median(a / b for a, b in zip(times[OURS], times[name], strict=True)), 3
            ),
            "loss_error": float(f"{errors[name][0]:.2g}"),
            "gradient_error": float(f"{errors[name][1]:.2g}"),
        }
        for name in contenders
    ]


def behaviours() -> list[dict]:
    """A row for each call that libraries answer differently: what each makes of it."""
    ruled_out = np.zeros((1, 4, 4))
    ruled_out[..., 3] = -np.inf
    classes = np.zeros(63, int)
    classes[1::3] = labels = np.tile([1, 2, 3], 7)
    calls = {
        "more labels than frames": (np.zeros((1, 2, 4)), [1, 2, 3]),
        "an unrelated class of logit -inf": (ruled_out, [1, 2]),
        "logits that are sure of the labels": (18 * np.eye(4)[None, classes], labels),
    }
    rows = []
    for name, (logits, labels) in calls.items():
        call = (
            logits.astype(np.float32),
            np.array([logits.shape[1]], np.int32),
            np.array([labels], np.int32),
            np.array([len(labels)], np.int32),
        )
        for library, program in programs(call).items():
            losses, gradient = program()
            kind = "some NaN" if np.isnan(gradient).any() else "not 0" if np.any(gradient) else "0"
            rows.append(
                {
                    "call": name,
                    "library": library,
                    "loss": f"{float(losses[0]):.4g}",
                    "gradient": kind,
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ctc_cpu", description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    speed = [row for name in NAMES for row in measure(SHAPES[name], options.turns)]
    answers = behaviours()
    print(f"losses and gradient, float32, shapes (B, T, V, N), jax {jax.__version__}")
    print(table(speed), "\n\n", table(answers), sep="")
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "turns": options.turns,
    }
    if importlib.util.find_spec("torch"):
        about["torch"] = importlib.metadata.version("torch")
    records.write(options.output, about | {"rows": speed + answers}, "rows")


if __name__ == "__main__":
    main()
