"""Every model of the walk on one split, beside published figures."""

import itertools
import math
import time
from typing import Any

import jax

from jaxformer import nn
from jaxformer.data import training_batches
from jaxformer.models import build
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.published import PRONUNCIATION
from jaxformer.training.run import vocabularies
from jaxformer.training.state import init_state
from jaxformer.training.step import make_train_step
from lessons.drawing import COLORS, panels
from lessons.framework import Lesson, Results, table
from lessons.runs import errors, examples, predict, trained
from lessons.training import pairs

ARMS = {
    "g2p-lstm": "LSTM, final state alone",
    "g2p-lstm-uniform": "LSTM, uniform mean",
    "g2p-bahdanau": "LSTM, additive attention",
    "g2p-luong": "LSTM, multiplicative attention",
    "g2p-ctc": "Transformer encoder, CTC",
    "g2p-hybrid": "hybrid of CTC and attention",
    "g2p-transformer": "Transformer",
}
ROUNDS = 4
STEPS = 2  # of each model in a round


def measure(*, small: bool, seed: int) -> Results:
    arms = list(ARMS)[:1] if small else list(ARMS)
    found = {arm: scores(arm, small=small) for arm in arms}
    costs = step_costs(arms, small=small, seed=seed)
    if small:  # One model stands for all.
        found, costs = dict.fromkeys(ARMS, found[arms[0]]), dict.fromkeys(ARMS, costs[arms[0]])
    data, _ = pairs(trained(arms[0], small=small).config.data)
    config = trained(arms[0], small=small).config
    return {
        "models": {arm: found[arm] | costs[arm] for arm in ARMS},
        "words": {split: len(held.examples) for split, held in data.splits.items()},
        "steps": config.train.steps,
        "batch": config.train.batch_size,
        "published": [{"name": name, "per": per, "wer": wer} for name, per, wer in PRONUNCIATION],
    }


def scores(preset: str, *, small: bool) -> dict[str, Any]:
    """A model's errors on the test split, by beam search as its run ended, and greedy."""
    run = trained(preset, small=small)
    chosen = examples(run, "test", 8 if small else 10**6)
    return {
        "parameters": nn.count(run.params),
        "minutes": run.minutes,
        "beam": run.scores,
        "greedy": errors(predict(run, chosen, beam=1), chosen).rates,
    }


def step_costs(arms: list[str], *, small: bool, seed: int) -> dict[str, dict[str, float]]:
    """Time of a training step by model, their steps taken in turn; the quickest round counts.

    Processor time does not count what other programs of the machine took.
    """
    steps: dict[str, Any] = {}
    for arm in arms:
        config = trained(arm, small=small).config
        data, tokenizers = pairs(config.data)
        model = build(config.model, **vocabularies(tokenizers, config.data), seed=seed)
        apply, params = nn.pure(model)
        optimizer = make_optimizer(config.optimizer, config.train.steps, nn.parameter_axes(model))
        schedule = make_schedule(config.optimizer, config.train.steps)
        step = jax.jit(make_train_step(apply, optimizer, schedule, config.train, config.seed))
        rows = config.train.batch_size
        with training_batches(data, config.data, batch_size=rows, seed=seed) as batches:
            batch = next(batches)
        state = init_state(params, optimizer)
        jax.block_until_ready(step(state, batch))
        steps[arm] = (step, state, batch)
    found = {arm: {"milliseconds": [], "cpu_milliseconds": []} for arm in arms}
    for _ in range(ROUNDS):
        for arm, (step, state, batch) in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            found[arm]["milliseconds"].append(1e3 * (time.perf_counter() - wall) / STEPS)
            found[arm]["cpu_milliseconds"].append(1e3 * (time.process_time() - cpu) / STEPS)
    return {arm: {name: min(times) for name, times in row.items()} for arm, row in found.items()}


def claims(results: Results) -> dict[str, bool]:
    models = results["models"]
    wer = {arm: found["beam"]["wer"] for arm, found in models.items()}
    per = {arm: found["beam"]["per"] for arm, found in models.items()}
    gained = {arm: found["greedy"]["wer"] - wer[arm] for arm, found in models.items()}
    cost = {arm: found["cpu_milliseconds"] for arm, found in models.items()}
    walk = ["g2p-lstm", "g2p-lstm-uniform", "g2p-luong", "g2p-bahdanau", "g2p-transformer"]
    without = [wer["g2p-ctc"], wer["g2p-hybrid"], wer["g2p-transformer"]]
    parameters = [found["parameters"] for found in models.values()]
    return {
        "final state > uniform mean > Luong > Bahdanau > Transformer, each by 1.5 % and more": all(
            wer[worse] - wer[better] > 1.5 for worse, better in itertools.pairwise(walk)
        ),
        "the three without recurrence are within a percent of each other": (
            max(without) - min(without) < 1
        ),
        "and below all others": max(without) < min(wer[arm] for arm in walk[:-1]),
        "CTC has the fewest wrong phonemes": per["g2p-ctc"] == min(per.values()),
        "a beam brings the final state the most, and CTC the least": (
            max(gained, key=lambda arm: gained[arm]) == "g2p-lstm"
            and min(gained, key=lambda arm: gained[arm]) == "g2p-ctc"
        ),
        "no more than two percent, and to CTC less than a tenth": (
            gained["g2p-lstm"] < 2 and gained["g2p-ctc"] < 0.1
        ),
        "a step of any recurrent model is cheaper than one of any other": (
            max(cost[arm] for arm in walk[:-1])
            < min(cost[arm] for arm in ("g2p-ctc", "g2p-hybrid", "g2p-transformer"))
        ),
        "and CTC's is the dearest": max(cost, key=lambda arm: cost[arm]) == "g2p-ctc",
        "all models have between 0.88 and 1.01 million parameters": (
            min(parameters) > 880_000 and max(parameters) < 1_010_000
        ),
    }


def figures(results: Results) -> dict[str, Any]:
    return {"errors": draw_errors(results)}


def draw_errors(results: Results) -> Any:
    figure, [axis] = panels(1, height=4.0)
    figure.set_figwidth(7.6)
    bars = [(ARMS[arm], found["beam"]["wer"], 0) for arm, found in results["models"].items()]
    bars += [(row["name"], row["wer"], 1) for row in results["published"]]
    bars.sort(key=lambda bar: -bar[1])
    axis.barh(
        [name for name, _, _ in bars],
        [wer for _, wer, _ in bars],
        color=[COLORS[published] for _, _, published in bars],
    )
    for place, (_, wer, _) in enumerate(bars):
        axis.annotate(f"{wer:.1f}", (wer + 0.4, place), va="center", fontsize=8)
    axis.set(xlabel="wrong words (%)", xlim=(0, 45))
    axis.annotate(
        "blue: here\norange: published,\non other splits",
        (1, 1),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=9,
    )
    axis.grid(visible=False)
    return figure


def values(results: Results) -> dict[str, Any]:
    rows = [
        (
            f"{ARMS[arm]} (`{arm}`)",
            f"{found['parameters']:,}",
            f"{found['minutes']:.1f}",
            f"{found['cpu_milliseconds']:.0f}",
            f"{found['greedy']['wer']:.2f}",
            f"{found['greedy']['per']:.2f}",
            f"{found['beam']['wer']:.2f}",
            f"{found['beam']['per']:.2f}",
        )
        for arm, found in results["models"].items()
    ]
    rows += [
        (row["name"], "", "", "", "", "", f"{row['wer']:.2f}", f"{row['per']:.2f}")
        for row in results["published"]
    ]
    return {
        "everything_table": table(
            (
                "",
                "parameters",
                "minutes",
                "CPU ms a step",
                "WER %, greedy",
                "PER %, greedy",
                "WER %, beam 4",
                "PER %, beam 4",
            ),
            rows,
        ),
        "wer": {arm: f"{found['beam']['wer']:.1f}" for arm, found in results["models"].items()},
        "per": {arm: f"{found['beam']['per']:.2f}" for arm, found in results["models"].items()},
        "gain": {
            arm: f"{found['greedy']['wer'] - found['beam']['wer']:.1f}"
            for arm, found in results["models"].items()
        },
        "epochs": results["steps"] * results["batch"] / results["words"]["train"],
        "standard_error": 100 * math.sqrt(0.3 * 0.7 / results["words"]["test"]),
    }


LESSON = Lesson(
    number=11,
    name="every-model",
    title="Every model of the walk",
    summary="parameters, training time and error of all of them on one split.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
