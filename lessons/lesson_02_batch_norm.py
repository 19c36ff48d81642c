"""Batch normalisation: what it holds still, what it needs, and where it breaks."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxformer import nn
from lessons.drawing import legend, line, panels
from lessons.framework import Lesson, Results, mean_and_error, table

ARMS = {"batch": "BatchNorm", "layer": "LayerNorm", "none": "no normalisation"}
LAYERS, WIDTH = 4, 64
CLASSES, PIXELS = 10, 64
PROBE = 32  # examples of a usual batch


class Network(nnx.Module):
    """Four hidden layers, each linear -> normalisation -> ReLU, and a linear read-out."""

    def __init__(self, norm: str, *, rngs: nnx.Rngs):
        widths = [PIXELS, *[WIDTH] * LAYERS]
        self.linear = nnx.List(
            nn.Linear({"D": before}, {"F": after}, bias=True, scale=2**0.5, rngs=rngs)
            for before, after in itertools.pairwise(widths)
        )
        kinds = {"batch": nn.BatchNorm, "layer": nn.LayerNorm}
        self.norms = (
            nnx.List(kinds[norm]({"F": WIDTH}, rngs=rngs) for _ in range(LAYERS))
            if norm in kinds
            else None
        )
        self.output = nn.Linear({"F": WIDTH}, {"V": CLASSES}, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, *, training: bool = False) -> jax.Array:
        """Logits [B, V] of images [B, D]."""
        for inputs in self.inputs(x, training=training):
            x = jax.nn.relu(inputs)
        return self.output(x)

    def inputs(self, x: jax.Array, *, training: bool = False) -> list[jax.Array]:
        """What enters each non-linearity, [B, F] a layer."""
        found = []
        for number, linear in enumerate(self.linear):
            x = linear(x)
            if self.norms is not None:
                norm = self.norms[number]
                by_batch = isinstance(norm, nn.BatchNorm)
                x = norm(x, training=training) if by_batch else norm(x)
            found.append(x)
            x = jax.nn.relu(x)
        return found


def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, in 0..1.

    The last fifth is the test split: neighbours in the order of collection share their writers.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = (found.data / 16).astype(np.float32), found.target.astype(np.int32)
    cut = len(y) * 4 // 5
    return {"train": (x[:cut], y[:cut]), "test": (x[cut:], y[cut:])}


def measure(*, small: bool, seed: int) -> Results:
    data = digits()
    seeds = 2 if small else 5
    epochs = 1 if small else 30
    sizes = [2, 64] if small else [2, 3, 4, 8, 16, 64]
    found: dict[str, Any] = {arm: [] for arm in ("batch", "layer")}
    for arm in found:
        for size in sizes:
            trained = fit(arm, data["train"], size, epochs=epochs, seeds=seeds, seed=seed)
            found[arm].append(accuracy(arm, trained, data["test"]))
    usual = {
        arm: fit(arm, data["train"], PROBE, epochs=epochs, seeds=seeds, seed=seed) for arm in ARMS
    }
    return {
        "train_images": len(data["train"][1]),
        "test_images": len(data["test"][1]),
        "epochs": epochs,
        "seeds": seeds,
        "batch": PROBE,
        "drift": {arm: usual[arm]["drift"] for arm in ARMS},
        "trace": {arm: usual[arm]["trace"] for arm in ARMS},
        "accuracy": {arm: mean_and_error(accuracy(arm, usual[arm], data["test"])) for arm in ARMS},
        "sizes": sizes,
        "by_size": {arm: [mean_and_error(run) for run in runs] for arm, runs in found.items()},
        "test_time": test_time(usual["batch"], data["test"], seed),
        "gradients": gradients(data["train"], sizes, seed),
        "variation": variation(data["train"], seed),
    }


@functools.cache
def model(arm: str, seed: int) -> tuple[Callable[..., Any], Any, Any]:
    """(apply, parameters, running statistics)."""
    network = Network(arm, rngs=nnx.Rngs(params=seed))
    return *nn.pure(network), nn.statistics(network)


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fit(
    arm: str,
    data: Any,
    size: int,
    *,
    epochs: int,
    seeds: int,
    seed: int,
    stops: int = 40,
) -> dict[str, Any]:
    """Trains `seeds` networks side by side: SGD with momentum, learning rate 0.05 x size / 32.

    At `stops` moments it looks at what enters the non-linearities, over one fixed batch of 256
    training images normalised by its own statistics, as in training. `drift` is how far the mean
    of a unit moves from one moment to the next, in units of its deviation: the mean over units,
    moments and networks, by layer. `trace` follows the means of three units of the last layer.
    """
    images, labels = map(jnp.asarray, data)
    apply, _, _ = model(arm, 0)
    made = [model(arm, seed + number)[1:] for number in range(seeds)]
    params, statistics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
    optimizer = optax.sgd(0.05 * size / 32, momentum=0.9)
    each = max(epochs * len(labels) // size // stops, 1)

    def objective(params: Any, statistics: Any, places: jax.Array) -> tuple[jax.Array, Any]:
        logits, moved = apply(params, images[places], statistics=statistics, training=True)
        return loss(logits, labels[places]), moved

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, statistics, state = carry
        places = jax.random.randint(key, (size,), 0, len(labels))
        gradient, statistics = jax.grad(objective, has_aux=True)(params, statistics, places)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), statistics, state), None

    def look(carry: Any, keys: jax.Array) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, keys)
        params, statistics, _ = carry
        seen, _ = apply(params, images[:256], statistics=statistics, training=True, method="inputs")
        return carry, [(layer.mean(0), layer.std(0)) for layer in seen]

    @jax.jit
    @jax.vmap
    def run(params: Any, statistics: Any, keys: jax.Array) -> Any:
        carry = (params, statistics, optimizer.init(params))
        (params, statistics, _), seen = jax.lax.scan(look, carry, keys)
        return params, statistics, seen

    keys = jax.random.split(jax.random.key(seed), (seeds, stops, each))
    params, statistics, seen = run(params, statistics, keys)
    drift = [
        float((jnp.abs(jnp.diff(mean, axis=1)) / (deviation[:, :-1] + 1e-6)).mean())
        for mean, deviation in seen
    ]
    mean, deviation = seen[-1]
    return {
        "params": params,
        "statistics": statistics,
        "drift": drift,
        "trace": {"mean": mean[0, :, :3].T, "deviation": deviation[0, :, :3].T},
    }


def predict(arm: str, trained: dict[str, Any], images: Any, *, by_batch: bool = False) -> jax.Array:
    """The predicted classes [seeds, B], with running statistics or with the batch's own."""
    apply, _, _ = model(arm, 0)

    @jax.jit
    @jax.vmap
    def logits(params: Any, statistics: Any) -> jax.Array:
        if by_batch:
            return apply(params, images, statistics=statistics, training=True)[0]
        return apply(params, images, statistics=statistics)

    return logits(trained["params"], trained["statistics"]).argmax(-1)


def accuracy(arm: str, trained: dict[str, Any], data: Any) -> list[float]:
    """The share of right answers, by network."""
    images, labels = map(jnp.asarray, data)
    return np.asarray((predict(arm, trained, images) == labels).mean(-1)).tolist()


def test_time(trained: dict[str, Any], data: Any, seed: int) -> dict[str, list[float]]:
    """Accuracy of BatchNorm where a test batch is normalised with its own statistics."""
    images, labels = data
    mixed = np.random.default_rng(seed).permutation(len(labels))
    sorted_places = np.argsort(labels, kind="stable")

    def by_batch(order: np.ndarray, size: int) -> tuple[float, float]:
        order = order[: len(order) // size * size].reshape(-1, size)
        found = jax.lax.map(
            lambda places: (
                predict("batch", trained, jnp.asarray(images)[places], by_batch=True)
                == jnp.asarray(labels)[places]
            ),
            jnp.asarray(order),
        )
        return mean_and_error(np.asarray(found.mean((0, 2))).tolist())

    return {
        "running": list(mean_and_error(accuracy("batch", trained, data))),
        "mixed_32": list(by_batch(mixed, 32)),
        "mixed_2": list(by_batch(mixed, 2)),
        "one_class": list(by_batch(sorted_places, 16)),
        "single": list(by_batch(mixed, 1)),
    }


def gradients(data: Any, sizes: list[int], seed: int) -> dict[str, Any]:
    """The gradient of the first layer at initialisation, from 64 random batches of each size.

    `norm`: its mean norm. `cosine`: of its angle with the gradient over all training images.
    """
    images, labels = map(jnp.asarray, data)
    found: dict[str, Any] = {}
    for arm in ("batch", "layer"):
        apply, params, statistics = model(arm, seed)

        def gradient(places: jax.Array, apply=apply, params=params, statistics=statistics):
            def objective(params: Any) -> jax.Array:
                logits, _ = apply(params, images[places], statistics=statistics, training=True)
                return loss(logits, labels[places])

            return jax.grad(objective)(params)["linear"][0]["kernel"].reshape(-1)

        whole = jax.jit(gradient)(jnp.arange(len(labels)))
        norms, cosines = [], []
        for size in sizes:
            places = jax.random.randint(jax.random.key(seed), (64, size), 0, len(labels))
            each = jax.jit(jax.vmap(gradient))(places)
            norm = jnp.linalg.norm(each, axis=-1)
            norms.append(float(norm.mean()))
            cosines.append(float((each @ whole / (norm * jnp.linalg.norm(whole) + 1e-20)).mean()))
        found[arm] = {
            "norm": norms,
            "cosine": cosines,
            "whole": float(jnp.linalg.norm(whole)),
        }
    return found


def variation(data: Any, seed: int) -> dict[str, Any]:
    """The gradient of the images where a batch's images are drawn together to their mean."""
    images, labels = (jnp.asarray(array[:PROBE]) for array in data)
    centre = images.mean(0)
    shares = [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]
    found: dict[str, Any] = {"shares": shares}
    for arm in ("batch", "layer"):
        apply, params, statistics = model(arm, seed)

        def objective(share: jax.Array, x: jax.Array, apply=apply, params=params, state=statistics):
            images = centre + share * (x - centre)
            return loss(apply(params, images, statistics=state, training=True)[0], labels)

        def norm(share: jax.Array, objective=objective) -> jax.Array:
            # The derivative by x is share times that by the images.
            return jnp.linalg.norm(jax.grad(objective, argnums=1)(share, images)) / share

        found[arm] = np.asarray(jax.jit(jax.vmap(norm))(jnp.array(shares))).tolist()
    return found


def claims(results: Results) -> dict[str, bool]:
    drift, sizes = results["drift"], results["sizes"]
    accuracy = {arm: mean for arm, (mean, _) in results["accuracy"].items()}
    by_size = {arm: [mean for mean, _ in rows] for arm, rows in results["by_size"].items()}
    test = {name: mean for name, (mean, _) in results["test_time"].items()}
    gradient, variation = results["gradients"], results["variation"]
    hundredth = variation["shares"].index(0.01)
    return {
        "BatchNorm drifts less than a tenth of no normalisation and of LayerNorm, everywhere": all(
            less < 0.1 * min(more)
            for less, *more in zip(drift["batch"], drift["layer"], drift["none"], strict=True)
        ),
        "BatchNorm is the most accurate with usual batches, by one to four points": all(
            0.01 < accuracy["batch"] - accuracy[arm] < 0.04 for arm in ("layer", "none")
        ),
        "LayerNorm is no better than no normalisation, within a point": (
            abs(accuracy["layer"] - accuracy["none"]) < 0.01
        ),
        "with running statistics the accuracy is as good as with mixed batches of 32, or better": (
            test["running"] > test["mixed_32"] - 0.01
        ),
        "a batch of one class is recognised worse, by ten points and more": (
            test["one_class"] < test["running"] - 0.1
        ),
        "single images are guessed": test["single"] < 0.2,
        "at batch size 2 BatchNorm's gradient is over a hundred times that at 64": (
            gradient["batch"]["norm"][0] > 100 * gradient["batch"]["norm"][-1]
        ),
        "and does not point where the whole gradient does, which LayerNorm's does a little": (
            abs(gradient["batch"]["cosine"][0]) < 0.05 < 0.1 < gradient["layer"]["cosine"][0]
        ),
        "LayerNorm's grows less than fivefold": (
            gradient["layer"]["norm"][0] < 5 * gradient["layer"]["norm"][-1]
        ),
        "at batch size 2 BatchNorm gets most images wrong, LayerNorm less than one in ten": (
            by_size["batch"][0] < 0.5 and by_size["layer"][0] > 0.9
        ),
        "from 16 on they are within three points": all(
            abs(one - other) < 0.03
            for one, other, size in zip(by_size["batch"], by_size["layer"], sizes, strict=True)
            if size >= 16
        ),
        "at a hundredth of the variation BatchNorm's gradient is over fifty times as large": (
            variation["batch"][hundredth] > 50 * variation["batch"][0]
        ),
        "LayerNorm's changes by less than a fifth": (
            max(variation["layer"]) < 1.2 * min(variation["layer"])
        ),
    }


def figures(results: Results) -> dict[str, Any]:
    return {"drift": draw_drift(results), "small-batches": draw_batches(results)}


def draw_drift(results: Results) -> Any:
    figure, axes = panels(3, height=3.0, sharey=True)
    for axis, (arm, name) in zip(axes, ARMS.items(), strict=True):
        trace = results["trace"][arm]
        for unit, (mean, deviation) in enumerate(
            zip(trace["mean"], trace["deviation"], strict=True)
        ):
            moments = np.linspace(0, results["epochs"], len(mean) + 1)[1:].tolist()
            line(axis, moments, mean, unit, f"unit {unit + 1}", error=deviation, marker=False)
        axis.set(title=name, xlabel="epoch")
    axes[0].set_ylabel("input of the last ReLU\n(mean ± deviation)")
    legend(axes[0])
    return figure


def draw_batches(results: Results) -> Any:
    figure, (left, middle, right) = panels(3, height=3.3)
    for number, arm in enumerate(("batch", "layer")):
        rows = results["by_size"][arm]
        line(
            left, results["sizes"], [100 * (1 - mean) for mean, _ in rows], number, ARMS[arm],
            error=[100 * error for _, error in rows],
        )  # fmt: skip
        line(middle, results["sizes"], results["gradients"][arm]["norm"], number, ARMS[arm])
        line(right, results["variation"]["shares"], results["variation"][arm], number, ARMS[arm])
    for axis in (left, middle):
        axis.set_xscale("log", base=2)
        axis.set_xticks(results["sizes"], [str(size) for size in results["sizes"]])
        axis.set(xlabel="batch size", yscale="log")
    left.set(title="test error (%)")
    left.minorticks_off()
    left.set_yticks([5, 10, 20, 40, 80], ["5", "10", "20", "40", "80"])
    middle.set(title="gradient norm, first layer")
    right.set(title="gradient norm, images", xlabel="variation in the batch (share)")
    right.set(xscale="log", yscale="log")
    legend(left)
    return figure


def values(results: Results) -> dict[str, Any]:
    def percent(pair: list[float]) -> str:
        return f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"

    layers = range(1, len(results["drift"]["batch"]) + 1)
    tests = {
        "running": "running statistics",
        "mixed_32": "its own, batches of 32 mixed images",
        "mixed_2": "its own, batches of 2 mixed images",
        "one_class": "its own, batches of 16 images sorted by class",
        "single": "its own, single images",
    }
    gradient = results["gradients"]
    return {
        "drift_table": table(
            ("layer", *map(str, layers), "test accuracy, %"),
            [
                (
                    name,
                    *(f"{d:.3f}" for d in results["drift"][arm]),
                    percent(results["accuracy"][arm]),
                )
                for arm, name in ARMS.items()
            ],
        ),
        "test_table": table(
            ("a test batch is normalised with", "accuracy, %"),
            [(text, percent(results["test_time"][name])) for name, text in tests.items()],
        ),
        "size_table": table(
            ("batch size", *map(str, results["sizes"])),
            [
                (f"accuracy, %: {ARMS[arm]}", *map(percent, rows))
                for arm, rows in results["by_size"].items()
            ]
            + [
                (f"gradient norm: {ARMS[arm]}", *(f"{norm:.2g}" for norm in found["norm"]))
                for arm, found in gradient.items()
            ]
            + [
                (f"cosine with the whole: {ARMS[arm]}", *(f"{c:.2f}" for c in found["cosine"]))
                for arm, found in gradient.items()
            ],
        ),
        "variation_table": table(
            ("variation", *(f"{share:g}" for share in results["variation"]["shares"])),
            [
                (ARMS[arm], *(f"{norm:.2g}" for norm in results["variation"][arm]))
                for arm in ("batch", "layer")
            ],
        ),
    }


LESSON = Lesson(
    number=2,
    name="batch-norm",
    title="Batch normalisation, and where it breaks",
    summary="what it holds still, why test time needs running statistics, and batches of two.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
