"""What a person sees while a model trains: a bar on a terminal, lines in a log file."""

import datetime
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINES_IN_A_LOG = 40


class TrainingProgress:
    """Shows step, loss, tokens a second and the time left. Use as a context manager."""

    def __init__(self, console: Console, *, start: int, steps: int):
        self.console = console
        self.steps = steps
        self.tokens = 0.0
        self.since = self.began = time.perf_counter()
        self.first = start
        self.line_every = max((steps - start) // LINES_IN_A_LOG, 1)
        self.next_line = start + self.line_every
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(
            "training", total=steps, completed=start, loss=float("nan"), speed=0.0
        )

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def count(self, tokens: float) -> None:
        """Adds the tokens of a step."""
        self.tokens += tokens

    def show(self, step: int, loss: float) -> float:
        """Shows a step that is done; returns tokens a second since the last call."""
        now = time.perf_counter()
        speed = self.tokens / max(now - self.since, 1e-9)
        self.bar.update(self.task, completed=step, loss=loss, speed=speed)
        if not self.console.is_terminal and step >= self.next_line:
            self.next_line = step + self.line_every
            self.console.print(
                f"step {step}/{self.steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  "
                f"{self._time_left(step, now)} left",
                highlight=False,
            )
        self.since, self.tokens = now, 0.0
        return speed

    def _time_left(self, step: int, now: float) -> datetime.timedelta:
        a_step = (now - self.began) / max(step - self.first, 1)
        return datetime.timedelta(seconds=round(a_step * (self.steps - step)))

    def pause(self) -> None:
        """Leaves the time until `resume` (an evaluation) out of the speed."""
        self.paused = time.perf_counter()

    def resume(self) -> None:
        """Ends a pause."""
        self.since += time.perf_counter() - self.paused

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(line, highlight=False)
