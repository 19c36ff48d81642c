"""Contenders in processes of their own that take turns.

Libraries in one process share an allocator and leave threads spinning in each other's turns. Here
each has a process, with its own peak of memory; while one works, the others wait at a pipe. `Here`
takes part in this process, for a library that leaves no thread spinning.

A contender is a function named "module:function". Its keyword arguments are JSON; it gets ready and
returns `turn`, or `(turn, facts)`: `turn()` does one turn's work to the end (and may return facts
of its own, or take arguments of JSON), `facts` is a dict of JSON.
"""

import importlib
import json
import os
import resource
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from benchmarks.measure import Times

_ROOT = Path(__file__).resolve().parent.parent


class ContestError(RuntimeError):
    """A contender's process ended early; the message holds the end of what it said."""


class HungError(ContestError):
    """A contender did not answer in time; it has been killed."""


class TakesTurns(Protocol):
    """What `race` runs."""

    def turn(self) -> tuple[float, dict[str, Any]]:
        """(seconds, facts) of one turn."""
        ...


class Here:
    """A program of this process; it returns when its work is done."""

    def __init__(self, program: Callable[[], Any]):
        self._program = program

    def turn(self) -> tuple[float, dict[str, Any]]:
        start = time.perf_counter()
        self._program()
        return time.perf_counter() - start, {}


class Contender:
    """One process that gets ready at once and then does a turn whenever it is asked to.

    Attributes:
        facts: what the function returned when it was ready, and `ready_s`, the seconds from the
            start of the process until then.
    """

    def __init__(
        self,
        target: str,
        options: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        log: Path | None = None,
        timeout: float | None = None,
    ):
        """Starts it.

        Args:
            target, options: the function and its keyword arguments.
            env: variables besides those of this process.
            python: the interpreter.
            log: file that what the process says is added to; else it goes where ours goes.
            timeout: seconds for getting ready and, where `turn` is given no others, for a turn.
        """
        self.target, self.timeout = target, timeout
        started = time.perf_counter()
        paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.contest", target, json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if log is None else log.open("a"),
            text=True,
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | dict(env or {}),
        )
        self.facts = self._answer(timeout)
        self.facts["ready_s"] = round(time.perf_counter() - started, 3)

    def turn(self, **arguments: Any) -> tuple[float, dict[str, Any]]:
        """(seconds, facts) of one turn; the arguments are what the contender's `turn` takes."""
        return self.turn_within(self.timeout, **arguments)

    def turn_within(self, timeout: float | None, **arguments: Any) -> tuple[float, dict[str, Any]]:
        """`turn`, but a contender that takes longer is killed.

        Raises:
            HungError: it took longer.
        """
        answer = self._ask(f"turn {json.dumps(arguments)}", timeout)
        return answer["seconds"], answer["facts"]

    def stop(self) -> dict[str, Any]:
        """Ends the process. Returns its `peak_mib` of resident memory."""
        answer = self._ask("stop", self.timeout)
        self._process.wait(timeout=60)
        return answer

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()

    def _ask(self, what: str, timeout: float | None) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer(timeout)

    def _answer(self, timeout: float | None) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            if not waiting.select(timeout):
                self.kill()
                raise HungError(f"{self.target} did not answer in {timeout:g} s; it was killed")
        line = self._process.stdout.readline()
        if not line:
            raise ContestError(
                f"{self.target} ended with status {self._process.wait()}; what it said is above"
            )
        return json.loads(line)


def race(
    contenders: Mapping[str, TakesTurns], *, turns: int, warm_up: int = 2, rest: float = 0.0
) -> "tuple[dict[str, Times], dict[str, dict[str, Any]]]":
    """Times of contenders that take turns, and the facts of each one's last turn.

    Args:
        contenders: by name.
        turns: that count, of each.
        warm_up: turns before them.
        rest: seconds before every turn, in which threads of the one before stop spinning.
    """
    # Here, for it loads jax, which a contender that is not of jax must not pay for.
    from benchmarks.measure import Times

    taken: dict[str, list[float]] = {name: [] for name in contenders}
    facts: dict[str, dict[str, Any]] = {}
    for turn in range(-warm_up, turns):
        for name, contender in contenders.items():
            time.sleep(rest)
            seconds, facts[name] = contender.turn()
            if turn >= 0:
                taken[name].append(seconds)
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}, facts


def _serve(target: str, options: str) -> None:
    # Whatever libraries print goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, function = target.split(":")
    made = getattr(importlib.import_module(module), function)(**json.loads(options))
    turn, facts = made if isinstance(made, tuple) else (made, {})
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        what, _, arguments = line.strip().partition(" ")
        if what == "stop":
            print(json.dumps({"peak_mib": round(_peak())}), file=answers, flush=True)
            return
        start = time.perf_counter()
        facts = turn(**json.loads(arguments or "{}")) or {}
        answer = {"seconds": time.perf_counter() - start, "facts": facts}
        print(json.dumps(answer), file=answers, flush=True)


def _peak() -> float:
    """MiB of memory that this process held at most."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, which on Linux counts what the parent held when it started this process.
        (line,) = (it for it in status.read_text().splitlines() if it.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    _serve(*sys.argv[1:])
