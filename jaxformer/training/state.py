"""Everything a training step reads and writes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxformer.nn.parameters import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A pytree: the number of steps done, parameters, optimiser state and, if kept, their average.

    Random keys are not part of it: a step's key is derived from the seed and the step.
    """

    step: Any
    """int32, no axes; its shape alone in a template."""
    params: Params
    optimizer_state: Any
    ema: Params | None = None

    @property
    def evaluated(self) -> Params:
        """The parameters to score and decode with: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """The state before the first step.

    The average starts as a copy of the parameters. It and the optimiser's moments are float32
    whatever dtype the parameters have: narrower ones would round small changes away.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_state=optimizer.init(float32(params)),
        ema=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params) if ema else None,
    )


def float32(tree: Params) -> Params:
    """The same arrays in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
