"""Writes the tables of docs/performance.md from the newest records of benchmarks/results.

`python -m benchmarks.performance` fills what stands between `<!-- train -->` and `<!-- end -->`,
likewise for each of TABLES, and copies their plots; the prose around is written by hand.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, report
from benchmarks.report import Record

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
Row = Mapping[str, Any]

# Part of a record -> heading -> key of a row, in the order of the columns; without any, its plots
# say it all.
TABLES: dict[str, dict[str, str]] = {
    "train": {
        "shape": "shape",
        "trainer": "contender",
        "precision": "precision",
        "ms a step": "ms",
        "our share of its time": "ours_to_this",
        "over PyTorch float32": "to_torch_float32",
        "MFU": "mfu",
        "peak MiB": "peak_mib",
        "first step cold, s": "first_step_cold_s",
        "warm, s": "first_step_warm_s",
    },
    "growth": {
        "along": "axis",
        "size": "size",
        "ms a step": "ms",
        "tokens/s": "tokens_per_s",
        "temporaries, MiB": "temporary_mib",
    },
    "decode": {
        "implementation": "implementation",
        "batch": "batch",
        "beam": "beam",
        "prompt tokens/s": "prefill_tokens_per_s",
        "new tokens/s": "decode_tokens_per_s",
        "its time over ours": "over_ours",
        "cache, MiB": "cache_mib",
    },
    "kernels": {
        "op": "op",
        "of": "shape",
        "call": "run",
        "pass": "pass",
        "dtype": "dtype",
        "contender": "contender",
        "ms": "ms",
        "our share of its time": "ours_share",
        "TFLOP/s": "tflops",
        "of the roofline": "roofline",
        "temporaries, MiB": "temporaries_mib",
        "error": "error",
        "plain error": "plain_error",
    },
    "kernels_lengths": {},
    "data": {
        "what": "part",
        "data": "pipeline",
        "worker processes": "workers",
        "tokens/s": "tokens_per_s",
        "ms a batch": "ms_a_batch",
        "ms a step": "step_ms",
        "of it waiting for data, %": "waiting_percent",
        "logging, %": "logging_percent",
        "saving, %": "saving_percent",
    },
}


def table(record: Record, columns: Mapping[str, str]) -> str:
    """The record's rows in Markdown: the columns that any row has, ranges beside their value."""
    # What refused a call has a note in place of numbers: the record and the printed table say it.
    rows = [row for row in record.rows if "note" not in row]
    rows.sort(key=lambda row: str(row.get("op", "")))
    return measure.table(
        [
            {heading: _cell(row, key) for heading, key in columns.items() if key in row}
            for row in rows
        ]
    )


def made_by(record: Record) -> str:
    """The line under a table."""
    versions = record.facts.get("versions", {})
    named = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch") if name in versions)
    machine = f"{record.facts.get('cores')} cores of {record.facts.get('processor')}"
    return f"`{record.facts.get('command')}`, {record.date}, {machine}, {named}."


def filled(page: str, records: Sequence[Record], folder: str) -> str:
    """The page with every table made anew of the newest record; others stay as they are."""
    for part, columns in TABLES.items():
        found = next((record for record in records if record.part == part), None)
        if found is None:
            continue
        pieces = [table(found, columns)] if columns else []
        pieces += [made_by(found)]
        pieces += [f"![{found.title}]({folder}/{plot.name})" for plot in found.plots]
        text = "\n\n".join(pieces)
        pattern = rf"(<!-- {part} -->\n).*?(<!-- end -->)"
        page = re.sub(
            pattern, lambda marks, text=text: f"{marks[1]}\n{text}\n\n{marks[2]}", page, flags=re.S
        )
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of records")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    try:
        records = report.read_folder(options.results)
        text = options.page.read_text(encoding="utf-8")
    except (report.ResultsError, OSError) as error:
        raise SystemExit(f"benchmarks.performance: {error}") from error
    plots = options.page.parent / "performance"
    options.page.write_text(filled(text, records, plots.name), encoding="utf-8")
    for record in records:
        for plot in record.plots:
            plots.mkdir(exist_ok=True)
            shutil.copy(plot, plots)
    return 0


def _cell(row: Row, key: str) -> Any:
    low, high = row.get(f"{key}_p20"), row.get(f"{key}_p80")
    if key == "ms":
        low, high = row.get("p20"), row.get("p80")
    if isinstance(row[key], Mapping):
        return " ".join(f"{name}{value}" for name, value in row[key].items())
    if low is None or high is None:
        return row[key]
    return f"{row[key]:.3g} ({low:.3g}–{high:.3g})"


if __name__ == "__main__":
    sys.exit(main())
