"""The one training step with models that need more of it: statistics, samples of their own."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer import nn
from jaxformer.config import CTCConfig, ModelConfig, SamplingConfig, TrainConfig
from jaxformer.data import EOS
from jaxformer.models import build
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.state import init_state
from jaxformer.training.step import make_eval_step, make_train_step

VOCABULARY = 8


def pairs(source):
    """Three rows of one to three labels and <eos> for a source [3, S, ...]."""
    targets = np.array([[4, 5, 6, EOS], [7, EOS, 0, 0], [5, 5, EOS, 0]], np.int32)
    weights = (np.cumsum(targets == EOS, 1) - (targets == EOS) == 0).astype(np.float32)
    inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=1) * (weights > 0)
    return {
        "source": jnp.asarray(source),
        "source_segment_ids": jnp.ones(source.shape[:2], jnp.int32),
        "inputs": jnp.asarray(inputs, jnp.int32),
        "targets": jnp.asarray(targets),
        "segment_ids": jnp.asarray(weights, jnp.int32),
        "weights": jnp.asarray(weights),
    }


def images(scale=1.0):
    random = np.random.default_rng(0)
    return pairs((scale * random.uniform(size=(3, 14, 8))).astype(np.float32))


@functools.cache
def reader():
    ctc = CTCConfig(encoder="lstm", channels=(2, 3))
    config = ModelConfig(kind="ctc", layers=1, width=8, heads=2, max_length=16, ctc=ctc)
    model = build(config, vocabulary=VOCABULARY, image_height=8)
    return *nn.pure(model), nn.statistics(model)


def make_step(apply, optimizer, **options):
    config = TrainConfig(**options)
    return jax.jit(make_train_step(apply, optimizer, optax.constant_schedule(0.1), config, 0))


def trained(batch, **options):
    apply, params, statistics = reader()
    optimizer = optax.adam(0.1)
    state = init_state(params, optimizer, statistics=statistics, ema=True)
    step = make_step(apply, optimizer, ema=0.5, **options)
    return apply, step, state, step(state, batch)[0]


def test_a_step_moves_the_running_statistics_as_the_model_does():
    apply, _, before, after = trained(images())
    inputs = {name: value for name, value in images().items() if name not in ("targets", "weights")}
    _, wanted = apply(
        before.params, **inputs, method="predictions", statistics=before.statistics, training=True
    )
    chex.assert_trees_all_close(after.statistics, wanted, atol=1e-6)
    assert any(
        bool((old != new).any())
        for old, new in zip(
            jax.tree.leaves(before.statistics), jax.tree.leaves(after.statistics), strict=True
        )
    )


def test_micro_batches_move_the_statistics_one_after_the_other():
    first, second = images(1.0), images(5.0)
    both = {name: jnp.concatenate([first[name], second[name]]) for name in first}
    apply, _, before, after = trained(both, accumulation=2)
    statistics = before.statistics
    for part in (first, second):
        inputs = {name: part[name] for name in ("source", "source_segment_ids")}
        _, statistics = apply(
            before.params, **inputs, method="predictions", statistics=statistics, training=True
        )
    chex.assert_trees_all_close(after.statistics, statistics, atol=1e-5)


def test_evaluation_normalises_with_the_running_statistics():
    apply, _, _, after = trained(images())
    loss = jax.jit(make_eval_step(apply))
    here = loss(after.evaluated, images())["loss"]
    moved = dataclasses.replace(
        after, statistics=jax.tree.map(lambda leaf: leaf + 1.0, after.statistics)
    )
    assert loss(moved.evaluated, images())["loss"] != here
    rows = ({name: value[i : i + 1] for name, value in images().items()} for i in range(3))
    alone = sum(float(loss(after.evaluated, row)["loss"]) for row in rows)
    np.testing.assert_allclose(alone, here, rtol=1e-5)


def test_statistics_come_back_from_a_checkpoint_bitwise(tmp_path):
    _, step, _, state = trained(images())
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state, {}, 1.0)
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    chex.assert_trees_all_equal(restored, state)
    found = checkpoints.restore_evaluated(state.params, statistics=state.statistics, ema=True)
    chex.assert_trees_all_equal(found, state.evaluated)
    chex.assert_trees_all_equal(step(restored, images())[0], step(state, images())[0])
    checkpoints.close()


def recurrent(schedule, **options):
    config = ModelConfig(kind="recurrent", layers=1, width=8, heads=2, max_length=16)
    model = build(config, vocabulary=VOCABULARY, source_vocabulary=VOCABULARY)
    apply, params = nn.pure(model)
    optimizer = optax.sgd(0.1)
    step = make_step(
        apply, optimizer, steps=10, sampling=SamplingConfig(schedule=schedule, **options)
    )
    source = np.random.default_rng(1).integers(4, VOCABULARY, (3, 5)).astype(np.int32)
    return step, init_state(params, optimizer), pairs(source)


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_scheduled_sampling_follows_its_schedule(scope):
    step, state, batch = recurrent("linear", rate=0.5, scope=scope, warmup_steps=2)
    rates = []
    for _ in range(6):
        state, metrics = step(state, batch)
        rates.append(float(metrics["sampling_rate"]))
    np.testing.assert_allclose(rates, [0, 0, 0, 0.0625, 0.125, 0.1875])


def test_sampled_inputs_change_the_loss_and_a_rate_of_0_does_not():
    losses = {}
    for schedule, rate in (("none", 0.0), ("constant", 0.0), ("constant", 1.0)):
        step, state, batch = recurrent(schedule, rate=rate)
        losses[schedule, rate] = float(step(state, batch)[1]["loss"])
    assert losses["constant", 0.0] == pytest.approx(losses["none", 0.0], rel=1e-6)
    assert losses["constant", 1.0] != pytest.approx(losses["none", 0.0], rel=1e-6)
