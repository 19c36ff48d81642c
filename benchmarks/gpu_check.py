"""Whether the kernels are right on the chip: the Hopper tests, long and odd calls, and decoding.

Errors are measured against float32, beside those of the plain computation in the dtype of the call:
at most twice these, thrice with a softcap.
"""

import dataclasses
import os
import queue
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_cases import CHECKS, Case
from benchmarks.gpu_process import Process, Settings

ROOT = Path(__file__).resolve().parent.parent
MODULE = "benchmarks.gpu_check"
FACTOR, WITH_SOFTCAP = 2, 3
CASE_SECONDS = 90.0
PYTEST_SECONDS = 330.0
MOST_HUNG = 2
"""Of a group; its rest is then left out, for the time is better spent on the others."""
TESTS_AT_ONCE = 6
GROUPS_AT_ONCE = 4
COLUMNS = ("group", "case", "verdict", "error_of", "error", "plain_error", "run")

# B, T, S, N, K, H and options of `decode_attention.shapes.Shape`.
DECODE: tuple[dict[str, Any], ...] = (
    {"B": 4, "T": 1, "S": 1024, "N": 8, "K": 8, "H": 128},
    {"B": 1, "T": 1, "S": 32768, "N": 8, "K": 1, "H": 128},
    {"B": 3, "T": 1, "S": 4096, "N": 16, "K": 2, "H": 64, "sinks": True},
    {"B": 2, "T": 4, "S": 2048, "N": 8, "K": 2, "H": 128, "softcap": 50.0},
    {"B": 2, "T": 1, "S": 4096, "N": 4, "K": 2, "H": 256, "window": (1023, 0)},
    {"B": 8, "T": 1, "S": 1024, "N": 8, "K": 1, "H": 128, "page_size": 16},
    {"B": 8, "T": 2, "S": 2048, "N": 8, "K": 2, "H": 64, "page_size": 128},
    {"B": 64, "T": 1, "S": 256, "N": 4, "K": 4, "H": 128},
)


def rows(settings: Settings, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every case; `facts` gets the end of what pytest said."""
    facts["rule"] = f"error <= {FACTOR} x plain_error, {WITH_SOFTCAP} x with a softcap"
    groups = {
        name: [(case.name, {"case": case.as_json()}) for case in sized(cases, settings)]
        for name, cases in CHECKS.items()
    }
    groups["decode"] = [
        (" ".join(f"{key} {value}" for key, value in shape.items()), {"decode": shape})
        for shape in DECODE[: 1 if settings.dry else None]
    ]
    groups["yardstick"] = [
        ("xla against the reference", {"case": CHECKS["features"][0].tiny().as_json()})
    ]
    at_once = 1 if settings.dry else GROUPS_AT_ONCE
    found: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(at_once) as pool:
        running = [
            pool.submit(_group, name, cases, settings, found.put)
            for name, cases in groups.items()
            if settings.wants(name)
        ]
        ended = 0
        while ended < len(running):
            row = found.get()
            if row is None:
                ended += 1
            else:
                yield row
        for group in running:
            group.result()
    if not settings.dry and settings.wants("pytest"):
        yield _pytest(settings, facts)


def sized(cases: tuple[Case, ...], settings: Settings) -> list[Case]:
    """The cases as they are run."""
    return [case.tiny() for case in cases[:1]] if settings.dry else list(cases)


def _group(
    name: str,
    cases: list[tuple[str, dict[str, Any]]],
    settings: Settings,
    found: Callable[[dict[str, Any] | None], None],
) -> None:
    """Hands on a row for every case of a group, and None at the end."""
    hung = 0
    try:
        with Process(MODULE, settings) as process:
            for case, call in cases:
                row = {"group": name, "case": case}
                if settings.left <= 0 or hung >= MOST_HUNG:
                    found(row | {"verdict": "left out"})
                    continue
                arguments = call | {"kernel": settings.kernel, "group": name, "dry": settings.dry}
                answer = process.ask(settings.within(CASE_SECONDS), **arguments)
                verdict = [key for key in ("hung", "failed", "cut_off") if key in answer]
                hung += "hung" in answer
                found(row | ({"verdict": verdict[0]} if verdict else {}) | answer)
    finally:
        found(None)


def answer(state: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """One case, in the child."""
    from benchmarks import gpu_calls

    if "decode" in arguments:
        with gpu_calls.exactly():
            return _decode(arguments["decode"], arguments["kernel"], arguments["dry"])
    case = Case(**arguments["case"])
    given, cotangents = gpu_calls.operands(case), gpu_calls.draw_cotangents(case)
    want = gpu_calls.exact(case, given, cotangents, lse=True)
    if arguments["group"] == "yardstick":
        return _yardstick(case, given, cotangents, want)
    ours = gpu_calls.ours(case, arguments["kernel"], lse=True)
    got = gpu_calls.results(ours, given, cotangents)
    plain = gpu_calls.results(gpu_calls.plain(case), given, cotangents)
    found = gpu_calls.errors(got, want)
    return _verdict(found, gpu_calls.errors(plain, want), case.softcap) | {"run": case.short()}


def _verdict(found, allowed, softcap) -> dict[str, Any]:
    from benchmarks import gpu_calls

    factor = WITH_SOFTCAP if softcap else FACTOR
    wrong = [name for name in found if not found[name] <= factor * allowed[name] + 1e-6]
    verdict = {"verdict": f"wrong: {', '.join(wrong)}" if wrong else "right"}
    return verdict | gpu_calls.worst(found, allowed)


def _yardstick(case, given, cotangents, want) -> dict[str, Any]:
    """`want`, by xla, against the reference, both in float32."""
    import jax.numpy as jnp

    from benchmarks import gpu_calls

    wide = {name: x.astype(jnp.float32) for name, x in given.items()}
    with gpu_calls.exactly():
        reference = gpu_calls.results(gpu_calls.ours(case, "reference", lse=True), wide, cotangents)
    found = gpu_calls.errors(want, reference)
    allowed = dict.fromkeys(found, 1e-5)
    return _verdict(found, allowed, None) | {"run": case.short()}


def _decode(fields: dict[str, Any], kernel: str, dry: bool) -> dict[str, Any]:
    from benchmarks import accuracy, kernel_calls, kernel_shapes
    from jaxformer_kernels.decode_attention.shapes import Shape

    window = fields.get("window")
    options: dict[str, Any] = fields | {"window": None if window is None else tuple(window)}
    shape = Shape(**options)
    if dry:
        shape = kernel_shapes.tiny("decode_attention", dataclasses.replace(shape, page_size=None))
    call = kernel_calls.make("decode_attention", shape, "bfloat16", details=True)
    got = accuracy.results(call.ours(kernel), call.operands, call.integers, None)
    compared = accuracy.compared(got, *accuracy.yardsticks(call, None))
    found, allowed = ({name: pair[i] for name, pair in compared.items()} for i in (0, 1))
    return _verdict(found, allowed, shape.softcap) | {"run": kernel_shapes.describe(shape)}


def run_bounded(
    command: Sequence[str], seconds: float, said: IO[str], environment: dict[str, str]
) -> int | None:
    """The exit status of a program and its children; None where they took longer."""
    program = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=said,
        stderr=said,
        start_new_session=True,
    )
    try:
        return program.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        return None


def _pytest(settings: Settings, facts: dict[str, Any]) -> dict[str, Any]:
    """The tests marked mosaic_gpu, several at once; one that hangs ends its worker alone."""
    seconds = settings.within(PYTEST_SECONDS)
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-m", "mosaic_gpu", "tests/kernels"),
        *("-n", str(TESTS_AT_ONCE), "--timeout", "120", "-p", "no:cacheprovider"),
    ]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "JAXFORMER_TEST_PLATFORM": "gpu",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_CLIENT_MEM_FRACTION": "0.12",
    }
    log = settings.output / "pytest.log"
    settings.output.mkdir(parents=True, exist_ok=True)
    row = {"group": "pytest", "case": "-m mosaic_gpu tests/kernels"}
    with log.open("w") as said:
        status = run_bounded(command, seconds, said, environment)
    lines = log.read_text(errors="replace").splitlines()
    facts["pytest"] = [line for line in lines if re.match("FAILED|ERROR|=+ ", line)][-60:]
    if not facts["pytest"] or status not in (0, 1):
        facts["pytest"] += lines[-20:]
    verdict = "hung" if status is None else "right" if status == 0 else "wrong"
    return row | {"verdict": verdict, "run": lines[-1] if lines else f"status {status}"}


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What was not right; a count of the rest."""
    right = sum(row["verdict"] == "right" for row in rows)
    table = [{"case": f"{right} of {len(rows)} are right"}]
    return table + [
        {"group": row["group"]}
        | {key: row[key] for key in ("case", "verdict", "error", "plain_error") if key in row}
        | {"why": row.get("hung") or row.get("failed") or row.get("run")}
        for row in rows
        if row["verdict"] != "right"
    ]
