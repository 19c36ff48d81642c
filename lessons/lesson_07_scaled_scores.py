"""Why attention divides its scores by the root of the head dimension."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from jaxformer_kernels import attention
from lessons.drawing import legend, line, panels
from lessons.framework import Lesson, Results, mean_and_error, table
from lessons.training import Trained, train, words

ARMS = {
    "scaled": "divided by √d",
    "unscaled": "not divided",
    "small_weights": "not divided, smaller initial weights",
}

DRAWS = 16  # sets of keys


def measure(*, small: bool, seed: int) -> Results:
    dimensions = [4, 64] if small else [1, 4, 16, 64, 256, 1024]
    queries, keys = (4, 16) if small else (128, 64)
    return {
        "dimensions": dimensions,
        "draws": DRAWS,
        "queries": queries,
        "keys": keys,
        "entropy_limit": math.log(keys),
        "initial": {
            arm: [initial(d, queries, keys, scaled=arm == "scaled", seed=seed) for d in dimensions]
            for arm in ("scaled", "unscaled")
        },
        "training": training(small=small, seed=seed),
    }


def initial(d: int, queries: int, keys: int, *, scaled: bool, seed: int) -> dict[str, float]:
    """Scores, weights and gradients of attention between standard normal queries and keys.

    The gradient is that of a standard normal functional of the weights with respect to the scores,
    its norm taken for each query.
    """
    query_key, key_key, gradient_key = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(query_key, (DRAWS, queries, 1, d))
    k = jax.random.normal(key_key, (DRAWS, keys, 1, d))
    # Values that are one-hot vectors make the output the weights, and the gradient of a bias that
    # is added to the scores is the gradient of the scores.
    one_hot = jnp.broadcast_to(jnp.eye(keys)[:, None, :], (DRAWS, keys, 1, keys))
    scale = d**-0.5 if scaled else 1.0

    def weights(bias: jax.Array) -> jax.Array:
        return attention(q, k, one_hot, bias=bias, scale=scale)

    p, pull_back = jax.vjp(weights, jnp.zeros((DRAWS, 1, queries, keys)))
    (gradient,) = pull_back(jax.random.normal(gradient_key, p.shape))
    norms = jnp.linalg.norm(gradient, axis=-1)
    scores = scale * jnp.einsum("btnh,bsnh->bts", q, k)
    return {
        "score_deviation": float(scores.std()),
        "entropy": float(-jax.scipy.special.xlogy(p, p).sum(-1).mean()),
        "largest_weight": float(p.max(-1).mean()),
        "gradient_median": float(jnp.median(norms)),
        "gradient_mean": float(norms.mean()),
    }


def experiment(head_dim: int, arm: str, seed: int, *, small: bool) -> Config:
    """A one-layer spelling-to-pronunciation model whose one head has the given dimension."""
    return Config(
        seed=seed,
        data=words(letters=9, small=small),
        model=ModelConfig(
            layers=1,
            width=16 if small else 64,
            heads=1,
            head_dim=head_dim,
            feedforward=32 if small else 128,
            attention_scale=None if arm == "scaled" else 1.0,
            max_length=16,
            scan=False,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=30),
        train=TrainConfig(steps=4 if small else 300, batch_size=8 if small else 64),
    )


def training(*, small: bool, seed: int) -> dict[str, Any]:
    """Losses with narrow and wide heads, by arm."""
    head_dims, seeds = ([4, 8], [seed]) if small else ([16, 256], [seed, seed + 1, seed + 2])
    found: dict[str, Any] = {"head_dims": head_dims, "seeds": len(seeds), "losses": {}}
    for head_dim in head_dims:
        runs = {arm: [one_run(head_dim, arm, s, small=small) for s in seeds] for arm in ARMS}
        found["losses"][str(head_dim)] = {
            arm: {
                "curve": np.mean([smooth(run.metrics["loss"]) for run in trained], axis=0),
                "last": [float(run.metrics["loss"][-50:].mean()) for run in trained],
            }
            for arm, trained in runs.items()
        }
    config = experiment(head_dims[-1], "scaled", seed, small=small)
    return found | {
        "steps": config.train.steps,
        "batch": config.train.batch_size,
        "width": config.model.width,
    }


def one_run(head_dim: int, arm: str, seed: int, *, small: bool) -> Trained:
    """Trains one model."""

    def undo(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        # Without the usual scale the library makes the query weights smaller by it, which is the
        # third arm; the second has the weights of the first.
        query = any(getattr(entry, "key", None) == "query" for entry in path)
        return leaf * math.sqrt(head_dim) if query else leaf

    config = experiment(head_dim, arm, seed, small=small)
    return train(
        config,
        change=(lambda p: jax.tree.map_with_path(undo, p)) if arm == "unscaled" else None,
    )


def smooth(losses: np.ndarray, points: int = 25) -> np.ndarray:
    """Means over equal stretches of steps."""
    return np.array([part.mean() for part in np.array_split(losses, min(points, len(losses)))])


def claims(results: Results) -> dict[str, bool]:
    d = results["dimensions"]
    scaled, unscaled = results["initial"]["scaled"], results["initial"]["unscaled"]
    losses = {
        int(head_dim): {arm: mean_and_error(found["last"]) for arm, found in arms.items()}
        for head_dim, arms in results["training"]["losses"].items()
    }
    wide, narrow = losses[256], losses[16]
    return {
        "the deviation of undivided scores is √d within 5 %": all(
            abs(row["score_deviation"] / math.sqrt(n) - 1) < 0.05
            for row, n in zip(unscaled, d, strict=True)
            if n >= 4
        ),
        "divided, it is 1 within 5 %": all(
            abs(row["score_deviation"] - 1) < 0.05
            for row, n in zip(scaled, d, strict=True)
            if n > 1
        ),
        "undivided, the entropy falls with every step in d": falling(unscaled, "entropy"),
        "divided, the entropy stays within 10 % of its value at d = 4": all(
            abs(row["entropy"] / scaled[1]["entropy"] - 1) < 0.1 for row in scaled[1:]
        ),
        "undivided, the median gradient at d = 1024 is below a hundredth of the divided one's": (
            unscaled[-1]["gradient_median"] < 0.01 * scaled[-1]["gradient_median"]
        ),
        "but the mean gradient is far above the median": (
            unscaled[-1]["gradient_mean"] > 10 * unscaled[-1]["gradient_median"]
        ),
        "with unchanged weights the undivided arm ends a nat and more above, at 16 and at 256": all(
            found["unscaled"][0] > found["scaled"][0] + 1 for found in (narrow, wide)
        ),
        "it loses more at 256 than at 16": (
            wide["unscaled"][0] - wide["scaled"][0] > narrow["unscaled"][0] - narrow["scaled"][0]
        ),
        "with smaller weights it keeps up at 16": (
            abs(narrow["small_weights"][0] - narrow["scaled"][0])
            < 2 * (narrow["small_weights"][1] + narrow["scaled"][1])
        ),
        "and does not at 256: it ends a nat and more above": (
            wide["small_weights"][0] > wide["scaled"][0] + 1
        ),
    }


def falling(rows: list[dict[str, float]], name: str) -> bool:
    """Whether a quantity falls from each row to the next."""
    return all(after[name] < before[name] for before, after in itertools.pairwise(rows))


def figures(results: Results) -> dict[str, Any]:
    return {"initial": draw_initial(results), "training": draw_training(results["training"])}


def draw_initial(results: Results) -> Any:
    figure, axes = panels(3, height=3.1)
    quantities = {
        "score_deviation": "deviation of the scores",
        "entropy": "entropy of the weights (nats)",
        "gradient_median": "median gradient norm",
    }
    for axis, (name, title) in zip(axes, quantities.items(), strict=True):
        for number, arm in enumerate(("scaled", "unscaled")):
            values = [row[name] for row in results["initial"][arm]]
            line(axis, results["dimensions"], values, number, ARMS[arm])
        axis.set(xlabel="head dimension d", title=title, xscale="log")
        axis.set_xticks(results["dimensions"], [str(d) for d in results["dimensions"]])
        axis.minorticks_off()
    axes[0].set_yscale("log")
    axes[1].axhline(results["entropy_limit"], color="0.5", linewidth=1)
    axes[1].annotate(
        "all keys alike", (1, results["entropy_limit"]), (0, -11), textcoords="offset points",
        fontsize=8, color="0.4",
    )  # fmt: skip
    axes[1].set_ylim(0, results["entropy_limit"] * 1.05)
    axes[2].set_yscale("log")
    legend(axes[0])
    return figure


def draw_training(found: dict[str, Any]) -> Any:
    figure, axes = panels(len(found["losses"]), height=3.3, sharey=True)
    for axis, (head_dim, arms) in zip(axes, found["losses"].items(), strict=True):
        for number, (arm, label) in enumerate(ARMS.items()):
            curve = arms[arm]["curve"]
            places = (np.arange(len(curve)) + 0.5) * found["steps"] / len(curve)
            line(axis, places.tolist(), curve, number, label, marker=False)
        axis.set(title=f"d = {head_dim}", xlabel="training step")
    axes[0].set_ylabel("training loss (nats a phoneme)")
    legend(axes[0])
    return figure


def values(results: Results) -> dict[str, Any]:
    scaled, unscaled = results["initial"]["scaled"], results["initial"]["unscaled"]
    rows = [
        (
            str(d),
            f"{without['score_deviation']:.2f}",
            f"{with_scale['entropy']:.2f}",
            f"{without['entropy']:.2f}",
            f"{with_scale['gradient_median']:.3f}",
            f"{without['gradient_median']:.2g}",
            f"{without['gradient_mean']:.3f}",
        )
        for d, with_scale, without in zip(results["dimensions"], scaled, unscaled, strict=True)
    ]
    found = results["training"]
    losses = [
        (ARMS[arm], *(pm(found["losses"][str(d)][arm]["last"]) for d in found["head_dims"]))
        for arm in ARMS
    ]
    return {
        "first": dict(zip(("scaled", "unscaled"), (scaled[0], unscaled[0]), strict=True)),
        "last": {"d": results["dimensions"][-1], "scaled": scaled[-1], "unscaled": unscaled[-1]},
        "gradient_share": unscaled[-1]["gradient_median"] / scaled[-1]["gradient_median"],
        "initial_table": table(
            (
                "d",
                "score deviation, not divided",
                "entropy, divided",
                "entropy, not",
                "median gradient, divided",
                "median gradient, not",
                "mean gradient, not",
            ),
            rows,
        ),
        "loss_table": table(("", *(f"d = {d}" for d in found["head_dims"])), losses),
    }


def pm(measurements: list[float]) -> str:
    """Mean ± standard error."""
    mean, error = mean_and_error(measurements)
    return f"{mean:.3f} ± {error:.3f}"


LESSON = Lesson(
    number=7,
    name="scaled-scores",
    title="Why attention divides by √d",
    summary="undivided scores have variance d; the softmax saturates and its gradient dies.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
