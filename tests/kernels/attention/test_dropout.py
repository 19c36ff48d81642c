"""The dropout mask: the share it keeps, and what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import Dropout, attention
from jaxformer_kernels.attention.dropout import keep

SIZES = (4, 5, 64, 64)


def kept(seed=0, rate=0.3, offsets=(0, 0, 0, 0)):
    index = np.ix_(*(np.arange(n) + o for n, o in zip(SIZES, offsets, strict=True)))
    return np.asarray(keep(Dropout(rate, jax.random.key(seed)).seed(), rate, *index))


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.5, 0.9])
def test_the_share_kept_is_one_minus_the_rate_everywhere(rate):
    mask = kept(rate=rate)
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        count = np.prod([SIZES[axis] for axis in axes])
        deviation = np.abs(mask.mean(axis=axes) - (1 - rate)).max()
        assert deviation < 5 * np.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("axis", range(4))
def test_neighbours_along_every_axis_are_uncorrelated(axis):
    mask = np.moveaxis(kept(rate=0.5), axis, 0) - 0.5
    for distance in (1, 2):
        products = mask[distance:] * mask[:-distance]
        assert abs(4 * products.mean()) < 5 / np.sqrt(products.size)


def test_keys_give_unrelated_masks_and_one_key_one_mask():
    np.testing.assert_array_equal(kept(seed=1), kept(seed=1))
    agreement = (kept(seed=1, rate=0.5) == kept(seed=2, rate=0.5)).mean()
    assert abs(agreement - 0.5) < 0.01


def test_any_block_can_be_drawn_alone():
    whole = kept()
    np.testing.assert_array_equal(
        whole[:-1, :-2, 3:, 5:], kept(offsets=(0, 0, 3, 5))[:-1, :-2, :-3, :-5]
    )


def test_typed_and_raw_keys_are_the_same_key():
    typed = jax.random.key(5)
    first, second = Dropout(0.1, typed), Dropout(0.1, jax.random.key_data(typed))
    np.testing.assert_array_equal(first.seed(), second.seed())


def test_the_mean_over_keys_is_attention_without_dropout():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 4, 2, 8)) for i in range(3))
    keys = jax.random.split(jax.random.key(9), 4000)
    run = jax.jit(jax.vmap(lambda key: attention(q, k, v, dropout=Dropout(0.4, key))))
    want, lse = attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(run(keys).mean(axis=0), want, atol=0.06)
    dropped = attention(q, k, v, dropout=Dropout(0.4, keys[0]), return_lse=True)
    np.testing.assert_allclose(dropped[1], lse, rtol=1e-6)
    np.testing.assert_array_equal(attention(q, k, v, dropout=Dropout(0.0, keys[0])), want)


def test_a_rate_or_key_that_cannot_be_is_refused():
    for rate in (1, -0.1, jnp.array(0.5)):
        with pytest.raises(ValueError, match="share of probabilities to drop"):
            Dropout(rate, jax.random.key(0))
    with pytest.raises(ValueError, match="one random key"):
        Dropout(0.1, jax.random.split(jax.random.key(0))).seed()
