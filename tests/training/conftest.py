import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.config import ModelConfig, TrainConfig
from jaxformer.models import build
from jaxformer.nn import pure
from jaxformer.training.state import init_state
from jaxformer.training.step import make_train_step


@functools.cache
def _model(dropout):
    config = ModelConfig(
        kind="decoder", layers=1, width=16, heads=2, max_length=8, dropout=dropout, scan=False
    )
    return pure(build(config, vocabulary=12))


@pytest.fixture(scope="session")
def make_training():
    """make_training(dropout=..., optimizer=..., seed=..., **train options) -> apply, state, step.

    The default optimiser subtracts the gradient, so that a step shows it.
    """

    def make(dropout=0.0, optimizer=None, seed=0, **options):
        apply, params = _model(dropout)
        optimizer = optimizer or optax.sgd(1.0)
        config = TrainConfig(**options)
        state = init_state(params, optimizer, ema=config.ema is not None)
        step = make_train_step(apply, optimizer, optax.constant_schedule(0.25), config, seed)
        return SimpleNamespace(
            apply=jax.jit(apply, static_argnames="method"),
            state=state,
            step=jax.jit(step),
            config=config,
        )

    return make


@pytest.fixture(scope="session")
def ragged_batch():
    """Six rows of 8, 1, 2, 7, 1, 3 tokens."""
    random = np.random.default_rng(0)
    lengths = np.array([8, 1, 2, 7, 1, 3])
    weights = (np.arange(8) < lengths[:, None]).astype(np.float32)
    inputs, targets = random.integers(4, 12, (2, 6, 8)) * (weights > 0)
    return {
        "inputs": jnp.asarray(inputs, jnp.int32),
        "targets": jnp.asarray(targets, jnp.int32),
        "weights": jnp.asarray(weights),
        "segment_ids": jnp.asarray(weights, jnp.int32),
    }
