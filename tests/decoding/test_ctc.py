"""CTC decoding is held to the definition: every path of cases small enough to list them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data.tokenizers import EOS, PAD, SOS, UNK
from jaxformer.decoding import ctc_beam_search, ctc_greedy, make_score, make_transcribe
from jaxformer.models.output import CTCFrames
from jaxformer.nn.ctc import collapse
from tests.decoding.ctc_enumeration import label_log_probs, labels_of, log_softmax

FRAMES, VOCABULARY = 5, 4
# Every label sequence of at most 5 labels out of 3 is fewer than this.
EVERYTHING = 400


@functools.cache
def compiled_search(**options):
    options = {"max_length": FRAMES} | options
    return jax.jit(functools.partial(ctc_beam_search, **options))


def draw_logits(seed, rows=3, vocabulary=VOCABULARY, frames=FRAMES, scale=2.0, ties=False):
    random = np.random.default_rng(seed)
    if ties:
        return random.integers(0, 2, (rows, frames, vocabulary)).astype(np.float32)
    return random.normal(0, scale, (rows, frames, vocabulary)).astype(np.float32)


def read(beams, row, blank=0):
    """The non-empty hypotheses of a row: labels, score, log-probability."""
    beams = jax.device_get(beams)
    found = []
    for place in range(beams.tokens.shape[1]):
        tokens, length = beams.tokens[row, place], beams.lengths[row, place]
        score, log_prob = beams.scores[row, place], beams.log_probs[row, place]
        assert (tokens[length:] == blank).all()
        assert blank not in tokens[:length]
        assert beams.finished[row, place] == np.isfinite(score) == np.isfinite(log_prob)
        if np.isfinite(score):
            found.append((tuple(tokens[:length].tolist()), float(score), float(log_prob)))
        else:
            assert length == 0
    return found


def ranked(scores):
    return sorted(scores.items(), key=lambda item: -item[1])


@given(
    path=st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=2, max_size=2),
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=2),
    blank=st.integers(0, 2),
)
def test_collapse_joins_equal_neighbours_and_drops_blanks(path, lengths, blank):
    labels, label_lengths = collapse(jnp.array(path), jnp.array(lengths), blank)
    for row in range(2):
        wanted = labels_of(path[row][: lengths[row]], blank)
        assert int(label_lengths[row]) == len(wanted)
        np.testing.assert_array_equal(labels[row], [*wanted, *[blank] * (6 - len(wanted))])


def test_collapse_keeps_a_label_on_both_sides_of_a_blank():
    labels, lengths = collapse(jnp.array([[1, 1, 0, 1, 2, 2, 0]]), jnp.array([7]))
    np.testing.assert_array_equal(labels[0], [1, 1, 2, 0, 0, 0, 0])
    assert lengths[0] == 3


@pytest.mark.parametrize("blank", [0, 2])
def test_greedy_gives_the_labels_of_the_likeliest_path(blank):
    logits = draw_logits(0, rows=4)
    lengths = np.array([5, 3, 1, 0])
    found = jax.device_get(ctc_greedy(jnp.asarray(logits), jnp.asarray(lengths), blank=blank))
    log_probs = log_softmax(logits)
    for row, length in enumerate(lengths):
        path = log_probs[row, :length].argmax(-1)
        np.testing.assert_array_equal(found.path[row], [*path, *[blank] * (5 - length)])
        wanted = labels_of(path.tolist(), blank)
        assert tuple(found.tokens[row, : found.lengths[row]]) == wanted
        np.testing.assert_allclose(
            found.log_probs[row], log_probs[row, :length].max(-1).sum(), atol=1e-5
        )


def test_greedy_ties_go_to_the_lower_token_and_forbidden_ones_keep_their_probability():
    logits = jnp.zeros((1, 3, 4))
    lengths = jnp.array([3])
    assert ctc_greedy(logits, lengths).lengths[0] == 0
    found = ctc_greedy(logits, lengths, blank=3, forbidden=(0,))
    assert found.tokens[0].tolist() == [1, 3, 3]
    np.testing.assert_allclose(found.log_probs, [3 * np.log(0.25)], rtol=1e-6)


@pytest.mark.parametrize("blank", [0, 3])
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, FRAMES), min_size=3, max_size=3),
    ties=st.booleans(),
)
def test_a_beam_that_holds_everything_equals_enumeration(blank, seed, lengths, ties):
    logits = draw_logits(seed, ties=ties)
    search = compiled_search(beam=EVERYTHING, n_best=EVERYTHING, blank=blank)
    beams = search(jnp.asarray(logits), jnp.asarray(lengths))
    tokens = [token for token in range(VOCABULARY) if token != blank]
    for row, length in enumerate(lengths):
        wanted = label_log_probs(log_softmax(logits[row]), length, tokens, blank)
        found = read(beams, row, blank)
        assert len(found) == len(wanted) == len({labels for labels, _, _ in found})
        for labels, score, log_prob in found:
            assert score == log_prob == pytest.approx(wanted[labels], abs=1e-5)
        assert [score for _, score, _ in found] == sorted((s for _, s, _ in found), reverse=True)
        if not ties:
            assert found[0][0] == ranked(wanted)[0][0]


def test_labels_longer_than_the_limit_are_not_searched():
    logits = draw_logits(4)
    lengths = np.array([5, 4, 2])
    search = compiled_search(beam=EVERYTHING, n_best=EVERYTHING, max_length=2)
    beams = search(jnp.asarray(logits), jnp.asarray(lengths))
    assert beams.tokens.shape[-1] == 2
    for row, length in enumerate(lengths):
        every = label_log_probs(log_softmax(logits[row]), length, (1, 2, 3))
        wanted = {labels: total for labels, total in every.items() if len(labels) <= 2}
        found = {labels: score for labels, score, _ in read(beams, row)}
        assert found == pytest.approx(wanted, abs=1e-5)


def plain_search(log_probs, beam, tokens, model=None, weight=1.0, bonus=0.0, blank=0):
    """Prefix beam search as a dictionary of prefixes: log-probabilities by last frame."""

    def fusion(prefix):
        if model is None:
            return bonus * len(prefix)
        return sum(weight * model(prefix[:i])[c] + bonus for i, c in enumerate(prefix))

    beams = {(): (0.0, -np.inf)}
    for frame in log_probs:
        new = {}

        def add(prefix, place, value, new=new):
            entry = list(new.get(prefix, (-np.inf, -np.inf)))
            entry[place] = np.logaddexp(entry[place], value)
            new[prefix] = tuple(entry)

        for prefix, (in_blank, in_label) in beams.items():
            total = np.logaddexp(in_blank, in_label)
            add(prefix, 0, total + frame[blank])
            if prefix:
                add(prefix, 1, in_label + frame[prefix[-1]])
            for token in tokens:
                before = in_blank if prefix and token == prefix[-1] else total
                add((*prefix, token), 1, before + frame[token])
        order = sorted(new, key=lambda p: -(np.logaddexp(*new[p]) + fusion(p)))
        beams = {p: new[p] for p in order[:beam] if np.logaddexp(*new[p]) > -np.inf}
    return {p: (np.logaddexp(*v) + fusion(p), np.logaddexp(*v)) for p, v in beams.items()}


@pytest.mark.parametrize("beam", [1, 2, 3, 8])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_a_narrow_beam_equals_a_plain_search_with_a_dictionary(beam, seed):
    # Long enough for prefixes to leave the beam, come back, and meet their extensions.
    logits = draw_logits(seed, rows=4, frames=12, scale=1.0)
    lengths = np.array([12, 12, 7, 3])
    search = compiled_search(beam=beam, n_best=beam, max_length=12)
    beams = search(jnp.asarray(logits), jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        wanted = plain_search(log_softmax(logits[row, :length]), beam, (1, 2, 3))
        found = {labels: score for labels, score, _ in read(beams, row)}
        assert found == pytest.approx({p: score for p, (score, _) in wanted.items()}, abs=3e-5)


class Bigram(NamedTuple):
    """A language model of one token's memory, as the searches ask it and by itself."""

    start: np.ndarray
    table: np.ndarray

    def __call__(self, tokens, state):
        if state is None:
            rows = jnp.tile(jnp.asarray(self.start), (len(tokens), 1))
            return rows, jnp.zeros(len(tokens), jnp.int32)
        # A model with a memory: the state counts what was read, and shifts what comes.
        assert state.shape == tokens.shape
        rows = jnp.asarray(self.table)[tokens] - 0.1 * (state[:, None] + 1)
        return rows, state + 1

    def log_probs(self, prefix):
        if not prefix:
            return self.start
        return self.table[prefix[-1]] - 0.1 * len(prefix)


def bigram(seed):
    random = np.random.default_rng(seed)
    return Bigram(
        log_softmax(random.normal(0, 2, VOCABULARY)).astype(np.float32),
        log_softmax(random.normal(0, 2, (VOCABULARY, VOCABULARY))).astype(np.float32),
    )


@pytest.mark.parametrize("eos_id", [None, 3])
@pytest.mark.parametrize(("weight", "bonus"), [(0.7, 0.0), (1.5, 1.0), (0.0, -0.5)])
def test_a_language_model_and_a_bonus_rank_as_enumeration_does(eos_id, weight, bonus):
    model, tokens = bigram(7), (1, 2)
    logits, lengths = draw_logits(11), np.array([5, 4, 0])
    search = compiled_search(
        beam=EVERYTHING,
        n_best=EVERYTHING,
        forbidden=(3,),
        language_model=model.__call__,
        language_model_weight=weight,
        length_bonus=bonus,
        eos_id=eos_id,
    )
    beams = search(jnp.asarray(logits), jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        every = label_log_probs(log_softmax(logits[row]), length, tokens)
        found = {labels: (score, log_prob) for labels, score, log_prob in read(beams, row)}
        assert found.keys() == every.keys()
        for labels, total in every.items():
            score = total + bonus * len(labels)
            score += weight * sum(model.log_probs(labels[:i])[c] for i, c in enumerate(labels))
            if eos_id is not None:
                score += weight * model.log_probs(labels)[eos_id]
            assert found[labels] == pytest.approx((score, total), abs=2e-5)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_a_narrow_beam_with_a_language_model_equals_a_plain_search(seed):
    model = bigram(5)
    search = compiled_search(
        beam=3, n_best=3, max_length=10, language_model=model.__call__, language_model_weight=0.8
    )
    logits = draw_logits(seed, frames=10, scale=1.0)
    beams = search(jnp.asarray(logits), jnp.full(3, 10))
    for row in range(3):
        wanted = plain_search(log_softmax(logits[row]), 3, (1, 2, 3), model.log_probs, weight=0.8)
        found = {labels: (score, log_prob) for labels, score, log_prob in read(beams, row)}
        assert found.keys() == wanted.keys()
        for labels, scores in wanted.items():
            assert found[labels] == pytest.approx(scores, abs=5e-5)


def test_repeated_labels_need_a_blank_between_them():
    logits = np.full((1, 3, 3), -50.0, np.float32)
    logits[0, :, 1] = 0.0
    assert read(compiled_search(beam=4, max_length=3)(logits, jnp.array([3])), 0)[0][0] == (1,)
    logits[0, 1] = [0.0, -50.0, -50.0]
    assert read(compiled_search(beam=4, max_length=3)(logits, jnp.array([3])), 0)[0][0] == (1, 1)


def test_the_search_finds_likelier_labels_than_the_likeliest_path():
    # The blank is likeliest in both frames, and yet most paths give the label (Graves, 2012).
    logits = np.log(np.array([[[0.6, 0.4], [0.6, 0.4]]], np.float32))
    assert ctc_greedy(jnp.asarray(logits), jnp.array([2])).lengths[0] == 0
    labels, score, _ = read(compiled_search(beam=2, max_length=2)(logits, jnp.array([2])), 0)[0]
    assert labels == (1,)
    assert np.exp(score) == pytest.approx(0.64, abs=1e-6)


def test_tokens_the_model_rules_out_do_no_harm():
    logits = draw_logits(3)
    logits[..., 2] = -np.inf
    beams = compiled_search(beam=EVERYTHING, n_best=EVERYTHING)(logits, jnp.array([5, 5, 2]))
    for row, length in enumerate((5, 5, 2)):
        with np.errstate(divide="ignore"):
            wanted = label_log_probs(log_softmax(logits[row]), length, (1, 3))
        assert {labels: s for labels, s, _ in read(beams, row)} == pytest.approx(wanted, abs=1e-5)


def test_what_stands_behind_the_last_frame_is_not_read():
    logits = draw_logits(8)
    lengths = jnp.array([5, 3, 0])
    changed = logits.copy()
    changed[1, 3:], changed[2] = 90.0, np.nan
    for function in (ctc_greedy, compiled_search(beam=4, n_best=3)):
        first, second = (function(jnp.asarray(given), lengths) for given in (logits, changed))
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_reruns_and_rows_one_by_one_give_the_same():
    logits, lengths = draw_logits(2, rows=6, frames=9), np.array([9, 9, 8, 5, 2, 0])
    search = compiled_search(beam=4, n_best=3, max_length=9)
    beams = search(logits, lengths)
    jax.tree.map(np.testing.assert_array_equal, beams, search(logits, lengths))
    for row in range(6):
        alone = search(logits[row : row + 1], lengths[row : row + 1])
        np.testing.assert_array_equal(beams.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(beams.scores[row], alone.scores[0], rtol=1e-6)


def test_equal_scores_rank_by_prefix_and_then_by_token():
    beams = compiled_search(beam=EVERYTHING, n_best=4, max_length=1)(
        np.zeros((1, 1, 4)), jnp.array([1])
    )
    assert [labels for labels, _, _ in read(beams, 0)] == [(), (1,), (2,), (3,)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam": 0}, "beam=0"),
        ({"n_best": 3}, "n_best=3"),
        ({"max_length": 0}, "max_length=0"),
        ({"blank": 4}, "blank=4"),
        ({"forbidden": (9,)}, "forbidden=9"),
        ({"forbidden": (0,)}, "the blank, 0,"),
        ({"eos_id": 4}, "eos_id=4"),
        ({"language_model_weight": -1.0}, "language_model_weight=-1.0"),
        ({"length_bonus": float("inf")}, "length_bonus=inf"),
    ],
)
def test_bad_arguments_are_refused_by_name(wrong, message):
    options = {"beam": 2, "max_length": 4} | wrong
    with pytest.raises(ValueError, match=message):
        ctc_beam_search(jnp.zeros((1, 2, 4)), jnp.array([2]), **options)


def frames_of(params, source, *, source_segment_ids, method):
    """A model whose frames are looked up by source token."""
    assert method == "predictions"
    return CTCFrames(params["logits"][source], source_segment_ids.sum(-1))


@pytest.mark.parametrize("beam", [1, 5])
def test_transcribe_never_gives_special_tokens(beam):
    params = np.random.default_rng(0).normal(0, 1, (9, 8)).astype(np.float32)
    params[:, [SOS, EOS, UNK]] += 5
    source = np.random.default_rng(1).integers(0, 9, (4, 6))
    segments = (np.arange(6) < np.array([[6], [4], [1], [0]])).astype(np.int32)
    transcribe = make_transcribe(frames_of, max_length=8, beam=beam)
    beams = jax.device_get(transcribe({"logits": params}, source, segments))
    assert beams.tokens.shape == (4, 1, 8)
    assert not np.isin(beams.tokens, [SOS, EOS, UNK]).any()
    assert beams.finished.all()
    assert beams.lengths[3, 0] == 0
    assert beams.lengths[0, 0] > 1
    if beam == 1:
        logits, lengths = jnp.asarray(params[source]), jnp.asarray(segments.sum(-1))
        wanted = ctc_greedy(logits, lengths, forbidden=(SOS, EOS, UNK))
        np.testing.assert_array_equal(beams.tokens[:, 0, :6], wanted.tokens)
    # Of the labels, by all their paths, or by those that a beam was wide enough for.
    for row, length in enumerate(segments.sum(-1)[1:], start=1):
        log_probs = log_softmax(params[source[row]])
        every = label_log_probs(log_probs, length, range(1, 8))
        labels = tuple(beams.tokens[row, 0, : beams.lengths[row, 0]].tolist())
        assert beams.log_probs[row, 0] <= every[labels] + 1e-5
        if beam == 1:
            assert beams.log_probs[row, 0] == pytest.approx(every[labels], abs=1e-5)


def test_transcribe_cuts_the_likeliest_path_at_the_limit_and_says_so():
    params = jnp.where(jnp.eye(8, dtype=bool), 9.0, 0.0)
    source = np.array([[4, 5, 6, 7], [4, PAD, 4, PAD]])
    beams = make_transcribe(frames_of, max_length=3)(
        {"logits": params}, source, np.ones_like(source)
    )
    np.testing.assert_array_equal(beams.tokens[:, 0], [[4, 5, 6], [4, 4, 0]])
    np.testing.assert_array_equal(beams.lengths[:, 0], [3, 2])
    np.testing.assert_array_equal(beams.finished[:, 0], [False, True])


def test_scores_of_given_labels_are_of_all_their_paths():
    params = np.random.default_rng(0).normal(0, 1, (9, 6)).astype(np.float32)
    source = np.random.default_rng(1).integers(0, 9, (3, 4))
    targets = np.array([[4, 4, EOS], [5, EOS, PAD], [4, 4, EOS]])
    batch = {
        "source": source,
        "source_segment_ids": (np.arange(4) < np.array([[4], [3], [2]])).astype(np.int32),
        "targets": targets,
        "weights": (targets != PAD).astype(np.float32),
    }
    found = make_score(frames_of)({"logits": params}, batch)
    for row, (length, labels) in enumerate([(4, (4, 4)), (3, (5,))]):
        wanted = label_log_probs(log_softmax(params[source[row]]), length, range(1, 6))[labels]
        assert float(found[row]) == pytest.approx(wanted, abs=1e-5)
    assert found[2] == -np.inf, "a repeated label needs a third frame"
