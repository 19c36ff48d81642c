"""The training objective, held to float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.losses import cross_entropy
from jaxformer.models.output import LogitFactors

OPTIONS = [{}, {"label_smoothing": 0.3, "z_loss": 0.1}, {"softcap": 2.0, "label_smoothing": 0.1}]


def draw(scale=1.0):
    random = np.random.default_rng(0)
    x = scale * random.normal(size=(3, 5, 4)).astype(np.float32)
    w = random.normal(size=(4, 9)).astype(np.float32)
    targets = random.integers(0, 9, (3, 5)).astype(np.int32)
    weights = np.array([[1] * 5, [1] * 3 + [0] * 2, [0.5, 2, 0, 1, 0]], np.float32)
    return x, w, targets, weights


def compiled(x, w, targets, weights, *, softcap=None, compute_dtype="float32", **options):
    @jax.jit
    def run(x, w, targets, weights):
        factors = LogitFactors(x, w, False, softcap, compute_dtype)
        return cross_entropy(factors, targets, weights, **options)

    return run(x, w, targets, weights)


def by_hand(x, w, targets, weights, softcap=None, label_smoothing=0.0, z_loss=0.0):
    """The formula of the docstring, a token at a time."""
    objective = loss = correct = 0.0
    for place in np.ndindex(targets.shape):
        row = x[place].astype(np.float64) @ w.astype(np.float64)
        if softcap is not None:
            row = softcap * np.tanh(row / softcap)
        log_z = np.log(np.exp(row - row.max()).sum()) + row.max()
        log_p = row - log_z
        nll, weight = -log_p[targets[place]], float(weights[place])
        smooth = (1 - label_smoothing) * nll - label_smoothing * log_p.mean()
        objective += weight * (smooth + z_loss * log_z**2)
        loss += weight * nll
        correct += weight * (row.argmax() == targets[place])
    return objective, {"loss": loss, "correct": correct, "tokens": weights.sum()}


@pytest.mark.parametrize("options", OPTIONS)
def test_objective_and_sums_equal_float64(options):
    objective, sums = compiled(*draw(), **options)
    wanted_objective, wanted = by_hand(*draw(), **options)
    np.testing.assert_allclose(objective, wanted_objective, rtol=1e-6)
    assert sums.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_a_float64_finite_difference(options):
    x, w, targets, weights = draw()
    dx, dw = jax.grad(lambda x, w: compiled(x, w, targets, weights, **options)[0], (0, 1))(x, w)
    random = np.random.default_rng(1)
    along = random.normal(size=x.shape), random.normal(size=w.shape)
    ahead, behind = (
        by_hand(x + step * along[0], w + step * along[1], targets, weights, **options)[0]
        for step in (1e-5, -1e-5)
    )
    slope = (dx * along[0]).sum() + (dw * along[1]).sum()
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-4)


def test_padding_changes_neither_sums_nor_gradient():
    x, w, targets, weights = draw()
    padding = weights == 0

    @jax.jit
    def run(x, w, targets, weights):
        def loss(x, w):
            factors = LogitFactors(x, w, False, None, "float32")
            return cross_entropy(factors, targets, weights, label_smoothing=0.1, z_loss=0.1)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)

    before = run(x, w, targets, weights)
    changed = np.where(padding[..., None], -5 * x, x), w, np.where(padding, -100, targets)
    after = run(*changed, weights)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert (np.asarray(before[1][0])[padding] == 0).all()


def test_narrow_operands_are_summed_in_float32():
    x, w, targets, weights = draw()
    objective, sums = compiled(x, w, targets, weights, compute_dtype="bfloat16")
    narrow = (np.asarray(jnp.asarray(it, jnp.bfloat16), np.float64) for it in (x, w))
    wanted, wanted_sums = by_hand(*narrow, targets, weights)
    assert objective.dtype == sums["loss"].dtype == jnp.float32
    np.testing.assert_allclose(objective, wanted, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], wanted_sums["loss"], rtol=1e-6)


def test_huge_logits_stay_finite():
    objective, _ = compiled(*draw(scale=1e4), label_smoothing=0.1)
    wanted, _ = by_hand(*draw(scale=1e4), label_smoothing=0.1)
    np.testing.assert_allclose(objective, wanted, rtol=1e-5)
