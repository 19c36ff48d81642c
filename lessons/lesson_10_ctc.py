"""Where CTC goes: a loss and a decoder, what it assumes, and what that costs."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformer import models, nn
from jaxformer.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxformer.data import EOS, PAD, SOS, Images, PairData, evaluation_batches, pair_batches
from jaxformer.decoding import ctc_align
from jaxformer.decoding.ngram import NGram
from jaxformer.models import model_inputs
from jaxformer.training.pictures import align
from jaxformer.training.run import vocabularies
from jaxformer_kernels import ctc_loss
from lessons.ctc_drawing import draw_digits, draw_lattice, draw_order
from lessons.framework import Lesson, Results, table
from lessons.runs import Run, errors, examples, predict, trained, transcribe
from lessons.training import minimise, pairs, train, words

WORD = ("knighthood", "N AY T HH UH D")
ORDER = 5
DIGITS_SHOWN = 6  # at least, so that there is something to see
LANGUAGE_WEIGHT, LENGTH_BONUS = 0.5, 0.5


def measure(*, small: bool, seed: int) -> Results:
    return {
        "lattice": lattice(small=small),
        "independence": independence(small=small, seed=seed),
        "room": room(small=small),
        "order": order(small=small, seed=seed),
        "frames": frames_of_the_run(small=small),
        "decoding": decoding(small=small),
        "hybrid": hybrid(small=small),
        "digits": digits(small=small),
    }


def lattice(*, small: bool) -> dict[str, Any]:
    """Posteriors over frames and labels, and the likeliest path, of one word."""
    run = trained("g2p-ctc", small=small)
    word, spoken = ("abba", "AE B AH") if small else WORD
    [batch] = pair_batches([f"{word}\t{spoken}"], run.tokenizers, run.config.data, batch_size=1)
    read = jax.jit(functools.partial(run.apply, method="predictions"))
    found = read(run.params, **model_inputs(_without_index(batch)))
    frames = int(found.lengths[0])
    labels = spoken.split()
    ids = jnp.asarray([run.tokenizers.target.encode(spoken)], jnp.int32)
    aligned = jax.jit(ctc_align)(found.logits, found.lengths, ids, jnp.array([len(labels)]))
    return {
        "word": word,
        "labels": labels,
        "frames": frames,
        "per_letter": run.config.model.ctc.upsample,
        "posteriors": np.asarray(aligned.posteriors[0, :frames]).round(4),
        "starts": np.asarray(aligned.starts[0]),
        "ends": np.asarray(aligned.ends[0]),
        "path_share": float(jnp.exp(aligned.log_probs - aligned.label_log_probs)[0]),
    }


def independence(*, small: bool, seed: int) -> dict[str, Any]:
    """The least loss that CTC reaches where two answers are equally right: A B, and B A.

    The logits themselves are fitted, from many starts: this is the best of any encoder.
    """
    starts, steps, frames = (4, 10, 4) if small else (32, 400, 8)
    labels = jnp.array([[1, 2], [2, 1]])

    def objective(logits: jax.Array, key: jax.Array) -> jax.Array:
        del key
        both = jnp.repeat(logits, 2, axis=0)
        rows = both.shape[0]
        losses = ctc_loss(
            both,
            jnp.full(rows, frames),
            jnp.tile(labels, (rows // 2, 1)),
            jnp.full(rows, 2),
        )
        return losses.sum() / 2

    first = jax.random.normal(jax.random.key(seed), (starts, frames, 3))
    logits, _ = minimise(objective, first, optax.adam(0.05), lambda key: key, steps=steps, seed=0)
    each = [float(objective(one[None], jax.random.key(0))) for one in logits]
    return {"starts": starts, "frames": frames, "ctc": min(each), "entropy": math.log(2)}


def room(*, small: bool) -> list[dict[str, float]]:
    """Training pairs that no path spells, by the number of frames that a letter becomes."""
    data, _ = pairs(trained("g2p-ctc", small=small).config.data)
    split = data.splits["train"]
    letters, _ = split.item_lengths
    spans = np.split(split.targets.tokens, np.cumsum(split.targets.lengths)[:-1])
    needed = np.array([len(s) - 1 + int((s[1:] == s[:-1]).sum()) for s in spans])
    return [
        {
            "per_letter": number,
            "impossible": int((needed > number * letters).sum()),
            "pairs": len(needed),
        }
        for number in (1, 2, 3)
    ]


def experiment(kind: str, seed: int, *, small: bool) -> Config:
    """A small model that learns to pronounce words of at most eight letters."""
    return Config(
        seed=seed,
        data=words(letters=8, small=small),
        model=ModelConfig(
            kind="ctc" if kind == "ctc" else "encoder_decoder",
            layers=1,
            encoder_layers=2 if kind == "ctc" else 1,
            width=16 if small else 64,
            heads=2,
            max_length=24,
            scan=False,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=30),
        train=TrainConfig(steps=4 if small else 200, batch_size=8 if small else 64),
    )


def order(*, small: bool, seed: int) -> dict[str, Any]:
    """The same words spoken forwards and backwards, by CTC and by attention.

    Every tenth step, also how many of the CTC model's frames say blank.
    """
    data, _ = pairs(experiment("ctc", seed, small=small).data)
    arms = {"forwards": data, "backwards": backwards(data)}
    config = experiment("ctc", seed, small=small)
    blanks: dict[str, list] = {"steps": [], "share": [], "sure": []}

    def watch(frames_of: Any, batch: Any, step: int, params: Any) -> None:
        if step == 1 or step % 10 == 0:
            share, sure = blank_share(frames_of, params, batch)
            blanks["steps"].append(step)
            blanks["share"].append(share)
            blanks["sure"].append(sure)

    found: dict[str, Any] = {
        "width": config.model.width,
        "steps": config.train.steps,
        "batch": config.train.batch_size,
    }
    for kind in ("ctc", "attention"):
        found[kind] = {}
        for name, given in arms.items():
            config = experiment(kind, seed, small=small)
            observe = None
            if (kind, name) == ("ctc", "forwards"):
                batch = evaluation_batches(data, config.data, "dev", batch_size=64)[0]
                observe = functools.partial(watch, _frames_of(config), _without_index(batch))
            losses = train(config, data=given, watch=observe).metrics["loss"]
            found[kind][name] = {"last": float(losses[-30:].mean()), "curve": smooth(losses)}
    return found | {"blanks": blanks}


def _frames_of(config: Config) -> Any:
    """A compiled function from parameters and a batch to the frames of a model."""
    _, tokenizers = pairs(config.data)
    model = models.abstract(config.model, **vocabularies(tokenizers, config.data))
    apply, _ = nn.pure(model)
    return jax.jit(lambda params, batch: apply(params, **model_inputs(batch), method="predictions"))


def blank_share(predict_frames: Any, params: Any, batch: Any) -> tuple[float, float]:
    """The share of real frames whose likeliest token is the blank, and the mean of the largest."""
    found = predict_frames(params, batch)
    real = np.arange(found.logits.shape[1]) < np.asarray(found.lengths)[:, None]
    probabilities = np.asarray(jax.nn.softmax(found.logits))
    return (
        float((probabilities.argmax(-1) == PAD)[real].mean()),
        float(probabilities.max(-1)[real].mean()),
    )


def backwards(data: PairData) -> PairData:
    """The same pairs with every target's labels in reverse."""
    split = data.splits["train"]
    targets = split.targets
    tokens = targets.tokens.copy()
    for start, end in zip(targets.offsets[:-1], targets.offsets[1:], strict=True):
        tokens[start : end - 1] = targets.tokens[start : end - 1][::-1]
    reverse = dataclasses.replace(targets, tokens=tokens)
    return dataclasses.replace(
        data, splits=data.splits | {"train": dataclasses.replace(split, targets=reverse)}
    )


def frames_of_the_run(*, small: bool) -> dict[str, float]:
    """What the frames of the trained model say, on dev words."""
    run = trained("g2p-ctc", small=small)
    data, _ = pairs(run.config.data)
    batches = evaluation_batches(data, run.config.data, "dev", batch_size=8 if small else 128)
    shares, sures, spans, sure_labels, fewest = [], [], [], [], []
    predictions = jax.jit(functools.partial(run.apply, method="predictions"))
    for batch in batches[: 1 if small else 2]:
        batch = _without_index(batch)
        share, sure = blank_share(lambda p, b: predictions(p, **model_inputs(b)), run.params, batch)
        found = predictions(run.params, **model_inputs(batch))
        labels = ((batch["weights"] != 0) & (batch["targets"] != EOS)).sum(1)
        aligned = jax.jit(ctc_align)(found.logits, found.lengths, batch["targets"], labels)
        used = np.arange(batch["targets"].shape[1]) < labels[:, None]
        spans.append(np.asarray(aligned.ends - aligned.starts)[used].mean())
        sure_labels.append(np.asarray(aligned.confidences)[used].mean())
        shares.append(share)
        sures.append(sure)
        fewest.append(1 - labels.sum() / np.asarray(found.lengths).sum())
    return {
        "blank": float(np.mean(shares)),
        "least_blank": float(np.mean(fewest)),
        "largest_probability": float(np.mean(sures)),
        "span": float(np.mean(spans)),
        "confidence": float(np.mean(sure_labels)),
    }


def decoding(*, small: bool) -> dict[str, Any]:
    """The best path, prefix beam search, and the same with an n-gram model of phonemes."""
    run = trained("g2p-ctc", small=small)
    chosen = examples(run, "test", 8 if small else 400)
    data, tokenizers = pairs(run.config.data)
    targets = data.splits["train"].targets
    spans = np.split(targets.tokens, np.cumsum(targets.lengths)[:-1])
    model = NGram.train(
        [span[:-1].tolist() for span in spans],
        vocabulary=len(tokenizers.target),
        order=2 if small else ORDER,
        sos_id=SOS,
        eos_id=EOS,
        pad_id=PAD,
    )
    searches = {
        "greedy": {"beam": 1},
        "beam": {"beam": 8},
        "with_language_model": {
            "beam": 8,
            "language_model": model,
            "language_model_weight": LANGUAGE_WEIGHT,
            "length_bonus": LENGTH_BONUS,
        },
    }
    found: dict[str, Any] = {"words": len(chosen), "order": ORDER, "weight": LANGUAGE_WEIGHT}
    greedy = None
    for name, options in searches.items():
        wrong = errors(transcribe(run, chosen, **options), chosen)
        greedy = greedy or wrong
        change, deviation = wrong.worse_than(greedy)
        found[name] = wrong.rates | {"change": change, "change_error": deviation}
    return found


def hybrid(*, small: bool) -> dict[str, Any]:
    """The hybrid model, its decoder and CTC weighed differently in the search."""
    run = trained("g2p-hybrid", small=small)
    chosen = examples(run, "test", 8 if small else 400)
    shares = [0.0, 1.0] if small else [0.0, 0.3, 0.6, 1.0]
    found = {share: predict(run, chosen, beam=4, ctc_weight=share) for share in shares}
    wrong = {share: errors(hypotheses, chosen) for share, hypotheses in found.items()}
    return {
        "words": len(chosen),
        "shares": shares,
        "rates": [wrong[share].rates for share in shares],
        "against_decoder": [wrong[share].worse_than(wrong[0.0]) for share in shares],
    }


def digits(*, small: bool) -> dict[str, Any]:
    """The first longer line of digits that is read correctly, and where each digit stands."""
    run = trained("digits-ctc", small=small)
    # The first lines are the same ones however many there are.
    data, _ = pairs(dataclasses.replace(run.config.data, lines=100))
    split = data.splits["test"]
    assert isinstance(split.sources, Images)
    for number, example in enumerate(split.examples[: 1 if small else None]):
        image = split.sources[number]
        [found] = align(run.apply, run.params, run.tokenizers, run.config, [image])
        if found.predicted == example.references[0] and len(found.labels) >= DIGITS_SHOWN:
            break
    return {
        "line": number,
        "right": example.references[0],
        "predicted": found.predicted,
        "image": image,
        "labels": found.labels,
        "spans": found.spans,
        "columns": len(image) / len(found.probabilities),
        "probabilities": found.probabilities.round(3),
        "scores": run.scores,
        "minutes": run.minutes,
        "parameters": _parameters(run),
    }


def _parameters(run: Run) -> int:
    """Parameters alone: a run's arrays hold BatchNorm's running statistics too."""
    sizes = vocabularies(run.tokenizers, run.config.data)
    return nn.count(nn.pure(models.abstract(run.config.model, **sizes))[1])


def smooth(losses: np.ndarray, points: int = 25) -> np.ndarray:
    """Means over equal stretches of steps."""
    return np.array([part.mean() for part in np.array_split(losses, min(points, len(losses)))])


def _without_index(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "index"}


def claims(results: Results) -> dict[str, bool]:
    independent, order = results["independence"], results["order"]
    frames, found, mixed = results["frames"], results["decoding"], results["hybrid"]
    greedy, language = found["greedy"], found["with_language_model"]
    blanks = order["blanks"]["share"]
    return {
        "two equally right answers cost CTC twice ln 2, a probability of a quarter each": (
            abs(independent["ctc"] / (2 * independent["entropy"]) - 1) < 0.01
        ),
        "with more frames a letter fewer pairs are impossible": all(
            after["impossible"] < before["impossible"]
            for before, after in itertools.pairwise(results["room"])
        ),
        "backwards costs CTC more than twice its loss": (
            order["ctc"]["backwards"]["last"] > 2 * order["ctc"]["forwards"]["last"]
        ),
        "and attention less than a tenth": (
            order["attention"]["backwards"]["last"] < 1.1 * order["attention"]["forwards"]["last"]
        ),
        "early in training all frames are blank": max(blanks) > 0.99,
        "at the end most frames are blank": frames["blank"] > 0.5,
        "a label stands in little more than one frame": frames["span"] < 1.5,
        "prefix beam search makes no difference": (
            found["beam"]["change"] == 0 and found["beam"]["per"] == greedy["per"]
        ),
        "the hybrid errs least where both readings count": (
            min(row["wer"] for row in mixed["rates"]) < mixed["rates"][0]["wer"]
            and min(row["wer"] for row in mixed["rates"]) < mixed["rates"][-1]["wer"]
        ),
        "but nothing differs from its decoder alone by two standard errors": all(
            abs(change) < 2 * error for change, error in mixed["against_decoder"][1:]
        ),
        "the language model lowers the error by more than two standard errors": (
            language["change"] < -2 * language["change_error"]
        ),
        "of the digits, fewer than a tenth of the strings are wrong": (
            results["digits"]["scores"]["wer"] < 10
        ),
        "the line that is shown is read correctly": (
            results["digits"]["predicted"] == results["digits"]["right"]
        ),
    }


def figures(results: Results) -> dict[str, Any]:
    return {
        "lattice": draw_lattice(results["lattice"]),
        "order": draw_order(results["order"]),
        "digits": draw_digits(results["digits"]),
    }


def values(results: Results) -> dict[str, Any]:
    found, mixed, order = results["decoding"], results["hybrid"], results["order"]
    names = {
        "greedy": "best path",
        "beam": "prefix beam search, beam 8",
        "with_language_model": f"the same with a {found['order']}-gram model of phonemes",
    }
    return {
        "room_table": table(
            ("frames a letter", "training pairs without a path"),
            [(str(row["per_letter"]), f"{row['impossible']:,}") for row in results["room"]],
        ),
        "order_table": table(
            ("", "forwards", "backwards", "ratio"),
            [
                (
                    label,
                    f"{order[kind]['forwards']['last']:.2f}",
                    f"{order[kind]['backwards']['last']:.2f}",
                    f"{order[kind]['backwards']['last'] / order[kind]['forwards']['last']:.1f}",
                )
                for kind, label in (("ctc", "CTC"), ("attention", "attention"))
            ],
        ),
        "decoding_table": table(
            ("", "WER %", "PER %", "WER against best path"),
            [
                (
                    label,
                    f"{found[name]['wer']:.1f} ± {found[name]['wer_error']:.1f}",
                    f"{found[name]['per']:.2f}",
                    f"{found[name]['change']:+.1f} ± {found[name]['change_error']:.1f}",
                )
                for name, label in names.items()
            ],
        ),
        "hybrid_table": table(
            ("share of CTC in the search", "WER %", "PER %", "WER against the decoder alone"),
            [
                (
                    f"{share:g}",
                    f"{rates['wer']:.1f} ± {rates['wer_error']:.1f}",
                    f"{rates['per']:.2f}",
                    f"{change:+.1f} ± {error:.1f}",
                )
                for share, rates, (change, error) in zip(
                    mixed["shares"], mixed["rates"], mixed["against_decoder"], strict=True
                )
            ],
        ),
        "most_blank": 100 * max(order["blanks"]["share"]),
        "percent": {name: 100 * share for name, share in results["frames"].items()},
        "path_percent": 100 * results["lattice"]["path_share"],
    }


LESSON = Lesson(
    number=10,
    name="ctc",
    title="Where CTC goes",
    summary="it is a loss and a decoder: what it assumes, and what that costs.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
