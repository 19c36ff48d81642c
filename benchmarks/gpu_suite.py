"""Everything about the GPU in one command: is it right, how fast is it, what should be tuned.

`python -m benchmarks.gpu_suite` runs all parts within a budget; `... check` or `... attention tune`
runs these. Every part keeps its own JSON, written anew with each row, so that a run that is cut
off loses a row at most. Nothing is fetched from anywhere. See benchmarks/GPU.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    gpu_attention,
    gpu_check,
    gpu_decode,
    gpu_process,
    gpu_rerun,
    gpu_sanitize,
    gpu_trainer,
    gpu_tune,
)
from benchmarks.gpu_process import Settings

# In the order of `all`: what must be right, what is wanted most, what helps.
PARTS: dict[str, Any] = {
    "check": gpu_check,
    "rerun": gpu_rerun,
    "attention": gpu_attention,
    "decode": gpu_decode,
    "trainer": gpu_trainer,
    "tune": gpu_tune,
    "sanitize": gpu_sanitize,
}
# Seconds a part may take where `all` of it are run; alone a part has the whole budget.
SHARES = {
    "check": 0.3,
    "rerun": 0.08,
    "attention": 0.25,
    "decode": 0.1,
    "trainer": 0.15,
    "tune": 0.07,
    "sanitize": 0.05,
}
BUDGET = 540.0
LONGEST_SUMMARY = 45


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts. Returns 1 if something was wrong, failed or hung, else 0."""
    options = _parser().parse_args(arguments)
    names = list(PARTS) if "all" in options.parts else list(dict.fromkeys(options.parts))
    # This process computes nothing; it asks jax for the device's name alone.
    os.environ.update(gpu_process.ENVIRONMENT)
    if options.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if not options.dry and not _on_gpu():
        print("error: jax sees no GPU here; --dry runs the plumbing on a CPU", file=sys.stderr)
        return 2
    end = time.monotonic() + options.budget_seconds
    tables, bad = {}, 0
    for number, name in enumerate(names):
        left = end - time.monotonic()
        later = sum(SHARES[other] for other in names[number:])
        seconds = max(0.0, left * SHARES[name] / later)
        settings = Settings(
            output=options.output,
            deadline=time.monotonic() + seconds,
            dry=options.dry,
            only=options.only,
            turns=2 if options.dry else options.turns,
            repeats=2 if options.dry else options.repeats,
        )
        print(f"{name}: {seconds:.0f} s", flush=True)
        rows, facts = run(name, settings)
        bad += sum(map(is_bad, rows))
        tables[name] = PARTS[name].summary(rows, facts), facts
    for name, (table, facts) in tables.items():
        print(rendered(name, table, facts), flush=True)
    return 1 if bad else 0


def run(name: str, settings: Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and facts of a part; its record is written after every row."""
    from benchmarks import measure

    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    start = time.monotonic()
    head = {"driver": driver(), "environment": gpu_process.ENVIRONMENT}

    def write() -> Path:
        seconds = round(time.monotonic() - start, 1)
        record = head | {"seconds": seconds} | facts | {"rows": rows}
        return measure.write(f"gpu_{name}", record, folder=settings.output)

    path = write()
    for row in PARTS[name].rows(settings, facts):
        rows.append(row)
        print(f"  {json.dumps(row)}"[:400], flush=True)
        path = write()
    path = write()
    print(f"{name}: {time.monotonic() - start:.0f} s, {path.name}", flush=True)
    return rows, facts


def is_bad(row: dict[str, Any]) -> bool:
    """Whether a row tells of a fault of ours: something wrong, not just slow, refused or left."""
    verdict = str(row.get("verdict", ""))
    faults = ("wrong", "hung", "failed", "differs", "found", "the program", "equal, but")
    mine = str(row.get("contender", "")).startswith("mosaic_gpu")
    return verdict.startswith(faults) or (mine and bool({"hung", "failed"} & set(row)))


def rendered(name: str, table: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The part's short table in Markdown, with what it left out."""
    from benchmarks import measure

    text = [f"\n### {name}\n"]
    if isinstance(facts.get("ceilings"), dict):
        text += [", ".join(f"{key} {value}" for key, value in facts["ceilings"].items()), ""]
    text += [measure.table(table[:LONGEST_SUMMARY])]
    if len(table) > LONGEST_SUMMARY:
        text += [f"and {len(table) - LONGEST_SUMMARY} more, in the record"]
    if facts.get("left_out"):
        text += [f"left out, the time was over: {', '.join(facts['left_out'])}"]
    return "\n".join(text)


def driver() -> str | None:
    """The GPU's name, driver and memory as nvidia-smi has them; None without it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def _parser() -> argparse.ArgumentParser:
    from benchmarks.measure import RESULTS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, "all"], default="all", metavar="PART",
        help=f"{', '.join(PARTS)}; else all",
    )  # fmt: skip
    parser.add_argument(
        "--budget-seconds", type=float, default=BUDGET, help="for all parts (default %(default)g)"
    )
    parser.add_argument(
        "--only",
        default="",
        help="cases with this in their name, or one of these: a,b,c",
    )
    parser.add_argument("--turns", type=int, default=7, help="of every contender")
    parser.add_argument("--repeats", type=int, default=100, help="reruns of `rerun`")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of records and logs")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: the plumbing alone")
    return parser


if __name__ == "__main__":
    sys.exit(main())
