"""The account of a step's memory against counts by hand."""

import dataclasses
from functools import partial

import jax
import numpy as np

from jaxformer import models, nn
from jaxformer.config import ModelConfig, OptimizerConfig, TrainConfig
from jaxformer.training import memory
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.state import init_state
from jaxformer.training.step import make_train_step

L, B, T, D, V = 3, 2, 128, 32, 64


def accounted(remat, accumulation=1):
    """(account, bytes that XLA allots) of a step of a small decoder; nothing is computed."""
    config = ModelConfig(kind="decoder", layers=L, width=D, heads=2, max_length=T, remat=remat)
    train = TrainConfig(steps=10, batch_size=B, accumulation=accumulation)
    model = models.abstract(config, vocabulary=V)
    apply, params = nn.pure(model)
    settings = OptimizerConfig()
    optimizer = make_optimizer(settings, train.steps, nn.parameter_axes(model))
    state = jax.eval_shape(partial(init_state, optimizer=optimizer, ema=True), params)
    names = ("inputs", "targets", "segment_ids", "positions", "weights")
    batch = {name: jax.ShapeDtypeStruct((B * accumulation, T), np.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct((B * accumulation, T), np.float32)
    schedule = make_schedule(settings, train.steps)
    step = make_train_step(apply, optimizer, schedule, dataclasses.replace(train, ema=0.9), seed=0)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return memory.account(apply, state, batch, train), memory.allotted(compiled), nn.count(params)


def test_parameters_optimizer_and_gradients_are_counted_to_the_byte():
    found, _, count = accounted("full")
    assert found.parameters == found.gradients == 4 * count
    # Two moments and the average; a few step counters.
    assert 0 <= found.optimizer - 3 * 4 * count < 64
    assert found.batch == 5 * 4 * B * T
    assert accounted("full", accumulation=2)[0].gradients == 2 * 4 * count


def test_full_remat_keeps_the_input_of_each_layer_and_little_else():
    found, _, _ = accounted("full")
    layer = 4 * B * T * D
    assert L * layer <= found.activations < (L + 6) * layer
    assert accounted("none")[0].activations > 3 * found.activations
