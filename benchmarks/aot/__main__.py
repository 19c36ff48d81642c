"""Compile the cases of one target, print a table, and fail if a case does."""

import argparse
import concurrent.futures
import datetime
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks import records

RESULTS = Path(__file__).resolve().parent.parent / "results"


class Worker:
    """A process that compiles cases; started when it is needed, killed when it takes too long."""

    def __init__(self, target: str, seconds: float, dumps: str, errors):
        self._command = [sys.executable, "-m", "benchmarks.aot.worker", target, dumps]
        self._seconds = seconds
        self._process = None
        self._errors = errors

    def compile(self, case: str, chip: str) -> dict:
        """What the worker answers, or why it did not."""
        process = self._process = self._process or self._start()
        position = self._errors.seek(0, os.SEEK_END)
        process.stdin.write(json.dumps({"case": case, "chip": chip}) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            in_time = bool(selector.select(self._seconds))
        answer = process.stdout.readline() if in_time else ""
        if answer:
            return json.loads(answer)
        self.stop()
        self._errors.seek(position)
        said = " ".join(self._errors.read().split())[-500:]
        why = f"the compiler crashed: {said}" if in_time else f"not done in {self._seconds:g} s"
        return {"outcome": "failed", "why": why}

    def stop(self) -> None:
        """End the process, and whatever compilers it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _start(self):
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )


def compile_all(target: str, requests: list[tuple[str, str]], jobs: int, seconds: float) -> list:
    """The answers to (case, chip) requests, in their order, each printed when it is there."""
    module = importlib.import_module(f"benchmarks.aot.{target}")
    answers: list = [None] * len(requests)
    waiting = list(enumerate(requests))[::-1]

    def work():
        with (
            tempfile.TemporaryDirectory() as dumps,
            tempfile.TemporaryFile(mode="w+", errors="replace") as errors,
        ):
            worker = Worker(target, seconds, dumps, errors)
            try:
                while waiting:
                    index, (case, chip) = waiting.pop()
                    answer = worker.compile(case, chip)
                    answers[index] = {"case": case, "chip": chip, **answer}
                    print(line(answers[index], module.describe), flush=True)
            finally:
                worker.stop()

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work) for _ in range(jobs)]:
            future.result()
    return answers


def line(answer: dict, describe) -> str:
    """One case of the printed table, the kernels of it on lines of their own."""
    head = f"{answer['outcome']:8}{answer['chip']:5} {answer['case']:58}"
    if "seconds" in answer:
        head += f" {answer['seconds']:5.1f} s"
    if answer["outcome"] != "ok":
        head += f"  {answer['why']}"
    return "\n".join([head, *(" " * 14 + describe(x) for x in answer.get("kernels", ()))])


def main(arguments: list[str] | None = None) -> int:
    """0 when no case failed."""
    options = parse(arguments)
    target = importlib.import_module(f"benchmarks.aot.{options.target}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    from benchmarks.aot.cases import all_cases

    cases = all_cases(target.IMPLEMENTATION)
    chips = target.CHIPS
    if options.small:
        cases, chips = [case for case in cases if case.small], target.SMALL_CHIPS
    names = [case.name for case in cases if options.only in case.name]
    if not names:
        print(f"no case of {target.IMPLEMENTATION!r} has {options.only!r} in its name")
        return 1

    requests = [(name, chip) for name in names for chip in chips]
    answers = compile_all(options.target, requests, options.jobs, options.seconds)
    count = {
        outcome: sum(answer["outcome"] == outcome for answer in answers)
        for outcome in ("ok", "refused", "failed")
    }
    print(", ".join(f"{number} {outcome}" for outcome, number in count.items()))
    if options.output:
        record = {
            "target": options.target,
            "date": datetime.date.today().isoformat(),
            "jax": version("jax"),
            "cases": answers,
        }
        records.write(options.output, record, rows="cases")
        print(f"written to {options.output}")
    return 1 if count["failed"] else 0


def parse(arguments):
    """The command line; the whole run is written to results/ unless told otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("target", choices=("tpu", "h100"))
    parser.add_argument("--small", action="store_true", help="a few cases that stand for all")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=180, help="time limit of a case")
    parser.add_argument("--output", type=Path, help="where to write JSON")
    options = parser.parse_args(arguments)
    if options.output is None and not options.small and not options.only:
        options.output = RESULTS / f"aot_{options.target}.json"
    return options


if __name__ == "__main__":
    sys.exit(main())
