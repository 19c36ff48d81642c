"""`python -m lessons [NUMBER ...]`: makes the pages of docs/lessons."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from lessons.framework import PAGES, LessonError, all_lessons, duration, index, make, publish
from lessons.runs import FOLDER


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, makes the lessons; returns the exit status."""
    lessons = all_lessons()
    parser = argparse.ArgumentParser(prog="python -m lessons", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="lessons to make; all if none")
    parser.add_argument("--small", action="store_true", help="seconds, not minutes: a try-out")
    parser.add_argument("--render", action="store_true", help="from the numbers that are there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="trained models, else runs/lessons")
    parser.add_argument("--folder", type=Path, help="else docs/lessons, or a temporary one (small)")
    given = parser.parse_args(arguments)
    if unknown := set(given.numbers) - set(lessons):
        parser.error(f"no lesson {sorted(unknown)}; there are {sorted(lessons)}")
    if given.runs:
        os.environ[FOLDER] = str(given.runs.resolve())
    folder = given.folder or (Path(tempfile.mkdtemp(prefix="lessons-")) if given.small else PAGES)
    status = 0
    for number in given.numbers or sorted(lessons):
        lesson, started = lessons[number], time.perf_counter()
        print(f"{number:2d}. {lesson.title} ...", flush=True)
        try:
            if given.render:
                page = publish(lesson, folder)
            else:
                page = make(lesson, folder, small=given.small, seed=given.seed)
        except LessonError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
        else:
            print(f"    {page} ({duration(time.perf_counter() - started)})", flush=True)
    (folder / "README.md").write_text(index(lessons.values()), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
