"""SIGINT and SIGTERM as a request to stop after the step at hand."""

import os
import signal
from types import FrameType

from jax.experimental import multihost_utils


class StopRequest:
    """While this context is open, a first signal asks to stop; a second SIGINT stops at once, and
    so does, where one process is the whole run, a second SIGTERM.

    Of `several` processes any may get it, and all stop after the same step, on which jax agrees in
    the background: it listens for SIGTERM itself, at the price of a local call a step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, several: bool = False) -> None:
        self.number: int | None = None
        self.several = several
        self._interrupted = False

    def __bool__(self) -> bool:
        return self.number is not None

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after every step."""
        if self.several and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return bool(self)

    def __enter__(self) -> "StopRequest":
        if self.several:
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._pass_on)}
        else:
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.several:
            # jax's own handler, which Python does not know, would let nothing end this process.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)
