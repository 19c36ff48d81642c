"""The trained models of the walk: read from runs/lessons, and trained there if they are not.

A preset takes some five minutes on two quiet cores, so `make lessons` takes about an hour where
none was trained before. The folder is `runs/lessons/<preset>`; another one than runs/lessons is
given by `python -m lessons --runs FOLDER`, or the environment variable LESSON_RUNS.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer import models, nn, presets
from jaxformer.config import Config
from jaxformer.data import Example, Tokenizers, source_batches
from jaxformer.decoding import Hypothesis, Translator, make_transcribe
from jaxformer.metrics import edit_distance
from jaxformer.nn.parameters import Params
from jaxformer.training.run import RunFolder, load_run, vocabularies
from lessons.framework import ROOT, LessonError
from lessons.training import pairs, words

FOLDER = "LESSON_RUNS"
BATCH = 64
SCORES = re.compile(r"\*\*this run\*\*, beam (\d+), [^|]*\| \*\*([\d.]+)\*\* \| \*\*([\d.]+)\*\*")
"""Phoneme and word error of a run's summary, in percent, and the beam they were reached with."""


@dataclass(frozen=True)
class Run:
    """A trained model."""

    config: Config
    tokenizers: Tokenizers
    apply: Any
    params: Params
    minutes: float
    """From the start of train.py to its last step."""
    scores: dict[str, float] = field(default_factory=dict)
    """`per` and `wer` of the test split in percent, and the `beam`."""


def runs_folder() -> Path:
    """Where the trained models lie."""
    return Path(os.environ.get(FOLDER) or ROOT / "runs" / "lessons")


@functools.cache
def trained(preset: str, *, small: bool = False) -> Run:
    """The model of a preset, trained if it is not there; a small one is untrained.

    Raises LessonError where its training fails or is still under way.
    """
    if small:
        return _untrained(preset)
    folder = RunFolder(runs_folder() / preset)
    if not folder.config.exists():
        print(f"    training {preset} into {folder.path}", flush=True)
        command = [sys.executable, ROOT / "train.py", preset, "--run", folder.path]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise LessonError(f"training failed: run `python train.py {preset}` and see why")
    if not folder.summary.exists():
        raise LessonError(
            f"{folder.path} is not finished: wait for it, or go on with "
            f"`python train.py {preset} --run {folder.path} --resume`"
        )
    run = load_run(folder.path)
    summary = folder.summary.read_text(encoding="utf-8")
    minutes = re.search(r"([\d.]+) minutes", summary)
    scores = SCORES.search(summary)
    return Run(
        config=run.config,
        tokenizers=run.tokenizers,
        apply=run.apply,
        params=run.params,
        minutes=float(minutes.group(1)) if minutes else 0.0,
        scores={}
        if scores is None
        else {
            "beam": int(scores.group(1)),
            "per": float(scores.group(2)),
            "wer": float(scores.group(3)),
        },
    )


def _untrained(preset: str) -> Run:
    """The kind of model that the preset has, with little width, as it was drawn."""
    whole = presets.get(preset)
    if whole.data.kind == "digits":
        data = dataclasses.replace(whole.data, lines=100)
    else:
        data = words(letters=12, small=True)
    config = dataclasses.replace(
        whole,
        data=data,
        model=dataclasses.replace(whole.model, layers=1, encoder_layers=1, width=16, heads=2),
        train=dataclasses.replace(whole.train, batch_size=8),
        eval=dataclasses.replace(whole.eval, batch_size=8),
    )
    _, tokenizers = pairs(config.data)
    model = models.build(config.model, **vocabularies(tokenizers, config.data))
    apply, params = nn.pure(model)
    scores = {"beam": config.decode.beam, "per": 100.0, "wer": 100.0}
    variables = nn.with_statistics(params, nn.statistics(model))
    return Run(config, tokenizers, apply, variables, 0.0, scores)


def examples(run: Run, split: str, most: int) -> list[Example]:
    """A fixed sample of a split: words at even distances in its order."""
    data, _ = pairs(run.config.data)
    found = data.splits[split].examples
    places = np.linspace(0, len(found), min(most, len(found)), endpoint=False).astype(int)
    return [found[place] for place in places]


_searches: dict[Any, Any] = {}  # one for each model and setting, so that each is compiled once


def predict(
    run: Run, chosen: Sequence[Example], *, params: Params | None = None, **options: Any
) -> list[Hypothesis]:
    """The best hypothesis for each example, with `options` in place of the run's decoding ones."""
    decode = dataclasses.replace(run.config.decode, **options)
    config = dataclasses.replace(run.config, decode=decode)
    key = (run.apply, config)
    if key not in _searches:
        _searches[key] = Translator(run.apply, run.tokenizers, config).translate
    return _searched(run, _searches[key], chosen, run.params if params is None else params)


def transcribe(run: Run, chosen: Sequence[Example], **options: Any) -> list[Hypothesis]:
    """The same of a CTC model, `options` being those of `decoding.make_transcribe`."""
    search = make_transcribe(run.apply, max_length=run.config.data.max_target_length, **options)
    return _searched(run, search, chosen, run.params)


def _searched(run: Run, search: Any, chosen: Sequence[Example], params: Params) -> list[Hypothesis]:
    """What a search finds. All batches are of one width, so that it is compiled once.

    Where it finds nothing that ends, the hypothesis is empty with a log-probability of 0.
    """
    sources = [example.source for example in chosen]
    batches = source_batches(sources, run.tokenizers, run.config.data, batch_size=BATCH)
    width = max(batch["source"].shape[1] for batch in batches)
    found = [Hypothesis("", 0.0, 0.0)] * len(chosen)
    for batch in batches:
        room = ((0, 0), (0, width - batch["source"].shape[1]))
        beams = jax.device_get(
            search(params, np.pad(batch["source"], room), np.pad(batch["source_segment_ids"], room))
        )
        for row, index in enumerate(batch["index"]):
            if index >= 0 and np.isfinite(beams.scores[row, 0]):
                tokens = beams.tokens[row, 0, : beams.lengths[row, 0]].tolist()
                found[index] = Hypothesis(
                    run.tokenizers.target.decode(tokens),
                    float(beams.log_probs[row, 0]),
                    float(beams.scores[row, 0]),
                )
    return found


@dataclass(frozen=True)
class Errors:
    """What is wrong in predictions, an array entry an example."""

    wrong: np.ndarray
    """bool: equal to no reference."""
    edits: np.ndarray
    """Phonemes to change for the closest reference."""
    length: np.ndarray
    """Phonemes of that reference."""

    @property
    def wer(self) -> float:
        """Share of examples that are wrong."""
        return float(self.wrong.mean())

    @property
    def per(self) -> float:
        """Edits a phoneme."""
        return float(self.edits.sum() / self.length.sum())

    @property
    def rates(self) -> dict[str, float]:
        """Both, in percent, and the standard error of the first (binomial)."""
        wer = self.wer
        error = np.sqrt(wer * (1 - wer) / len(self.wrong))
        return {"wer": 100 * wer, "wer_error": 100 * float(error), "per": 100 * self.per}

    def worse_than(self, other: "Errors") -> tuple[float, float]:
        """By how many percent of the same examples more are wrong, and the standard error."""
        difference = 100.0 * (self.wrong.astype(float) - other.wrong)
        return float(difference.mean()), float(difference.std() / np.sqrt(len(difference)))


def errors(predictions: Sequence[Hypothesis], chosen: Sequence[Example]) -> Errors:
    """Compares predictions with all references."""
    found = []
    for hypothesis, example in zip(predictions, chosen, strict=True):
        said = hypothesis.text.split()
        accepted = [reference.split() for reference in example.references]
        edits, negative = min((edit_distance(said, right), -len(right)) for right in accepted)
        found.append((said not in accepted, edits, -negative))
    wrong, edits, length = (np.array(column) for column in zip(*found, strict=True))
    return Errors(wrong, edits, length)
