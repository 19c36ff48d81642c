"""The training objective, held to float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.losses import cross_entropy

compiled = jax.jit(cross_entropy, static_argnames=("label_smoothing", "z_loss"))


def draw(scale=3.0):
    random = np.random.default_rng(0)
    logits = scale * random.normal(size=(3, 5, 9)).astype(np.float32)
    targets = random.integers(0, 9, (3, 5)).astype(np.int32)
    weights = np.array([[1] * 5, [1] * 3 + [0] * 2, [0.5, 2, 0, 1, 0]], np.float32)
    return logits, targets, weights


def by_hand(logits, targets, weights, label_smoothing=0.0, z_loss=0.0):
    """The formula of the docstring, a token at a time."""
    objective = loss = correct = 0.0
    for place in np.ndindex(targets.shape):
        row = logits[place].astype(np.float64)
        log_z = np.log(np.exp(row - row.max()).sum()) + row.max()
        log_p = row - log_z
        nll, weight = -log_p[targets[place]], float(weights[place])
        smooth = (1 - label_smoothing) * nll - label_smoothing * log_p.mean()
        objective += weight * (smooth + z_loss * log_z**2)
        loss += weight * nll
        correct += weight * (row.argmax() == targets[place])
    return objective, {"loss": loss, "correct": correct, "tokens": weights.sum()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"z_loss": 0.01},
        {"label_smoothing": 0.3, "z_loss": 0.1},
    ],
    ids=["plain", "smoothed", "z-loss", "both"],
)
def test_objective_and_sums_equal_float64(options):
    objective, sums = compiled(*draw(), **options)
    wanted_objective, wanted = by_hand(*draw(), **options)
    np.testing.assert_allclose(objective, wanted_objective, rtol=1e-6)
    assert sums.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3, "z_loss": 0.1}])
def test_gradient_equals_a_float64_finite_difference(options):
    logits, targets, weights = draw()
    gradient = jax.grad(lambda x: compiled(x, targets, weights, **options)[0])(logits)
    direction = np.random.default_rng(1).normal(size=logits.shape)
    ahead, behind = (
        by_hand(logits + sign * 1e-5 * direction, targets, weights, **options)[0]
        for sign in (1, -1)
    )
    np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-4)


def test_padding_changes_neither_sums_nor_gradient():
    logits, targets, weights = draw()
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    run = jax.value_and_grad(lambda *given: compiled(*given, **options), has_aux=True)
    (objective, sums), gradient = run(logits, targets, weights)
    padding = weights == 0
    changed = np.where(padding[..., None], -50 * logits, logits)
    (other, other_sums), other_gradient = run(changed, np.where(padding, 0, targets), weights)
    assert objective == other
    assert sums == other_sums
    np.testing.assert_array_equal(gradient, other_gradient)
    assert (np.asarray(gradient)[padding] == 0).all()


def test_narrow_logits_are_summed_in_float32():
    logits, targets, weights = draw()
    narrow = jnp.asarray(logits, jnp.bfloat16)
    objective, _ = compiled(narrow, targets, weights)
    assert objective.dtype == jnp.float32
    wanted, _ = by_hand(np.asarray(narrow, np.float64), targets, weights)
    np.testing.assert_allclose(objective, wanted, rtol=1e-6)


def test_huge_logits_stay_finite():
    objective, _ = compiled(*draw(scale=1e4), label_smoothing=0.1)
    np.testing.assert_allclose(objective, by_hand(*draw(scale=1e4), 0.1)[0], rtol=1e-5)
