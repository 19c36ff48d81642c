"""What the decoder sees of the source: one state, the mean of all states, or attention to them."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxformer import nn
from jaxformer.config import Config, ModelConfig, OptimizerConfig, RecurrentConfig, TrainConfig
from jaxformer.data import Example
from lessons.drawing import legend, line, panels
from lessons.framework import Lesson, Results, mean_and_error, table
from lessons.runs import Errors, errors, predict, trained
from lessons.training import pairs, train_seeds, words

ARMS = {
    "g2p-lstm": "final state alone",
    "g2p-lstm-uniform": "uniform mean",
    "g2p-bahdanau": "additive attention (Bahdanau)",
    "g2p-luong": "multiplicative attention (Luong)",
    "g2p-transformer": "Transformer",
}
ORDER = ("g2p-lstm", "g2p-lstm-uniform", "g2p-luong", "g2p-bahdanau", "g2p-transformer")
BUCKETS = ((1, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 30))


def measure(*, small: bool, seed: int) -> Results:
    arms = list(ARMS)
    chosen = by_length(4 if small else 200, small=small)
    everything = [example for bucket in chosen for example in bucket]
    # Of a small run, one model stands for all.
    decoded = arms[:1] if small else arms
    wrong = {arm: decode(arm, everything, small=small) for arm in decoded}
    wrong |= {arm: wrong[arms[0]] for arm in arms if small}
    return {
        "buckets": [f"{low}–{high}" for low, high in BUCKETS[:-1]] + [f"{BUCKETS[-1][0]}+"],
        "sizes": [len(bucket) for bucket in chosen],
        "letters": [float(np.mean([len(e.source) for e in b])) if b else 0.0 for b in chosen],
        "arms": {arm: summary(arm, wrong[arm], chosen, small=small) for arm in arms},
        "differences": {
            f"{first} {second}": wrong[first].worse_than(wrong[second])
            for first, second in itertools.pairwise(arms)
        },
        "feeding": feeding(small=small, seed=seed),
    }


def by_length(most: int, *, small: bool) -> list[list[Example]]:
    """Test words of every bucket, at even distances in the order of the split."""
    data, _ = pairs(trained(next(iter(ARMS)), small=small).config.data)
    found = []
    for low, high in BUCKETS:
        inside = [e for e in data.splits["test"].examples if low <= len(e.source) <= high]
        places = np.linspace(0, len(inside), min(most, len(inside)), endpoint=False).astype(int)
        found.append([inside[place] for place in places])
    return found


def decode(preset: str, chosen: Sequence[Example], *, small: bool) -> Errors:
    """What a model gets wrong, by greedy search."""
    return errors(predict(trained(preset, small=small), chosen, beam=1), chosen)


def summary(
    preset: str, wrong: Errors, chosen: Sequence[Sequence[Example]], *, small: bool
) -> dict[str, Any]:
    """Errors by bucket, and those of the whole test split that the run ended with."""
    run = trained(preset, small=small)
    rates, start = [], 0
    for bucket in chosen:
        part = slice(start, start + len(bucket))
        start += len(bucket)
        if bucket:
            part = Errors(wrong.wrong[part], wrong.edits[part], wrong.length[part])
            rates.append(part.rates)
        else:
            rates.append({"wer": 0.0, "wer_error": 0.0, "per": 0.0})
    return {
        "rates": rates,
        "test": run.scores,
        "parameters": nn.count(run.params),
        "sampled": wrong.rates,
    }


def experiment(feeding: bool, *, small: bool) -> Config:
    """A small model with multiplicative attention."""
    return Config(
        data=words(letters=8, small=small),
        model=ModelConfig(
            kind="recurrent",
            layers=1,
            width=16 if small else 96,
            embedding_scale=True,
            max_length=24,
            recurrent=RecurrentConfig(context="general", input_feeding=feeding),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=30),
        train=TrainConfig(steps=4 if small else 150, batch_size=8 if small else 64),
    )


def feeding(*, small: bool, seed: int) -> dict[str, Any]:
    """Training losses with and without input feeding, at a small size."""
    seeds = [seed] if small else [seed, seed + 1]
    found: dict[str, Any] = {"seeds": len(seeds)}
    for name, fed in (("with", True), ("without", False)):
        config = experiment(fed, small=small)
        runs = train_seeds(config, seeds)
        last = [float(run.metrics["loss"][-50:].mean()) for run in runs]
        mean, error = mean_and_error(last)
        found[name] = {"last": last, "mean": mean, "error": error}
    return found | {
        "steps": config.train.steps,
        "batch": config.train.batch_size,
        "width": config.model.width,
    }


def claims(results: Results) -> dict[str, bool]:
    arms, fed = results["arms"], results["feeding"]
    wer = [arms[arm]["test"]["wer"] for arm in ORDER]
    lost = {arm: [row["wer"] for row in found["rates"]] for arm, found in arms.items()}
    attention = np.mean([lost["g2p-bahdanau"], lost["g2p-luong"]], axis=0)
    return {
        "each arm of the order errs at least 1.5 % of the words less than the one before": all(
            worse - better > 1.5 for worse, better in itertools.pairwise(wer)
        ),
        "all arms err more on words of 13 letters and more than on those of 5 and 6": all(
            row[-1] > row[1] for row in lost.values()
        ),
        "the final state alone loses more against attention on the longest words than on short": (
            lost["g2p-lstm"][-1] - attention[-1] > 5 + lost["g2p-lstm"][1] - attention[1]
        ),
        "on the longest words the uniform mean is within 5 % of the final state": (
            abs(lost["g2p-lstm-uniform"][-1] - lost["g2p-lstm"][-1]) < 5
        ),
        "and both kinds of attention are at least 10 % better than it": all(
            lost["g2p-lstm-uniform"][-1] - lost[arm][-1] > 10
            for arm in ("g2p-bahdanau", "g2p-luong")
        ),
        "input feeding makes no difference beyond two standard errors at the small size": (
            abs(fed["with"]["mean"] - fed["without"]["mean"])
            < 2 * (fed["with"]["error"] + fed["without"]["error"])
        ),
    }


def figures(results: Results) -> dict[str, Any]:
    return {"length": draw_length(results)}


def draw_length(results: Results) -> Any:
    figure, axes = panels(1, height=3.8)
    figure.set_figwidth(7.0)
    for number, (arm, found) in enumerate(results["arms"].items()):
        rates = found["rates"]
        line(
            axes[0],
            results["letters"],
            [row["wer"] for row in rates],
            number,
            ARMS[arm],
            error=[row["wer_error"] for row in rates],
        )
    axes[0].set_xticks(results["letters"], results["buckets"])
    axes[0].set(xlabel="letters", ylabel="wrong words (%)", ylim=(0, None))
    legend(axes[0])
    return figure


def values(results: Results) -> dict[str, Any]:
    fed = results["feeding"]
    return {
        "length_table": table(
            ("", *(f"{bucket} letters" for bucket in results["buckets"])),
            [
                (
                    ARMS[arm],
                    *(f"{row['wer']:.0f} ± {row['wer_error']:.0f}" for row in found["rates"]),
                )
                for arm, found in results["arms"].items()
            ],
        ),
        "test_table": table(
            ("", "parameters", "WER %", "PER %"),
            [
                (
                    ARMS[arm],
                    f"{found['parameters']:,}",
                    f"{found['test']['wer']:.2f}",
                    f"{found['test']['per']:.2f}",
                )
                for arm, found in results["arms"].items()
            ],
        ),
        "short": {arm: found["rates"][1] for arm, found in results["arms"].items()},
        "long": {arm: found["rates"][-1] for arm, found in results["arms"].items()},
        "fed": {
            name: f"{fed[name]['mean']:.3f} ± {fed[name]['error']:.3f}"
            for name in ("with", "without")
        },
    }


LESSON = Lesson(
    number=4,
    name="bottleneck",
    title="The bottleneck, and attention",
    summary="what the decoder sees of the source, and the error against the length of the word.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
