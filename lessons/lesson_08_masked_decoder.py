"""A masked decoder alone beside an encoder-decoder, and what attention aligns."""

import functools
import itertools
from typing import Any

import jax
import numpy as np

from jaxformer import models, nn
from jaxformer.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxformer.data import EOS, SOS, evaluation_batches, pair_batches, training_batches
from jaxformer.decoding import ctc_align
from jaxformer.models import model_inputs
from jaxformer.training.evaluation import make_loss, mean_loss
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.run import vocabularies
from jaxformer.training.state import init_state
from jaxformer.training.step import make_train_step
from lessons.drawing import legend, line, panels
from lessons.framework import Lesson, Results, table
from lessons.runs import Run, trained
from lessons.training import pairs, words

ARMS = {
    "encoder_decoder": "encoder-decoder",
    "decoder": "one masked decoder",
}
SHOWN = (("knighthood", "N AY T HH UH D"), ("phonetics", "F AH N EH T IH K S"))
LOOKED_AT = {"g2p-transformer": "Transformer", "g2p-luong": "LSTM, Luong"}


def measure(*, small: bool, seed: int) -> Results:
    return {
        "training": training(small=small, seed=seed),
        "maps": maps(small=small),
        "alignment": alignment(small=small),
    }


def experiment(arm: str, seed: int, *, small: bool) -> Config:
    """Models with equally many parameters in their blocks: 56 D^2 each.

    An encoder layer has 4 D^2 in attention and 2 D F in the feed-forward layer, a decoder layer
    another 4 D^2 for the source: 2 x 12 + 2 x 16 = 56 with F = 4 D, and 4 x 14 with F = 5 D.
    """
    width = 16 if small else 64
    alone = arm != "encoder_decoder"
    return Config(
        seed=seed,
        data=words(letters=8, small=small),
        model=ModelConfig(
            kind="decoder" if alone else "encoder_decoder",
            layers=4 if alone else 2,
            width=width,
            heads=4,
            feedforward=5 * width if alone else 4 * width,
            max_length=24,
            scan=False,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=30),
        train=TrainConfig(steps=4 if small else 250, batch_size=8 if small else 64),
    )


def training(*, small: bool, seed: int) -> dict[str, Any]:
    """Losses of the three arms, a phoneme of the target."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        config = experiment(arm, seed, small=small)
        found[arm] = one_run(config)
    return found | {
        "steps": config.train.steps,
        "batch": config.train.batch_size,
        "width": config.model.width,
    }


def one_run(config: Config) -> dict[str, Any]:
    """Trains one model, whose batches are pairs, or single sequences for a decoder alone."""
    data, tokenizers = pairs(config.data)
    sizes = vocabularies(tokenizers, config.data)
    alone = config.model.kind == "decoder"
    if alone:  # All ids are of one vocabulary.
        sizes["vocabulary"] += sizes["source_vocabulary"] or 0
    model = models.build(config.model, **sizes, seed=config.seed)
    apply, params = nn.pure(model)
    optimizer = make_optimizer(config.optimizer, config.train.steps, nn.parameter_axes(model))
    schedule = make_schedule(config.optimizer, config.train.steps)
    step = jax.jit(make_train_step(apply, optimizer, schedule, config.train, config.seed))
    state, losses = init_state(params, optimizer), []

    def shaped(batch: dict[str, Any]) -> dict[str, Any]:
        return one_sequence(batch, offset=len(tokenizers.target)) if alone else batch

    with training_batches(
        data, config.data, batch_size=config.train.batch_size, seed=config.seed
    ) as batches:
        for _ in range(config.train.steps):
            state, metrics = step(state, shaped(next(batches)))
            losses.append(metrics["loss"])
    dev = evaluation_batches(data, config.data, "dev", batch_size=config.train.batch_size)
    scored = [shaped(_without_index(batch)) for batch in dev[:10]]
    scores = mean_loss(make_loss(apply), state.params, scored)
    losses = np.array([float(loss) for loss in jax.device_get(losses)])
    return {
        "parameters": nn.count(params),
        "block_parameters": nn.count(params) - _embedding_parameters(params),
        "dev_loss": scores["loss"],
        "dev_accuracy": 100 * scores["accuracy"],
        "curve": [part.mean() for part in np.array_split(losses, min(25, len(losses)))],
    }


def _embedding_parameters(params: Any) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if "embedding" in jax.tree_util.keystr(path))


def one_sequence(batch: dict[str, Any], *, offset: int) -> dict[str, Any]:
    """Pairs as single sequences: <sos> source separator target <eos>, padding behind.

    Letters have ids of their own, behind the phonemes'; the source's <eos> is the separator. The
    loss counts the target alone.
    """
    source = np.where(batch["source_segment_ids"] != 0, batch["source"] + offset, 0)
    target = np.where(batch["weights"] != 0, batch["targets"], 0)
    both = np.concatenate([source, target], axis=1)
    of_target = np.concatenate([np.zeros_like(source), np.ones_like(target)], axis=1)
    # Padding between the two goes behind: a stable sort keeps the order of the rest.
    front = np.argsort(both == 0, axis=1, kind="stable")
    both = np.take_along_axis(both, front, axis=1)
    of_target = np.take_along_axis(of_target, front, axis=1)
    counted = (both != 0) & (of_target == 1)
    inputs = np.pad(both[:, :-1], ((0, 0), (1, 0)), constant_values=SOS)
    return {"inputs": inputs, "targets": both, "weights": counted.astype(np.float32)}


def maps(*, small: bool) -> list[dict[str, Any]]:
    """Attention of two words, by model, mean over layers and heads."""
    found = []
    for word, spoken in SHOWN:
        row: dict[str, Any] = {"word": word, "phonemes": spoken.split()}
        for preset in LOOKED_AT:
            run = trained(preset, small=small)
            [batch] = pair_batches(
                [f"{word}\t{spoken}"], run.tokenizers, run.config.data, batch_size=1
            )
            weights = attention(run, batch)[:, 0, :, :, : len(word) + 1]
            row[preset] = weights.mean((0, 2))[: len(row["phonemes"]) + 1].round(4)
        found.append(row)
    return found


def alignment(*, small: bool) -> dict[str, Any]:
    """How much of attention falls on the letters where CTC's forced alignment has the phoneme.

    Counted are its letter and the two beside it, over dev words; `chance` is what weights that are
    equal on all letters would have there; `backwards` the share of steps that go to an earlier
    letter than the step before.
    """
    ctc = trained("g2p-ctc", small=small)
    data, _ = pairs(ctc.config.data)
    rows = 8 if small else 256
    batch = _without_index(evaluation_batches(data, ctc.config.data, "dev", batch_size=rows)[0])
    read = jax.jit(functools.partial(ctc.apply, method="predictions"))
    frames = read(ctc.params, **model_inputs(batch))
    labels = ((batch["weights"] != 0) & (batch["targets"] != EOS)).sum(1)
    aligned = jax.jit(ctc_align)(frames.logits, frames.lengths, batch["targets"], labels)
    letters = np.asarray(aligned.starts) // ctc.config.model.ctc.upsample
    used = np.arange(batch["targets"].shape[1]) < labels[:, None]
    near = np.abs(np.arange(batch["source"].shape[1]) - letters[..., None]) <= 1
    near &= (batch["source_segment_ids"] != 0)[:, None]
    lengths = batch["source_segment_ids"].sum(1)[:, None]
    found: dict[str, Any] = {
        "words": rows,
        "chance": 100 * float((near.sum(-1) / lengths)[used].mean()),
    }
    for preset in LOOKED_AT:
        run = trained(preset, small=small)
        weights = attention(run, batch)
        hits = np.einsum("lbtns,bts->lnbt", weights, near.astype(float))[..., used].mean(-1)
        mean = weights.mean((0, 3))
        best = mean.argmax(-1)
        later = used[:, 1:]
        found[preset] = {
            "heads": 100 * hits,
            "best_head": 100 * float(hits.max()),
            "mean": 100 * float(hits.mean()),
            "backwards": 100 * float((best[:, 1:] < best[:, :-1])[later].mean()),
        }
    return found


def attention(run: Run, batch: dict[str, Any]) -> np.ndarray:
    """Attention of every target place to every letter, float[L, B, T, N, S]."""
    look = jax.jit(functools.partial(run.apply, method="cross_attention_weights"))
    weights = look(
        run.params,
        batch["source"],
        batch["inputs"],
        source_segment_ids=batch["source_segment_ids"],
    )
    return np.asarray(weights)


def _without_index(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "index"}


def claims(results: Results) -> dict[str, bool]:
    arms, found = results["training"], results["alignment"]
    both = [arms[arm]["block_parameters"] for arm in ARMS]
    heads = np.array(found["g2p-transformer"]["heads"])
    return {
        "the blocks have equally many parameters within 1 %": abs(both[0] / both[1] - 1) < 0.01,
        "the decoder alone ends with the lower dev loss": (
            arms["decoder"]["dev_loss"] < arms["encoder_decoder"]["dev_loss"]
        ),
        "and by less than 0.2 nats": (
            arms["decoder"]["dev_loss"] > arms["encoder_decoder"]["dev_loss"] - 0.2
        ),
        "Luong's attention is nearly all where CTC has the phoneme": (
            found["g2p-luong"]["mean"] > 95
        ),
        "so is that of the Transformer's best head": heads.max() > 95,
        "all heads are above chance, but not all above twice chance": (
            heads.min() > found["chance"] and heads.min() < 2 * found["chance"]
        ),
        "steps back to an earlier letter are below 1 % in both": all(
            found[preset]["backwards"] < 1 for preset in LOOKED_AT
        ),
    }


def figures(results: Results) -> dict[str, Any]:
    return {"training": draw_training(results["training"]), "maps": draw_maps(results["maps"])}


def draw_training(found: dict[str, Any]) -> Any:
    figure, axes = panels(1, height=3.1)
    for number, (arm, label) in enumerate(ARMS.items()):
        curve = found[arm]["curve"]
        places = (np.arange(len(curve)) + 0.5) * found["steps"] / len(curve)
        line(axes[0], places.tolist(), curve, number, label, marker=False)
    axes[0].set(xlabel="training step", ylabel="training loss (nats a phoneme)")
    legend(axes[0])
    return figure


def draw_maps(shown: list[dict[str, Any]]) -> Any:
    figure, axes = panels(len(LOOKED_AT), len(shown), height=5.4)
    for row, found in enumerate(shown):
        for column, (preset, label) in enumerate(LOOKED_AT.items()):
            axis = axes[row * len(LOOKED_AT) + column]
            letters = [*found["word"], "·"]
            phonemes = [*found["phonemes"], "·"]
            axis.imshow(found[preset], cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axis.set_xticks(range(len(letters)), letters)
            axis.set_yticks(range(len(phonemes)), phonemes)
            axis.set_title(label)
            axis.grid(visible=False)
    return figure


def values(results: Results) -> dict[str, Any]:
    arms, found = results["training"], results["alignment"]
    return {
        "loss_table": table(
            ("", "parameters", "in blocks", "dev loss (nats a phoneme)", "right phonemes %"),
            [
                (
                    label,
                    f"{arms[arm]['parameters']:,}",
                    f"{arms[arm]['block_parameters']:,}",
                    f"{arms[arm]['dev_loss']:.3f}",
                    f"{arms[arm]['dev_accuracy']:.1f}",
                )
                for arm, label in ARMS.items()
            ],
        ),
        "alignment_table": table(
            (
                "",
                "weight there, mean of heads %",
                "best head %",
                "steps back to an earlier letter %",
            ),
            [
                (
                    label,
                    f"{found[preset]['mean']:.0f}",
                    f"{found[preset]['best_head']:.0f}",
                    f"{found[preset]['backwards']:.1f}",
                )
                for preset, label in LOOKED_AT.items()
            ],
        ),
        "transformer": found["g2p-transformer"]
        | {"worst_head": min(itertools.chain(*found["g2p-transformer"]["heads"]))},
        "luong": found["g2p-luong"],
    }


LESSON = Lesson(
    number=8,
    name="masked-decoder",
    title="A masked decoder, or an encoder and a decoder",
    summary="one sequence or two, at equal size; attention finds the alignment by itself.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
