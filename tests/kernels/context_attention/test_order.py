"""Which tokens a device holds."""

import numpy as np
import pytest

from jaxformer_kernels import zigzag
from jaxformer_kernels.context_attention.order import chunks_of, straightened, zigzagged


def test_zigzag_pairs_the_first_chunk_with_the_last():
    assert zigzag(2, 8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag(1, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("C", "T"), [(1, 2), (2, 12), (4, 8), (3, 30)])
def test_both_ways_are_the_permutation_and_its_inverse(C, T):
    x = np.arange(2 * T * 3).reshape(2, T, 3)
    places = zigzag(C, T)
    assert sorted(places) == list(range(T))
    np.testing.assert_array_equal(zigzagged(x, C), x[:, places])
    np.testing.assert_array_equal(straightened(x[:, places], C), x)
    np.testing.assert_array_equal(straightened(x[..., 0][:, places], C), x[..., 0])
    held = np.concatenate([chunks_of("zigzag", C, device) for device in range(C)])
    np.testing.assert_array_equal(places.reshape(2 * C, -1)[:, 0] // (T // (2 * C)), held)


@pytest.mark.parametrize(("C", "T", "fix"), [(4, 12, "16"), (2, 0, "4"), (2, 9, "12")])
def test_a_length_that_makes_no_chunks_is_refused_with_one_that_does(C, T, fix):
    with pytest.raises(ValueError, match=f"pad the sequence to {fix} tokens"):
        zigzag(C, T)
