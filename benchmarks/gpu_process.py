"""Processes of the GPU suite: whatever hangs or crashes the device takes its own process with it.

A part of the suite asks, `serve` answers, in a process started anew after one that had to be
killed. Loads no jax, for the process may be torch's.
"""

import dataclasses
import importlib
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import contest

# Processes share the device, so none takes memory that it does not use yet.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_CLIENT_MEM_FRACTION": "0.65",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
READY_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every part of the suite is told.

    Attributes:
        output: folder of records and logs.
        deadline: `time.monotonic()` at which a part begins nothing new.
        dry: tiny sizes on the CPU, with `xla` in place of the GPU's kernels.
        only: texts, with commas between, of which the name of a case must hold one.
        turns: of every contender.
        repeats: reruns that must be bitwise equal.
    """

    output: Path
    deadline: float
    dry: bool = False
    only: str = ""
    turns: int = 7
    repeats: int = 100

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def kernel(self) -> str:
        """The implementation under test."""
        return "xla" if self.dry else "mosaic_gpu"

    def wants(self, name: str) -> bool:
        """Whether a case of this name is to run."""
        return any(text in name for text in self.only.split(","))

    def within(self, seconds: float) -> float:
        """So many seconds, or what is left, but enough to say something."""
        return max(5.0, min(seconds, self.left))


class Process:
    """A child of one part; it is started when it is first asked, and again after it was lost.

    What is dry is answered in this process.
    """

    def __init__(
        self,
        module: str,
        settings: Settings,
        *,
        environment: Mapping[str, str] | None = None,
    ):
        self._module, self._settings = module, settings
        self._environment = ENVIRONMENT | dict(environment or {})
        self._child: contest.Contender | None = None
        # What is dry may take seconds in all, not seconds for every process.
        self._here = serve(module)[0] if settings.dry else None

    def ask(self, seconds: float, **arguments: Any) -> dict[str, Any]:
        """What `answer` of the module returns; or {"hung": why}, {"failed": why}, {"cut_off": why}.

        Cut off is who might have answered, had the part's time not been over.
        """
        if self._here is not None:
            return self._here(**arguments)
        try:
            child = self._child or self._start()
            _, facts = child.turn_within(seconds, **arguments)
        except contest.HungError as error:
            self._child = None
            return {"cut_off" if self._settings.left <= 0 else "hung": str(error)}
        except contest.ContestError as error:
            self._child = None
            return {"failed": f"{error}: see {self._log.name}"}
        return facts

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _log(self) -> Path:
        return self._settings.output / f"{self._module.rpartition('.')[2]}.log"

    def _start(self) -> contest.Contender:
        self._settings.output.mkdir(parents=True, exist_ok=True)
        self._child = contest.Contender(
            "benchmarks.gpu_process:serve",
            {"module": self._module},
            env=self._environment,
            log=self._log,
            timeout=READY_SECONDS,
        )
        return self._child


def serve(module: str) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    """A contender whose turn is `answer(state, **arguments)` of the module."""
    answer = importlib.import_module(module).answer
    state: dict[str, Any] = {}

    def turn(**arguments: Any) -> dict[str, Any]:
        try:
            return answer(state, **arguments)
        except Exception as error:
            traceback.print_exc()
            told = " ".join(str(error).split())
            return {"failed": f"{type(error).__name__}: {told[:300]}"}

    return turn, {"pid": os.getpid()}
