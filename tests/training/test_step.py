"""The training step: what it adds up, divides by, and draws."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxformer.training.step import make_eval_step


def gradient_of(training, batch):
    """The gradient that a step of plain subtraction applied."""
    after, _ = training.step(training.state, batch)
    return jax.tree.map(jnp.subtract, training.state.params, after.params)


def plain_loss(apply, batch, rows=slice(None)):
    """Mean negative log-likelihood of the tokens of some rows, written out."""

    def loss(params):
        part = {name: value[rows] for name, value in batch.items()}
        logits = apply(params, part["inputs"], segment_ids=part["segment_ids"])
        log_p = jnp.log(jax.nn.softmax(logits))
        chosen = (log_p * jax.nn.one_hot(part["targets"], 12)).sum(-1)
        return -(chosen * part["weights"]).sum() / part["weights"].sum()

    return loss


def close(found, wanted, relative):
    """Equal to `relative` of each tensor's largest element (and of 1e-3, for those that are 0)."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        scale = max(float(jnp.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * scale, err_msg=str(path))


def test_step_applies_the_gradient_of_the_mean_loss_of_a_token(make_training, ragged_batch):
    training = make_training()
    wanted = jax.jit(jax.grad(plain_loss(training.apply, ragged_batch)))(training.state.params)
    close(gradient_of(training, ragged_batch), wanted, 1e-4)


def test_gradient_equals_a_finite_difference(make_training, ragged_batch):
    training = make_training()
    loss = jax.jit(plain_loss(training.apply, ragged_batch))
    params, gradient = training.state.params, gradient_of(training, ragged_batch)
    norm = float(optax.tree.norm(gradient))

    def moved(by):
        return float(loss(jax.tree.map(lambda p, g: p + by * g / norm, params, gradient)))

    # Along the gradient the slope is its norm.
    assert (moved(0.002) - moved(-0.002)) / 0.004 == pytest.approx(norm, rel=3e-3)


@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_accumulation_over_ragged_rows_equals_the_big_batch(
    make_training, ragged_batch, accumulation
):
    big = make_training()
    small = make_training(accumulation=accumulation)
    found, wanted = gradient_of(small, ragged_batch), gradient_of(big, ragged_batch)
    close(found, wanted, 2e-5)
    assert optax.tree.norm(optax.tree.sub(found, wanted)) < 1e-6 * optax.tree.norm(wanted)
    _, wanted = big.step(big.state, ragged_batch)
    _, found = small.step(small.state, ragged_batch)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=3e-6, err_msg=name)


def test_accumulation_is_not_the_mean_of_means(make_training, ragged_batch):
    training = make_training(accumulation=3)
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    means = [
        jax.jit(jax.grad(plain_loss(training.apply, ragged_batch, rows)))(training.state.params)
        for rows in parts
    ]
    mean_of_means = jax.tree.map(lambda *leaves: sum(leaves) / 3, *means)
    found = gradient_of(training, ragged_batch)
    difference = optax.tree.norm(optax.tree.sub(found, mean_of_means))
    assert difference > 0.1 * optax.tree.norm(found)


def test_metrics_are_means_over_tokens(make_training, ragged_batch):
    training = make_training(label_smoothing=0.1, z_loss=0.01)
    _, metrics = training.step(training.state, ragged_batch)
    logits = training.apply(
        training.state.params, ragged_batch["inputs"], segment_ids=ragged_batch["segment_ids"]
    )
    logits, targets = np.asarray(logits, np.float64), np.asarray(ragged_batch["targets"])
    real = np.asarray(ragged_batch["weights"]) > 0
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    loss = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    objective = 0.9 * loss - 0.1 * log_p.mean(-1) + 0.01 * log_z**2
    assert metrics["tokens"] == real.sum() == 22
    assert metrics["loss"] == pytest.approx(loss[real].mean(), rel=1e-5)
    assert metrics["objective"] == pytest.approx(objective[real].mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == targets)[real].mean())
    assert metrics["learning_rate"] == 0.25


def test_gradient_norm_is_taken_before_clipping(make_training, ragged_batch):
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    training = make_training(optimizer=optimizer)
    _, metrics = training.step(training.state, ragged_batch)
    clipped = gradient_of(training, ragged_batch)
    assert optax.tree.norm(clipped) == pytest.approx(0.01, rel=1e-4)
    norm = optax.tree.norm(gradient_of(make_training(), ragged_batch))
    assert metrics["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_padding_rows_change_nothing(make_training, ragged_batch):
    training = make_training()
    padded = {
        name: jnp.concatenate([value, jnp.zeros_like(value)])
        for name, value in ragged_batch.items()
    }
    close(gradient_of(training, padded), gradient_of(training, ragged_batch), 2e-5)


def test_batch_without_any_token_moves_nothing(make_training, ragged_batch):
    training = make_training()
    empty = jax.tree.map(jnp.zeros_like, ragged_batch)
    after, metrics = training.step(training.state, empty)
    chex.assert_trees_all_equal(after.params, training.state.params)
    assert metrics["loss"] == 0 and metrics["tokens"] == 0


def test_dropout_is_reproducible_and_differs_by_step_by_seed_and_from_none(
    make_training, ragged_batch
):
    training = make_training(dropout=0.3)
    first, second = (gradient_of(training, ragged_batch) for _ in range(2))
    chex.assert_trees_all_equal(first, second)

    def distance(other):
        return float(optax.tree.norm(optax.tree.sub(first, other)))

    later = dataclasses.replace(training.state, step=jnp.asarray(1, jnp.int32))
    after, _ = training.step(later, ragged_batch)
    assert distance(optax.tree.sub(later.params, after.params)) > 0.01
    assert distance(gradient_of(make_training(dropout=0.3, seed=1), ragged_batch)) > 0.01
    assert distance(gradient_of(make_training(), ragged_batch)) > 0.01


def test_micro_batches_have_dropout_of_their_own(make_training, ragged_batch):
    training = make_training(dropout=0.3, accumulation=2)
    half = {name: value[:3] for name, value in ragged_batch.items()}
    twice = {name: jnp.concatenate([value, value]) for name, value in half.items()}
    # With one mask for both halves the two gradients would be one, halves of its sum.
    found = gradient_of(training, twice)
    single = make_training(dropout=0.3)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)

    def loss(params, key):
        logits = single.apply(params, half["inputs"], segment_ids=half["segment_ids"], key=key)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, half["targets"])
        return (nll * half["weights"]).sum() / half["weights"].sum()

    one, other = (jax.jit(jax.grad(loss))(single.state.params, key) for key in keys)
    assert optax.tree.norm(optax.tree.sub(one, other)) > 0.01
    close(found, jax.tree.map(lambda a, b: (a + b) / 2, one, other), 1e-4)


def test_average_follows_its_recurrence(make_training, ragged_batch):
    training = make_training(ema=0.3, optimizer=optax.adam(0.05))
    state = training.state
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    for number in range(5):
        state, _ = training.step(state, ragged_batch)
        keep = min(0.3, (1 + number) / (10 + number))
        wanted = jax.tree.map(lambda a, p, k=keep: k * a + (1 - k) * p, wanted, state.params)
    assert keep == 0.3
    chex.assert_trees_all_close(state.ema, wanted, atol=1e-6)
    chex.assert_trees_all_equal(state.evaluated, state.ema)
    assert optax.tree.norm(optax.tree.sub(state.ema, state.params)) > 0.01


def test_without_an_average_the_parameters_are_evaluated(make_training, ragged_batch):
    state, _ = make_training().step(make_training().state, ragged_batch)
    assert state.ema is None
    chex.assert_trees_all_equal(state.evaluated, state.params)


def test_step_counts(make_training, ragged_batch):
    training = make_training()
    state = training.state
    for number in range(3):
        assert int(state.step) == number
        state, _ = training.step(state, ragged_batch)


def test_evaluation_sums_without_dropout(make_training, ragged_batch):
    noisy, clean = make_training(dropout=0.5), make_training()
    params = clean.state.params
    found = jax.jit(make_eval_step(noisy.apply))(params, ragged_batch)
    _, wanted = clean.step(clean.state, ragged_batch)
    assert found["loss"] / found["tokens"] == pytest.approx(float(wanted["loss"]), rel=1e-6)
    assert found["tokens"] == 22
