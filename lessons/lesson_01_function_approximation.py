"""A network as a function approximator, and the error that data can show of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes

from jaxformer import nn
from lessons.drawing import legend, line, panels
from lessons.framework import Lesson, Results, mean_and_error, table
from lessons.training import minimise

NOISE = 0.3
BATCH = 64
CHECKED = 100  # values of x at which the expectation over x is taken


class Network(nnx.Module):
    """One hidden layer of tanh: R -> R."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.first = nn.Linear({"X": 1}, {"F": width}, bias=True, scale=3.0, rngs=rngs)
        self.second = nn.Linear({"F": width}, {"Y": 1}, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x[..., None])))[..., 0]


def target(x: Any) -> Any:
    """The function to be approximated, on [-1, 1]."""
    return jnp.sin(6 * x) * jnp.exp(-(x**2)) + 0.5 * jnp.abs(x)


def measure(*, small: bool, seed: int) -> Results:
    sizes = [8, 64] if small else [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    widths = [4, 16] if small else [2, 8, 64]
    seeds = 2 if small else 12
    steps = 20 if small else 2000
    curves: dict[str, Any] = {}
    for width in widths:
        found = [experiment(width, size, seeds, steps, seed) for size in sizes]
        curves[str(width)] = {
            name: {
                "mean": [mean_and_error(run[name])[0] for run in found],
                "error": [mean_and_error(run[name])[1] for run in found],
            }
            for name in ("train", "true")
        }
        examples = {str(size): run["curve"] for size, run in zip(sizes, found, strict=True)}
    grid = np.linspace(-1, 1, CHECKED)
    shown = [str(size) for size in (sizes if small else (8, 64, 2048))]
    return {
        "sizes": sizes,
        "widths": widths,
        "seeds": seeds,
        "steps": steps,
        "noise": NOISE,
        "floor": NOISE**2,
        "errors": curves,
        "proxy": proxy(seed, small=small),
        "grid": grid,
        "target": target(grid),
        "examples": {size: examples[size] for size in shown},
    }


def experiment(width: int, size: int, seeds: int, steps: int, seed: int) -> dict[str, Any]:
    """Train and true error of networks fitted to `size` points, one network and data set a seed.

    The divergence is the squared error. The true error is its expectation over x, uniform, and over
    the noise of y: the mean of (f(x) - target(x))^2 over a grid, plus the variance of the noise.
    """
    apply, _ = nn.pure(Network(width, rngs=nnx.Rngs(params=0)))
    keys = jax.random.split(jax.random.key(seed), seeds)
    data = jax.vmap(lambda key: sample(key, size))(keys)
    initial = [
        nn.pure(Network(width, rngs=nnx.Rngs(params=seed + number)))[1] for number in range(seeds)
    ]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *initial)

    def errors(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.square(jax.vmap(apply)(params, x) - y).mean(1)

    def objective(params: Any, batch: Any) -> jax.Array:
        # A sum over networks that share no parameter: each gets its own gradient.
        return errors(params, *batch).sum()

    def draw(key: jax.Array) -> Any:
        places = jax.random.randint(key, (seeds, min(size, BATCH)), 0, size)
        return jax.tree.map(lambda array: jnp.take_along_axis(array, places, 1), data)

    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    params, _ = minimise(objective, params, adam, draw, steps=steps, seed=seed)
    grid = jnp.broadcast_to(jnp.linspace(-1, 1, CHECKED), (seeds, CHECKED))
    fitted = jax.vmap(apply)(params, grid)
    return {
        "train": np.asarray(errors(params, *data)).tolist(),
        "true": np.asarray(jnp.square(fitted - target(grid)).mean(1) + NOISE**2).tolist(),
        "curve": np.asarray(fitted[0]),
    }


def sample(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Points (x, y): x uniform on [-1, 1], y the target with normal noise."""
    x_key, noise_key = jax.random.split(key)
    x = jax.random.uniform(x_key, (size,), minval=-1, maxval=1)
    return x, target(x) + NOISE * jax.random.normal(noise_key, (size,))


def proxy(seed: int, *, small: bool) -> dict[str, Any]:
    """How far the average divergence strays from the expected one for a function chosen before.

    The function is 0: nothing was fitted to the data.
    """
    sizes = [4, 64] if small else [4, 16, 64, 256, 1024, 4096]
    repeats = 20 if small else 2000
    grid = jnp.linspace(-1, 1, 100 * CHECKED)
    expected = float(jnp.square(target(grid)).mean() + NOISE**2)
    averages = [
        jax.vmap(lambda key, size=size: jnp.square(sample(key, size)[1]).mean())(
            jax.random.split(jax.random.key(seed), repeats)
        )
        for size in sizes
    ]
    return {
        "sizes": sizes,
        "repeats": repeats,
        "expected": expected,
        "mean": [float(average.mean()) for average in averages],
        "deviation": [float(average.std()) for average in averages],
    }


def claims(results: Results) -> dict[str, bool]:
    proxy = results["proxy"]
    scaled = np.array(proxy["deviation"]) * np.sqrt(proxy["sizes"])
    errors, floor = results["errors"], results["floor"]
    narrow, wide = (errors[str(results["widths"][place])] for place in (0, -1))
    gaps = np.array(wide["true"]["mean"]) - np.array(wide["train"]["mean"])
    return {
        "the average divergence is right on average, within 3 %": all(
            abs(mean / proxy["expected"] - 1) < 0.03 for mean in proxy["mean"]
        ),
        "its deviation falls as 1 / sqrt(n), within 10 %": (
            np.ptp(scaled) < 0.1 * float(scaled.mean())
        ),
        "the train error is below the true error for every width and size": all(
            train < true
            for found in errors.values()
            for train, true in zip(found["train"]["mean"], found["true"]["mean"], strict=True)
        ),
        "the wide network fits the noise of few points: train error under a tenth of the floor": (
            wide["train"]["mean"][0] < 0.1 * floor
        ),
        "there its true error is over three times the floor": wide["true"]["mean"][0] > 3 * floor,
        "the gap of the wide network falls by 50 and more from the smallest to the largest set": (
            gaps[-1] < gaps[0] / 50
        ),
        "with the largest set its true error is within 25 % of the floor, not within 10 %": (
            1.1 * floor < wide["true"]["mean"][-1] < 1.25 * floor
        ),
        "the narrow network stays at twice the floor and more, train and true": (
            min(narrow["true"]["mean"][-1], narrow["train"]["mean"][-1]) > 2 * floor
        ),
        "with the fewest points no width is better than another beyond two standard errors": all(
            abs(found["true"]["mean"][0] - wide["true"]["mean"][0])
            < 2 * (found["true"]["error"][0] + wide["true"]["error"][0])
            for found in errors.values()
        ),
    }


def figures(results: Results) -> dict[str, Any]:
    return {"errors": draw_errors(results), "fits": draw_fits(results)}


def draw_errors(results: Results) -> Any:
    figure, axes = panels(2, height=3.5)
    proxy, floor = results["proxy"], results["floor"]
    left, right = axes
    left.errorbar(
        proxy["sizes"], proxy["mean"], yerr=proxy["deviation"],
        color="#0072B2", marker="o", linestyle="none", capsize=3, label="average ± deviation",
    )  # fmt: skip
    left.axhline(proxy["expected"], color="#D55E00", linestyle="--", label="expected divergence")
    left.set(title="a function chosen before the data", xlabel="points", ylabel="squared error")
    label_sizes(left, proxy["sizes"])
    legend(left)
    for number, (width, found) in enumerate(results["errors"].items()):
        for name, dash in (("true", "-"), ("train", ":")):
            line(
                right, results["sizes"], found[name]["mean"], number,
                f"{width} hidden units, {name}", error=found[name]["error"], linestyle=dash,
            )  # fmt: skip
    right.axhline(floor, color="0.4", linewidth=1)
    right.annotate(
        "variance of the noise", (results["sizes"][-1], floor), (0, -10),
        textcoords="offset points", fontsize=8, color="0.4", ha="right",
    )  # fmt: skip
    right.set(title="functions fitted to the data", xlabel="training points")
    label_sizes(right, results["sizes"][::2])
    right.set_yscale("log")
    right.set_ylim(floor / 30, 60 * floor)
    legend(right, fontsize=7.5)
    return figure


def label_sizes(axis: Axes, sizes: list[int]) -> None:
    """A logarithmic axis with the numbers of points written out."""
    axis.set_xscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()


def draw_fits(results: Results) -> Any:
    figure, axes = panels(len(results["examples"]), height=2.8, sharey=True)
    for axis, (size, curve) in zip(axes, results["examples"].items(), strict=True):
        line(axis, results["grid"], results["target"], 1, "target", marker=False)
        line(axis, results["grid"], curve, 0, "network", marker=False, linestyle="-")
        axis.set(title=f"fitted to {size} points", xlabel="x", ylim=(-1.8, 1.8))
    axes[0].set_ylabel("y")
    legend(axes[0])
    return figure


def values(results: Results) -> dict[str, Any]:
    sizes, floor = results["sizes"], results["floor"]

    def cell(found: dict[str, Any], place: int) -> str:
        return f"{found['mean'][place]:.3f} ± {found['error'][place]:.3f}"

    shown = range(0, len(sizes), 3)
    rows = [
        (f"{width} units, {name}", *(cell(found[name], place) for place in shown))
        for width, found in results["errors"].items()
        for name in ("train", "true")
    ]
    wide = results["errors"][str(results["widths"][-1])]
    narrow = results["errors"][str(results["widths"][0])]
    return {
        "error_table": table(("points", *(str(sizes[place]) for place in shown)), rows),
        "most": sizes[-1],
        "fewest": sizes[0],
        "wide": results["widths"][-1],
        "narrow": results["widths"][0],
        "wide_train_few": wide["train"]["mean"][0],
        "wide_true_few": wide["true"]["mean"][0],
        "wide_true_many": wide["true"]["mean"][-1],
        "narrow_true_many": narrow["true"]["mean"][-1],
        "narrow_excess": narrow["true"]["mean"][-1] / floor - 1,
        "proxy_first": {name: results["proxy"][name][0] for name in ("sizes", "mean", "deviation")},
        "proxy_last": {name: results["proxy"][name][-1] for name in ("sizes", "mean", "deviation")},
    }


LESSON = Lesson(
    number=1,
    name="function-approximation",
    title="A network as a function approximator",
    summary="the average divergence on data stands in for the expected one, until it is minimised.",
    measure=measure,
    figures=figures,
    claims=claims,
    values=values,
)
