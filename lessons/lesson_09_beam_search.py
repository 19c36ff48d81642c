"""What beam search finds, what it does not mend, and where it has a place in training."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxformer.data import EOS, PAD, SOS, UNK, PairData, pair_batches, source_batches
from jaxformer.data.corpus import Example
from jaxformer.decoding import beam_search, make_score, make_translate, sequence_log_probs
from jaxformer.decoding.ngram import NGram
from jaxformer.losses import expected_risk
from jaxformer.metrics import edit_distance
from jaxformer.nn.parameters import Params
from lessons.drawing import legend, line, panels
from lessons.framework import Lesson, Results, table
from lessons.runs import Errors, Run, errors, examples, predict, trained
from lessons.training import pairs

PRESET = "g2p-transformer"
ORDER = 5
CANDIDATES = 8
LETTERS = 11  # longest word of the fine-tuning, whose batches then have one shape
WIDTH = 16  # of batches that hold them
OBJECTIVES = ("risk", "cross_entropy")


def measure(*, small: bool, seed: int) -> Results:
    run = trained(PRESET, small=small)
    chosen = examples(run, "test", 8 if small else 400)
    beams = [1, 4] if small else [1, 2, 4, 8, 16, 32]
    penalties = [0.0, 1.0] if small else [0.0, 2.0]
    return {
        "words": len(chosen),
        "beams": beams,
        "search": search(run, chosen, beams),
        "penalties": penalties,
        "penalised": penalised(run, chosen, penalties),
        "language_model": likeliest_words(run, [1, 2] if small else [1, 4, 8, 32, 128, 512]),
        "risk": minimum_risk(run, small=small, seed=seed),
    }


def search(run: Run, chosen: Sequence[Example], beams: Sequence[int]) -> list[dict[str, float]]:
    """Every width without a length penalty: what is found, how likely it is, and how right.

    `search_errors` are wrong words of which the model gives a reference more probability than what
    was found; the other wrong words no search could have got right.
    """
    right = reference_log_probs(run, chosen)
    rows, greedy = [], None
    for beam in beams:
        found = predict(run, chosen, beam=beam, length_penalty=0.0)
        wrong = errors(found, chosen)
        greedy = greedy or wrong
        log_probs = np.array([hypothesis.log_prob for hypothesis in found])
        lost = wrong.wrong & (log_probs < right - 1e-3)
        difference, deviation = wrong.worse_than(greedy)
        rows.append(
            wrong.rates
            | {
                "log_prob": float(log_probs.mean()),
                "length": float(np.mean([len(h.text.split()) for h in found])),
                "search_errors": 100 * float(lost.mean()),
                "against_greedy": difference,
                "against_greedy_error": deviation,
            }
        )
    return rows


def reference_log_probs(run: Run, chosen: Sequence[Example]) -> np.ndarray:
    """The model's log-probability of each example's likeliest reference."""
    owners = [i for i, example in enumerate(chosen) for _ in example.references]
    lines = [f"{example.source}\t{text}" for example in chosen for text in example.references]
    score = make_score(run.apply)
    best = np.full(len(chosen), -np.inf)
    for batch in pair_batches(lines, run.tokenizers, run.config.data, batch_size=128):
        index = batch.pop("index")
        for place, value in zip(index, np.asarray(score(run.params, batch)), strict=True):
            if place >= 0:
                best[owners[place]] = max(best[owners[place]], value)
    return best


def penalised(
    run: Run, chosen: Sequence[Example], penalties: Sequence[float]
) -> list[dict[str, float]]:
    """A beam of eight under length penalties."""
    rows = []
    for penalty in penalties:
        found = predict(run, chosen, beam=8, length_penalty=penalty)
        length = float(np.mean([len(hypothesis.text.split()) for hypothesis in found]))
        rows.append(errors(found, chosen).rates | {"length": length})
    return rows


class _State(NamedTuple):
    """Where an n-gram model stands, as the cache of a search."""

    state: jax.Array

    def take(self, indices: jax.Array) -> "_State":
        return _State(self.state[indices])


def likeliest_words(run: Run, beams: Sequence[int]) -> dict[str, Any]:
    """What beam search takes for the likeliest word of English, by an n-gram model of phonemes."""
    data, tokenizers = pairs(run.config.data)
    targets = data.splits["train"].targets
    vocabulary = len(tokenizers.target)
    spans = np.split(targets.tokens, np.cumsum(targets.lengths)[:-1])
    model = NGram.train(
        [span[:-1].tolist() for span in spans],
        vocabulary=vocabulary,
        order=ORDER,
        sos_id=SOS,
        eos_id=EOS,
        pad_id=PAD,
    )

    def step(tokens: jax.Array, cache: _State) -> tuple[jax.Array, _State]:
        logits, state = model(tokens[:, 0], cache.state)
        return logits, _State(state)

    rows = []
    logits, state = model(jnp.array([SOS]), None)
    for beam in beams:
        for penalty in (0.0, 1.0):
            found = beam_search(
                step,
                _State(state),
                logits,
                beam=beam,
                max_length=run.config.data.max_target_length,
                length_penalty=penalty,
                eos_id=EOS,
                pad_id=PAD,
                forbidden=(SOS, UNK),
            )
            length = int(found.lengths[0, 0])
            rows.append(
                {
                    "beam": beam,
                    "penalty": penalty,
                    "length": length,
                    "log_prob": float(found.log_probs[0, 0]),
                    "word": tokenizers.target.decode(found.tokens[0, 0, :length].tolist()),
                }
            )
    return {"order": ORDER, "mean_length": float(targets.lengths.mean() - 1), "rows": rows}


def minimum_risk(run: Run, *, small: bool, seed: int) -> dict[str, Any]:
    """Fine-tuning by the expected edits of n-best lists, and by cross-entropy on the same words."""
    steps, rows = (2, 4) if small else (80, 24)
    chosen = examples(run, "dev", 8 if small else 1200)
    tuned: dict[str, Params] = {"before": run.params}
    curve: list[float] = []
    for name in OBJECTIVES:
        tuned[name], values = fine_tune(run, name, steps=steps, rows=rows, seed=seed)
        curve = values if name == "risk" else curve
    found: dict[str, Any] = {"steps": steps, "rows": rows, "words": len(chosen), "curve": curve}
    before: dict[int, Errors] = {}
    short = [example for example in chosen if len(example.source) <= LETTERS]
    short = short[: 8 if small else 256]
    found["short_words"] = len(short)
    search = nearest(run)
    expected = {name: expected_edits(run, params, short, search) for name, params in tuned.items()}
    for name, params in tuned.items():
        change = expected[name] - expected["before"]
        found[name] = {
            "expected": float(expected[name].mean()),
            "expected_change": float(change.mean()),
            "expected_change_error": float(change.std() / np.sqrt(len(change))),
        }
        for beam in (1, 4):
            wrong = errors(predict(run, chosen, params=params, beam=beam), chosen)
            before.setdefault(beam, wrong)
            difference, deviation = wrong.worse_than(before[beam])
            edits = 100.0 * (wrong.edits - before[beam].edits) / wrong.length.mean()
            found[name][f"beam{beam}"] = wrong.rates | {
                "wer_change": difference,
                "wer_change_error": deviation,
                "per_change": float(edits.mean()),
                "per_change_error": float(edits.std() / np.sqrt(len(edits))),
            }
    return found


def nearest(run: Run) -> Any:
    """The search that proposes the candidates."""
    return make_translate(
        run.apply,
        max_length=LETTERS + 3,
        beam=CANDIDATES,
        n_best=CANDIDATES,
        length_penalty=0.0,
    )


def expected_edits(run: Run, params: Params, chosen: Sequence[Example], search: Any) -> np.ndarray:
    """The objective of minimum risk training for each example, its candidates searched anew."""
    sources = [example.source for example in chosen]
    risk = jax.jit(functools.partial(expected_risks, run.apply))
    values = np.zeros(len(chosen))
    for batch in source_batches(sources, run.tokenizers, run.config.data, batch_size=64):
        room = ((0, 0), (0, WIDTH - batch["source"].shape[1]))
        index = batch.pop("index")
        batch = {name: np.pad(array, room) for name, array in batch.items()}
        found = jax.device_get(search(params, batch["source"], batch["source_segment_ids"]))
        batch |= candidates(run, found, [chosen[max(place, 0)] for place in index])
        for place, value in zip(index, np.asarray(risk(params, batch)), strict=True):
            if place >= 0:
                values[place] = value
    return values


def fine_tune(
    run: Run, name: str, *, steps: int, rows: int, seed: int
) -> tuple[Params, list[float]]:
    """A model after so many steps of Adam on one of the objectives, and the objective's course."""
    data, _ = pairs(run.config.data)
    fits = (data.splits["train"].item_lengths[0] <= LETTERS + 1) & (
        data.splits["train"].item_lengths[1] <= LETTERS + 1
    )
    items = np.random.default_rng(seed).permutation(np.flatnonzero(fits))
    # The run ended at a learning rate near 0: without a decay the noise of small batches costs more
    # than any objective brings.
    decay = optax.linear_schedule(1e-4, 0.0, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(decay))
    translate = nearest(run)

    @jax.jit
    def update(params: Params, state: Any, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
        objective = functools.partial(risk_or_loss, run.apply, batch=batch)
        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, curve = run.params, optimizer.init(run.params), []
    for number in range(steps):
        drawn = np.take(items, np.arange(number * rows, (number + 1) * rows), mode="wrap")
        owners = data.splits["train"].item_example[drawn]
        batch = source_and_targets(data, drawn)
        if name == "risk":
            found = jax.device_get(translate(params, batch["source"], batch["source_segment_ids"]))
            batch |= candidates(run, found, [data.splits["train"].examples[i] for i in owners])
        params, state, value = update(params, state, batch)
        curve.append(float(value))
    return params, curve


def source_and_targets(data: PairData, items: np.ndarray) -> dict[str, Any]:
    """A batch of training pairs, each its only candidate."""
    split = data.splits["train"]
    source, real = split.sources.gather(split.item_example[items], LETTERS + 1)
    targets, weights = split.targets.gather(items, LETTERS + 3)
    return {
        "source": source,
        "source_segment_ids": real.astype(np.int32),
        "targets": targets[:, None],
        "weights": weights[:, None].astype(np.float32),
    }


def candidates(run: Run, found: Any, chosen: Sequence[Example]) -> dict[str, Any]:
    """N-best lists as candidates, with the edits that each is away from a reference."""
    weights = np.arange(found.tokens.shape[-1]) <= found.lengths[..., None]
    weights &= found.finished[..., None]
    risks = np.zeros(found.lengths.shape, np.float32)
    for row, example in enumerate(chosen):
        right = [run.tokenizers.target.encode(text) for text in example.references]
        for number, length in enumerate(found.lengths[row]):
            said = found.tokens[row, number, :length].tolist()
            risks[row, number] = min(edit_distance(said, reference) for reference in right)
    return {"targets": found.tokens, "weights": weights.astype(np.float32), "risks": risks}


def risk_or_loss(apply: Any, params: Params, *, batch: dict[str, Any]) -> jax.Array:
    """The mean expected risk of the candidates [B, M], or without risks the loss of the targets."""
    if "risks" in batch:
        return expected_risks(apply, params, batch).mean()
    return -log_probs_of(apply, params, batch).sum() / batch["weights"].sum()


def expected_risks(apply: Any, params: Params, batch: dict[str, Any]) -> jax.Array:
    """The expected risk of each row's candidates."""
    log_probs = log_probs_of(apply, params, batch)
    return expected_risk(log_probs, batch["risks"], batch["weights"].any(-1))


def log_probs_of(apply: Any, params: Params, batch: dict[str, Any]) -> jax.Array:
    """Log-probabilities of the candidates [B, M]."""
    rows, number, length = batch["targets"].shape
    targets = batch["targets"].reshape(rows * number, length)
    weights = batch["weights"].reshape(rows * number, length)
    inputs = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=SOS)
    factors = apply(
        params,
        source=jnp.repeat(batch["source"], number, axis=0),
        inputs=inputs,
        source_segment_ids=jnp.repeat(batch["source_segment_ids"], number, axis=0),
        method="predictions",
    )
    return sequence_log_probs(factors.logits(), targets, weights).reshape(rows, number)


def claims(results: Results) -> dict[str, bool]:
    rows, words = results["search"], results["language_model"]
    plain = [row for row in words["rows"] if row["penalty"] == 0]
    risk, control = results["risk"]["risk"], results["risk"]["cross_entropy"]
    return {
        "a wider beam never finds less likely words on average": rising(rows, "log_prob"),
        "greedy search makes few search errors": 0 < rows[0]["search_errors"] < 2,
        "a beam of 2 makes none, and wider ones find the same": all(
            row["search_errors"] == 0 and row["log_prob"] == rows[1]["log_prob"] for row in rows[1:]
        ),
        "the error does not fall beyond noise": all(
            abs(row["against_greedy"]) <= 2 * row["against_greedy_error"] for row in rows[1:]
        ),
        "nor does a length penalty change it by a percent": all(
            abs(row["wer"] - results["penalised"][0]["wer"]) < 1 for row in results["penalised"]
        ),
        "the likeliest word by n-grams is two phonemes shorter than words are on average": (
            plain[-1]["length"] < words["mean_length"] - 2
            and plain[-1]["length"] < plain[0]["length"]
        ),
        "and gets likelier with the beam": rising(plain, "log_prob"),
        "minimum risk lowers the expected edits of dev words by two standard errors": (
            risk["expected_change"] < -2 * risk["expected_change_error"]
        ),
        "and more than cross-entropy does": risk["expected_change"] < control["expected_change"],
        "the word error with a beam of 4 does not fall, by either objective": all(
            found["beam4"]["wer_change"] > 0 for found in (risk, control)
        ),
        "no phoneme error changes by two standard errors": all(
            abs(found[beam]["per_change"]) < 2 * found[beam]["per_change_error"]
            for found in (risk, control)
            for beam in ("beam1", "beam4")
        ),
    }


def rising(rows: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether a quantity never falls from a row to the next, but for rounding."""
    return all(after[name] >= before[name] - 1e-4 for before, after in itertools.pairwise(rows))


def figures(results: Results) -> dict[str, Any]:
    return {
        "search": draw_search(results),
        "likeliest": draw_likeliest(results["language_model"]),
    }


def draw_search(results: Results) -> Any:
    figure, axes = panels(3, height=3.1)
    rows, beams = results["search"], results["beams"]

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    line(axes[0], beams, column("log_prob"), 0)
    axes[0].set(title="log-probability of what is found (nats)")
    line(axes[1], beams, column("wer"), 1, "wrong words", error=column("wer_error"))
    line(axes[1], beams, column("search_errors"), 2, "of these search errors")
    axes[1].set(title="error (% of words)", ylim=(0, None))
    legend(axes[1])
    line(axes[2], beams, column("length"), 3)
    axes[2].set(title="phonemes a word", ylim=(0, 8))
    for axis in axes:
        doubling(axis, beams)
    return figure


def doubling(axis: Any, beams: Sequence[int]) -> None:
    """Marks beams at even distances."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(beams, [str(beam) for beam in beams])
    axis.minorticks_off()
    axis.set_xlabel("beam")


def draw_likeliest(found: dict[str, Any]) -> Any:
    figure, axes = panels(2, height=3.0)
    for number, (penalty, label) in enumerate(((0, "no penalty"), (1, "length penalty 1"))):
        rows = [row for row in found["rows"] if row["penalty"] == penalty]
        beams = [row["beam"] for row in rows]
        line(axes[0], beams, [row["log_prob"] for row in rows], number, label)
        line(axes[1], beams, [row["length"] for row in rows], number, label)
    axes[0].set_title("log-probability of the likeliest word (nats)")
    axes[1].axhline(found["mean_length"], color="0.4", linewidth=1)
    axes[1].annotate(
        "mean of the dictionary",
        (rows[-1]["beam"], found["mean_length"]),
        (0, 4),
        ha="right", textcoords="offset points",
        fontsize=8, color="0.4",
    )  # fmt: skip
    axes[1].set(title="its phonemes", ylim=(0, None))
    for axis in axes:
        doubling(axis, beams)
    legend(axes[0])
    return figure


def values(results: Results) -> dict[str, Any]:
    rows, words, risk = results["search"], results["language_model"], results["risk"]
    names = {
        "before": "before",
        "risk": "after minimum risk",
        "cross_entropy": "after cross-entropy",
    }
    return {
        "narrow": rows[0],
        "likeliest": [row for row in words["rows"] if row["penalty"] == 0][-1],
        "wide": rows[-1] | {"beam": results["beams"][-1]},
        "search_table": table(
            ("beam", "log-probability", "phonemes", "WER %", "against greedy", "search errors %"),
            [
                (
                    str(beam),
                    f"{row['log_prob']:.3f}",
                    f"{row['length']:.2f}",
                    f"{row['wer']:.1f} ± {row['wer_error']:.1f}",
                    f"{row['against_greedy']:+.1f} ± {row['against_greedy_error']:.1f}",
                    f"{row['search_errors']:.1f}",
                )
                for beam, row in zip(results["beams"], rows, strict=True)
            ],
        ),
        "penalty_table": table(
            ("length penalty", "phonemes", "WER %", "PER %"),
            [
                (f"{penalty:g}", f"{row['length']:.2f}", f"{row['wer']:.1f}", f"{row['per']:.2f}")
                for penalty, row in zip(results["penalties"], results["penalised"], strict=True)
            ],
        ),
        "likeliest_table": table(
            ("beam", "length penalty", "word", "phonemes", "log-probability"),
            [
                (
                    str(row["beam"]),
                    f"{row['penalty']:g}",
                    f"`{row['word']}`",
                    str(row["length"]),
                    f"{row['log_prob']:.2f}",
                )
                for row in words["rows"]
            ],
        ),
        "risk_table": table(
            ("", "expected edits", "change", "PER % greedy", "change", "PER % beam 4", "change"),
            [
                (
                    label,
                    f"{risk[name]['expected']:.3f}",
                    f"{risk[name]['expected_change']:+.3f} "
                    f"± {risk[name]['expected_change_error']:.3f}",
                    *(
                        text
                        for beam in ("beam1", "beam4")
                        for text in (
                            f"{risk[name][beam]['per']:.2f}",
                            f"{risk[name][beam]['per_change']:+.2f} "
                            f"± {risk[name][beam]['per_change_error']:.2f}",
                        )
                    ),
                )
                for name, label in names.items()
            ],
        ),
    }


LESSON = Lesson(
    number=9,
    name="beam-search",
    title="Beam search: what it finds, and its place in training",
    summary="a search gets better than the model it searches; training uses it in one way only.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
