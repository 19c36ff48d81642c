"""The input pipelines: tokens a second, and the share of a training that is no step.

`python -m benchmarks.data` reads every kind of data that needs no file, checks that batches are the
same with and without worker processes and that an epoch holds every token once, and times them. It
then trains, by train.py itself, and notes how long its loop waits for batches, for logging and for
checkpoints.
"""

import argparse
import dataclasses
import importlib.util
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import measure
from jaxformer import presets
from jaxformer.config import CheckpointConfig, Config, EvalConfig, MeshConfig
from jaxformer.data import Data, build_tokenizers, encode_corpus, load_corpus, training_batches
from jaxformer.errors import JaxformerError
from jaxformer.runtime import keep_compiled

ROOT = Path(__file__).resolve().parent.parent
PIPELINES = {
    "characters": "shakespeare-char-cpu",
    "text": "text",
    "pronunciation": "g2p",
    "digits": "digits-ctc",
}
"""Names and the presets whose data and batches they are."""


class ParityError(AssertionError):
    """A pipeline that yields something else than it should."""


def configuration(pipeline: str, folder: Path, *, small: bool) -> Config:
    """The preset of a pipeline; its text is the running Python's library, in small a short file."""
    config = presets.get(PIPELINES[pipeline])
    data = config.data
    if small and data.kind == "pronunciation":
        words = ["".join(letters) for letters in itertools.product("abcde", repeat=4)]
        path = folder / "pairs.tsv"
        path.write_text("".join(f"{word}\t{' '.join(word.upper())}\n" for word in words))
        data = dataclasses.replace(
            data, kind="pairs", files=(str(path),), tokenizer="character", target_tokenizer="word"
        )
    if small and data.kind == "text":
        path = folder / "text.txt"
        path.write_text("To be, or not to be, that is the question. " * 400)
        data = dataclasses.replace(
            data, files=(str(path),), split="tail", dev_fraction=0.1, test_fraction=0.1
        )
    if small and data.kind == "digits":
        data = dataclasses.replace(data, lines=200)
    model = config.model
    if small:
        model = dataclasses.replace(model, layers=1, width=16, heads=2)
    return dataclasses.replace(config, data=data, model=model)


def tokens_of(data: Data) -> int:
    """Target tokens of the train split: what an epoch must hold, no more and no less."""
    split = data.splits["train"]
    return len(split.documents.tokens if hasattr(split, "documents") else split.targets.tokens)


def check(config: Config, data: Data, workers: tuple[int, ...]) -> None:
    """Raises ParityError where an epoch misses tokens or workers change a batch."""
    rows = config.train.batch_size
    with training_batches(data, config.data, batch_size=rows, seed=0) as batches:
        epoch = list(itertools.islice(batches, batches.batches_per_epoch))
    found, wanted = int(sum(batch["weights"].sum() for batch in epoch)), tokens_of(data)
    if found != wanted:
        raise ParityError(f"an epoch holds {found:,} tokens, the data {wanted:,}")
    for count in workers:
        own = dataclasses.replace(config.data, workers=count)
        with training_batches(data, own, batch_size=rows, seed=0) as batches:
            for number, (batch, other) in enumerate(zip(batches, epoch[:20], strict=False)):
                if any(not np.array_equal(batch[name], other[name]) for name in other):
                    raise ParityError(f"batch {number} differs with {count} workers")


def pipeline_rows(name: str, config: Config, *, workers: tuple[int, ...], count: int) -> list[dict]:
    """A row for each number of workers: tokens a second, `count` batches after the first."""
    start = time.perf_counter()
    corpus = load_corpus(config.data)
    read = time.perf_counter()
    data = encode_corpus(corpus, build_tokenizers(corpus, config.data), config.data)
    encoded = time.perf_counter()
    check(config, data, workers)
    rows = []
    for number in workers:
        own = dataclasses.replace(config.data, workers=number)
        with training_batches(data, own, batch_size=config.train.batch_size, seed=0) as batches:
            next(batches)
            begin = time.perf_counter()
            tokens = sum(
                float(batch["weights"].sum()) for batch in itertools.islice(batches, count)
            )
            seconds = time.perf_counter() - begin
        rows.append(
            {
                "part": "pipeline",
                "pipeline": name,
                "workers": number,
                "rows": config.train.batch_size,
                "ms_a_batch": 1e3 * seconds / count,
                "tokens_per_s": round(tokens / seconds),
                "tokens": tokens_of(data),
                "read_s": read - start,
                "encode_s": encoded - read,
                "parity": "same batches, every token once",
            }
        )
    return rows


def training_row(name: str, config: Config, folder: Path, *, steps: int) -> dict[str, Any]:
    """Trains and says what share of the loop went to batches, logging and checkpoints.

    Saving is measured twice in the run and counted at the preset's own interval; the first save
    loads Orbax, once a run, and stands apart.
    """
    every = config.checkpoint.every
    config = dataclasses.replace(
        config,
        run=str(folder / f"run-{name}"),
        train=dataclasses.replace(config.train, steps=steps),
        eval=EvalConfig(every=0, batch_size=32, max_batches=1, final_examples=8),
        checkpoint=CheckpointConfig(every=max(steps // 3, 1)),
        mesh=MeshConfig(data=1),
    )
    program = _train_program()
    seconds: dict[str, list[float]] = {"waiting": [], "logging": [], "saving": [], "loop": []}
    batches, progress = program.BatchIterator, program.TrainingProgress
    with (
        _noted(batches, "__next__", seconds["waiting"]),
        _noted(progress, "count", seconds["logging"]),
        _noted(progress, "show", seconds["logging"]),
        _noted(program.Tracker, "write", seconds["logging"]),
        _noted(program.Checkpoints, "save", seconds["saving"]),
        _noted(program.report, "finite", seconds["logging"]),
        _spanned(progress, seconds["loop"]),
        _Replaced(program.report, "text_samples", lambda before: lambda *given: []),
    ):
        program.train(config, Console(file=io.StringIO()))
    loop = seconds["loop"][0] - sum(seconds["saving"])
    later = seconds["saving"][1:]
    save = sum(later) / max(len(later), 1)
    step = loop / steps
    return {
        "part": "training",
        "pipeline": name,
        "workers": config.data.workers,
        "steps": steps,
        "step_ms": 1e3 * step,
        "waiting_percent": 100 * sum(seconds["waiting"]) / loop,
        "logging_percent": 100 * sum(seconds["logging"]) / loop,
        "save_ms": 1e3 * save,
        "saving_percent": 100 * save / (max(every, 1) * step),
        "first_save_ms": 1e3 * seconds["saving"][0],
    }


def _train_program() -> Any:
    """train.py as a module; benchmarks/train.py has the same name."""
    spec = importlib.util.spec_from_file_location("train_program", ROOT / "train.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    from jaxformer.data import BatchIterator

    program.BatchIterator = BatchIterator  # type: ignore[attr-defined]
    return program


class _Replaced:
    """A method in place of a class's own while this context is open."""

    def __init__(self, owner: Any, name: str, make: Callable[..., Any]):
        self.owner, self.name, self.before = owner, name, getattr(owner, name)
        self.method = make(self.before)

    def __enter__(self) -> None:
        setattr(self.owner, self.name, self.method)

    def __exit__(self, *exception: object) -> None:
        setattr(self.owner, self.name, self.before)


def _noted(owner: Any, name: str, seconds: list[float]) -> _Replaced:
    """Notes how long every call takes."""

    def make(before: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return before(*given, **named)
            finally:
                seconds.append(time.perf_counter() - start)

        return noted

    return _Replaced(owner, name, make)


def _spanned(progress: Any, seconds: list[float]) -> _Replaced:
    """Notes how long the loop takes: from the first call of `count` to the end."""

    def make(before: Callable[..., Any]) -> Callable[..., Any]:
        def leave(self: Any, *exception: object) -> None:
            seconds.append(time.perf_counter() - self.began)
            before(self, *exception)

        return leave

    return _Replaced(progress, "__exit__", make)


def _wanted(names: list[str]) -> Iterator[str]:
    for name in names:
        if name == "digits" and importlib.util.find_spec("sklearn") is None:
            print(
                "digits: left out, scikit-learn is not installed (pip install 'jaxformer[digits]')"
            )
            continue
        yield name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--small", action="store_true", help="seconds: parity, not speed")
    parser.add_argument(
        "--pipeline", action="append", choices=sorted(PIPELINES), help="may be repeated; all"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--steps", type=int, default=120, help="of the training")
    parser.add_argument(
        "--train",
        action="append",
        choices=["none", *sorted(PIPELINES)],
        help="pipelines to train on; default: characters",
    )
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    options = parser.parse_args(arguments)
    if min(options.workers) < 0 or min(options.batches, options.steps) < 1:
        parser.error("--workers must not be negative, --batches and --steps positive")
    if options.small:
        options.batches, options.steps = 6, 6
    keep_compiled()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            for pipeline in _wanted(options.pipeline or list(PIPELINES)):
                config = configuration(pipeline, folder, small=options.small)
                workers = tuple(options.workers)
                rows += pipeline_rows(pipeline, config, workers=workers, count=options.batches)
            for pipeline in _wanted(options.train or ["characters"]):
                if pipeline != "none":
                    config = configuration(pipeline, folder, small=options.small)
                    rows.append(training_row(pipeline, config, folder, steps=options.steps))
        except (JaxformerError, ParityError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    for part in ("pipeline", "training"):
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            print(measure.table(chosen), end="\n\n")
    print(measure.write("data", {"rows": rows}, folder=options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
