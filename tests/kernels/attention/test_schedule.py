"""Blocks called empty hide everything, and blocks called full show everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer_kernels import Mask
from jaxformer_kernels.attention.schedule import (
    EMPTY,
    FULL,
    PARTIAL,
    classify,
    intervals,
    ranges,
)

B, N = 2, 2
SIDE = st.one_of(st.none(), st.integers(0, 6))
STATIC_POSITION = st.integers(-4, 14)
POSITION = st.one_of(
    STATIC_POSITION, st.lists(STATIC_POSITION, min_size=B, max_size=B).map(np.array)
)


@st.composite
def calls(draw, q_offset=POSITION):
    """A mask with any of its fields, the lengths it is for and the sizes of the blocks."""
    T, S = draw(st.sampled_from(((11, 13), (8, 12), (1, 7))))
    rng = np.random.RandomState(draw(st.integers(0, 99)))
    fields = {}
    if draw(st.booleans()):
        batch = draw(st.sampled_from((1, B)))
        fields["q_segment_ids"] = np.sort(rng.randint(0, 3, (batch, T)))
        fields["kv_segment_ids"] = np.sort(rng.randint(0, 3, (batch, S)))
        if draw(st.booleans()):  # ids need not be sorted
            rng.shuffle(fields["kv_segment_ids"][0])
    if draw(st.booleans()):
        fields["array"] = rng.rand(draw(st.sampled_from((1, B))), 1, T, S) < 0.7
    mask = Mask(
        causal=draw(st.booleans()),
        q_offset=draw(q_offset),
        window=draw(st.one_of(st.none(), st.tuples(SIDE, SIDE))),
        kv_start=draw(st.one_of(st.none(), POSITION)),
        kv_end=draw(st.one_of(st.none(), POSITION)),
        **fields,
    )
    return mask, T, S, draw(st.sampled_from((1, 3, 4))), draw(st.sampled_from((2, 4, 5)))


def shown(mask, T, S, rows, columns):
    """For every block: (whether any query sees any key, whether every query sees every key).

    As for a kernel, keys that a ragged last block has beyond S are hidden; queries beyond T are
    nobody's.
    """
    visible = np.asarray(mask.as_array(B, N, T, S))
    visible = np.pad(visible, ((0, 0), (0, 0), (0, 0), (0, -S % columns)))
    blocks = [
        [visible[:, :, t : t + rows, s : s + columns] for s in range(0, S, columns)]
        for t in range(0, T, rows)
    ]
    some = [[block.any(axis=(1, 2, 3)) for block in row] for row in blocks]
    every = [[block.all(axis=(1, 2, 3)) for block in row] for row in blocks]
    return (np.moveaxis(np.array(x), -1, 0) for x in (some, every))


@given(calls())
def test_empty_hides_everything_and_full_shows_everything(call):
    code = np.asarray(classify(*call))
    some, every = shown(*call)
    assert code.dtype == np.int32
    assert code.shape[1:] == some.shape[1:]
    assert set(np.unique(code)) <= {EMPTY, PARTIAL, FULL}
    code = np.broadcast_to(code, some.shape)
    assert not np.any(some[code == EMPTY])
    assert np.all(every[code == FULL])


@given(calls(q_offset=STATIC_POSITION))
def test_causal_and_windows_are_classified_exactly(call):
    """Nothing is computed, and no mask looked at, that need not be."""
    mask, *sizes = call
    mask = Mask(causal=mask.causal, window=mask.window, q_offset=mask.q_offset)
    code = classify(mask, *sizes)
    some, every = shown(mask, *sizes)
    np.testing.assert_array_equal(code, (np.where(every, FULL, 1 * some))[:1])


def test_sorted_documents_meet_only_where_they_overlap():
    ids = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2]])
    mask = Mask(q_segment_ids=ids, kv_segment_ids=ids)
    np.testing.assert_array_equal(
        classify(mask, 12, 12, 4, 4)[0],
        [[FULL, EMPTY, EMPTY], [EMPTY, FULL, PARTIAL], [EMPTY, PARTIAL, PARTIAL]],
    )


def test_a_mask_that_is_static_is_classified_when_traced():
    def grid(_):
        code = classify(Mask(causal=True, window=(4, 0), kv_end=7), 12, 12, 4, 4)
        assert isinstance(code, np.ndarray)
        return jnp.asarray(code)

    np.testing.assert_array_equal(jax.jit(grid)(0)[0], [[1, 0, 0], [1, 1, 0], [0, 1, 0]])


@settings(max_examples=10)
@given(calls())
def test_a_traced_mask_is_classified_alike(call):
    mask, *sizes = call
    code = jax.jit(lambda mask: jnp.asarray(classify(mask, *sizes)))(mask)
    np.testing.assert_array_equal(code, classify(mask, *sizes))


@pytest.mark.parametrize("field", ["q_offset", "kv_start", "kv_end"])
def test_a_position_of_a_batch_of_one_stands_for_any_batch(field):
    mask = Mask(causal=True, **{field: np.array([2])})
    assert classify(mask, 8, 8, 4, 4).shape == (1, 2, 2)


@pytest.mark.parametrize("by_query", [True, False])
@given(call=calls())
def test_an_interval_of_each_row_is_what_positions_show(by_query, call):
    mask, T, S, *_ = call
    mask = dataclasses.replace(mask, q_segment_ids=None, kv_segment_ids=None, array=None)
    low, high = (np.asarray(x)[..., None] for x in intervals(mask, T, S, by_query))
    place = np.arange(S if by_query else T)
    want = np.asarray(mask.as_array(B, 1, T, S))[:, 0]
    want = want if by_query else want.swapaxes(1, 2)
    np.testing.assert_array_equal((low <= place) & (place < high) | np.zeros((B, 1, 1), bool), want)


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=4))
def test_ranges_hold_every_block_to_visit_and_only_full_ones_are_whole(table):
    code = np.array([table])
    for row, (first, stop, whole_first, whole_stop) in zip(
        table, np.asarray(ranges(code))[0], strict=True
    ):
        row = np.array(row)
        assert not np.any(row[:first]) and not np.any(row[stop:])
        assert np.all(row[whole_first:whole_stop] == FULL)
        if np.any(row):
            assert row[first] != EMPTY and row[stop - 1] != EMPTY
        else:
            assert first >= stop
        assert (whole_first < whole_stop) == (FULL in row)
