"""How the share of scheduled sampling grows over a run."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.config import SamplingConfig


def sampling_rate(config: SamplingConfig, steps: int) -> Callable[..., Float[Array, ""]]:
    """The share of a decoder's inputs that are its own samples, as a function of the step.

    With u the share of the run that is done, counted from `warmup_steps` (before them the rate is
    0), d `config.decay` and r `config.rate`, the three decays of Bengio et al. (2015) over a run of
    any length:

        constant         r
        linear           r u
        exponential      r (1 - exp(-d u))
        inverse_sigmoid  r / (1 + exp(-d (2 u - 1)))
    """
    span = max(steps - config.warmup_steps, 1)
    shapes = {
        "none": jnp.zeros_like,
        "constant": jnp.ones_like,
        "linear": lambda u: u,
        "exponential": lambda u: 1 - jnp.exp(-config.decay * u),
        "inverse_sigmoid": lambda u: jax.nn.sigmoid(config.decay * (2 * u - 1)),
    }
    shape = shapes[config.schedule]

    def rate(step):
        after = jnp.asarray(step, jnp.float32) - config.warmup_steps
        u = jnp.clip(after / span, 0.0, 1.0)
        return jnp.where(after >= 0, config.rate * shape(u), 0.0)

    return rate
