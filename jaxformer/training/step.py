"""The one pure training step, and the pure evaluation step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

from jaxformer.config import TrainConfig
from jaxformer.losses import cross_entropy
from jaxformer.models import model_inputs
from jaxformer.nn.parameters import Params
from jaxformer.training.state import TrainState, float32

Batch = dict[str, Array]
"""Model inputs by name, with `targets` and `weights`, each [B, ...]."""
Metrics = dict[str, Float[Array, ""]]


def batch_loss(
    apply: Callable[..., Any],
    params: Params,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Summed objective of a batch, and the sums of `losses.cross_entropy`."""
    factors = apply(params, **model_inputs(batch), key=key, method="predictions")
    return cross_entropy(
        factors,
        batch["targets"],
        batch["weights"],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def make_train_step(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    seed: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function `train_step(state, batch) -> (state, metrics)`; the caller compiles it.

    The batch holds `config.accumulation` micro-batches of rows, one after the other. Objectives are
    summed and divided once by the number of tokens, so that accumulation equals one big batch.
    Gradients are summed, and the optimiser computes, in float32 whatever dtype parameters have.
    Metrics: loss and objective (nats a token), accuracy, gradient_norm (before clipping),
    learning_rate, tokens.
    """

    def objective(params: Params, batch: Batch, key: PRNGKeyArray) -> tuple[Array, Metrics]:
        return batch_loss(
            apply,
            params,
            batch,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            key=key,
        )

    def gradients(params: Params, batch: Batch, key: PRNGKeyArray) -> tuple[Params, Metrics]:
        (total, sums), gradient = jax.value_and_grad(objective, has_aux=True)(params, batch, key)
        return float32(gradient), sums | {"objective": total}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if config.accumulation == 1:
            gradient, sums = gradients(state.params, batch, key)
        else:
            micro_batches = {
                name: rearrange(value, "(A B) ... -> A B ...", A=config.accumulation)
                for name, value in batch.items()
            }
            keys = jax.random.split(key, config.accumulation)
            shapes = jax.eval_shape(
                gradients, state.params, jax.tree.map(lambda x: x[0], micro_batches), key
            )
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

            def add(totals: Any, item: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, totals, gradients(state.params, *item)), None

            (gradient, sums), _ = jax.lax.scan(add, zeros, (micro_batches, keys))
        tokens = jnp.maximum(sums["tokens"], 1.0)
        gradient = jax.tree.map(lambda leaf: leaf / tokens, gradient)
        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer_state, float32(state.params)
        )
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": sums["loss"] / tokens,
            "objective": sums["objective"] / tokens,
            "accuracy": sums["correct"] / tokens,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": sums["tokens"],
        }
        return (
            dataclasses.replace(
                state,
                step=state.step + 1,
                params=params,
                optimizer_state=optimizer_state,
                ema=_average(state, params, config.ema),
            ),
            metrics,
        )

    return train_step


def make_eval_step(apply: Callable[..., Any]) -> Callable[[Params, Batch], Metrics]:
    """A pure function `eval_step(params, batch)` to the sums of loss, correct and tokens."""
    return lambda params, batch: batch_loss(apply, params, batch)[1]


def _average(state: TrainState, params: Any, decay: float | None) -> Params | None:
    if state.ema is None or decay is None:
        return None
    # Early on a long memory would be of the initial parameters: it grows with the steps.
    keep = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(
        lambda old, new: (keep * old + (1 - keep) * new).astype(jnp.float32), state.ema, params
    )
