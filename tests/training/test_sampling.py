"""Schedules of scheduled sampling: their ends, their shapes, their warm-up."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import SamplingConfig
from jaxformer.training.sampling import sampling_rate

STEPS, WARMUP, RATE, DECAY = 110, 10, 0.4, 5.0
FORMULAS = {
    "none": lambda u: 0 * u,
    "constant": lambda u: RATE + 0 * u,
    "linear": lambda u: RATE * u,
    "exponential": lambda u: RATE * (1 - np.exp(-DECAY * u)),
    "inverse_sigmoid": lambda u: RATE / (1 + np.exp(-DECAY * (2 * u - 1))),
}


def rates(name, steps):
    config = SamplingConfig(schedule=name, rate=RATE, warmup_steps=WARMUP, decay=DECAY)
    return np.asarray(sampling_rate(config, STEPS)(jnp.asarray(steps)))


@pytest.mark.parametrize("name", FORMULAS)
def test_the_share_follows_its_formula_from_the_warm_up_to_the_end(name):
    steps = np.arange(WARMUP, STEPS + 1)
    expected = FORMULAS[name]((steps - WARMUP) / (STEPS - WARMUP))
    np.testing.assert_allclose(rates(name, steps), expected, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_warm_up_is_teacher_forcing_and_the_share_never_falls_nor_passes_the_rate(name):
    found = rates(name, np.arange(2 * STEPS))
    assert not np.any(found[:WARMUP])
    assert np.all(np.diff(found) >= 0)
    assert np.all((found >= 0) & (found <= RATE))
