"""Logits, multiplied out and not: one head, whichever way the loss takes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import ModelConfig
from jaxformer.losses import cross_entropy
from jaxformer.models.output import Output
from jaxformer.nn import Embedding


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_capped_product(tied):
    config = ModelConfig(width=8, tied_embeddings=tied, output_scale=0.5, output_softcap=1.5)
    embedding = Embedding(12, 8, deviation=1.0, rngs=nnx.Rngs(0))
    output = Output(config, 12, nnx.Rngs(1))
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    factors = output(jnp.asarray(x), embedding)
    w = embedding.table[...].T if tied else output.projection.kernel[...]
    wanted = 1.5 * np.tanh(0.5 * x.astype(np.float64) @ np.asarray(w, np.float64) / 1.5)
    logits = factors.logits()
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)


def test_a_tied_table_gets_the_gradients_of_both_its_uses(make_model):
    """Lookup and projection: together they are the gradient along the whole table."""
    model = make_model("decoder", layers=1)
    inputs = jnp.array([[4, 5, 4, 7]])
    targets = jnp.array([[5, 4, 7, 6]])

    def loss(looked_up, projected):
        params = {**model.params, "embedding": {"table": looked_up}}
        factors = model.apply(params, inputs, method="predictions")
        factors = dataclasses.replace(factors, w=projected)
        return cross_entropy(factors, targets, jnp.ones((1, 4)))[0]

    table = model.params["embedding"]["table"]
    whole = jax.grad(lambda table: loss(table, table))(table)
    of_lookup, of_projection = jax.grad(loss, argnums=(0, 1))(table, table)
    assert np.any(of_lookup) and np.any(of_projection)
    np.testing.assert_allclose(whole, of_lookup + of_projection, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_the_logits(make_model, kind, tied):
    model = make_model(kind, layers=1, tied_embeddings=tied, output_softcap=3.0)
    random = np.random.default_rng(0)
    inputs = {"inputs": jnp.asarray(random.integers(4, 12, (2, 6)))}
    if kind == "encoder_decoder":
        inputs["source"] = jnp.asarray(random.integers(4, 12, (2, 5)))
    targets, weights = jnp.asarray(random.integers(4, 12, (2, 6))), jnp.ones((2, 6))

    def fused(params):
        factors = model.apply(params, **inputs, method="predictions")
        return cross_entropy(factors, targets, weights)[0]

    def plain(params):
        log_p = jax.nn.log_softmax(model.apply(params, **inputs))
        return -jnp.take_along_axis(log_p, targets[..., None], -1).sum()

    got, want = (jax.jit(jax.value_and_grad(it))(model.params) for it in (fused, plain))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_factors_may_leave_compiled_code():
    output, embedding = (
        Output(ModelConfig(width=8), 12, nnx.Rngs(1)),
        Embedding(12, 8, rngs=nnx.Rngs(0)),
    )
    factors = jax.jit(lambda x: output(x, embedding))(jnp.ones((2, 3, 8)))
    assert factors.transposed and factors.logits().shape == (2, 3, 12)
