"""Modules inside a user's own `jax.shard_map`, with its default check of what varies where."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxformer.config import MeshConfig, ModelConfig
from jaxformer.nn import Block, pure
from jaxformer.sharding import make_mesh
from jaxformer_kernels import Mask

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")


@pytest.mark.parametrize(
    ("norm", "activation"), [("layernorm", "gelu"), ("rmsnorm", "swiglu"), ("layernorm", "relu")]
)
def test_gradients_of_shared_parameters_are_those_of_all_rows(norm, activation):
    config = ModelConfig(
        kind="decoder", width=16, heads=2, norm=norm, activation=activation, max_length=8
    )
    apply, params = pure(Block(config, cross=False, layers=1, rngs=nnx.Rngs(params=0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 16)), jnp.float32)

    def loss(params, x):
        y, _ = apply(params, x, mask=Mask(causal=True))
        return jnp.sum(jnp.sin(y))

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(MeshConfig(data=4)),
        in_specs=(P(), P("data")),
        out_specs=(P(), P("data")),
    )
    def gradients(params, x):
        return jax.grad(loss, argnums=(0, 1))(params, x)

    got = jax.jit(gradients)(params, x)
    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
