"""Write the table of kernels/README.md from what the compilers and the accuracy script found.

`python -m benchmarks.aot.table` reads results/aot_tpu.json, results/aot_h100.json and
results/accuracy.json.
"""

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "kernels" / "README.md"
START = "<!-- table: written by `python -m benchmarks.aot.table` -->\n"
END = "<!-- end of table -->"

# What each kernel computes, by words in its name; the first that fits.
RESULTS_OF = (
    ("dk_dv", ("dk", "dv")),
    ("dbias", ("dbias",)),
    ("bias", ("dbias",)),
    ("dq", ("dq",)),
    ("dk", ("dk",)),
    ("dv", ("dv",)),
    ("backward", ("dq", "dk", "dv")),
    ("", ("out", "loss", "lse")),
)


def main() -> None:
    """Replace what stands between the markers."""
    tpu, h100, accuracy = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("aot_tpu", "aot_h100", "accuracy")
    )
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    README.write_text(f"{before}{START}\n{render(tpu, h100, accuracy)}\n{END}{after}")


def render(tpu: dict, h100: dict, accuracy: dict) -> str:
    """The tables, in Markdown, each to be folded out."""
    sizes = accuracy["lengths"]
    return "\n\n".join(
        [
            paragraph(
                f"Errors are the largest against float32; in brackets those of the plain bfloat16 "
                f"computation of the same call. They are measured on inputs from a standard normal "
                f"distribution, in calls scaled down to {sizes['positions']} positions, head dim "
                f"{sizes['head_dim']} and {sizes['tokens']} tokens, with the kernels in their "
                f"interpreter (jax {accuracy['jax']}, {accuracy['date']}). Everything else is what "
                f"the compiler says of the call in full size, in bfloat16."
            ),
            paragraph(
                f"**H100**, sm_90a machine code: {counts(h100)} (jax {h100['jax']}, "
                f"{h100['date']}). Registers are those a thread starts with."
            ),
            folded(
                "H100: registers, spills and shared memory of every kernel and shape",
                ("call", "kernel", "registers", "spills, B", "shared, KiB", "largest error"),
                h100_rows(h100, accuracy),
            ),
            paragraph(
                f"**TPU**: {counts(tpu)} (jax {tpu['jax']}, {tpu['date']}). The length of the "
                f"schedule is in instruction bundles, the body of a loop counted once; VMEM is all "
                f"of a kernel's scratch, and its windows with their buffers."
            ),
            folded(
                "TPU: vector memory and static schedule length of every kernel and shape",
                ("call", "kernel", "VMEM, MiB", "bundles v5e", "v5p", "v6e", "largest error"),
                tpu_rows(tpu, accuracy),
            ),
            paragraph(
                "**Errors by implementation**, of the result that is worst against the plain "
                "computation, forward and among the gradients. `xla` runs in its short regime at "
                "these lengths."
            ),
            folded(
                "Largest errors against float32, beside those of plain bfloat16",
                ("call", "implementation", "forward", "gradients"),
                error_rows(accuracy),
            ),
        ]
    )


def paragraph(text: str) -> str:
    """Text, in lines of a length to read."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def folded(title: str, head: tuple[str, ...], rows: Iterator[tuple]) -> str:
    """A table that a click unfolds."""
    return f"<details><summary>{title}</summary>\n\n{table(head, rows)}\n\n</details>"


def counts(record: dict) -> str:
    """How many programs compiled, in words; the names of those that did not."""
    by_outcome: dict[str, list[str]] = {}
    for case in record["cases"]:
        by_outcome.setdefault(case["outcome"], []).append(f"{case['case']} ({case['chip']})")
    words = [f"{len(by_outcome.get('ok', ()))} programs compiled"]
    for outcome in ("refused", "failed"):
        if outcome in by_outcome:
            words.append(f"{outcome}: {', '.join(by_outcome[outcome])}")
    return "; ".join(words)


def table(head: tuple[str, ...], rows: Iterator[tuple]) -> str:
    """A Markdown table; a call's name stands in its first row only."""
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    last = None
    for call, *rest in rows:
        lines.append(" | ".join(["" if call == last else call, *map(str, rest)]))
        last = call
    return "\n".join(f"| {line} |" for line in lines)


def programs(record: dict) -> dict[str, dict[str, dict]]:
    """Call -> chip -> the case that compiled and holds most of its kernels."""
    found: dict[str, dict[str, dict]] = {}
    for case in record["cases"]:
        op, call, dtype, _ = case["case"].split(" ", 3)
        if case["outcome"] != "refused" and case.get("kernels") and dtype == "bfloat16":
            chips = found.setdefault(f"{op} {call}", {})
            if len(case["kernels"]) >= len(chips.get(case["chip"], {"kernels": ()})["kernels"]):
                chips[case["chip"]] = case
    return found


def h100_rows(record: dict, accuracy: dict) -> Iterator[tuple]:
    """A row for every kernel of every call."""
    for call, chips in programs(record).items():
        for kernel in sorted(chips["h100"]["kernels"], key=lambda kernel: kernel["name"]):
            yield (
                call,
                kernel["name"],
                kernel["registers"],
                kernel["spills"],
                f"{kernel['shared_memory'] / 1024:.0f}",
                kernel_error(accuracy, call, "mosaic_gpu", kernel["name"]),
            )


def tpu_rows(record: dict, accuracy: dict) -> Iterator[tuple]:
    """A row for every kernel of every call, the chips beside each other."""
    for call, chips in programs(record).items():
        names = dict.fromkeys(x["name"] for case in chips.values() for x in case["kernels"])
        for name in names:
            kernels = {
                chip: [x for x in case["kernels"] if x["name"] == name]
                for chip, case in chips.items()
            }
            vmem = max((x["vmem"] or 0 for found in kernels.values() for x in found), default=0)
            bundles = [
                " + ".join(str(x["bundles"]) for x in kernels.get(chip, ())) or "–"
                for chip in ("v5e", "v5p", "v6e")
            ]
            error = kernel_error(accuracy, call, "mosaic_tpu", name)
            yield call, name, f"{vmem / 2**20:.1f}", *bundles, error


def error_rows(accuracy: dict) -> Iterator[tuple]:
    """A row for every call and implementation."""
    for entry in accuracy["errors"]:
        gradients = [name for name in entry["results"] if name.startswith("d")]
        forward = [name for name in entry["results"] if name not in gradients]
        call = f"{entry['op']} {', '.join(entry['shapes'])}"
        yield call, entry["implementation"], worst(entry, forward), worst(entry, gradients)


def kernel_error(accuracy: dict, call: str, implementation: str, kernel: str) -> str:
    """The worst error among what that kernel computes; a dash where it was not measured."""
    op, shape = call.split(" ", 1)
    results = next(names for word, names in RESULTS_OF if word in kernel)
    for entry in accuracy["errors"]:
        if (
            entry["implementation"] == implementation
            and entry["op"] == op
            and shape in entry["shapes"]
        ):
            return worst(entry, [name for name in results if name in entry["results"]])
    return "–"


def worst(entry: dict, names: list[str]) -> str:
    """As `dk 1.2e-02 (2.7e-02)`: the result whose error is the largest share of the plain one."""
    if not names:
        return "–"
    errors = entry["results"]
    name = max(names, key=lambda name: errors[name][0] / max(errors[name][1], 1e-9))
    return f"{name} {errors[name][0]:.1e} ({errors[name][1]:.1e})"


if __name__ == "__main__":
    sys.exit(main())
