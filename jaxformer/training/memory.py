"""What a training step holds in memory: an account from shapes, and what XLA allots in fact.

Nothing is computed and no array is made, so a model may be larger than the machine.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.config import TrainConfig
from jaxformer.training.state import TrainState, float32
from jaxformer.training.step import batch_loss


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one training step, by what they are for."""

    parameters: int
    optimizer: int
    """Its state, and the moving average of the parameters if one is kept."""
    gradients: int
    """Float32, twice where they are summed over micro-batches."""
    activations: int
    """What the backward pass reads of the forward pass of a micro-batch, as `model.remat` says."""
    batch: int

    @property
    def total(self) -> int:
        """The sum: what a step must hold, if all of it is alive at one moment."""
        return sum(dataclasses.asdict(self).values())


def account(
    apply: Callable[..., Any], state: TrainState, batch: dict[str, Any], config: TrainConfig
) -> Memory:
    """The memory that a step of `make_train_step` must hold, from arrays or their shapes.

    Activations are the residuals of `jax.vjp`, whatever the model and its remat policy. Not
    counted is what an operation needs while it runs (scores of attention, a tile of logits).
    """
    rows = {
        name: jax.ShapeDtypeStruct(
            (value.shape[0] // config.accumulation, *value.shape[1:]), value.dtype
        )
        for name, value in batch.items()
    }
    gradients = size(jax.eval_shape(float32, state.params))
    return Memory(
        parameters=size(state.params) + size(state.statistics),
        optimizer=size(state.optimizer_state) + size(state.ema),
        gradients=gradients * (1 if config.accumulation == 1 else 2),
        activations=size(residuals(apply, state, rows, config)),
        batch=size(batch),
    )


def residuals(
    apply: Callable[..., Any], state: TrainState, batch: dict[str, Any], config: TrainConfig
) -> list[jax.ShapeDtypeStruct]:
    """The shapes of what the forward pass of a micro-batch keeps, parameters and batch apart."""

    def forward(params: Any, statistics: Any, batch: dict[str, Any]) -> list[Any]:
        loss = functools.partial(
            batch_loss,
            apply,
            batch=batch,
            statistics=statistics,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            key=jax.random.key(0),
        )
        _, backward, _ = jax.vjp(loss, params, has_aux=True)
        given = {id(leaf) for leaf in jax.tree.leaves((params, statistics, batch))}
        kept = {id(leaf): leaf for leaf in jax.tree.leaves(backward)}
        return [leaf for name, leaf in kept.items() if name not in given]

    return jax.eval_shape(forward, state.params, state.statistics, batch)


def allotted(compiled: Any) -> int:
    """Bytes that a compiled step takes: arguments, results that no argument gave its memory to,
    and temporaries.
    """
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def size(tree: Any) -> int:
    """Bytes of all arrays, or shapes, of a tree."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
