"""The specification against counting by hand, differences, and the recursion in logarithms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.ctc.calls import exact, make_call, plain, reference


@pytest.mark.parametrize(
    ("frames", "labels", "paths"),
    [(3, [1], 6), (3, [], 1), (2, [1, 2], 1), (3, [1, 2], 5), (3, [1, 1], 1), (4, [1, 1], 5)],
)
def test_of_equally_likely_paths_it_counts_the_right_ones(frames, labels, paths):
    V = 2 + (2 in labels)
    found = jax.jit(reference)(
        np.zeros((1, frames, V), np.float32),
        np.array([frames]),
        np.array(labels, int).reshape(1, -1),
        np.array([len(labels)]),
    )
    np.testing.assert_allclose(found, -np.log(paths / V**frames), rtol=1e-6)


@pytest.mark.parametrize("blank", [0, 2])
def test_the_recursion_in_logarithms_finds_the_same(blank):
    call = make_call(0, 24, 6, 4, 3, blank)
    want, want_gradient = exact(reference, *call, blank=blank)
    got, gradient = exact(plain, *call, blank=blank)
    possible = np.isfinite(want)
    assert 4 < possible.sum() < 24
    np.testing.assert_allclose(got[possible], want[possible], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradient[possible], want_gradient[possible], atol=1e-12)
    assert (got[~possible] > 1e8).all()


def test_its_gradient_is_that_of_small_differences():
    call = make_call(1, 3, 4, 3, 2)
    logits = call[0]
    gradient = exact(reference, *call)[1]

    with jax.enable_x64(True):
        loss = jax.jit(lambda logits: reference(logits, *call[1:]))
        weights = np.arange(1, 4) * np.isfinite(loss(logits))
        for place in np.ndindex(logits.shape):
            step = np.zeros_like(logits)
            step[place] = 1e-5
            change = np.nan_to_num(loss(logits + step)) - np.nan_to_num(loss(logits - step))
            np.testing.assert_allclose((change * weights).sum() / 2e-5, gradient[place], atol=1e-8)


def test_it_refuses_to_write_out_too_many_paths():
    with pytest.raises(NotImplementedError, match=r"4\^9 paths.*use implementation='xla'"):
        reference(jnp.zeros((1, 9, 4)), jnp.array([9]), jnp.ones((1, 2), int), jnp.array([1]))
