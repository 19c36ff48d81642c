"""What a mask means, how masks combine, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer_kernels import Mask

B, N, T, S = 2, 3, 4, 5
SIDE = st.one_of(st.none(), st.integers(0, 4))
POSITION = st.one_of(
    st.integers(-3, 6), st.lists(st.integers(-3, 6), min_size=B, max_size=B).map(jnp.array)
)


def ids(length):
    row = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    return st.lists(row, min_size=B, max_size=B).map(jnp.array)


@st.composite
def masks(draw, q_offset=POSITION):
    segments = draw(st.booleans())
    shape = [draw(st.sampled_from((1, size))) for size in (B, N, T, S)]
    array = np.random.RandomState(draw(st.integers(0, 9))).rand(*shape) < 0.7
    return Mask(
        causal=draw(st.booleans()),
        q_offset=draw(q_offset),
        window=draw(st.one_of(st.none(), st.tuples(SIDE, SIDE))),
        q_segment_ids=draw(ids(T)) if segments else None,
        kv_segment_ids=draw(ids(S)) if segments else None,
        kv_start=draw(st.one_of(st.none(), POSITION)),
        kv_end=draw(st.one_of(st.none(), POSITION)),
        array=draw(st.one_of(st.none(), st.just(jnp.asarray(array)))),
    )


def by_definition(mask, b, n, t, s):
    def of_row(position):
        return int(position) if np.ndim(position) == 0 else int(position[b])

    place = t + of_row(mask.q_offset)
    left, right = mask.window or (None, None)
    return (
        (not mask.causal or s <= place)
        and (left is None or place - left <= s)
        and (right is None or s <= place + right)
        and (mask.q_segment_ids is None or mask.q_segment_ids[b, t] == mask.kv_segment_ids[b, s])
        and (mask.kv_start is None or s >= of_row(mask.kv_start))
        and (mask.kv_end is None or s < of_row(mask.kv_end))
        and (mask.array is None or np.broadcast_to(mask.array, (B, N, T, S))[b, n, t, s])
    )


@given(masks())
def test_as_array_is_the_definition(mask):
    want = [by_definition(jax.device_get(mask), *index) for index in np.ndindex(B, N, T, S)]
    got = mask.as_array(B, N, T, S)
    assert got.dtype == bool
    np.testing.assert_array_equal(got, np.reshape(want, (B, N, T, S)))


@given(masks(q_offset=st.just(1)), masks(q_offset=st.just(1)))
def test_and_shows_what_both_show(a, b):
    if a.q_segment_ids is not None and b.q_segment_ids is not None:
        with pytest.raises(ValueError, match="segment ids do not combine"):
            a & b
        return
    both = (a & b).as_array(B, N, T, S)
    np.testing.assert_array_equal(both, a.as_array(B, N, T, S) & b.as_array(B, N, T, S))
    np.testing.assert_array_equal(both, (b & a).as_array(B, N, T, S))


@given(masks())
def test_and_has_a_neutral_element_and_repeats_itself(mask):
    for same in (mask & Mask(), Mask() & mask, mask & mask):
        np.testing.assert_array_equal(same.as_array(B, N, T, S), mask.as_array(B, N, T, S))


@given(masks(), st.integers(0, 2), st.integers(0, 3))
def test_a_cut_mask_shows_its_block_of_the_whole(mask, t, s):
    block = mask.cut((t, 2), (s, 2)).visible(t + jnp.arange(2), s + jnp.arange(2))
    block = np.broadcast_to(True if block is None else block, (B, N, 2, 2))
    np.testing.assert_array_equal(block, mask.as_array(B, N, T, S)[:, :, t : t + 2, s : s + 2])


@given(masks())
def test_a_padded_mask_hides_the_new_keys_and_keeps_the_old(mask):
    padded = mask.pad(t=2, s=3, S=S).as_array(B, N, T + 2, S + 3)
    np.testing.assert_array_equal(padded[:, :, :T, :S], mask.as_array(B, N, T, S))
    assert not np.any(padded[..., S:])


def test_offsets_that_differ_combine_only_where_one_does_not_count():
    assert (Mask(causal=True, q_offset=3) & Mask(kv_end=2)).q_offset == 3
    assert (Mask(kv_end=2, q_offset=7) & Mask(causal=True, q_offset=3)).q_offset == 3
    offset = jnp.array(3)
    combined = Mask(causal=True, q_offset=offset) & Mask(window=(1, 0), q_offset=offset)
    assert combined.q_offset is offset
    with pytest.raises(ValueError, match="different q_offset"):
        Mask(causal=True, q_offset=3) & Mask(window=(1, 0))


def test_only_numbers_are_static():
    mask = Mask(causal=True, window=(3, 0), q_offset=2, kv_end=jnp.array([3, 4]))
    assert len(jax.tree.leaves(mask)) == 1
    assert len(jax.tree.leaves(Mask(causal=True, q_offset=jnp.array(2)))) == 1

    @jax.jit
    def show(mask):
        assert mask.causal is True
        assert mask.q_offset == 2
        return mask.as_array(B, N, T, S)

    np.testing.assert_array_equal(show(mask), mask.as_array(B, N, T, S))


def test_a_mask_maps_over_a_batch():
    ends = jnp.array([1, 3, 5])
    shown = jax.vmap(lambda mask: mask.as_array(1, 1, T, S))(Mask(kv_end=ends))
    np.testing.assert_array_equal(shown.sum(axis=(1, 2, 3, 4)), T * ends)


@pytest.mark.parametrize(
    ("fields", "error", "fix"),
    [
        ({"causal": 1}, TypeError, "Python bool"),
        ({"window": 3}, ValueError, r"window=\(W - 1, 0\)"),
        ({"window": (-1, 0)}, ValueError, ">= 0 or None"),
        ({"q_offset": 1.5}, TypeError, "integer"),
        ({"q_offset": None}, TypeError, "integer"),
        ({"kv_end": np.ones((2, 2), np.int32)}, TypeError, r"scalar or \[B\]"),
        ({"q_segment_ids": np.ones((2, 4), np.int32)}, ValueError, "pass kv_segment_ids too"),
        ({"array": np.ones((4, 5), np.float32)}, TypeError, r"attention\(bias=\)"),
    ],
)
def test_a_wrong_field_is_refused_with_the_fix(fields, error, fix):
    with pytest.raises(error, match=fix):
        Mask(**fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"q_offset": np.zeros(3, np.int32)}, "q_offset"),
        ({"kv_start": np.zeros(3, np.int32)}, "kv_start"),
        ({"array": np.ones((3, 1, 4, 5), bool)}, "array"),
        (
            {
                "q_segment_ids": np.ones((B, T + 1), np.int32),
                "kv_segment_ids": np.ones((B, S), np.int32),
            },
            "q_segment_ids",
        ),
    ],
)
def test_a_field_that_does_not_fit_the_call_is_named(fields, name):
    with pytest.raises(ValueError, match=name):
        Mask(**fields).as_array(B, N, T, S)
