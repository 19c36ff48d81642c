"""Stacked layers: scanned, unrolled and recomputed, they are one function of one set of params."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import ModelConfig
from jaxformer.models import build
from jaxformer.nn import Linear, parameter_axes, pure, run_layers, stack_layers
from jaxformer.nn.stack import REMAT_POLICIES

CONFIG = ModelConfig(
    kind="encoder_decoder",
    layers=2,
    encoder_layers=1,
    width=16,
    heads=2,
    max_length=16,
    dropout=0.2,
    attention_dropout=0.2,
)
VOCABULARY = 11


def batch():
    random = np.random.default_rng(0)
    return {
        "source": jnp.asarray(random.integers(4, VOCABULARY, (3, 6))),
        "inputs": jnp.asarray(random.integers(4, VOCABULARY, (3, 5))),
        "source_segment_ids": jnp.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]]),
    }


@pytest.fixture(scope="module")
def params():
    return pure(build(CONFIG, vocabulary=VOCABULARY))[1]


@functools.cache
def value_and_gradients(**options):
    apply, _ = pure(build(dataclasses.replace(CONFIG, **options), vocabulary=VOCABULARY))

    def loss(params):
        logits = apply(params, **batch(), key=jax.random.key(3))
        return jnp.square(logits).sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_scanned_and_unrolled_models_have_the_same_parameters_and_axes():
    unrolled = build(dataclasses.replace(CONFIG, scan=False), vocabulary=VOCABULARY)
    scanned = build(dataclasses.replace(CONFIG, scan=True), vocabulary=VOCABULARY)
    chex.assert_trees_all_equal(pure(unrolled)[1], pure(scanned)[1])
    assert parameter_axes(unrolled) == parameter_axes(scanned)


def test_scanned_equals_unrolled_in_values_and_gradients_with_dropout(params):
    (_, logits), gradients = value_and_gradients(scan=True)(params)
    (_, wanted), wanted_gradients = value_and_gradients(scan=False)(params)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    chex.assert_trees_all_close(gradients, wanted_gradients, rtol=1e-4, atol=1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("remat", "scan"), [*((remat, True) for remat in REMAT_POLICIES), ("full", False)]
)
def test_recomputation_changes_no_gradient(params, remat, scan):
    (_, logits), gradients = value_and_gradients(scan=scan, remat=remat)(params)
    (_, wanted), wanted_gradients = value_and_gradients(scan=scan)(params)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    chex.assert_trees_all_close(gradients, wanted_gradients, rtol=1e-4, atol=1e-4)


def test_full_recomputation_saves_less_than_none(params):
    def residuals(remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        apply, _ = pure(build(config, vocabulary=VOCABULARY))
        _, pull = jax.eval_shape(
            lambda params: jax.vjp(lambda params: apply(params, **batch()), params), params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert residuals("full") < residuals("dots") <= residuals("none")


def test_layers_run_in_order_each_with_its_item():
    stacked = stack_layers(
        lambda rngs: Linear({"D": 2}, {"F": 2}, bias=False, rngs=rngs), 3, nnx.Rngs(0)
    )
    assert stacked.kernel.shape == (3, 2, 2)
    kernels = np.asarray(stacked.kernel[...], np.float64)
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    x, items = np.ones((1, 2)), np.array([1.0, 10.0, 100.0])
    wanted = x
    for kernel, item in zip(kernels, items, strict=True):
        wanted = wanted @ kernel + item
    for scan in (True, False):
        found = run_layers(
            lambda layer, x, item: layer(x) + item["n"],
            stacked,
            jnp.asarray(x, jnp.float32),
            {"n": jnp.asarray(items, jnp.float32)},
            scan=scan,
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("remat", "most"), [("full", 0.5), ("dots", 0.8)])
def test_what_is_computed_again_takes_no_memory_before(scan, remat, most):
    def temporaries(remat):
        options = {"scan": scan, "remat": remat, "max_length": 128}
        config = ModelConfig(kind="decoder", layers=8, width=32, heads=2, **options)
        apply, params = pure(build(config, vocabulary=VOCABULARY))
        tokens = jnp.zeros((4, 128), jnp.int32)
        compiled = jax.jit(jax.grad(lambda params: apply(params, tokens).sum())).lower(params)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(remat) < most * temporaries("none")
