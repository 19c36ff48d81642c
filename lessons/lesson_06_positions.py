"""Self-attention without recurrence: where order comes from, and how far it reaches."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import models, nn
from jaxformer.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxformer.data import EOS, Example, PairCorpus, Tokenizers, load_corpus
from jaxformer.decoding import make_translate
from jaxformer.metrics import token_error_rate
from lessons.drawing import legend, line, panels
from lessons.framework import Lesson, Results, table
from lessons.training import Trained, train_seeds, words

Position = Literal["none", "learned", "sinusoidal", "rotary", "alibi", "relative"]
KINDS: tuple[Position, ...] = get_args(Position)
SHORT, LONG = 8, 16  # letters: the longest trained on, the longest tested on
CONTROL = "rotary, trained on all lengths"


def measure(*, small: bool, seed: int) -> Results:
    seeds = [seed]
    kinds: tuple[Position, ...] = ("none", "rotary") if small else KINDS
    tested = test_words(3 if small else 60, small=small)
    pairs = anagrams(2 if small else 40, small=small)
    spellings = [word for word, _ in itertools.chain(*tested.values())]
    flat = [word for pair in pairs for word in pair]
    found: dict[str, Any] = {"errors": {}, "same_for_anagrams": {}, "loss": {}}
    arms: list[tuple[Position, int]] = [*((kind, SHORT) for kind in kinds), ("rotary", LONG)]
    for kind, letters in arms:
        name = kind if letters == SHORT else CONTROL
        config = dataclasses.replace(experiment(kind, letters, small=small), seed=seed)
        runs = train_seeds(config, seeds)
        pronounce = pronouncer(runs[0])
        # All words at once, so that one shape is compiled.
        predicted = [pronounce(run, spellings + flat) for run in runs]
        found["errors"][name] = [errors(found_by, tested) for found_by in predicted]
        alike = [
            spoken[place] == spoken[place + 1]
            for spoken in predicted
            for place in range(len(spellings), len(spoken), 2)
        ]
        found["same_for_anagrams"][name] = float(np.mean(alike))
        found["loss"][name] = [float(run.metrics["loss"][-50:].mean()) for run in runs]
    config = experiment("none", SHORT, small=small)
    return found | {
        "lengths": list(tested),
        "words": [len(entries) for entries in tested.values()],
        "anagram_pairs": len(pairs),
        "seeds": len(seeds),
        "short": SHORT,
        "long": LONG,
        "steps": config.train.steps,
        "batch": config.train.batch_size,
        "width": config.model.width,
        "encoder_layers": config.model.encoder_layers,
        "equivariance": {kind: equivariance(kind, seed) for kind in kinds},
    }


def experiment(kind: Position, letters: int, *, small: bool) -> Config:
    """A small spelling-to-pronunciation model with one way to tell places."""
    return Config(
        data=words(letters=letters, small=small),
        model=ModelConfig(
            layers=1,
            encoder_layers=2,
            width=16 if small else 64,
            heads=4,
            feedforward=32 if small else 128,
            position=kind,
            max_length=LONG + 8,
            scan=False,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, schedule="linear", warmup_steps=30),
        train=TrainConfig(steps=4 if small else 500, batch_size=8 if small else 64),
    )


def test_words(each: int, *, small: bool) -> dict[int, list[tuple[str, list[list[str]]]]]:
    """Up to `each` words of every length with their pronunciations, of the dev and test split."""
    found: dict[int, list[Any]] = defaultdict(list)
    for example in examples(("dev", "test"), small=small):
        letters = len(example.source)
        if letters <= LONG and len(found[letters]) < each:
            references = [reference.split() for reference in example.references]
            found[letters].append((example.source, references))
    return {length: found[length] for length in range(3, LONG + 1) if found[length]}


def anagrams(most: int, *, small: bool) -> list[tuple[str, str]]:
    """Pairs of words of the same letters, of at most SHORT letters each."""
    groups = defaultdict(list)
    for example in examples(("train", "dev", "test"), small=small):
        if 5 <= len(example.source) <= SHORT:
            groups["".join(sorted(example.source))].append(example.source)
    pairs = [(group[0], group[1]) for group in groups.values() if len(group) > 1]
    if small:
        return [("listen", "silent")]
    places = np.linspace(0, len(pairs), min(most, len(pairs)), endpoint=False).astype(int)
    return [pairs[place] for place in places]


def examples(splits: tuple[str, ...], *, small: bool) -> list[Example]:
    """The words of CMUdict, by split."""
    corpus = whole_corpus(small)
    return [example for split in splits for example in corpus.splits[split]]


@functools.cache
def whole_corpus(small: bool) -> PairCorpus:
    """CMUdict, split; read once."""
    corpus = load_corpus(words(letters=LONG, small=small))
    assert isinstance(corpus, PairCorpus)
    return corpus


def pronouncer(like: Trained) -> Callable[[Trained, list[str]], list[list[str]]]:
    """A function from a model of this kind and words to phonemes, by greedy search."""
    translate = make_translate(like.apply, max_length=LONG + 7)

    def pronounce(run: Trained, sources: list[str]) -> list[list[str]]:
        source, real = encode(sources, run.tokenizers)
        rows = min(len(sources), 256)
        found = []
        for first in range(0, len(sources), rows):
            # The last rows once more fill up a batch: one shape is compiled.
            places = np.minimum(np.arange(first, first + rows), len(sources) - 1)
            beams = jax.device_get(translate(run.params, source[places], real[places]))
            for row in range(min(rows, len(sources) - first)):
                tokens = beams.tokens[row, 0, : beams.lengths[row, 0]].tolist()
                found.append(run.tokenizers.target.decode(tokens).split())
        return found

    return pronounce


def encode(sources: list[str], tokenizers: Tokenizers) -> tuple[np.ndarray, np.ndarray]:
    """Letters as ids and <eos>, int32[words, LONG + 1], and which of them are real."""
    assert tokenizers.source is not None
    ids = np.zeros((len(sources), LONG + 1), np.int32)
    for row, source in enumerate(sources):
        tokens = [*tokenizers.source.encode(source), EOS]
        ids[row, : len(tokens)] = tokens
    return ids, (ids != 0).astype(np.int32)


def errors(predicted: list[list[str]], tested: dict[int, list[Any]]) -> list[float]:
    """The phoneme error rate of every length."""
    rest = iter(predicted)
    return [
        token_error_rate([next(rest) for _ in entries], [references for _, references in entries])
        for entries in tested.values()
    ]


def equivariance(kind: Position, seed: int) -> float:
    """How much an untrained encoder's states change but for their order when its input is permuted.

    |encode(permuted x) - permuted encode(x)|, the largest, over the largest |encode(x)|.
    """
    config = dataclasses.replace(
        experiment(kind, SHORT, small=False).model, max_length=16, encoder_layers=2
    )
    apply, params = nn.pure(models.build(config, vocabulary=32, seed=seed))
    key, order_key = jax.random.split(jax.random.key(seed))
    x = jax.random.randint(key, (8, 16), 4, 32)
    order = jax.random.permutation(order_key, 16)
    encode = jax.jit(lambda tokens: apply(params, tokens, method="encode"))
    straight, permuted = encode(x), encode(x[:, order])
    return float(jnp.abs(permuted - straight[:, order]).max() / jnp.abs(straight).max())


def average(results: Results, name: str, low: int, high: int) -> float:
    """The mean phoneme error rate over words of `low` to `high` letters, every length alike."""
    places = [place for place, n in enumerate(results["lengths"]) if low <= n <= high]
    return float(np.mean([[run[place] for place in places] for run in results["errors"][name]]))


def claims(results: Results) -> dict[str, bool]:
    equivariance, same = results["equivariance"], results["same_for_anagrams"]
    short = {name: average(results, name, 3, SHORT) for name in results["errors"]}
    near = {name: average(results, name, SHORT + 1, 11) for name in results["errors"]}
    far = {name: average(results, name, 12, LONG) for name in results["errors"]}
    ordered = [kind for kind in KINDS if kind != "none"]
    return {
        "without positions a permuted input gives permuted states, to 1e-5": (
            equivariance["none"] < 1e-5
        ),
        "with any other kind it does not": all(equivariance[kind] > 1e-3 for kind in ordered),
        "without positions at least 19 in 20 pairs of anagrams are pronounced alike": (
            same["none"] >= 0.95
        ),
        "with any other kind at most one in five": all(same[kind] <= 0.2 for kind in ordered),
        "on short words none is worst, by ten points and more": all(
            short["none"] > short[kind] + 0.1 for kind in ordered
        ),
        "there learned and rotary positions are best, by five points and more": (
            max(short["learned"], short["rotary"])
            < min(short[kind] for kind in ("sinusoidal", "alibi", "relative")) - 0.05
        ),
        "on 9 to 11 letters rotary is best by ten points, and within ten points of the control": (
            near["rotary"] < min(near[kind] for kind in KINDS if kind != "rotary") - 0.1
            and near["rotary"] < near[CONTROL] + 0.1
        ),
        "on long words every kind loses fifteen points and more against its short words": all(
            far[kind] > short[kind] + 0.15 for kind in ordered
        ),
        "on long words the model that was trained on all lengths beats every other by 20 points": (
            all(far[kind] > far[CONTROL] + 0.2 for kind in KINDS)
        ),
    }


def figures(results: Results) -> dict[str, Any]:
    figure, (axis,) = panels(height=4.2)
    figure.set_size_inches(7.4, 4.6)
    for number, (name, runs) in enumerate(results["errors"].items()):
        errors = [100 * value for value in np.mean(runs, axis=0)]
        line(axis, results["lengths"], errors, number, name)
    axis.axvspan(results["lengths"][0], SHORT, color="0.92", zorder=0)
    axis.annotate(
        "lengths in training", (results["lengths"][0] + 0.1, 1.5), fontsize=8, color="0.4"
    )
    axis.set(xlabel="letters of the word", ylabel="phoneme error rate (%)", ylim=(0, None))
    legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)
    return {"lengths": figure}


def values(results: Results) -> dict[str, Any]:
    ranges = ((3, SHORT), (9, 11), (12, LONG))
    rows = [
        (
            name,
            f"{results['equivariance'].get(name, results['equivariance'].get('rotary', 0)):.0e}",
            f"{100 * results['same_for_anagrams'][name]:.0f}",
            *(f"{100 * average(results, name, *both):.1f}" for both in ranges),
        )
        for name in results["errors"]
    ]
    far = {name: average(results, name, 12, LONG) for name in results["errors"] if name != CONTROL}
    best = min(far, key=lambda name: far[name])
    return {
        "table": table(
            (
                "positions",
                "change when permuted",
                "anagrams alike, %",
                *(f"PER %, {low} to {high} letters" for low, high in ranges),
            ),
            rows,
        ),
        "best": best,
        "best_far": 100 * far[best],
        "rotary_near": 100 * average(results, "rotary", SHORT + 1, 11),
        "control_near": 100 * average(results, CONTROL, SHORT + 1, 11),
        "control_far": 100 * average(results, CONTROL, 12, LONG),
        "control": CONTROL,
        "fewest": min(results["words"]),
        "most": max(results["words"]),
    }


LESSON = Lesson(
    number=6,
    name="positions",
    title="Dropping recurrence: where does order come from?",
    summary="attention alone sees a set; six ways to give it order, and how far each reaches.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
