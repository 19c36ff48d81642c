"""The results folder as one HTML page that needs no network and no script.

`python -m benchmarks.report` shows the newest record of every part on every device, its plots (PNG
files beside it whose names begin as its own), the command that made it and where it ran; older
records are listed. Open benchmarks/results/report.html in a browser.
"""

import argparse
import base64
import dataclasses
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from benchmarks import measure, tables

TEMPLATE = Path(__file__).resolve().parent / "report.html.tmpl"
TITLES = {
    "accuracy": "Errors of kernels",
    "aot_h100": "Kernels compiled for H100",
    "aot_tpu": "Kernels compiled for TPU",
    "data": "Data pipelines",
    "decode": "Decoding",
    "growth": "Growth with length, width, depth and batch",
    "kernels": "Kernels",
    "kernels_lengths": "Kernels against length",
    "train": "Training",
}
_PNG = b"\x89PNG\r\n\x1a\n"
_SHOWN_ELSEWHERE = {"date", "device", "processor", "cores", "versions"}


class ResultsError(ValueError):
    """A results folder that cannot be shown; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What one benchmark wrote.

    Attributes:
        rows: the table, a list of dicts.
        facts: everything else that the file holds.
        plots: PNG files that belong to it.
    """

    path: Path
    part: str
    device: str
    date: str
    rows: list[dict[str, Any]]
    facts: dict[str, Any]
    plots: tuple[Path, ...]

    @property
    def title(self) -> str:
        """A heading for a reader."""
        return TITLES.get(self.part, self.part.replace("_", " ").capitalize())

    @property
    def anchor(self) -> str:
        """The id of its section."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.part}-{self.device}".lower()).strip("-")


def read(path: Path, plots: Iterable[Path] = ()) -> Record:
    """The record in a file; `ResultsError` where there is none."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(
            f"{path} is not JSON ({error}): delete it, or run its benchmark again"
        ) from error
    # Records of the kernels' compilation call their rows cases, those of their errors errors.
    names = ["rows", *facts] if isinstance(facts, dict) else []
    key = next((name for name in names if _is_table(facts.get(name))), None)
    if key is None:
        raise ResultsError(
            f'{path} has no list of rows ("rows"): delete it, or run its benchmark again'
        )
    rows = facts.pop(key)
    named = re.fullmatch(r"(\d{4}-\d\d-\d\d)_(.+)_([^_]+)", path.stem)
    date, part, device = named.groups() if named else (str(facts.get("date", "")), path.stem, "")
    device = str(facts.get("device") or device)
    return Record(path, part, device, date, rows, facts, tuple(sorted(plots)))


def read_folder(folder: Path) -> list[Record]:
    """Every record of a folder, the newest first."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ResultsError(f"no records (*.json) in {folder}: run `make bench` first")
    plots: dict[str, list[Path]] = {path.stem: [] for path in paths}
    for plot in folder.glob("*.png"):
        # The longest: kernels_cpu also begins the name of a plot of kernels_cpu_growth.
        stem = max((stem for stem in plots if plot.stem.startswith(stem)), key=len, default=None)
        if stem is not None:
            plots[stem].append(plot)
    records = [read(path, plots[path.stem]) for path in paths]
    return sorted(records, key=lambda record: record.date, reverse=True)


def page(records: Sequence[Record]) -> str:
    """The page of records, of which the first of each part and device is shown whole."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.title, record.device), []).append(record)
    groups = dict(sorted(groups.items()))
    contents = "\n".join(_entry(newest) for newest, *_ in groups.values())
    sections = "\n".join(_section(newest, older) for newest, *older in groups.values())
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(contents=contents, sections=sections)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Writes the page; returns where it is."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of records")
    parser.add_argument("--output", type=Path, help="the page, else report.html in that folder")
    options = parser.parse_args(arguments)
    output = options.output or options.results / "report.html"
    try:
        text = page(read_folder(options.results))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except (ResultsError, OSError) as error:
        raise SystemExit(f"benchmarks.report: {error}") from error
    print(f"{output}: open it in a browser")
    return output


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _entry(record: Record) -> str:
    verdicts = tables.verdicts(record.rows)
    counts = [f"{len(record.rows)} rows"]
    if verdicts:
        counts.append(f"faster in {verdicts.count('faster')} of {len(verdicts)} comparisons")
    where = f" on {html.escape(record.device)}" if record.device else ""
    return (
        f'<li><a href="#{record.anchor}">{html.escape(record.title)}</a>{where}'
        f" <small>{html.escape(record.date)}, {', '.join(counts)}</small></li>"
    )


def _section(record: Record, older: Sequence[Record]) -> str:
    where = f" <small>{html.escape(record.device)}</small>" if record.device else ""
    parts = [
        f'<section id="{record.anchor}">',
        f"<h2>{html.escape(record.title)}{where}</h2>",
        *(tables.table(rows) for rows in tables.alike(record.rows)),
        _about(record),
    ]
    if record.plots:
        parts.append(
            f'<div class="plots">{"".join(_figure(record, p) for p in record.plots)}</div>'
        )
    if older:
        names = "".join(f"<li>{html.escape(record.path.name)}</li>" for record in older)
        parts.append(f'<p class="older">Older records:</p><ul class="older">{names}</ul>')
    return "\n".join([*parts, '<p><a href="#top">Contents</a></p>', "</section>"])


def _about(record: Record) -> str:
    """What stands under a table: the command, the machine, versions, and the record's own facts."""
    facts = record.facts
    machine = [str(facts[key]) for key in ("device", "processor") if facts.get(key)]
    if facts.get("cores"):
        machine.append(f"{facts['cores']} cores")
    # Records from before `measure.write` have versions among their facts.
    entries = {"made": record.date, "machine": ", ".join(dict.fromkeys(machine))}
    entries |= {key: value for key, value in facts.items() if key not in _SHOWN_ELSEWHERE}
    entries |= {"versions": facts.get("versions"), "file": record.path.name}
    cells = [
        f"<dt>{html.escape(tables.heading(name))}</dt><dd>{_fact(name, value)}</dd>"
        for name, value in entries.items()
        if value not in ("", None)
    ]
    return f'<dl class="about">{"".join(cells)}</dl>'


def _fact(name: str, value: Any) -> str:
    if name in ("command", "file"):
        return f"<code>{html.escape(str(value))}</code>"
    if name == "versions" and isinstance(value, dict):
        return html.escape(", ".join(f"{package} {number}" for package, number in value.items()))
    return tables.text(value)


def _figure(record: Record, plot: Path) -> str:
    content = plot.read_bytes()
    if not content.startswith(_PNG):
        raise ResultsError(f"{plot} is not a PNG image: delete it, or run its benchmark again")
    rest = plot.stem.removeprefix(record.path.stem).strip("_-. ")
    caption = html.escape(re.sub(r"[_-]+", " ", rest).strip().capitalize() or record.title)
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    image = f'<img alt="Plot: {caption}" src="{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


if __name__ == "__main__":
    main()
