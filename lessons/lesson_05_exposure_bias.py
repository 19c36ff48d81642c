"""Teacher forcing, free running and what lies between: exposure bias measured."""

from typing import Any

import jax
import numpy as np

from jaxformer.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    RecurrentConfig,
    SamplingConfig,
    TrainConfig,
)
from jaxformer.data import UNK, evaluation_batches
from jaxformer.decoding import make_translate, token_log_probs
from jaxformer.metrics import edit_distance
from lessons.drawing import legend, line, panels
from lessons.framework import Lesson, Results, table
from lessons.training import Trained, train, words

LETTERS = 8
ARMS = {
    "teacher": ("teacher forcing", SamplingConfig()),
    "linear": ("linear to 50 %, by token", SamplingConfig("linear", rate=0.5)),
    "sigmoid": ("inverse sigmoid to 50 %, by token", SamplingConfig("inverse_sigmoid", rate=0.5)),
    "sequence": (
        "linear to 50 %, by sequence",
        SamplingConfig("linear", scope="sequence", rate=0.5),
    ),
    "free": ("free running from the start", SamplingConfig("constant", rate=1.0)),
}
SPOILT = 2  # the place of the input that is replaced: the second phoneme
AFTER = 4  # predictions that are looked at behind it


def measure(*, small: bool, seed: int) -> Results:
    runs = {arm: train(experiment(arm, seed, small=small)) for arm in ARMS}
    # The models differ in nothing but parameters, so one of them serves to compile for all.
    first = runs["teacher"]
    batches = evaluation_batches(
        first.data, first.config.data, "dev", batch_size=8 if small else 256
    )
    batches = [_without_index(batch) for batch in batches[: 1 if small else 4]]
    look = make_look(first)
    translate = make_translate(first.apply, max_length=LETTERS + 1)
    found = {}
    for arm, run in runs.items():
        scores = score(run, batches, look, translate, seed)
        found[arm] = scores | {"last_loss": float(run.metrics["loss"][-30:].mean())}
    config = first.config
    return {
        "steps": config.train.steps,
        "batch": config.train.batch_size,
        "width": config.model.width,
        "letters": LETTERS,
        "words": sum(len(batch["source"]) for batch in batches),
        "spoilt": SPOILT,
        "arms": found,
    }


def experiment(arm: str, seed: int, *, small: bool) -> Config:
    """An LSTM encoder-decoder with attention, trained with the arm's inputs."""
    return Config(
        seed=seed,
        data=words(letters=LETTERS, small=small),
        model=ModelConfig(
            kind="recurrent",
            layers=1,
            width=16 if small else 96,
            embedding_scale=True,
            max_length=24,
            recurrent=RecurrentConfig(context="general", input_feeding=False),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=30),
        train=TrainConfig(
            steps=4 if small else 200, batch_size=8 if small else 64, sampling=ARMS[arm][1]
        ),
    )


def make_look(run: Trained) -> Any:
    """A compiled function from parameters and a batch to what the model says of the targets.

    That is their log-probabilities, and whether each is the likeliest token.
    """

    @jax.jit
    def look(params: Any, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits = run.apply(
            params,
            batch["source"],
            batch["inputs"],
            source_segment_ids=batch["source_segment_ids"],
        )
        return token_log_probs(logits, batch["targets"]), logits.argmax(-1) == batch["targets"]

    return look


def score(run: Trained, batches: Any, look: Any, translate: Any, seed: int) -> dict[str, Any]:
    """A model given the right prefix, its own, and one with a wrong phoneme in it."""
    losses, spoilt_losses, forced, own, edits, lengths, wrong = [], [], [], [], [], [], []
    after_right, after_wrong = [], []
    random = np.random.default_rng(seed)
    for batch in batches:
        used = batch["weights"] != 0
        log_probs, right = jax.device_get(look(run.params, batch))
        spoilt, _ = jax.device_get(look(run.params, spoil(batch, run, random)))
        # Words long enough for all places that are compared.
        long = batch["weights"].sum(1) > SPOILT + AFTER
        places = slice(SPOILT, SPOILT + AFTER)
        losses.append(-log_probs[long, places])
        spoilt_losses.append(-spoilt[long, places])
        forced.append(np.where(used, right, np.nan))
        found = translate(run.params, batch["source"], batch["source_segment_ids"])
        tokens = np.asarray(found.tokens[:, 0])[:, : used.shape[1]]
        tokens = np.pad(tokens, ((0, 0), (0, used.shape[1] - tokens.shape[1])))
        same = tokens == batch["targets"]
        own.append(np.where(used, same, np.nan))
        both = used[:, 1:]
        after_right.append(same[:, 1:][both & same[:, :-1]])
        after_wrong.append(same[:, 1:][both & ~same[:, :-1]])
        for row in range(len(tokens)):
            target = batch["targets"][row][used[row]].tolist()
            said = tokens[row, : found.lengths[row, 0]].tolist()
            edits.append(edit_distance(said, target[:-1]))
            lengths.append(len(target) - 1)
            wrong.append(said != target[:-1])
    forced, own = np.concatenate(forced), np.concatenate(own)
    clean, spoilt = np.concatenate(losses), np.concatenate(spoilt_losses)
    rise = spoilt - clean
    return {
        "forced_error": 100 * (1 - np.nanmean(forced)),
        "own_error": 100 * (1 - np.nanmean(own)),
        "forced_by_place": 100 * (1 - np.nanmean(forced, axis=0)[:LETTERS]),
        "own_by_place": 100 * (1 - np.nanmean(own, axis=0)[:LETTERS]),
        "clean_loss": clean.mean(0),
        "spoilt_loss": spoilt.mean(0),
        "rise": rise.mean(0),
        "rise_error": rise.std(0) / np.sqrt(len(rise)),
        "total_rise": float(rise.sum(1).mean()),
        "total_rise_error": float(rise.sum(1).std() / np.sqrt(len(rise))),
        "dev_loss": float(clean.mean()),
        "per": 100 * sum(edits) / sum(lengths),
        "wer": 100 * float(np.mean(wrong)),
        "error_after_right": _share_wrong(np.concatenate(after_right)),
        "error_after_wrong": _share_wrong(np.concatenate(after_wrong)),
    }


def _share_wrong(right: np.ndarray) -> float:
    """In percent; 0 of nothing."""
    return 100 * float((~right).sum()) / max(len(right), 1)


def spoil(batch: dict[str, Any], run: Trained, random: np.random.Generator) -> dict[str, Any]:
    """The same batch with another phoneme in the place of one of the inputs."""
    inputs = batch["inputs"].copy()
    first, last = UNK + 1, len(run.tokenizers.target)
    shift = random.integers(1, last - first, len(inputs))
    inputs[:, SPOILT] = first + (inputs[:, SPOILT] - first + shift) % (last - first)
    return batch | {"inputs": inputs}


def _without_index(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "index"}


def claims(results: Results) -> dict[str, bool]:
    arms = results["arms"]
    teacher, free = arms["teacher"], arms["free"]
    sampled = [arms[arm] for arm in ("linear", "sigmoid", "sequence")]

    def gap(found: dict[str, Any], place: int) -> float:
        return found["own_by_place"][place] - found["forced_by_place"][place]

    return {
        "every model errs more given its own prefix": all(
            found["own_error"] > found["forced_error"] + 3 for found in arms.values()
        ),
        "and the gap is wider at the sixth phoneme than at the second": all(
            gap(found, 5) > gap(found, 1) for found in arms.values()
        ),
        "after a wrong phoneme teacher forcing errs more than twice as often": (
            teacher["error_after_wrong"] > 2 * teacher["error_after_right"]
        ),
        "no scheduled sampling brings fewer wrong phonemes by half a percent": all(
            found["per"] > teacher["per"] - 0.5 for found in sampled
        ),
        "one wrong phoneme costs teacher forcing more than each kind of scheduled sampling": all(
            teacher["total_rise"] - found["total_rise"]
            > 2 * (teacher["total_rise_error"] + found["total_rise_error"])
            for found in sampled
        ),
        "and each of these more than twice as much as free running": all(
            found["total_rise"] > 2 * free["total_rise"] for found in sampled
        ),
        "most of the rise is at the next phoneme": teacher["rise"][0] > 0.7 * teacher["total_rise"],
        "from the third on it is below 0.3 nats": max(teacher["rise"][2:]) < 0.3,
        "free running has the highest loss and the most errors": all(
            free["dev_loss"] > found["dev_loss"] and free["per"] > found["per"]
            for found in (teacher, *sampled)
        ),
        "teacher forcing has the lowest loss": all(
            teacher["dev_loss"] < found["dev_loss"] for found in (*sampled, free)
        ),
    }


def figures(results: Results) -> dict[str, Any]:
    return {"places": draw_places(results), "spoilt": draw_spoilt(results)}


def draw_places(results: Results) -> Any:
    figure, axes = panels(2, height=3.2, sharey=True)
    places = list(range(1, results["letters"] + 1))
    for axis, name, title in (
        (axes[0], "forced_by_place", "given the right prefix"),
        (axes[1], "own_by_place", "given its own prefix"),
    ):
        for number, (arm, (label, _)) in enumerate(ARMS.items()):
            line(axis, places, results["arms"][arm][name][: len(places)], number, label)
        axis.set(title=title, xlabel="place in the pronunciation")
    axes[0].set(ylabel="wrong phonemes (%)", ylim=(0, None))
    legend(axes[1], fontsize=7.5, loc="lower right")
    return figure


def draw_spoilt(results: Results) -> Any:
    figure, axes = panels(1, height=3.2)
    for number, (arm, (label, _)) in enumerate(ARMS.items()):
        found = results["arms"][arm]
        places = list(range(1, len(found["rise"]) + 1))
        line(axes[0], places, found["rise"], number, label, error=found["rise_error"])
    axes[0].axhline(0, color="0.5", linewidth=1)
    axes[0].set_xticks(places)
    axes[0].set(xlabel="predictions after the wrong phoneme", ylabel="rise of the loss (nats)")
    legend(axes[0])
    return figure


def values(results: Results) -> dict[str, Any]:
    arms = results["arms"]
    return {
        "error_table": table(
            (
                "",
                "dev loss",
                "wrong, right prefix %",
                "wrong, own prefix %",
                "after a right one %",
                "after a wrong one %",
                "PER %",
                "WER %",
            ),
            [
                (
                    label,
                    f"{arms[arm]['dev_loss']:.2f}",
                    f"{arms[arm]['forced_error']:.1f}",
                    f"{arms[arm]['own_error']:.1f}",
                    f"{arms[arm]['error_after_right']:.0f}",
                    f"{arms[arm]['error_after_wrong']:.0f}",
                    f"{arms[arm]['per']:.1f}",
                    f"{arms[arm]['wer']:.1f}",
                )
                for arm, (label, _) in ARMS.items()
            ],
        ),
        "spoilt_table": table(
            ("", "loss, right prefix", "rise, next phoneme", "rise, sum of four"),
            [
                (
                    label,
                    f"{arms[arm]['dev_loss']:.2f}",
                    f"{arms[arm]['rise'][0]:+.2f} ± {arms[arm]['rise_error'][0]:.2f}",
                    f"{arms[arm]['total_rise']:+.2f} ± {arms[arm]['total_rise_error']:.2f}",
                )
                for arm, (label, _) in ARMS.items()
            ],
        ),
        "teacher": arms["teacher"],
        "free": arms["free"],
    }


LESSON = Lesson(
    number=5,
    name="exposure-bias",
    title="Teacher forcing, free running, scheduled sampling",
    summary="a model trained on right prefixes is read on its own: what that costs.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
