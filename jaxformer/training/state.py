"""Everything a training step reads and writes."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxformer.nn.parameters import Params, with_statistics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A pytree: steps done, parameters, optimiser state, statistics, and a moving average if kept.

    Random keys are not part of it: a step's key is derived from the seed and the step.
    """

    step: Any
    """int32, no axes; its shape alone in a template."""
    params: Params
    optimizer_state: Any
    statistics: Params = field(default_factory=dict)
    """BatchNorm's running statistics; empty where the model has none."""
    ema: Params | None = None

    @property
    def evaluated(self) -> Params:
        """What to score and decode with: the moving average of the parameters where there is one,
        else the parameters, with the running statistics among them.
        """
        return with_statistics(self.params if self.ema is None else self.ema, self.statistics)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    statistics: Params | None = None,
    ema: bool = False,
) -> TrainState:
    """The state before the first step.

    The average starts as a copy of the parameters. It and the optimiser's moments are float32
    whatever dtype the parameters have: narrower ones would round small changes away.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_state=optimizer.init(float32(params)),
        statistics=statistics or {},
        ema=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params) if ema else None,
    )


def float32(tree: Params) -> Params:
    """The same arrays in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
