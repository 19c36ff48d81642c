"""What every benchmark shares: timing by turns, the machine's ceilings, and where it all ran.

A time is worth little by itself on a machine that others use. Contenders therefore take turns, each
turn gives a ratio, and what is reported of both times and ratios is the median with the 20th and
80th percentile.
"""

import dataclasses
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import records

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "tokamax", "numpy")


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that one contender took, turn by turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def ratio(self, other: "Times") -> tuple[float, float, float]:
        """(median, p20, p80) of our share of the other's time, turn by turn."""
        return percentiles([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])

    def milliseconds(self) -> dict[str, float]:
        """Median, p20 and p80 for a record."""
        median, low, high = percentiles(self.seconds)
        return {"ms": _short(1e3 * median), "p20": _short(1e3 * low), "p80": _short(1e3 * high)}


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    middle, low, high = np.percentile(np.asarray(values), [50, 20, 80])
    return float(middle), float(low), float(high)


def in_turns(
    programs: Mapping[str, Callable[[], Any]], *, turns: int, warm_up: int = 1
) -> dict[str, Times]:
    """Times of programs of this process that take turns; each returns when its work is done.

    A jax program must block on its results itself (`jax.block_until_ready`).
    """
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(-warm_up, turns):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds = time.perf_counter() - start
            if turn >= 0:
                taken[name].append(seconds)
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}


def ceilings(size: int = 2048, turns: int = 7) -> dict[str, float]:
    """What this device reaches: TFLOP/s of a large square matmul, GB/s of a large copy.

    A matmul of `size` costs 2 size^3 FLOPs; a copy reads and writes every byte once.
    """
    reached = {}
    for dtype in ("float32", "bfloat16"):
        x = jnp.ones((size, size), dtype)
        program = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
        times = in_turns({"it": lambda f=program, x=x: f(x).block_until_ready()}, turns=turns)
        reached[f"matmul_{dtype}_tflops"] = 2 * size**3 / times["it"].median / 1e12
    x = jnp.ones((64 * size * size // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    times = in_turns({"it": lambda: copy(x).block_until_ready()}, turns=turns)
    reached["copy_gb_per_s"] = 2 * x.nbytes / times["it"].median / 1e9
    return {name: _short(value) for name, value in reached.items()}


def device() -> str:
    """A short name of what jax runs on, fit for a file name."""
    kind = jax.devices()[0].device_kind
    return "".join(letter if letter.isalnum() else "-" for letter in kind.lower()).strip("-")


def about() -> dict[str, Any]:
    """Date, command, device and versions: how a record came about."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "command": command(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "versions": versions,
    }


def command() -> str:
    """The command line as a reader would type it."""
    program = Path(sys.argv[0])
    name = f"-m benchmarks.{program.stem}" if program.parent.name == "benchmarks" else program.name
    return " ".join(["python", name, *sys.argv[1:]])


def write(part: str, record: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """Writes `record`, whose list "rows" is the table, as <date>_<part>_<device>.json."""
    record = about() | record
    path = folder / f"{record['date']}_{part}_{device()}.json"
    records.write(path, record, "rows")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown; a column for every key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
