"""Our side of the training benchmark: what `train.py` does every step, and nothing else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import train_shapes, train_weights
from benchmarks.train_shapes import Shape
from jaxformer import models, nn
from jaxformer.runtime import keep_memory
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.state import TrainState, init_state
from jaxformer.training.step import make_train_step


def jaxformer_trainer(
    shape: str,
    precision: str = "float32",
    steps_per_turn: int = 20,
    first_steps: int = 1,
    weights: str | None = None,
    tiny: bool = False,
    model: dict[str, Any] | None = None,
) -> tuple[Callable[[], dict[str, Any]], dict[str, Any]]:
    """A contender (`benchmarks.contest`) whose turn is `steps_per_turn` whole training steps.

    Metrics are fetched every `log_every` steps, and at the end of a turn, so that the work is done.
    Before the first turn, `first_steps` steps are done from the weights in a file, or from drawn
    ones; their losses are the facts. `model` changes fields of the model's configuration.
    """
    keep_memory()
    made = train_shapes.named(shape, precision=precision, tiny=tiny).with_model(**(model or {}))
    train_step, state = make_step(made, weights=weights)
    host = train_shapes.batches(made)
    log_every = made.train.log_every
    count = nn.count(state.params)
    done = 0

    def step() -> dict[str, Any]:
        nonlocal state, done
        state, metrics = train_step(state, host[done % len(host)])
        done += 1
        return metrics

    def turn() -> dict[str, Any]:
        for number in range(1, steps_per_turn + 1):
            metrics = step()
            if number % log_every == 0 or number == steps_per_turn:
                values = jax.device_get(metrics)
        jax.block_until_ready(state)
        return {"loss": float(values["loss"])}

    losses = [float(step()["loss"]) for _ in range(first_steps)]
    return turn, {"losses": losses, "parameters": count}


def make_step(shape: Shape, *, weights: str | None = None) -> tuple[Any, TrainState]:
    """The jitted training step of a shape and the state before the first one, as in `train.py`."""
    model = models.build(
        shape.model, vocabulary=shape.vocabulary, source_vocabulary=shape.source_vocabulary
    )
    apply, params = nn.pure(model)
    if weights is not None:
        params = jax.tree.map(jax.numpy.asarray, train_weights.load(weights))
    optimizer = make_optimizer(shape.optimizer, shape.train.steps, nn.parameter_axes(model))
    schedule = make_schedule(shape.optimizer, shape.train.steps)
    train_step = jax.jit(
        make_train_step(apply, optimizer, schedule, shape.train, 0), donate_argnums=0
    )
    make_state = partial(init_state, optimizer=optimizer, ema=shape.train.ema is not None)
    return train_step, make_state(params, statistics=nn.statistics(model))


def save_weights(shape: Shape, path: str) -> None:
    """Draws the weights that both sides start from."""
    model = models.build(
        shape.model, vocabulary=shape.vocabulary, source_vocabulary=shape.source_vocabulary, seed=1
    )
    _, params = nn.pure(model)
    train_weights.save(jax.tree.map(np.asarray, params), path)
