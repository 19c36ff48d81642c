"""One call, everyone who can make it by turns: time, work, memory and error of each."""

import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import accuracy, contest, kernel_calls, kernel_shapes, kernel_torch
from benchmarks.kernel_calls import APIS, Arrays, Call
from benchmarks.kernel_competitors import TORCH, competitors
from benchmarks.measure import Times, percentiles

FORWARD, BACKWARD = "forward", "forward+backward"
LEAST_TURNS = 3
REST = 0.02
"""Seconds between turns where torch takes part: its threads spin for some milliseconds."""


@dataclasses.dataclass
class Entrant:
    """One contender that is ready.

    Attributes:
        runner: takes the turns.
        errors: result -> (its error, that of the plain computation).
        memory: MiB of temporaries, outputs and arguments.
    """

    runner: contest.TakesTurns
    errors: dict[str, tuple[float, float]]
    memory: dict[str, float]


@dataclasses.dataclass
class Yardsticks:
    """What results are compared with; None where they do not fit into memory."""

    cotangents: Arrays
    exact: Arrays | None
    plain: Arrays | None


def names(op: str, torch: bool) -> list[str]:
    """Contenders of an op: ours, the platform's own choice first, then the others."""
    api = APIS[op]
    order = api.ORDER.get(jax.default_backend(), api.ORDER["default"])
    ours = dict.fromkeys([*order, *api.IMPLEMENTATIONS])
    return [*ours, *competitors(op), *([TORCH] if torch else [])]


def yardsticks(call: Call, gradients: bool) -> Yardsticks:
    """The exact and the plain results of the part of the call that is looked at."""
    cotangents = kernel_calls.cotangents(call.plain, call.operands, call.integers)
    part = dataclasses.replace(call, operands=call.part(call.operands))
    try:
        found = accuracy.yardsticks(part, call.part(cotangents) if gradients else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = None, None
    return Yardsticks(cotangents, *found)


def measure(
    call: Call,
    dtype: str,
    passes: str,
    contenders: Sequence[str],
    known: Yardsticks,
    torch: contest.Contender | None,
    *,
    ceilings: dict[str, float],
    turns: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """A row for each contender, those that refuse included.

    Args:
        call: with operands in `dtype`.
        dtype: of the operands.
        passes: FORWARD or BACKWARD.
        contenders: whose turn it is, in this order, by the names of `names`.
        known: exact and plain results.
        torch: the process that serves torch.
        ceilings: rates of this device, from `measure.ceilings`.
        turns: at most so many of each.
        seconds: to spend, about; there are LEAST_TURNS turns of each in any case.
    """
    start = time.monotonic()
    gradients = passes == BACKWARD
    ready: dict[str, Entrant] = {}
    refused: dict[str, str] = {}
    moved = 0.0
    for name in contenders:
        try:
            if name == TORCH:
                ready[name] = _by_torch(call, dtype, gradients, known, torch)
            else:
                ready[name], moved = _by_jax(call, name, gradients, known)
        except NotImplementedError as refusal:
            refused[name] = f"refused: {refusal}".splitlines()[0]
        except (RuntimeError, ValueError) as failure:
            if name in APIS[call.op].IMPLEMENTATIONS:
                raise
            refused[name] = f"failed: {failure}".splitlines()[0]
    runners = {name: entrant.runner for name, entrant in ready.items()}
    rest = REST if TORCH in runners else 0.0
    # Everyone has run once, to be looked at.
    first, _ = contest.race(runners, turns=1, warm_up=0, rest=rest)
    a_round = sum(taken.median + rest for taken in first.values())
    left = seconds - (time.monotonic() - start)
    turns = int(min(turns, max(min(turns, LEAST_TURNS), 1 + left / max(a_round, 1e-6))))
    more, _ = contest.race(runners, turns=turns - 1, warm_up=0, rest=rest)
    times = {name: Times(taken.seconds + more[name].seconds) for name, taken in first.items()}

    mine = APIS[call.op].IMPLEMENTATIONS
    ours = next((name for name in contenders if name in mine and name in times), None)
    work = kernel_shapes.flops(call.op, call.shape, gradients)
    peak = max(ceilings["matmul_float32_tflops"], ceilings[f"matmul_{dtype}_tflops"])
    floor = max(work / peak / 1e12, moved / ceilings["copy_gb_per_s"] / 1e9)
    rows = []
    for name in contenders:
        if name in refused:
            rows.append({"contender": name, "ours": name in mine, "note": refused[name]})
            continue
        row: dict[str, Any] = {"contender": name, "ours": name in mine, "turns": turns}
        row |= times[name].milliseconds()
        if ours is not None:
            shares = percentiles(
                [a / b for a, b in zip(times[ours].seconds, times[name].seconds, strict=True)]
            )
            row |= dict(
                zip(
                    ("ours_share", "ours_share_p20", "ours_share_p80"),
                    map(_short, shares),
                    strict=True,
                )
            )
        row["tflops"] = _short(work / times[name].median / 1e12)
        if moved:
            row["roofline"] = _short(floor / times[name].median)
        rows.append(row | ready[name].memory | _worst(ready[name].errors))
    return rows


def _by_jax(call: Call, name: str, gradients: bool, known: Yardsticks) -> tuple[Entrant, float]:
    """The contender, and the bytes that any program for the call must move."""
    if name in APIS[call.op].IMPLEMENTATIONS:
        function = call.ours(name)
    else:
        function = competitors(call.op)[name](call.shape)
    arguments: tuple[Arrays, ...] = (call.operands, call.integers)
    program: Callable = function
    if gradients:
        program = functools.partial(kernel_calls.with_gradients, function)
        arguments += (accuracy.fitting(function, *arguments, known.cotangents),)
    compiled = jax.jit(program).lower(*arguments).compile()
    found = jax.block_until_ready(compiled(*arguments))
    sizes = compiled.memory_analysis()
    memory = {} if sizes is None else _memory(sizes)
    runner = contest.Here(lambda: jax.block_until_ready(compiled(*arguments)))
    return Entrant(runner, _errors(call, found, known), memory), _moved(call, arguments, found)


def _by_torch(call, dtype, gradients, known, torch) -> Entrant:
    if torch is None:
        raise NotImplementedError("its process has ended")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.npz"
        prepare = kernel_torch.options(call.op, call.shape, dtype, gradients)
        _, facts = torch.turn(prepare=prepare | {"save": str(path)})
        if "refused" in facts:
            raise NotImplementedError(facts["refused"])
        with np.load(path) as arrays:
            found = dict(arrays)
    memory = {}
    if "peak_bytes" in facts:
        kept = sum(x.nbytes for x in (*call.operands.values(), *found.values()))
        memory["temporaries_mib"] = _short(max(0, facts["peak_bytes"] - kept) / 2**20)
    return Entrant(torch, _errors(call, found, known), memory)


def _errors(call: Call, found: Arrays, known: Yardsticks) -> dict[str, tuple[float, float]]:
    if known.exact is None or known.plain is None:
        return {}
    return accuracy.compared(call.part(found), known.exact, known.plain)


def _memory(sizes) -> dict[str, float]:
    return {
        "temporaries_mib": _short(sizes.temp_size_in_bytes / 2**20),
        "outputs_mib": _short(sizes.output_size_in_bytes / 2**20),
        "arguments_mib": _short(sizes.argument_size_in_bytes / 2**20),
    }


def _moved(call: Call, arguments: tuple[Arrays, ...], found: Arrays) -> float:
    """Bytes of all that goes in and comes out, once; of a cache what some query sees."""
    total = float(sum(x.nbytes for arrays in (*arguments, found) for x in arrays.values()))
    if call.op == "decode_attention":
        spans = kernel_shapes.visible(call.op, call.shape)
        seen = (spans[..., 1].max(axis=1) - spans[..., 0].min(axis=1)).sum()
        cache = call.operands["k"].nbytes + call.operands["v"].nbytes
        total -= cache * (1 - float(seen) / (call.shape.B * call.shape.S))
    return total


def _worst(errors: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """The result whose error is the largest share of the plain computation's."""
    if not errors:
        return {}
    name = max(errors, key=lambda name: _share(*errors[name]))
    error, plain = errors[name]
    return {"error_of": name, "error": _finite(error), "plain_error": _finite(plain)}


def _share(error: float, plain: float) -> float:
    return error / max(plain, 1e-12) if np.isfinite(error) else np.inf


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@contextlib.contextmanager
def torch_process(wanted: bool):
    """The process that serves torch, or None."""
    if not wanted:
        yield None
        return
    served = contest.Contender(
        "benchmarks.kernel_torch:serve", {"cuda": jax.default_backend() == "gpu"}
    )
    try:
        yield served
    finally:
        served.kill()
