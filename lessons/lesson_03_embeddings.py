"""One-hot vectors, embeddings, and the probability of a sequence."""

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes

from jaxformer import decoding, models, nn
from jaxformer.config import ModelConfig
from jaxformer.data import EOS, PAD, SOS, UNK, PairData, Tokenizer
from jaxformer.losses import cross_entropy
from lessons.drawing import COLORS, MARKERS, legend, line, panels
from lessons.framework import Lesson, Results, table
from lessons.training import minimise, pairs, words

VOWELS = frozenset(
    ["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"]
)
FORBIDDEN = (PAD, SOS, UNK)
LONGEST = 11  # phonemes
WIDTH = 64
ENUMERATED = 3  # every string of so many phonemes is scored


def measure(*, small: bool, seed: int) -> Results:
    data, tokenizers = pairs(words(letters=LONGEST, small=small))
    apply, before = language_model(len(tokenizers.target), seed)
    params, losses = train(apply, before, data, small=small, seed=seed)
    tables = [np.asarray(tree["embedding"]["table"]) for tree in (before, params)]
    return {
        "cost": cost(small=small),
        "phonemes": phonemes(tokenizers.target),
        "distances": {
            name: distances(found, tokenizers.target)
            for name, found in zip(("before", "after"), tables, strict=True)
        },
        "training": {
            "steps": len(losses),
            "first_loss": float(losses[:10].mean()),
            "last_loss": float(losses[-50:].mean()),
            "words": len(data.splits["train"].examples),
            "parameters": nn.count(params),
            "width": WIDTH,
        },
        "strings": strings(apply, params, data, tokenizers.target, small=small, seed=seed),
    }


# ------------------------------------------------------------------ One-hot against look-up


def cost(*, small: bool) -> dict[str, Any]:
    """A one-hot product and a look-up of the same rows: seconds, and bytes of the one-hot input."""
    tokens, width = 512, 128
    vocabularies = [64, 256] if small else [128, 1024, 8192, 32768]
    found: dict[str, Any] = {"tokens": tokens, "width": width, "vocabularies": vocabularies}
    seconds: dict[str, list[float]] = {"one_hot": [], "lookup": []}
    same = []
    for vocabulary in vocabularies:
        random = np.random.default_rng(0)
        weights = jnp.asarray(random.normal(size=(vocabulary, width)).astype(np.float32))
        ids = jnp.asarray(random.integers(0, vocabulary, tokens))
        one_hot = jax.nn.one_hot(ids, vocabulary)
        product, took = timed(jax.jit(jnp.matmul), one_hot, weights)
        rows, took_lookup = timed(jax.jit(lambda ids, table: table[ids]), ids, weights)
        seconds["one_hot"].append(took)
        seconds["lookup"].append(took_lookup)
        same.append(bool((product == rows).all()))
    return found | {
        "seconds": seconds,
        "same": all(same),
        "flops": [2 * tokens * v * width for v in vocabularies],
        "one_hot_bytes": [4 * tokens * v for v in vocabularies],
        "id_bytes": 4 * tokens,
    }


def timed(function: Any, *arguments: Any) -> tuple[jax.Array, float]:
    """What a function returns, and the least seconds that one of seven calls took."""
    result = jax.block_until_ready(function(*arguments))
    spent = []
    for _ in range(7):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        spent.append(time.perf_counter() - started)
    return result, min(spent)


# ------------------------------------------------------------------ A model of pronunciations


def language_model(vocabulary: int, seed: int) -> tuple[Any, Any]:
    """A small decoder over phonemes: (apply, initial parameters)."""
    config = ModelConfig(
        kind="decoder",
        layers=2,
        width=WIDTH,
        heads=2,
        feedforward=2 * WIDTH,
        max_length=2 * LONGEST,
        scan=False,
    )
    return nn.pure(models.build(config, vocabulary=vocabulary, seed=seed))


def rows(data: PairData, split: str) -> np.ndarray:
    """The pronunciations of a split, int32[items, LONGEST + 1], each ending in <eos>."""
    targets = data.splits[split].targets
    return targets.gather(np.arange(len(targets)), LONGEST + 1)[0]


def nats(apply: Any, params: Any, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed -log p of the targets, and their number."""
    inputs = jnp.pad(targets, ((0, 0), (1, 0)), constant_values=SOS)[:, :-1]
    real = (targets != PAD).astype(jnp.float32)
    factors = apply(params, inputs, method="predictions")
    total, _ = cross_entropy(factors, targets, real)
    return total, real.sum()


def train(apply: Any, params: Any, data: PairData, *, small: bool, seed: int) -> tuple[Any, Any]:
    """Next-phoneme prediction on the train split."""
    targets = jnp.asarray(rows(data, "train"))
    steps = 10 if small else 800

    def objective(params: Any, batch: jax.Array) -> jax.Array:
        total, count = nats(apply, params, batch)
        return total / count

    return minimise(
        objective,
        params,
        optax.adam(optax.cosine_decay_schedule(4e-3, steps)),
        lambda key: targets[jax.random.randint(key, (64,), 0, len(targets))],
        steps=steps,
        seed=seed,
    )


# ------------------------------------------------------------------ Distances


def phonemes(tokenizer: Tokenizer) -> list[str]:
    """The phonemes of a tokenizer, vowels first."""
    found = [tokenizer.decode([token]) for token in range(UNK + 1, len(tokenizer))]
    return sorted(found, key=lambda name: (name not in VOWELS, name))


def distances(embeddings: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    """How the embeddings of phonemes lie to each other, by the cosine of their angles."""
    names = phonemes(tokenizer)
    vectors = embeddings[[tokenizer.encode(name)[0] for name in names]].astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    vowel = np.array([name in VOWELS for name in names])
    others = ~np.eye(len(names), dtype=bool)
    alike = (vowel[:, None] == vowel) & others
    nearest = np.where(others, cosines, -np.inf).argmax(1)
    centred = unit - unit.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return {
        "alike": float(cosines[alike].mean()),
        "unlike": float(cosines[vowel[:, None] != vowel].mean()),
        "spread": float(cosines[others].std()),
        "nearest": {name: names[place] for name, place in zip(names, nearest, strict=True)},
        "nearest_alike": float((vowel[nearest] == vowel).mean()),
        "chance": float(alike.sum() / others.sum()),
        "plane": (centred @ axes[:2].T),
    }


# ------------------------------------------------------------------ Strings


def strings(
    apply: Any, params: Any, data: PairData, tokenizer: Tokenizer, *, small: bool, seed: int
) -> dict[str, Any]:
    """Exact sums over short strings, samples, and what always taking the likeliest token gives."""
    real = rows(data, "dev")
    total, count = jax.jit(lambda p, t: nats(apply, p, t))(params, jnp.asarray(real[:2000]))
    drawn = 64 if small else 4000
    sampled = generate(apply, params, drawn, 1.0, seed)
    greedy = generate(apply, params, 1, 0.0, seed)
    best = search(apply, params)
    known = {tuple(row[row != PAD].tolist()) for row in rows(data, "train")}
    drawn_rows = [
        tuple(t[: n + 1].tolist()) for t, n in zip(sampled.tokens, sampled.lengths, strict=True)
    ]
    lengths = np.arange(LONGEST + 1)
    real_lengths = (real != PAD).sum(1) - 1
    return {
        "dev_nats": float(total / count),
        "uniform_nats": float(np.log(len(tokenizer) - len(FORBIDDEN))),
        "enumerated": enumerate_strings(apply, params, tokenizer, small=small),
        "lengths": lengths,
        "sampled_up_to": [
            float((sampled.lengths[sampled.finished] <= n).sum() / drawn) for n in lengths
        ],
        "real_up_to": [float((real_lengths <= n).mean()) for n in lengths],
        "drawn": drawn,
        "distinct": len(set(drawn_rows)),
        "known": float(np.mean([row in known for row in drawn_rows])),
        "examples": [tokenizer.decode(list(row[:-1])) for row in drawn_rows[:8]],
        "sample_nats": float(-np.mean(sampled.log_probs)),
        "greedy": spoken(tokenizer, greedy.tokens[0], greedy.lengths[0]),
        "greedy_probability": float(np.exp(greedy.log_probs[0])),
        "best": spoken(tokenizer, best.tokens[0, 0], best.lengths[0, 0]),
        "best_probability": float(np.exp(best.log_probs[0, 0])),
    }


def spoken(tokenizer: Tokenizer, tokens: np.ndarray, length: Any) -> str:
    """The phonemes of a row without its <eos>."""
    return tokenizer.decode(tokens[: int(length)].tolist())


def generate(apply: Any, params: Any, number: int, temperature: float, seed: int) -> Any:
    """Strings drawn token by token; at temperature 0 the likeliest token each time."""
    draw = decoding.make_generate(apply, max_length=LONGEST + 1, temperature=temperature)
    prompts, start = np.full((number, 1), SOS, np.int32), np.zeros(number, np.int32)
    return jax.device_get(draw(params, prompts, start, jax.random.key(seed)))


def search(apply: Any, params: Any, beam: int = 64) -> Any:
    """The likeliest string that a beam search finds."""

    def step(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = apply(params, tokens, cache, method="extend")
        return logits[:, -1], cache

    @jax.jit
    def run() -> Any:
        cache = apply(params, LONGEST + 2, jnp.zeros(1, jnp.int32), method="init_cache")
        logits, cache = step(jnp.full((1, 1), SOS, jnp.int32), cache)
        return decoding.beam_search(
            step,
            cache,
            logits,
            beam=beam,
            max_length=LONGEST + 1,
            eos_id=EOS,
            pad_id=PAD,
            length_penalty=0.0,
            forbidden=FORBIDDEN,
        )

    return jax.device_get(run())


def enumerate_strings(
    apply: Any, params: Any, tokenizer: Tokenizer, *, small: bool
) -> dict[str, Any]:
    """The summed probability of all strings of each length, by the chain rule.

    `unfinished`: the summed probability of going on after ENUMERATED phonemes, whatever follows.
    """
    letters = np.arange(UNK + 1, len(tokenizer))[: 6 if small else None]
    every = np.array(list(itertools.product(letters, repeat=ENUMERATED)), np.int32)
    block = 1024
    padded = np.resize(every, (-(-len(every) // block) * block, ENUMERATED))

    @jax.jit
    def chain(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = jnp.pad(batch, ((0, 0), (1, 0)), constant_values=SOS)
        logits = apply(params, inputs).at[..., np.array(FORBIDDEN)].set(-jnp.inf)
        logs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logs[:, :-1], batch[..., None], -1)[..., 0]
        prefix = jnp.pad(jnp.cumsum(chosen, 1), ((0, 0), (1, 0)))
        return prefix, logs[..., EOS]

    parts = [jax.device_get(chain(params, part)) for part in padded.reshape(-1, block, ENUMERATED)]
    prefix, end = (
        np.concatenate(part)[: len(every)].astype(np.float64) for part in zip(*parts, strict=True)
    )
    by_length, number = [], []
    for length in range(ENUMERATED + 1):
        # Strings of one length share their last phonemes in a stride of the enumeration.
        stride = len(letters) ** (ENUMERATED - length)
        by_length.append(float(np.exp(prefix[::stride, length] + end[::stride, length]).sum()))
        number.append(len(letters) ** length)
    going_on = np.exp(prefix[:, -1]) * -np.expm1(end[:, -1])
    return {
        "number": number,
        "probability": by_length,
        "up_to": np.cumsum(by_length),
        "unfinished": float(going_on.sum()),
        "total": float(sum(by_length) + going_on.sum()),
        "without_end": [
            float(np.exp(without(prefix, end, length, len(letters))).sum()) for length in (1, 2, 3)
        ],
    }


def without(prefix: np.ndarray, end: np.ndarray, length: int, letters: int) -> np.ndarray:
    """Log-probability of every string of a length if <eos> is never an option."""
    stride = letters ** (ENUMERATED - length)
    lost = np.log(-np.expm1(end[::stride, :length])).sum(1)
    return prefix[::stride, length] - lost


def claims(results: Results) -> dict[str, bool]:
    cost, strings = results["cost"], results["strings"]
    before, after = results["distances"]["before"], results["distances"]["after"]
    enumerated = strings["enumerated"]
    seconds = cost["seconds"]
    return {
        "product and look-up give the same numbers, bit by bit": cost["same"],
        "with the largest vocabulary the look-up is over a hundred times as fast": (
            seconds["one_hot"][-1] > 100 * seconds["lookup"][-1]
        ),
        "before training, alike and unlike phonemes are equally far, within 0.05": (
            abs(before["alike"] - before["unlike"]) < 0.05
        ),
        "after training, alike ones are nearer by 0.1 and more": (
            after["alike"] - after["unlike"] > 0.1
        ),
        "after training nine in ten phonemes have a neighbour of their own class": (
            after["nearest_alike"] >= 0.9
        ),
        "before training no more than seven in ten": before["nearest_alike"] <= 0.7,
        "finished strings and those going on sum to 1, within 1e-5": (
            abs(enumerated["total"] - 1) < 1e-5
        ),
        "without <eos> the strings of every length sum to 1, within 1e-5": all(
            abs(total - 1) < 1e-5 for total in enumerated["without_end"]
        ),
        "samples agree with the exact sums within 0.02": all(
            abs(drawn - exact) < 0.02
            for drawn, exact in zip(strings["sampled_up_to"], enumerated["up_to"], strict=False)
        ),
        "the model is surer than chance": strings["dev_nats"] < strings["uniform_nats"] - 0.5,
        "the string of likeliest steps is likelier than a typical sample by e^3 and more": (
            np.log(strings["greedy_probability"]) > 3 - strings["sample_nats"]
        ),
        "a wide search finds one that is over ten times as likely": (
            10 * strings["greedy_probability"] < strings["best_probability"]
        ),
        "and it is the empty string": strings["best"] == "",
        "nearly all samples are different": strings["distinct"] > 0.9 * strings["drawn"],
    }


def figures(results: Results) -> dict[str, Any]:
    return {"cost": draw_cost(results), "embeddings": draw_embeddings(results)}


def draw_cost(results: Results) -> Any:
    figure, (left, right) = panels(2, height=3.3)
    cost, strings = results["cost"], results["strings"]
    for number, (name, label) in enumerate(
        {"one_hot": "one-hot product", "lookup": "look-up"}.items()
    ):
        spent = [1e3 * seconds for seconds in cost["seconds"][name]]
        line(left, cost["vocabularies"], spent, number, label)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(cost["vocabularies"], [f"{v:,}" for v in cost["vocabularies"]])
    left.set(xlabel="vocabulary V", ylabel="time (ms)", title=f"{cost['tokens']} tokens")
    legend(left)
    exact = strings["enumerated"]["up_to"]
    line(right, range(len(exact)), exact, 0, "model, exact sums", linestyle="", markersize=7)
    line(right, strings["lengths"], strings["sampled_up_to"], 1, "model, samples")
    line(right, strings["lengths"], strings["real_up_to"], 2, "held-out words")
    right.set(xlabel="n (phonemes)", ylabel="probability", title="strings of at most n phonemes")
    legend(right)
    return figure


def draw_embeddings(results: Results) -> Any:
    figure, axes = panels(2, height=4.2)
    for axis, (name, found) in zip(axes, results["distances"].items(), strict=True):
        draw_plane(axis, found["plane"], results["phonemes"])
        axis.set(title=f"{name} training", xlabel="first principal axis", xticks=[], yticks=[])
    axes[0].set_ylabel("second principal axis")
    legend(axes[1])
    return figure


def draw_plane(axis: Axes, places: list[list[float]], names: list[str]) -> None:
    """Each phoneme at its place, vowels and consonants in different colours."""
    for number, (label, vowel) in enumerate((("vowel", True), ("consonant", False))):
        own = [
            place for place, name in zip(places, names, strict=True) if (name in VOWELS) == vowel
        ]
        axis.plot(
            *zip(*own, strict=True), linestyle="", marker=MARKERS[number], markersize=4,
            color=COLORS[number], label=label,
        )  # fmt: skip
    for (x, y), name in zip(places, names, strict=True):
        axis.annotate(name, (x, y), (3, 2), textcoords="offset points", fontsize=7)


def values(results: Results) -> dict[str, Any]:
    cost, strings = results["cost"], results["strings"]
    spent, enumerated = cost["seconds"], strings["enumerated"]
    rows = [
        (
            f"{v:,}",
            f"{flops / 1e6:,.0f} M",
            f"{size / 2**20:.1f} MiB",
            f"{1e3 * product:.2f} ms",
            f"{1e3 * lookup:.3f} ms",
        )
        for v, flops, size, product, lookup in zip(
            cost["vocabularies"], cost["flops"], cost["one_hot_bytes"], spent["one_hot"],
            spent["lookup"], strict=True,
        )
    ]  # fmt: skip
    nearest = results["distances"]["after"]["nearest"]
    shown = [name for name in ("IY", "AE", "OW", "P", "S", "M", "JH", "R") if name in nearest]
    real = strings["real_up_to"]
    return {
        "cost_table": table(
            ("V", "multiplications and additions", "one-hot input", "product", "look-up"), rows
        ),
        "largest": cost["vocabularies"][-1],
        "speedup": spent["one_hot"][-1] / spent["lookup"][-1],
        "neighbours": ", ".join(f"{name} → {nearest[name]}" for name in shown),
        "sum_table": table(
            ("n", "strings of n phonemes", "their probability", "of all up to n", "held-out words"),
            [
                (str(n), f"{number:,}", f"{own:.4f}", f"{so_far:.4f}", f"{real[n]:.4f}")
                for n, (number, own, so_far) in enumerate(
                    zip(
                        enumerated["number"],
                        enumerated["probability"],
                        enumerated["up_to"],
                        strict=True,
                    )
                )
            ],
        ),
        "unfinished": enumerated["unfinished"],
        "best": f"`{strings['best']}`" if strings["best"] else "the empty string",
        "samples": "; ".join(f"`{text}`" for text in strings["examples"]),
        "typical": float(np.exp(-strings["sample_nats"])),
        "vowels": sum(name in VOWELS for name in results["phonemes"]),
        "consonants": sum(name not in VOWELS for name in results["phonemes"]),
    }


LESSON = Lesson(
    number=3,
    name="embeddings",
    title="One-hot vectors, embeddings, and the probability of a sequence",
    summary="what a look-up saves, what distances learn, and why strings need an end.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
