"""Plan published models on machines for rent, and write the table of docs/scaling.md.

`python -m benchmarks.plans tpu` (in an environment with the TPU's compiler) and `h100` (with
NVIDIA's) compile one training step after another, minutes each target, and keep their rows in
results/plans.json; `python -m benchmarks.plans` writes the table.
"""

import argparse
import datetime
import io
import json
import sys
import textwrap
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

from benchmarks import records

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plans.json"
PAGE = ROOT / "docs" / "scaling.md"
START, END = "<!-- table: written by `python -m benchmarks.plans` -->\n", "<!-- end of table -->"
GIB = 2**30

SLICES = ("v5p-128", "v5p-256", "v5p-512", "v5p-1024", "v5e-256")
CHIPS = {"v5p-128": 64, "v5p-256": 128, "v5p-512": 256, "v5p-1024": 512, "v5e-256": 256}
# A step has the 4 million tokens of Llama 2, 1024 rows of 4096. Of 70B a chip holds few at a time.
PARTS = {
    ("llama2-70b", "v5p-128"): 4,
    ("llama2-70b", "v5p-256"): 2,
    ("llama2-70b", "v5e-256"): 4,
}
CASES = {
    "tpu": [
        (model, name, {"mesh.fsdp": CHIPS[name]}, PARTS.get((model, name), 1))
        for model in ("llama2-7b", "llama2-13b", "llama2-70b")
        for name in SLICES
    ],
    "h100": [("llama2-7b", "h100:8", {"mesh.fsdp": 8}, 64)],
}
ROWS = 1024


def measure(model: str, topology: str, mesh: dict[str, int], parts: int) -> dict:
    """One row: the plan of a case, or why there is none."""
    from jaxformer.cli import main as command

    options = {**mesh, "train.batch_size": ROWS // parts, "train.accumulation": parts}
    written = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    said = io.StringIO()
    with redirect_stdout(said):
        command(["plan", model, "--topology", topology, "--no-propose", "--json", *written])
    plan = json.loads(said.getvalue())
    return {
        "model": model,
        "options": written,
        "name": topology,
        "jax": version("jax"),
        "date": datetime.date.today().isoformat(),
        **plan,
    }


def render(rows: list[dict]) -> str:
    """The table in Markdown."""
    head = (
        "model | machine | mesh | rows x micro-batches | fits | GiB held, of | least ms a step | "
        "limit | MFU at best | compiled in"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for row in rows:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        parts = int(row["options"][-1].split("=")[1])
        cells = [row["model"], row["name"], mesh, f"{ROWS // parts} x {parts}"]
        held = sum(row["memory"].values()) / GIB
        cells += [
            {True: "yes", False: "**no**", None: row.get("why", "not known")}[row["fits"]],
            f"{held:.1f} of {row['available'] / GIB:.1f}",
        ]
        least = row.get("bound")
        cells += (
            [f"{1e3 * least['seconds']:,.0f}", least["limit"], f"{least['mfu']:.0%}"]
            if least
            else ["", "", ""]
        )
        cells.append(f"{row['seconds']['compile']:.0f} s" if "seconds" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(sorted({f"jax {row['jax']}" for row in rows}))
    dates = ", ".join(sorted({row["date"] for row in rows}))
    note = (
        f"Compiled with `--effort low` ({versions}; {dates}) on two CPU cores that other work kept "
        "busy: with less of it, 7B on v5p-128 took 32 s, and 117 s with `--effort full`. Remat "
        "full, rows of 4,096 tokens, bfloat16 products, float32 parameters and AdamW. Fits: a "
        "TPU's compiler refuses what does not; for H100, by what it allotted. GiB held: "
        "parameters, optimiser, gradients, activations, from shapes. Times are bounds; no step "
        "was run."
    )
    return "\n".join([*lines, "", textwrap.fill(note, 100)])


def write_page(rows: list[dict]) -> None:
    """Replaces what stands between the markers."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{render(rows)}\n\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """0 when every case compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument("target", nargs="?", choices=tuple(CASES))
    parser.add_argument("--only", default="", help="cases with this in model and machine")
    parser.add_argument("--missing", action="store_true", help="cases without a row alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where rows are kept")
    options = parser.parse_args(arguments)
    known = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    rows = {(row["model"], row["name"]): row for row in known}
    if options.target is None:
        write_page(list(rows.values()))
        return 0
    failed = 0
    for case in CASES[options.target]:
        if options.only not in " ".join(case[:2]) or (options.missing and case[:2] in rows):
            continue
        row = rows[case[:2]] = measure(*case)
        failed += row["outcome"] != "ok"
        print(
            f"{row['outcome']:10}{row['model']:12}{row['name']:10}{row.get('seconds')}", flush=True
        )
        order = [case[:2] for cases in CASES.values() for case in cases]
        kept = sorted(rows.values(), key=lambda row: order.index((row["model"], row["name"])))
        record = {"written by": "python -m benchmarks.plans", "rows": kept}
        records.write(options.output, record, rows="rows")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
