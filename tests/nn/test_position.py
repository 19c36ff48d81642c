"""Positions are held to the formulas and numbers of their papers."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.nn.position import RelativeBias, alibi, alibi_slopes, rotary, sinusoidal


def test_rotary_scores_depend_on_distance_alone():
    random = np.random.default_rng(0)
    query, key = (jnp.asarray(random.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))

    @jax.jit
    def score(query_place, key_place):
        places = (jnp.full((1, 1), place) for place in (query_place, key_place))
        rotated = (rotary(x, place) for x, place in zip((query, key), places, strict=True))
        return jnp.einsum("btnh,bsnh->n", *rotated)

    for distance in (0, 1, 5):
        near, far = score(3 + distance, 3), score(200 + distance, 200)
        np.testing.assert_allclose(near, far, atol=1e-4)
    assert np.abs(score(3, 3) - score(8, 3)).max() > 0.1


def test_rotary_turns_pair_i_by_place_over_base_to_the_2i_over_h():
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 8)).astype(np.float32)
    places, base = np.array([[0, 1, 17]]), 500.0
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = places[..., None, None] * base ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * angles)
    found = rotary(jnp.asarray(x), jnp.asarray(places), base)
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
    np.testing.assert_array_equal(found[:, 0], x[:, 0])


def test_rotary_keeps_lengths():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50, 2, 8)), jnp.float32)
    turned = rotary(x, jnp.arange(50)[None])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoidal_wavelengths_run_from_two_pi_to_ten_thousand_times_that(width):
    places = np.arange(40)[None]
    found = np.asarray(sinusoidal(jnp.asarray(places), width))
    wavelengths = 2 * np.pi * np.geomspace(1, 10_000, 4)
    angles = places[..., None] * 2 * np.pi / wavelengths
    wanted = np.concatenate([np.sin(angles), np.cos(angles)], -1)[..., :width]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_alibi_slopes_of_eight_heads_are_the_papers():
    np.testing.assert_array_equal(alibi_slopes(8), [1 / 2**i for i in range(1, 9)])


def test_alibi_slopes_of_sixteen_heads_are_the_papers():
    np.testing.assert_allclose(alibi_slopes(16), [2 ** (-i / 2) for i in range(1, 17)], rtol=1e-6)


def test_alibi_slopes_between_powers_of_two_interleave_the_sequence_above():
    slopes = alibi_slopes(12)
    np.testing.assert_allclose(slopes[:8], alibi_slopes(8))
    np.testing.assert_allclose(slopes[8:], alibi_slopes(16)[::2][:4], rtol=1e-6)


def test_alibi_bias_is_minus_slope_times_distance():
    places = np.arange(5)
    found = alibi(8, jnp.asarray(places[None] - places[:, None]))
    assert found.shape == (1, 8, 5, 5)
    for head in range(8):
        for query in range(5):
            for key in range(5):
                assert found[0, head, query, key] == -abs(key - query) / 2 ** (head + 1)


def t5_bucket(distance, buckets, longest, bidirectional):
    """Section 2.1 of the paper and its released code, in whole numbers.

    Of the `wide` buckets beyond the exact ones, number k begins where
    (steps / exact) ** wide >= (longest / exact) ** k.
    """
    offset, steps = 0, -distance
    if bidirectional:
        buckets //= 2
        offset, steps = (buckets if distance > 0 else 0), abs(distance)
    steps = max(steps, 0)
    exact = buckets // 2
    if steps < exact:
        return offset + steps
    wide, k = buckets - exact, 0
    while k + 1 < wide and Fraction(steps, exact) ** wide >= Fraction(longest, exact) ** (k + 1):
        k += 1
    return offset + exact + k


@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20)])
def test_relative_buckets_equal_the_papers_definition(buckets, longest, bidirectional):
    module = RelativeBias(
        2,
        buckets=buckets,
        max_distance=longest,
        bidirectional=bidirectional,
        rngs=nnx.Rngs(0),
    )
    distance = np.arange(-300, 301)
    found = module.bucket(jnp.asarray(distance)[None])[0]
    wanted = [t5_bucket(int(d), buckets, longest, bidirectional) for d in distance]
    np.testing.assert_array_equal(found, wanted)
    assert found.min() == 0 and found.max() == buckets - 1


def test_relative_buckets_that_the_released_code_is_known_for():
    module = RelativeBias(2, buckets=32, max_distance=128, bidirectional=True, rngs=nnx.Rngs(0))
    known = {0: 0, -1: 1, 1: 17, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -128: 15, 7: 23, 500: 31}
    found = module.bucket(jnp.array([list(known)]))[0]
    np.testing.assert_array_equal(found, list(known.values()))


def test_relative_bias_reads_the_table_by_head_and_bucket():
    module = RelativeBias(3, buckets=8, max_distance=20, bidirectional=True, rngs=nnx.Rngs(0))
    distance = jnp.arange(4)[None] - jnp.arange(5)[:, None]
    bias, buckets = module(distance), module.bucket(distance)
    table = np.asarray(module.table[...])
    assert bias.shape == (1, 3, 5, 4)
    np.testing.assert_array_equal(bias[0], np.moveaxis(table[np.asarray(buckets)], -1, 0))
