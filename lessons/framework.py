"""From an experiment to a page: numbers, the claims they must bear out, figures, text."""

import dataclasses
import importlib
import json
import math
import os
import pkgutil
import platform
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure

from lessons.drawing import save

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "lessons"
TEMPLATES = Path(__file__).resolve().parent / "templates"
GAP = re.compile(r"\{\{\s*([\w.-]+)\s*(?::([^{}]+))?\}\}")
DIGITS = 6  # significant, of the numbers that are kept

Results = dict[str, Any]
"""What an experiment found: nested dicts and lists of numbers and strings."""


class LessonError(Exception):
    """A lesson that cannot be made; the message says what to mend."""


class Measure(Protocol):
    """An experiment: `small` asks for one of a few seconds, whose numbers nobody relies on."""

    def __call__(self, *, small: bool, seed: int) -> Results: ...


@dataclass(frozen=True)
class Lesson:
    """One lesson; its functions take the numbers as they were read back from JSON."""

    number: int
    name: str
    """Stem of its files, after the number: words joined by hyphens."""
    title: str
    summary: str
    """One sentence for the list of lessons."""
    measure: Measure
    figures: Callable[[Results], dict[str, Figure]]
    """By name; the page shows each as `![what is seen]({{figure.<name>}})`."""
    claims: Callable[[Results], dict[str, bool]]
    """Sentence -> whether it is true. Whatever the prose asserts beside a number is listed."""
    values: Callable[[Results], dict[str, Any]] = lambda results: {}
    """More for the gaps of the page: ratios, tables."""

    @property
    def stem(self) -> str:
        """Such as 07-scaled-scores."""
        return f"{self.number:02d}-{self.name}"

    @property
    def module(self) -> str:
        """Such as lesson_07_scaled_scores."""
        return f"lesson_{self.number:02d}_{self.name.replace('-', '_')}"


def all_lessons() -> dict[int, Lesson]:
    """Every lesson by its number."""
    folder = str(Path(__file__).resolve().parent)
    names = sorted(info.name for info in pkgutil.iter_modules([folder]))
    modules = [
        importlib.import_module(f"lessons.{name}") for name in names if name.startswith("lesson_")
    ]
    return {module.LESSON.number: module.LESSON for module in modules}


def make(lesson: Lesson, folder: Path = PAGES, *, small: bool = False, seed: int = 0) -> Path:
    """Does the experiment and writes its numbers, figures and page into a folder.

    Raises LessonError where a claim does not hold (of a small run none is checked); the numbers are
    written all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started, busy = time.perf_counter(), time.process_time()
    results = lesson.measure(small=small, seed=seed)
    record = {
        "lesson": lesson.number,
        "command": f"make lessons LESSON={lesson.number}",
        "seed": seed,
        "small": small,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "flax", "numpy")},
        },
        "results": rounded(results),
    }
    text = compact_json(record) + "\n"
    (folder / f"{lesson.stem}.json").write_text(text, encoding="utf-8")
    return publish(lesson, folder)


def publish(lesson: Lesson, folder: Path = PAGES) -> Path:
    """Writes figures and page from the numbers that lie in the folder; returns the page's path."""
    record = load(lesson, folder)
    check_claims(lesson, record, folder)
    for name, figure in lesson.figures(record["results"]).items():
        save(figure, folder / figure_file(lesson, name))
    page = folder / f"{lesson.stem}.md"
    page.write_text(render(lesson, record), encoding="utf-8")
    return page


def load(lesson: Lesson, folder: Path = PAGES) -> dict[str, Any]:
    """The numbers of a lesson, and how they were measured. Raises LessonError."""
    path = folder / f"{lesson.stem}.json"
    if not path.is_file():
        raise LessonError(f"{path} is missing: run `make lessons LESSON={lesson.number}`")
    return json.loads(path.read_text(encoding="utf-8"))


def check_claims(lesson: Lesson, record: dict[str, Any], folder: Path = PAGES) -> None:
    """Raises LessonError naming the claims of the page that the numbers do not bear out."""
    if record["small"]:
        return
    false = [claim for claim, holds in lesson.claims(record["results"]).items() if not holds]
    if false:
        listed = "".join(f"\n  - {claim}" for claim in false)
        raise LessonError(
            f"lesson {lesson.number}: its page says what was not measured. Mend the prose in "
            f"lessons/templates/{lesson.stem}.md and the claims in lessons/{lesson.module}.py, or "
            f"the experiment (numbers: {folder / lesson.stem}.json):{listed}"
        )


def render(lesson: Lesson, record: dict[str, Any]) -> str:
    """The page: the template with its gaps filled, and below it how it was made.

    A gap is {{path.to.number}} or {{path.to.number:format}}. Raises LessonError on one that nothing
    fills.
    """
    results = record["results"]
    named = {name: figure_file(lesson, name) for name in lesson.figures(results)}
    known = record | results | lesson.values(results) | {"figure": named}
    template = (TEMPLATES / f"{lesson.stem}.md").read_text(encoding="utf-8")

    def fill(gap: re.Match) -> str:
        path, form = gap.group(1), gap.group(2) or ""
        try:
            return format(_follow(known, path), form.strip())
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise LessonError(
                f"lessons/templates/{lesson.stem}.md: nothing fills {gap.group(0)} ({error!r})"
            ) from None

    page = GAP.sub(fill, template.rstrip())
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    took = f"{duration(record['seconds'])}, {duration(record['cpu_seconds'])} of CPU time"
    made = f"`{record['command']}` ({took}) on {record['machine']}"
    return (
        f"# {lesson.number}. {lesson.title}\n\n{page}\n\n---\n"
        f"Made by {made} ({versions}; seed {record['seed']}), from "
        f"[`{lesson.module}.py`](../../lessons/{lesson.module}.py); all its numbers are in "
        f"[`{lesson.stem}.json`]({lesson.stem}.json). [All lessons](README.md)\n"
    )


def index(lessons: Iterable[Lesson]) -> str:
    """The list of lessons, as a page."""
    lines = "".join(
        f"{lesson.number}. [{lesson.title}]({lesson.stem}.md): {lesson.summary}\n"
        for lesson in sorted(lessons, key=lambda lesson: lesson.number)
    )
    introduction = (TEMPLATES / "README.md").read_text(encoding="utf-8").rstrip()
    return f"{introduction}\n\n{lines}"


def figure_file(lesson: Lesson, name: str) -> str:
    """The file of one of a lesson's figures."""
    return f"{lesson.stem}-{name}.png"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent measurements and its standard error, s / sqrt(n)."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), 0.0
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


def duration(seconds: float) -> str:
    """Such as 12 s, or 3.4 min."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def rounded(tree: Any) -> Any:
    """The same as JSON has it: lists for arrays, numbers with six significant digits.

    Raises LessonError on a number that is not finite, which no page could rest on.
    """
    if isinstance(tree, dict):
        return {str(key): rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return rounded(dataclasses.asdict(tree))
    if isinstance(tree, str | bool | int | None):
        return tree
    array = np.asarray(tree)
    if array.ndim:
        return [rounded(value) for value in array]
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array.item()
    if not np.isfinite(array):
        raise LessonError(f"an experiment returned {array}: leave it out, or say null")
    return float(f"{float(array):.{DIGITS}g}")


def compact_json(tree: Any, indent: int = 0) -> str:
    """JSON for people: what fits into a line stands in one."""
    line = json.dumps(tree, ensure_ascii=False)
    if indent + len(line) <= 100 or not isinstance(tree, dict | list) or not tree:
        return line
    inner, outer = " " * (indent + 1), " " * indent
    if isinstance(tree, dict):
        parts = [f"{json.dumps(key)}: {compact_json(tree[key], indent + 1)}" for key in tree]
        return "{\n" + ",\n".join(inner + part for part in parts) + f"\n{outer}}}"
    if any(isinstance(value, dict | list | str) for value in tree):
        parts = [inner + compact_json(value, indent + 1) for value in tree]
        return "[\n" + ",\n".join(parts) + f"\n{outer}]"
    values = ", ".join(json.dumps(value, ensure_ascii=False) for value in tree)
    wrapped = textwrap.wrap(
        values, 100, initial_indent=inner, subsequent_indent=inner, break_on_hyphens=False
    )
    return "[\n" + "\n".join(wrapped) + f"\n{outer}]"


def _follow(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree
