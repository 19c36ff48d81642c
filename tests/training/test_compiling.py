"""What is compiled ahead is what is called, and only once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import ConfigError, ModelConfig
from jaxformer.training.checkpoint import placed
from jaxformer.training.compiling import compile_ahead, run_once, trace
from jaxformer.training.state import TrainState

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """The names of the functions that were compiled, or read from the cache, since the start."""
    names = []

    def note(event, _, **facts):
        if event == COMPILED:
            names.append(facts["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_call_takes_up_what_was_compiled_ahead(compiled):
    def first():
        weights = {"weights": jax.random.normal(jax.random.key(0), (4, 3))}
        return TrainState(jnp.zeros((), int), weights, optimizer_state={})

    def double(state, batch):
        return jax.tree.map(lambda leaf: 2 * leaf, state), batch["x"].sum()

    template, batch = placed(jax.eval_shape(first)), {"x": np.ones(5, np.float32)}
    step = jax.jit(double, donate_argnums=0)
    compile_ahead(trace(step, template, batch, model=ModelConfig())).result()
    state = run_once(first, like=template)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state, first())
    for _ in range(2):
        state, total = step(state, batch)
    assert float(total) == 5
    assert sum("double" in name for name in compiled) == 1


def test_error_of_the_attention_asked_for_is_one_of_the_configuration():
    def fails(x):
        raise NotImplementedError("no such kernel")

    step = jax.jit(fails)
    with pytest.raises(ConfigError, match="attention: no such kernel"):
        trace(step, 1.0, model=ModelConfig(attention="other"))
    with pytest.raises(NotImplementedError):
        trace(step, 1.0, model=ModelConfig())
