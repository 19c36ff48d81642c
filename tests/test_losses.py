"""The training objective, held to float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data import EOS
from jaxformer.losses import cross_entropy, expected_risk, objective
from jaxformer.models.output import CTCFrames, HybridPredictions, LogitFactors

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


def frames_and_targets():
    """Three rows of labels and <eos>; the last row's three labels do not fit its two frames."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 6, 7)).astype(np.float32)
    targets = np.array([[4, 4, EOS, 0], [5, EOS, 0, 0], [4, 5, 6, EOS]], np.int32)
    weights = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], np.float32)
    frames = CTCFrames(jnp.asarray(logits), jnp.array([6, 4, 2]))
    return frames, jnp.asarray(targets), jnp.asarray(weights)


def by_paths(logits, length, labels):
    """-log of the summed probability of every path of `length` frames that collapses to labels."""
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    total = 0.0
    for path in itertools.product(range(p.shape[1]), repeat=length):
        collapsed = [label for label, _ in itertools.groupby(path) if label]
        if collapsed == labels:
            total += np.prod([p[frame, label] for frame, label in enumerate(path)])
    return -np.log(total)


def test_ctc_is_summed_over_rows_that_fit_and_divided_over_labels_and_eos():
    frames, targets, weights = frames_and_targets()
    total, sums = objective(frames, targets, weights, label_smoothing=0.1)
    wanted = by_paths(frames.logits[0], 6, [4, 4]) + by_paths(frames.logits[1], 4, [5])
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], wanted, rtol=1e-6)
    assert float(sums["tokens"]) == weights.sum()


def test_ctc_counts_the_tokens_of_rows_whose_best_path_is_right():
    frames, targets, weights = frames_and_targets()
    paths = np.array([[4, 0, 4, 4, 0, 0], [0, 5, 6, 0, 5, 5], [4, 5, 0, 0, 0, 0]])
    frames = CTCFrames(9 * jax.nn.one_hot(paths, 7), frames.lengths)
    _, sums = objective(frames, targets, weights)
    assert float(sums["correct"]) == 3  # the first row's; frame 2 of the second is wrong
    _, sums = objective(CTCFrames(frames.logits, jnp.array([6, 2, 2])), targets, weights)
    assert float(sums["correct"]) == 5


def test_rows_of_weight_0_add_nothing_to_ctc():
    frames, targets, weights = frames_and_targets()
    total, sums = objective(frames, targets, weights * jnp.array([[1.0], [0], [0]]))
    np.testing.assert_allclose(total, by_paths(frames.logits[0], 6, [4, 4]), rtol=1e-6)
    assert float(sums["tokens"]) == 3


def test_a_hybrid_weighs_both_readings():
    frames, targets, weights = frames_and_targets()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 5)), jnp.float32)
    factors = LogitFactors(x, jnp.ones((5, 7)).at[2].set(jnp.arange(7)), False, None, "float32")
    options = dict(label_smoothing=0.1, z_loss=0.01)
    total, sums = objective(HybridPredictions(frames, factors, 0.3), targets, weights, **options)
    ctc, ctc_sums = objective(frames, targets, weights)
    decoder, decoder_sums = objective(factors, targets, weights, **options)
    np.testing.assert_allclose(total, 0.3 * ctc + 0.7 * decoder, rtol=1e-6)
    mixed = 0.3 * ctc_sums["loss"] + 0.7 * decoder_sums["loss"]
    np.testing.assert_allclose(sums["loss"], mixed, rtol=1e-6)
    np.testing.assert_allclose(sums["ctc_loss"], ctc_sums["loss"], rtol=1e-6)
    assert sums["correct"] == decoder_sums["correct"]


def test_expected_risk_is_the_mean_cost_under_renormalised_probabilities():
    log_probs = jnp.array([[-1.0, -3.0, -2.0], [-4.0, -1.0, -9.0], [-1.0, -1.0, -1.0]], np.float32)
    risks = jnp.array([[0.0, 2.0, 5.0], [1.0, 3.0, 7.0], [1.0, 2.0, 3.0]], np.float32)
    present = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    shares = np.exp(0.5 * np.asarray(log_probs, np.float64)) * present
    wanted = [(shares[row] * risks[row]).sum() / shares[row].sum() for row in range(2)] + [0.0]

    def total(log_probs):
        return expected_risk(log_probs, risks, present, sharpness=0.5).sum()

    found = expected_risk(log_probs, risks, present, sharpness=0.5)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    gradient = jax.grad(total)(jnp.asarray(log_probs))
    # d/dl of a softmax mean: sharpness * share * (risk - mean); absent candidates have none.
    share = shares[:2] / shares[:2].sum(1, keepdims=True)
    by_hand = 0.5 * share * (risks[:2] - np.array(wanted[:2])[:, None])
    np.testing.assert_allclose(gradient[:2], by_hand, atol=1e-6)
    assert (gradient[2] == 0).all()
