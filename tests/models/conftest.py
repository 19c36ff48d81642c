import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import ModelConfig
from jaxformer.models import abstract
from jaxformer.nn import pure

VOCABULARY = 12


@functools.cache
def _make(kind, options):
    config = ModelConfig(kind=kind, **{"layers": 2, "width": 16, "heads": 4} | dict(options))
    apply, shapes = pure(abstract(config, vocabulary=VOCABULARY))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        values = random.normal(size=leaf.shape).astype(np.float32)
        return {
            "scale": 1 + 0.2 * values,
            "bias": 0.2 * values,
            "kernel": 0.3 * values,
            "table": values,
        }[path[-1].key]

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    params = jax.tree.map(jnp.asarray, params)
    return SimpleNamespace(config=config, apply=apply, params=params, call=jax.jit(apply))


@pytest.fixture(scope="session")
def make_model():
    """make_model(kind, **options): apply, params far from their initialisation, and jitted call."""
    return lambda kind, **options: _make(kind, tuple(sorted(options.items())))
