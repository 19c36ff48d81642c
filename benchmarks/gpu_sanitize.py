"""NVIDIA's compute-sanitizer over tiny calls of the kernels: memory that is not theirs, and races.

`python -m benchmarks.gpu_sanitize` is the program that it looks at.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import ROOT, run_bounded
from benchmarks.gpu_process import Settings

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOL_SECONDS = 130.0
PROGRAMS = ("attention", "decode_attention")
# Where it is installed, if not on the PATH.
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
FOUND = 86


def rows(settings: Settings, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every tool and op."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(PLACES)
    )
    facts["compute-sanitizer"] = tool
    if tool is None:
        yield {"tool": "compute-sanitizer", "verdict": "missing: nothing was looked at"}
        if not settings.dry:
            return
    for check in TOOLS[:1] if settings.dry else TOOLS:
        for op in PROGRAMS:
            if not settings.wants(f"{check} {op}"):
                continue
            row = {"tool": check, "op": op}
            if settings.left <= 0:
                yield row | {"verdict": "left out"}
                continue
            if tool is None or settings.dry:
                _program(op, "xla")
                yield row | {"verdict": "not looked at (dry)"}
                continue
            yield row | _looked_at(tool, check, op, settings)


def _looked_at(tool: str, check: str, op: str, settings: Settings) -> dict[str, Any]:
    log = settings.output / f"sanitizer_{check}_{op}.log"
    settings.output.mkdir(parents=True, exist_ok=True)
    command = [
        *(tool, "--tool", check, "--error-exitcode", str(FOUND), "--target-processes", "all"),
        *("--print-limit", "20"),
        *(sys.executable, "-m", "benchmarks.gpu_sanitize", op),
    ]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # Every array by itself, so that one byte too far is nobody's.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # No autotuning, whose trials it would look at too.
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
    }
    with log.open("w") as said:
        status = run_bounded(command, settings.within(TOOL_SECONDS), said, environment)
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if re.search("ERROR SUMMARY|RACECHECK SUM", line)]
    told = lines[-1].strip("= ") if lines else " ".join(text.split())[-160:]
    ran = "ran to the end" in text
    if status is None:
        verdict = "did not end in time"
    elif status == 0 and ran:
        verdict = "clean"
    elif status == FOUND:
        verdict = "found something" if ran else "found something; the program did not end"
    else:
        verdict = f"the program failed, status {status}"
    # Not all that it finds is ours: XLA's kernels and the libraries' are looked at too.
    places = sorted(set(re.findall(r"=\s+at (\w+)", text)))[:6]
    return {"verdict": verdict, "told": told, "places": places, "log": log.name}


def _program(op: str, implementation: str) -> None:
    """Forward, and of attention backward, of calls that take every path in few tiles."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks import gpu_calls
    from benchmarks.gpu_cases import Case
    from jaxformer_kernels import decode_attention

    if op == "attention":
        for case in (
            Case("ragged", 1, 200, 2, 1, 64, softcap=20.0, sinks=True),
            Case("packed", 1, 256, 2, 2, 128, documents=3),
        ):
            given, cotangents = gpu_calls.operands(case), gpu_calls.draw_cotangents(case)
            found = gpu_calls.results(gpu_calls.ours(case, implementation), given, cotangents)
            assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in found.values())
        return
    q, k, v = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate([(2, 1, 4, 64), (2, 256, 2, 64), (2, 256, 2, 64)])
    )
    out = decode_attention(q, k, v, jnp.array([256, 100]), implementation=implementation)
    assert np.all(np.isfinite(np.asarray(out, np.float32)))


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """All of them."""
    return rows


if __name__ == "__main__":
    _program(sys.argv[1], "mosaic_gpu")
    print("ran to the end", Path(__file__).name, flush=True)
