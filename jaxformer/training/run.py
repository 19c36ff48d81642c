"""The run folder: what training leaves behind and prediction needs, and nothing from outside."""

import contextlib
import dataclasses
import datetime
import fcntl
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from jaxformer import config as configuration
from jaxformer import models
from jaxformer.config import Config, DataConfig
from jaxformer.data import Tokenizers, image_height
from jaxformer.errors import JaxformerError
from jaxformer.nn.parameters import Params, pure, statistics
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.distributed import from_main

SEEN_WITHIN = 60
"""Seconds after which a shared file system shows every machine a new folder."""


class RunError(JaxformerError):
    """A run folder that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class RunFolder:
    """The names inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole resolved configuration."""
        return self.path / "config.json"

    @property
    def tokenizers(self) -> Path:
        """Source and target tokenizer."""
        return self.path / "tokenizers"

    @property
    def checkpoints(self) -> Path:
        """One folder a step."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether any step was saved."""
        if not self.checkpoints.is_dir():
            return False
        return any(child.name.isdigit() for child in self.checkpoints.iterdir())

    @property
    def lock(self) -> Path:
        """Held by the run that trains here."""
        return self.path / "lock"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The page written at the end."""
        return self.path / "summary.md"

    @property
    def loss_curve(self) -> Path:
        """The figure that the summary shows."""
        return self.path / "loss.png"

    @property
    def alignment(self) -> Path:
        """The labels of a few sources in their frames (CTC)."""
        return self.path / "alignment.png"

    @property
    def line(self) -> Path:
        """A held-out image, to predict from (digits)."""
        return self.path / "line.png"


def open_run(config: Config) -> tuple[Config, RunFolder]:
    """The run folder of a configuration, and the configuration with its name filled in.

    A new run gets a new folder; a resumed one must exist, and keep all but the options that only
    change speed, length or reporting. Nothing is written. Of several processes the first looks and
    names the folder, for all. Raises RunError.
    """
    path = from_main(lambda: _run_path(config))
    return dataclasses.replace(config, run=path), RunFolder(Path(path))


def _run_path(config: Config) -> str:
    if config.run is None:
        if config.resume:
            raise RunError("--resume needs --run DIR, the folder to go on with")
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = f"runs/{config.preset}-{stamp}"
    else:
        path = config.run
    folder = RunFolder(Path(path))
    if config.resume:
        if not folder.config.exists():
            raise RunError(f"{folder.path} holds no run to resume; leave --resume out to start one")
        _check_unchanged(configuration.load(folder.config), config)
    else:
        _check_free(folder)
    return path


def _check_free(folder: RunFolder) -> None:
    if folder.config.exists():
        raise RunError(
            f"{folder.path} already holds a run: add --resume to go on with it, or choose "
            "another --run"
        )
    if folder.path.exists() and not folder.path.is_dir():
        raise RunError(f"{folder.path} is a file; choose another --run")


@contextlib.contextmanager
def claim(folder: RunFolder, *, resume: bool) -> Generator[None]:
    """Makes the folder and holds it for this run. Raises RunError if another one has it.

    Of several processes the first holds it, and all must see it.
    """
    with contextlib.ExitStack() as held:
        from_main(lambda: _hold(folder, resume, held))
        _await(folder.lock)
        yield


def _hold(folder: RunFolder, resume: bool, held: contextlib.ExitStack) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context(folder.lock.open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(
            f"another process trains in {folder.path}: wait for it, or choose another --run"
        ) from None
    if not resume:
        _check_free(folder)


def _await(lock: Path) -> None:
    for _ in range(SEEN_WITHIN):
        if lock.exists():
            return
        time.sleep(1)
    raise RunError(
        f"this process does not see {lock.parent}, which process 0 made: give a --run in a folder "
        "that all machines share"
    )


# What a resumed run may change; the rest of these groups decides what is computed on which data.
FREE: dict[str, tuple[str, ...]] = {
    "data": ("workers",),
    "model": ("scan", "remat", "attention"),
    "optimizer": (),
    "train": ("steps", "log_every"),
}


def _check_unchanged(old: Config, new: Config) -> None:
    before, after = configuration.to_dict(old), configuration.to_dict(new)
    changed = [] if old.seed == new.seed else ["seed"]
    for group, free in FREE.items():
        changed += [
            f"{group}.{name}"
            for name, value in before[group].items()
            if name not in free and value != after[group][name]
        ]
    if changed:
        raise RunError(
            f"a resumed run keeps its data, model, optimizer, batches and seed; changed: "
            f"{', '.join(changed)}. Leave them as they were, or start a new run"
        )


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready to predict."""

    folder: RunFolder
    config: Config
    tokenizers: Tokenizers
    apply: Any
    params: Params
    step: int


def load_run(path: str | Path, *, step: int | None = None) -> LoadedRun:
    """Reads a run folder, wherever it was moved to: the best checkpoint, or that of a step.

    Raises RunError, ConfigError or CheckpointError naming what is missing.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise RunError(f"{path} is not a folder; give a run folder, such as runs/g2p-...")
    config = configuration.load(folder.config)
    tokenizers = Tokenizers.load(folder.tokenizers)
    model = models.abstract(config.model, **vocabularies(tokenizers, config.data))
    apply, template = pure(model)
    if not folder.has_checkpoint:
        raise RunError(f"{path} has no checkpoint yet")
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    try:
        step = checkpoints.best if step is None else step
        params = checkpoints.restore_evaluated(
            template,
            statistics=statistics(model),
            ema=config.train.ema is not None,
            step=step,
        )
    finally:
        checkpoints.close()
    return LoadedRun(folder, config, tokenizers, apply, params, int(step or 0))


class Vocabularies(TypedDict):
    """Numbers of tokens, or the height of images, as `models.build` takes them."""

    vocabulary: int
    source_vocabulary: int | None
    image_height: int | None


def vocabularies(tokenizers: Tokenizers, data: DataConfig) -> Vocabularies:
    """What the data gives a model to read and to predict."""
    return {
        "vocabulary": len(tokenizers.target),
        "source_vocabulary": None if tokenizers.source is None else len(tokenizers.source),
        "image_height": image_height(data),
    }
