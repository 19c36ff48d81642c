"""Dropout: its rate, its expectation, its independence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.nn import dropout

COUNT = 1 << 20
compiled = jax.jit(dropout, static_argnums=1)


def dropped(rate, seed=0):
    return np.asarray(compiled(jnp.ones(COUNT), rate, jax.random.key(seed))) == 0


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_of_zeros_is_the_rate_within_five_binomial_deviations(rate):
    deviation = np.sqrt(rate * (1 - rate) / COUNT)
    assert abs(dropped(rate).mean() - rate) < 5 * deviation


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_what_is_kept_is_scaled_so_that_the_expectation_stays(rate):
    y = np.asarray(compiled(jnp.full(COUNT, 3.0), rate, jax.random.key(1)))
    np.testing.assert_allclose(y[y != 0], 3.0 / (1 - rate), rtol=1e-6)
    deviation = 3.0 * np.sqrt(rate / (1 - rate) / COUNT)
    assert abs(y.mean(dtype=np.float64) - 3.0) < 5 * deviation


def test_keys_and_neighbours_and_streams_are_independent():
    first, second = dropped(0.5, 0), dropped(0.5, 1)
    bound = 5 * 0.5 / np.sqrt(COUNT)
    assert abs((first & second).mean() - 0.25) < bound
    for step in (1, 2, 3, 64, 1024):
        assert abs((first[step:] & first[:-step]).mean() - 0.25) < bound
    folded = [jax.random.fold_in(jax.random.key(0), step) for step in range(2)]
    masks = [np.asarray(compiled(jnp.ones(COUNT), 0.5, key)) == 0 for key in folded]
    assert abs((masks[0] & masks[1]).mean() - 0.25) < bound


def test_one_key_gives_one_mask():
    np.testing.assert_array_equal(dropped(0.3, 7), dropped(0.3, 7))


def test_mask_is_the_same_in_every_shape_and_dtype():
    x = jnp.ones(64)
    flat = compiled(x, 0.5, jax.random.key(0))
    square = compiled(x.reshape(8, 8), 0.5, jax.random.key(0))
    narrow = compiled(x.astype(jnp.bfloat16), 0.5, jax.random.key(0))
    np.testing.assert_array_equal(flat, square.reshape(-1))
    np.testing.assert_array_equal(flat, narrow.astype(jnp.float32))
    assert narrow.dtype == jnp.bfloat16


def test_no_key_or_no_rate_is_the_identity():
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_gradient_passes_what_was_kept_and_stops_the_rest():
    key = jax.random.key(0)
    y, pull = jax.vjp(lambda x: dropout(x, 0.5, key), jnp.ones(100))
    np.testing.assert_array_equal(pull(jnp.ones(100))[0], y)
