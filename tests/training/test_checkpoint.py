"""Checkpoints: bitwise, few, and refused where they do not fit."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.config import OptimizerConfig
from jaxformer.training.checkpoint import CheckpointError, Checkpoints
from jaxformer.training.optimizer import make_optimizer
from jaxformer.training.state import init_state

PARAMS = {"layer": {"kernel": (2, 3, 4), "bias": (4,)}, "embedding": {"table": (5, 3)}}
AXES = {
    "layer": {"kernel": ("L", "D", "F"), "bias": ("F",)},
    "embedding": {"table": ("V", "D")},
}


def make_state(step=0, *, name="adamw", ema=True, seed=0):
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        PARAMS,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    optimizer = make_optimizer(OptimizerConfig(name=name), 10, AXES)
    state = init_state(params, optimizer, ema=ema)
    updates, optimizer_state = jax.jit(optimizer.update)(params, state.optimizer_state, params)
    return dataclasses.replace(
        state,
        step=jnp.asarray(step, jnp.int32),
        params=optax.apply_updates(params, updates),
        optimizer_state=optimizer_state,
    )


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_state_comes_back_bitwise_with_the_place_in_the_data(checkpoints, name):
    state = make_state(7, name=name)
    checkpoints.save(state, {"next_index": 41})
    template = make_state(name=name, seed=1)
    found, data = checkpoints.restore(template)
    assert data == {"next_index": 41}
    chex.assert_trees_all_equal(found, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state)


def test_parameters_come_back_alone_or_averaged(checkpoints):
    state = make_state(1)
    checkpoints.save(state, {})
    params = checkpoints.restore_evaluated(state.params, ema=False)
    average = checkpoints.restore_evaluated(state.params, ema=True)
    chex.assert_trees_all_equal(params, state.params)
    chex.assert_trees_all_equal(average, state.ema)
    assert (params["layer"]["kernel"] != average["layer"]["kernel"]).any()


def test_saving_goes_on_while_the_state_is_overwritten(checkpoints):
    state = make_state(1)
    wanted = jax.tree.map(np.array, state.params)
    step = jax.jit(
        lambda state: dataclasses.replace(
            state, params=jax.tree.map(lambda leaf: leaf + 1, state.params)
        ),
        donate_argnums=0,
    )
    checkpoints.save(state, {})
    for _ in range(20):
        state = step(state)
    chex.assert_trees_all_equal(checkpoints.restore_evaluated(state.params, ema=False), wanted)


def test_newest_and_best_are_kept(checkpoints):
    for step, dev_loss in enumerate([3.0, 1.0, None, 2.0, 2.5, None], start=1):
        checkpoints.save(make_state(step), {}, dev_loss)
    checkpoints.manager.wait_until_finished()
    assert sorted(checkpoints.manager.all_steps()) == [2, 5, 6]
    assert (checkpoints.best, checkpoints.latest) == (2, 6)
    folders = {path.name for path in checkpoints.folder.iterdir() if path.is_dir()}
    assert folders == {"2", "5", "6"}


def test_best_and_newest_are_known_again_when_the_folder_is_opened_anew(checkpoints):
    for step, dev_loss in enumerate([3.0, 1.0, 2.0], start=1):
        checkpoints.save(make_state(step), {}, dev_loss)
    checkpoints.close()
    again = Checkpoints(checkpoints.folder, keep=2)
    assert (again.best, again.latest) == (2, 3)
    again.close()


def test_without_dev_losses_the_newest_is_the_best(checkpoints):
    for step in (1, 2):
        checkpoints.save(make_state(step), {})
    assert checkpoints.best == 2


def test_saving_a_step_again_leaves_it_as_it_was(checkpoints):
    first = make_state(1)
    checkpoints.save(first, {})
    checkpoints.save(make_state(1, seed=5), {})
    found = checkpoints.restore_evaluated(first.params, ema=False)
    chex.assert_trees_all_equal(found, first.params)


def test_empty_folder_and_missing_step_are_refused(checkpoints):
    state = make_state(3)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        checkpoints.restore(state)
    checkpoints.save(state, {})
    with pytest.raises(CheckpointError, match=r"has no step 9, only \[3\]"):
        checkpoints.restore_evaluated(state.params, ema=False, step=9)


@pytest.mark.parametrize(
    "change",
    [
        lambda params: {"layer": {"kernel": params["layer"]["kernel"]}, **params} | {"new": params},
        lambda params: {"layer": params["layer"]},
        lambda params: params | {"embedding": {"table": jnp.zeros((6, 3))}},
        lambda params: params | {"embedding": {"table": jnp.zeros((4, 3))}},
    ],
    ids=["one more", "one less", "larger", "smaller"],
)
def test_parameters_of_another_model_are_refused_in_one_line(checkpoints, change):
    state = make_state(1)
    checkpoints.save(state, {})
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        checkpoints.restore_evaluated(change(state.params), ema=False)
    assert "\n" not in str(caught.value)


def test_missing_average_is_refused(checkpoints):
    checkpoints.save(make_state(1, ema=False), {})
    with pytest.raises(CheckpointError, match="does not fit this model"):
        checkpoints.restore(make_state(1, ema=True))
