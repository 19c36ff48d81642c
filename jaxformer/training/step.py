"""The one pure training step, and the pure evaluation step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformer import sharding
from jaxformer.config import TrainConfig
from jaxformer.losses import objective
from jaxformer.models import model_inputs
from jaxformer.nn.parameters import Params
from jaxformer.training.sampling import sampling_rate
from jaxformer.training.state import TrainState, float32

Batch = dict[str, Array]
"""Model inputs by name, with `targets` and `weights`, each [B, ...]."""
Metrics = dict[str, Float[Array, ""]]


def batch_loss(
    apply: Callable[..., Any],
    params: Params,
    batch: Batch,
    *,
    statistics: Params | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **options: Any,
) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:
    """Summed objective of a batch, the sums of `losses.objective`, and the new statistics.

    With `statistics`, which may be empty, the model trains: BatchNorm uses those of the batch and
    moves its running ones. `options` go to the model (`key`, and what scheduled sampling needs).
    """
    inputs = model_inputs(batch)
    if statistics:
        predictions, statistics = apply(
            params, **inputs, **options, method="predictions", statistics=statistics, training=True
        )
    else:
        predictions = apply(params, **inputs, **options, method="predictions")
    total, sums = objective(
        predictions,
        batch["targets"],
        batch["weights"],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return total, (sums, statistics or {})


def make_train_step(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    seed: int,
    *,
    axis_names: tuple[str, ...] = (),
    constrain: Callable[[Params], Params] = lambda gradient: gradient,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function `train_step(state, batch) -> (state, metrics)`; the caller compiles it.

    The batch holds `config.accumulation` micro-batches of rows, one after the other. Objectives are
    summed and divided once by the number of tokens, so that accumulation equals one big batch (but
    for BatchNorm, whose statistics are those of a micro-batch). Gradients are summed, and the
    optimiser computes, in float32 whatever dtype parameters have. Metrics: loss and objective
    (nats a token), accuracy, gradient_norm (before clipping), learning_rate, tokens; with scheduled
    sampling its sampling_rate.

    Inside `shard_map` or `pmap`, `axis_names` are the mesh axes over which the batch is divided:
    the step sums over them, once. `constrain` says where gradients are to lie on a mesh.
    """
    sampled = config.sampling.schedule != "none"
    share_sampled = sampling_rate(config.sampling, config.steps)

    def gradients(
        state: TrainState, statistics: Params, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Params, Metrics, Params]:
        options: dict[str, Any] = {"key": key}
        if sampled:
            options["sampling_rate"] = share_sampled(state.step)
            options["sampling_scope"] = config.sampling.scope
        loss = functools.partial(
            batch_loss,
            apply,
            batch=batch,
            statistics=statistics,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            **options,
        )
        value, gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        total, (sums, statistics) = value
        return constrain(float32(gradient)), sums | {"objective": total}, statistics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        statistics = state.statistics
        if config.accumulation == 1:
            gradient, sums, statistics = gradients(state, statistics, batch, key)
        else:
            micro_batches = {
                name: _divided(rearrange(value, "(A B) ... -> A B ...", A=config.accumulation))
                for name, value in batch.items()
            }
            keys = jax.random.split(key, config.accumulation)
            first = jax.tree.map(lambda x: x[0], micro_batches)
            shapes = jax.eval_shape(gradients, state, statistics, first, key)[:2]
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            zeros = (constrain(zeros[0]), zeros[1])

            def add(carry: Any, item: Any) -> tuple[Any, None]:
                totals, statistics = carry
                *terms, statistics = gradients(state, statistics, *item)
                return (jax.tree.map(jnp.add, totals, tuple(terms)), statistics), None

            ((gradient, sums), statistics), _ = jax.lax.scan(
                add, (zeros, statistics), (micro_batches, keys)
            )
        if axis_names:
            gradient, sums = jax.lax.psum((gradient, sums), axis_names)
        tokens = _divisor(sums["tokens"])
        gradient = jax.tree.map(lambda leaf: leaf / tokens, gradient)
        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer_state, float32(state.params)
        )
        params = optax.apply_updates(state.params, updates)
        metrics = means(sums) | {
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        if sampled:
            metrics["sampling_rate"] = jnp.asarray(share_sampled(state.step), jnp.float32)
        return (
            dataclasses.replace(
                state,
                step=state.step + 1,
                params=params,
                optimizer_state=optimizer_state,
                statistics=statistics,
                ema=_average(state, params, config.ema),
            ),
            metrics,
        )

    return train_step


def make_eval_step(apply: Callable[..., Any]) -> Callable[[Params, Batch], Metrics]:
    """A pure function `eval_step(params, batch)` to the sums of loss, correct and tokens."""
    return lambda params, batch: batch_loss(apply, params, batch)[1][0]


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Sums over tokens as means a token: `accuracy` of `correct`, others by their own names."""
    tokens = _divisor(sums["tokens"])
    divided = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    divided["accuracy"] = divided.pop("correct")
    return divided | {"tokens": sums["tokens"]}


def _divided(micro_batches: Array) -> Array:
    """[A, B, ...], on a mesh with the rows of each micro-batch split over all devices."""
    letters = ["A", "B", "T"][: micro_batches.ndim]
    letters += ["_"] * (micro_batches.ndim - len(letters))
    return sharding.constrain(micro_batches, " ".join(letters))


def _divisor(tokens: Any) -> Any:
    """What sums are divided by: an empty batch has means of 0."""
    return tokens + (tokens == 0)


def _average(state: TrainState, params: Any, decay: float | None) -> Params | None:
    if state.ema is None or decay is None:
        return None
    # Early on a long memory would be of the initial parameters: it grows with the steps.
    keep = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(
        lambda old, new: (keep * old + (1 - keep) * new).astype(jnp.float32), state.ema, params
    )
