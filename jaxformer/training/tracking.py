"""Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases by option."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from jaxformer.config import Config, to_dict
from jaxformer.errors import JaxformerError
from jaxformer.training.distributed import is_main


class TrackingError(JaxformerError):
    """A tracker that is not installed; the message names the extra."""


def require_installed(config: Config) -> None:
    """Raises TrackingError if a tracker that is asked for is not installed, naming the extra."""
    asked = {
        "tensorboard": config.tracking.tensorboard,
        "wandb": config.tracking.wandb is not None,
    }
    for name, wanted in asked.items():
        if wanted and importlib.util.find_spec(name) is None:
            raise TrackingError(f"--tracking.{name} needs {name}: pip install 'jaxformer[{name}]'")


class Tracker:
    """Writes one line of metrics at a time, each with its step and kind (train or dev).

    Of several processes only the first writes.
    """

    def __init__(self, path: Path, config: Config, *, start_step: int = 0):
        self.path = path
        self.writers: list[Any] = []
        self.file = None
        if not is_main():
            return
        if config.tracking.tensorboard:
            self.writers.append(_TensorBoard(path.parent / "tensorboard"))
        if config.tracking.wandb:
            self.writers.append(_WeightsAndBiases(config, path.parent))
        if path.exists():
            forget_after(path, start_step)
        self.file = path.open("a", buffering=1)

    def write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Appends metrics of a step."""
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, "kind": kind, **metrics}) + "\n")
        for writer in self.writers:
            writer.write(step, {f"{kind}/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """Flushes and closes every writer."""
        if self.file is not None:
            self.file.close()
        for writer in self.writers:
            writer.close()


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind or all."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]


def forget_after(path: Path, step: int) -> None:
    """Removes lines after a step: a resumed run writes them anew. A line cut short goes too."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(line + "\n" for line in kept))
    replacement.replace(path)


class _TensorBoard:
    def __init__(self, folder: Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        self.writer = EventFileWriter(str(folder))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        values = [self.summary.Value(tag=name, simple_value=v) for name, v in metrics.items()]
        self.writer.add_event(self.event(step=step, summary=self.summary(value=values)))

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, config: Config, folder: Path):
        import wandb

        self.run = wandb.init(
            project=config.tracking.wandb, dir=str(folder), name=folder.name, config=to_dict(config)
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()
