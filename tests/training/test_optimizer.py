"""Schedules at named points, and what each optimiser does to which parameter."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.config import ModelConfig, OptimizerConfig
from jaxformer.models import build
from jaxformer.nn import parameter_axes, pure
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.step import batch_loss

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
WARMUP, STEPS, PEAK = 10, 100, 0.5


def rates(**options):
    """The learning rate of step 1, 2, ..., STEPS, at places 1, 2, ... (place 0 is not used)."""
    config = OptimizerConfig(learning_rate=PEAK, **{"warmup_steps": WARMUP} | options)
    schedule = make_schedule(config, STEPS)
    return np.array([np.nan, *(float(schedule(step)) for step in range(STEPS))])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "inverse_sqrt", "wsd"])
def test_warm_up_rises_linearly_from_the_first_step_to_the_peak(schedule):
    found = rates(schedule=schedule)
    np.testing.assert_allclose(
        found[1 : WARMUP + 1], PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-6
    )
    assert np.nanmax(found) == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "inverse_sqrt", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warm_up_the_first_step_has_the_peak(schedule, warmup):
    assert rates(schedule=schedule, warmup_steps=warmup)[1] == pytest.approx(PEAK)


def test_inverse_square_root_is_noams_formula():
    n = np.arange(1, STEPS + 1)
    # width ** -0.5 * min(n ** -0.5, n * warmup ** -1.5), its peak put to PEAK.
    noam = np.minimum(n**-0.5, n * WARMUP**-1.5) * PEAK * WARMUP**0.5
    np.testing.assert_allclose(rates(schedule="inverse_sqrt")[1:], noam, rtol=1e-5)


def test_constant_stays_at_the_peak():
    np.testing.assert_allclose(rates(schedule="constant")[WARMUP:], PEAK)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_last_step_has_the_final_fraction_of_the_peak(schedule):
    found = rates(schedule=schedule, final_fraction=0.1)
    assert found[STEPS] == pytest.approx(0.1 * PEAK, rel=1e-5)
    assert found[STEPS - 1] > found[STEPS]


def test_cosine_is_half_a_period():
    n = np.arange(WARMUP, STEPS + 1)
    shape = 0.5 * (1 + np.cos(np.pi * (n - WARMUP) / (STEPS - WARMUP)))
    found = rates(schedule="cosine", final_fraction=0.1)[WARMUP:]
    np.testing.assert_allclose(found, PEAK * (0.1 + 0.9 * shape), rtol=1e-5)


def test_linear_passes_the_middle_half_way():
    found = rates(schedule="linear", final_fraction=0.0)
    assert found[(WARMUP + STEPS) // 2] == pytest.approx(PEAK / 2, rel=1e-5)


def test_wsd_stays_then_falls_linearly_over_the_last_fraction():
    found = rates(schedule="wsd", decay_fraction=0.2, final_fraction=0.0)
    np.testing.assert_allclose(found[WARMUP:81], PEAK)
    np.testing.assert_allclose(found[80:], np.linspace(PEAK, 0, 21), atol=1e-6)


MODEL = ModelConfig(
    kind="decoder", layers=2, width=16, heads=2, norm="layernorm", position="learned", max_length=8,
    tied_embeddings=False, scan=False,
)  # fmt: skip


@functools.cache
def tiny():
    """apply, params, axes of a small language model."""
    model = build(MODEL, vocabulary=12)
    return *pure(model), parameter_axes(model)


def updates_of(config, gradients=None):
    """One update of the tiny model, jitted: by default from random gradients."""
    _, params, axes = tiny()
    random = np.random.default_rng(0)
    if gradients is None:
        gradients = jax.tree.map(
            lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), params
        )
    optimizer = make_optimizer(config, STEPS, axes)
    updates, _ = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(params), params)
    return updates


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_learns_a_tiny_batch(name):
    apply, params, axes = tiny()
    rate = {"adafactor": 0.05, "muon": 0.02, "sgd": 0.1, "lion": 3e-3}.get(name, 0.01)
    config = OptimizerConfig(name=name, learning_rate=rate, schedule="constant", warmup_steps=2)
    optimizer = make_optimizer(config, STEPS, axes)
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 12, (4, 8)))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((4, 7))}

    def loss(params):
        objective, (sums, _) = batch_loss(apply, params, batch)
        return objective / sums["tokens"]

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=60))
    (_, state), losses = run((params, jax.jit(optimizer.init)(params)))
    assert np.isfinite(losses).all()
    assert losses[0] > 2
    assert losses[-1] < 0.5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_pulls_kernels_and_tables_and_nothing_else(name):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=None
    )
    decaying = dataclasses.replace(config, weight_decay=0.3)
    without, with_decay = flat(updates_of(config)), flat(updates_of(decaying))
    params = flat(tiny()[1])
    touched = set()
    for path, update in without.items():
        pulled = with_decay[path] - update
        if np.abs(pulled).max() > 1e-6:
            touched.add(path)
            # Towards zero, in proportion to the parameter.
            ratio = np.sum(pulled * params[path]) / np.sum(params[path] ** 2)
            assert ratio < 0
            np.testing.assert_allclose(pulled, ratio * params[path], atol=2e-5)
    assert touched == {path for path in params if path.endswith(("kernel", "table"))}
    assert any(path.endswith("bias") for path in params)
    assert any(path.endswith("scale") for path in params)


def test_clipping_bounds_the_norm_of_what_the_optimiser_sees():
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, b1=0.0
    )
    free = updates_of(dataclasses.replace(config, clip_norm=None))
    clipped = updates_of(dataclasses.replace(config, clip_norm=0.5))
    loose = updates_of(dataclasses.replace(config, clip_norm=1e6))
    norm = float(optax.tree.norm(free))
    assert norm > 10
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.5, rel=1e-5)
    chex.assert_trees_all_close(clipped, jax.tree.map(lambda u: u * (0.5 / norm), free), rtol=1e-4)
    chex.assert_trees_all_close(loose, free, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_stacked_layers_are_updated_as_each_layer_alone_would_be(name):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.1,
        clip_norm=None,
    )  # fmt: skip
    _, params, _ = tiny()
    layer_axes = {"kernel": ("D", "F")}
    kernel = params["decoder"]["blocks"]["feedforward"]["up"]["kernel"]
    gradient = jax.random.normal(jax.random.key(0), kernel.shape)
    stacked = make_optimizer(config, STEPS, {"kernel": ("L", "D", "F")})
    alone = make_optimizer(config, STEPS, layer_axes)

    def update(optimizer, gradient, kernel):
        state = optimizer.init({"kernel": kernel})
        return optimizer.update({"kernel": gradient}, state, {"kernel": kernel})[0]["kernel"]

    together = update(stacked, gradient, kernel)
    for layer in range(MODEL.layers):
        np.testing.assert_allclose(
            together[layer], update(alone, gradient[layer], kernel[layer]), rtol=1e-5, atol=1e-7
        )


def test_muon_makes_every_layers_matrix_orthogonal_and_leaves_the_rest_to_adam():
    _, params, axes = tiny()
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, schedule="constant", warmup_steps=0, clip_norm=None
    )
    names = flat_axes(axes)
    gradients = jax.tree_util.tree_map_with_path(
        lambda path, leaf: well_conditioned(
            names[jax.tree_util.keystr(path, simple=True, separator=".")], leaf.shape
        ),
        params,
    )
    updates = flat(updates_of(config, gradients))
    adam = flat(updates_of(dataclasses.replace(config, name="adamw"), gradients))
    for path, update in updates.items():
        if "blocks" not in path or not path.endswith("kernel"):
            np.testing.assert_allclose(update, adam[path], rtol=1e-5, err_msg=path)
            continue
        # Inputs of the map on one side, outputs on the other, a matrix a layer.
        width = [int(np.prod(side)) for side in sides(names[path], update.shape)]
        matrices = update.reshape(update.shape[0], *width)
        for matrix in matrices:
            values = np.linalg.svd(matrix, compute_uv=False)
            assert values.min() > 0.6 * values.max(), (path, values)
            # The scale that makes its elements as large as AdamW's: 0.2 * sqrt(larger side).
            assert values.max() == pytest.approx(0.2 * max(width) ** 0.5, rel=0.35), path


def flat_axes(axes):
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda n: isinstance(n, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="."): names for path, names in leaves}


def well_conditioned(names, shape):
    """Random numbers; where there is a matrix a layer, its singular values run from 1 to 4."""
    values = np.random.default_rng(len(shape)).normal(size=shape)
    if names[0] == "L" and len(shape) > 2:
        widths = [int(np.prod(side)) for side in sides(names, shape)]
        left, _, right = np.linalg.svd(values.reshape(-1, *widths), full_matrices=False)
        values = ((left * np.linspace(4, 1, min(widths))) @ right).reshape(shape)
    return jnp.asarray(values, jnp.float32)


def sides(names, shape):
    """The sizes of inputs and outputs of a stacked kernel, known by name: D maps to or from D."""
    sizes = list(zip(names, shape, strict=True))[1:]
    if sizes[0][0] == "D":
        return [sizes[0][1]], [size for _, size in sizes[1:]]
    return [size for _, size in sizes[:-1]], [sizes[-1][1]]
