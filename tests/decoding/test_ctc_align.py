"""Forced alignment is held to the list of all paths of tiny cases."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.decoding import ctc_align
from tests.decoding.ctc_enumeration import labels_of, log_softmax, log_sum, paths_by_labels

FRAMES, PLACES, VOCABULARY = 6, 3, 4
align = jax.jit(ctc_align, static_argnames="blank")


def places_of(path, blank):
    """The label number that each frame of a path emits, or None."""
    number, before, places = -1, blank, []
    for token in path:
        number += token not in (blank, before)
        places.append(None if token == blank else number)
        before = token
    return places


def wanted_of(log_probs, length, labels, blank):
    """The probability of every path of the labels, and the posterior of each label's frames."""
    others = [token for token in range(VOCABULARY) if token != blank]
    paths = paths_by_labels(log_probs, length, others, blank).get(tuple(labels), [])
    total = log_sum([log_prob for _, log_prob in paths])
    posteriors = np.zeros((FRAMES, PLACES))
    for path, log_prob in paths:
        for frame, place in enumerate(places_of(path, blank)):
            if place is not None:
                posteriors[frame, place] += np.exp(log_prob - total)
    return dict(paths), total, posteriors


@pytest.mark.parametrize("blank", [0, 3])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, FRAMES), min_size=2, max_size=2),
    label_lengths=st.lists(st.integers(0, PLACES), min_size=2, max_size=2),
    repeats=st.booleans(),
    ties=st.booleans(),
)
def test_alignments_equal_enumeration(blank, seed, lengths, label_lengths, repeats, ties):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (2, FRAMES, VOCABULARY))
    if ties:
        logits = np.round(logits / 3)
    labels = random.integers(0, 1 if repeats else 3, (2, PLACES)) + (blank == 0)
    for row, count in enumerate(label_lengths):
        labels[row, count:] = random.integers(-9, 99)  # what stands there is not read
    found = jax.device_get(
        align(
            jnp.asarray(logits, jnp.float32),
            jnp.asarray(lengths),
            jnp.asarray(labels),
            jnp.asarray(label_lengths),
            blank=blank,
        )
    )
    for row, (length, count) in enumerate(zip(lengths, label_lengths, strict=True)):
        given_labels = labels[row, :count].tolist()
        log_probs = log_softmax(logits[row])
        paths, total, posteriors = wanted_of(log_probs, length, given_labels, blank)
        path = tuple(found.path[row, :length].tolist())
        assert found.label_log_probs[row] == pytest.approx(total, abs=1e-5)
        np.testing.assert_allclose(found.posteriors[row], posteriors, atol=1e-5)
        assert (found.path[row, length:] == blank).all()
        if not paths:
            assert found.log_probs[row] == -np.inf
            assert_nothing(found, row, blank)
            continue
        assert labels_of(path, blank) == tuple(given_labels)
        assert found.log_probs[row] == pytest.approx(max(paths.values()), abs=1e-5)
        assert paths[path] == pytest.approx(max(paths.values()), abs=1e-5)
        for place in range(PLACES):
            span = [f for f, at in enumerate(places_of(path, blank)) if at == place]
            start, end = found.starts[row, place], found.ends[row, place]
            assert span == list(range(start, end))
            mean = posteriors[span, place].mean() if span else 0.0
            assert found.confidences[row, place] == pytest.approx(mean, abs=1e-5)


def assert_nothing(found, row, blank=0):
    """A row without an alignment, or without labels, is empty and not made up."""
    assert (found.path[row] == blank).all()
    for field in (found.starts, found.ends, found.posteriors, found.confidences):
        assert (field[row] == 0).all()


def test_labels_that_do_not_fit_are_flagged_and_leave_other_rows_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (6, 4, 4)), jnp.float32)
    lengths = jnp.array([4, 4, 2, 4, 4, 3])
    labels = jnp.array([[1, 1, 2], [1, 1, 1], [1, 2, 3], [1, 0, 2], [1, 7, 2], [2, 2, 0]])
    label_lengths = jnp.array([3, 3, 3, 3, 3, 2])
    found = jax.device_get(align(logits, lengths, labels, label_lengths))
    # Row 1 needs 5 frames, row 2 three; rows 3 and 4 have a blank and no token among the labels.
    np.testing.assert_array_equal(np.isfinite(found.log_probs), [1, 0, 0, 0, 0, 1])
    for row in (1, 2, 3, 4):
        assert_nothing(found, row)
        assert found.label_log_probs[row] == -np.inf
    np.testing.assert_array_equal(found.path[0], [1, 0, 1, 2])
    np.testing.assert_array_equal(found.path[5], [2, 0, 2, 0])
    np.testing.assert_array_equal(found.starts[0], [0, 2, 3])
    np.testing.assert_array_equal(found.ends[0], [1, 3, 4])
    np.testing.assert_array_equal(found.confidences[0], 1.0)


def test_a_class_the_model_rules_out_makes_its_labels_impossible_and_no_others():
    logits = np.random.default_rng(0).normal(0, 1, (2, 4, 4)).astype(np.float32)
    logits[..., 2] = -np.inf
    found = align(
        jnp.asarray(logits), jnp.array([4, 4]), jnp.array([[1, 2], [1, 3]]), jnp.array([2, 2])
    )
    np.testing.assert_array_equal(np.isfinite(found.log_probs), [False, True])
    assert not any(np.isnan(np.asarray(field)).any() for field in found)


def test_no_labels_align_to_blanks_and_no_frames_to_no_labels():
    logits = jnp.zeros((2, 3, 4))
    found = align(logits, jnp.array([3, 0]), jnp.zeros((2, 2), int), jnp.array([0, 0]))
    np.testing.assert_allclose(found.log_probs, [3 * np.log(0.25), 0.0], rtol=1e-6)
    for row in range(2):
        assert_nothing(found, row)


def test_of_equally_likely_paths_the_one_that_stays_and_ends_in_a_blank_is_taken():
    paths = [
        align(jnp.zeros((1, 4, 3)), jnp.array([4]), jnp.array([labels]), jnp.array([len(labels)]))
        .path[0]
        .tolist()
        for labels in ([1], [1, 2])
    ]
    # Seen from the end: blanks as long as the labels before still fit.
    assert paths == [[1, 0, 0, 0], [1, 2, 0, 0]]


def test_long_rows_stay_finite_and_sure():
    frames, places, vocabulary = 800, 60, 12
    random = np.random.default_rng(0)
    labels = random.integers(1, vocabulary, places)
    labels[1:] += (labels[1:] == labels[:-1]) * (1 - 2 * (labels[1:] == vocabulary - 1))
    path = np.repeat(np.stack([labels, np.zeros_like(labels)], 1).ravel(), 6)
    logits = random.normal(0, 1, (1, frames, vocabulary)).astype(np.float32)
    logits[0, np.arange(len(path)), path] += 12
    logits[0, len(path) :, 0] += 12
    found = align(
        jnp.asarray(logits), jnp.array([frames]), jnp.asarray(labels)[None], jnp.array([places])
    )
    np.testing.assert_array_equal(found.path[0, : len(path)], path)
    np.testing.assert_array_equal(found.ends - found.starts, 6)
    assert (np.asarray(found.confidences) > 0.98).all()
    total = np.asarray(found.posteriors[0].sum(-1))
    assert (total < 1 + 1e-3).all()


def test_every_short_label_sequence_has_a_share_and_the_shares_sum_to_one():
    logits = np.random.default_rng(4).normal(0, 1, (1, 3, 3))
    every = [labels for count in range(4) for labels in itertools.product((1, 2), repeat=count)]
    padded = jnp.array([[*labels, *[0] * (3 - len(labels))] for labels in every])
    found = align(
        jnp.asarray(np.tile(logits, (len(every), 1, 1)), jnp.float32),
        jnp.full(len(every), 3),
        padded,
        jnp.array([len(labels) for labels in every]),
    )
    assert float(jnp.exp(found.label_log_probs).sum()) == pytest.approx(1, abs=1e-5)


def test_a_blank_that_is_no_token_is_refused():
    with pytest.raises(ValueError, match="blank=4"):
        ctc_align(jnp.zeros((1, 2, 4)), jnp.array([2]), jnp.array([[1]]), jnp.array([1]), blank=4)
