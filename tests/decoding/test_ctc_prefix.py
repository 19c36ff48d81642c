"""CTC prefix scores and the joint search are held to enumeration of all paths and all labels."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import CTCConfig, ModelConfig
from jaxformer.data.tokenizers import EOS, PAD, SOS, UNK
from jaxformer.decoding import (
    CTCPrefixScorer,
    ctc_beam_search,
    frame_log_probs,
    joint_search,
    make_joint_translate,
    make_score,
    make_translate,
)
from jaxformer.models import build
from jaxformer.models.output import CTCFrames
from jaxformer.nn import pure
from tests.decoding.ctc_enumeration import label_log_probs, log_softmax, log_sum

A, B = 4, 5
FRAMES, VOCABULARY, LENGTH = 4, 6, 4
EXHAUSTIVE = 40  # more than 1 + 2 + 4 + 8 + 16 hypotheses


@functools.cache
def compiled_scores(blank, eos_id):
    """From logits, lengths and a prefix: log P(the labels begin with it and v), for every v."""

    @jax.jit
    def score(logits, lengths, prefix):
        log_probs = frame_log_probs(logits, lengths, blank=blank, forbidden=(eos_id,))
        scorer = CTCPrefixScorer(log_probs, blank=blank, eos_id=eos_id)

        def feed(prefixes, label):
            return scorer.extend(jnp.full(len(lengths), label), prefixes), None

        prefixes, _ = jax.lax.scan(feed, scorer.start(), prefix)
        return scorer.next_log_probs(prefixes), prefixes.log_prob

    return score


@pytest.mark.parametrize(("blank", "eos_id", "labels"), [(0, 3, (1, 2)), (2, 0, (1, 3))])
@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, FRAMES), min_size=2, max_size=2),
)
def test_prefix_scores_equal_enumeration(blank, eos_id, labels, seed, lengths):
    logits = np.random.default_rng(seed).normal(0, 3, (2, FRAMES, 4)).astype(np.float32)
    score = compiled_scores(blank, eos_id)
    every = [
        label_log_probs(log_softmax(row), length, (*labels, eos_id), blank)
        for row, length in zip(logits, lengths, strict=True)
    ]
    for prefix in itertools.chain.from_iterable(
        itertools.product(labels, repeat=length) for length in range(4)
    ):
        found, log_prob = score(jnp.asarray(logits), jnp.asarray(lengths), jnp.asarray(prefix, int))
        for row in range(2):

            def beginning(prefix, row=row):
                return log_sum([p for key, p in every[row].items() if key[: len(prefix)] == prefix])

            assert float(log_prob[row]) == pytest.approx(beginning(prefix), abs=2e-5)
            for label in labels:
                wanted = beginning((*prefix, label))
                assert float(found[row, label]) == pytest.approx(wanted, abs=2e-5)
            wanted = every[row].get(prefix, -np.inf)
            assert float(found[row, eos_id]) == pytest.approx(wanted, abs=2e-5)
            assert found[row, blank] == -np.inf


def test_long_inputs_stay_finite_and_their_continuations_sum_to_the_prefix():
    frames, vocabulary = 600, 12
    random = np.random.default_rng(0)
    logits = random.normal(0, 6, (2, frames, vocabulary)).astype(np.float32)
    logits[..., 1] = -np.inf
    lengths = jnp.array([600, 411])
    prefix = jnp.asarray(random.integers(2, vocabulary, 30))
    found, log_prob = compiled_scores(0, 1)(jnp.asarray(logits), lengths, prefix)
    assert np.isfinite(log_prob).all()
    assert (log_prob < 0).all()
    np.testing.assert_allclose(jax.nn.logsumexp(found, axis=-1), log_prob, rtol=1e-5)


class History(NamedTuple):
    """The state of a small recurrent decoder: what it has read, and the source it reads."""

    hidden: jax.Array
    source: jax.Array

    def take(self, indices):
        return History(self.hidden[indices], self.source[indices])


def hybrid(params, *inputs, method):
    """A hybrid model in miniature: frames and decoder look the source tokens up in tables."""
    if method == "extend":
        tokens, cache = inputs
        fed = params["inputs"][tokens[:, 0]] + 0.3 * params["source"][cache.source]
        hidden = jnp.tanh(0.7 * cache.hidden + fed)
        return (hidden @ params["outputs"])[:, None], cache._replace(hidden=hidden)
    source, source_segment_ids, _ = inputs
    cache = History(jnp.zeros((len(source), 4)), source[:, 0])
    if method == "init_cache":
        return cache
    assert method == "init_joint"
    return cache, CTCFrames(params["frames"][source], source_segment_ids.sum(-1))


def draw_params(seed):
    random = np.random.default_rng(seed)
    shapes = {
        "inputs": (VOCABULARY, 4),
        "outputs": (4, VOCABULARY),
        "source": (9, 4),
        "frames": (9, VOCABULARY),
    }
    return {name: random.normal(0, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}


def draw_source(seed):
    source = np.random.default_rng(seed).integers(0, 9, (3, FRAMES))
    return source, (np.arange(FRAMES) < np.array([[4], [3], [0]])).astype(np.int32)


def decoder_log_prob(params, source, labels):
    """log P(labels, <eos>) under the small decoder, in float64."""
    hidden, total = np.zeros(4), 0.0
    for token, following in zip((SOS, *labels), (*labels, EOS), strict=True):
        fed = params["inputs"][token].astype(float) + 0.3 * params["source"][source]
        hidden = np.tanh(0.7 * hidden + fed)
        total += log_softmax(hidden @ params["outputs"])[following]
    return total


@functools.cache
def compiled_joint(weight, **options):
    return make_joint_translate(hybrid, ctc_weight=weight, max_length=LENGTH + 1, **options)


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_joint_search_with_a_full_beam_equals_enumeration(weight, length_penalty, seed):
    params, (source, segments) = draw_params(seed), draw_source(seed)
    options = {"beam": EXHAUSTIVE, "n_best": EXHAUSTIVE, "length_penalty": length_penalty}
    beams = jax.device_get(compiled_joint(weight, **options)(params, source, segments))
    options["n_best"] = 1  # which may stop long before the last label
    stopped = jax.device_get(compiled_joint(weight, **options)(params, source, segments))
    for row, length in enumerate(segments.sum(-1)):
        by_ctc = label_log_probs(log_softmax(params["frames"][source[row]]), length, (A, B))
        wanted = {
            labels: weight * total + (1 - weight) * decoder_log_prob(params, source[row, 0], labels)
            for labels, total in by_ctc.items()
        }
        found = {
            tuple(tokens[:count].tolist()): log_prob
            for tokens, count, log_prob in zip(
                beams.tokens[row], beams.lengths[row], beams.log_probs[row], strict=True
            )
            if np.isfinite(log_prob)
        }
        assert found == pytest.approx(wanted, abs=3e-5)
        scores = {k: v / ((5 + len(k) + 1) / 6) ** length_penalty for k, v in wanted.items()}
        best = max(scores.values())
        assert beams.scores[row, 0] == pytest.approx(best, abs=3e-5)
        assert stopped.scores[row, 0] == pytest.approx(best, abs=3e-5)


@pytest.mark.parametrize("options", [{"beam": 1}, {"beam": 3, "n_best": 2}], ids=str)
def test_weight_zero_is_the_decoder_alone_exactly(options):
    joint = compiled_joint(0.0, **options)
    alone = make_translate(hybrid, max_length=LENGTH + 1, **options)
    for seed in range(4):
        params, (source, segments) = draw_params(seed), draw_source(seed)
        found, wanted = joint(params, source, segments), alone(params, source, segments)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.lengths, wanted.lengths)
        np.testing.assert_array_equal(found.finished, wanted.finished)
        compare = np.testing.assert_array_equal if options["beam"] > 1 else assert_close
        compare(found.log_probs, wanted.log_probs)
        compare(found.scores, wanted.scores)


def assert_close(found, wanted):
    # With a beam of 1 the other is greedy search, which sums a logsumexp in another order.
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_a_narrow_joint_beam_never_beats_and_often_meets_the_full_one(weight):
    met = 0
    for seed in range(12):
        params, (source, segments) = draw_params(seed), draw_source(seed)
        full = compiled_joint(weight, beam=EXHAUSTIVE, length_penalty=0.0)
        narrow = compiled_joint(weight, beam=3, length_penalty=0.0)
        wanted, found = (search(params, source, segments) for search in (full, narrow))
        assert (found.scores <= wanted.scores + 1e-5).all()
        met += int(np.isclose(found.scores, wanted.scores, atol=1e-5).sum())
    assert met >= 30, "of 36"


def test_special_tokens_are_never_given_however_likely_their_frames_are():
    params, (source, segments) = draw_params(1), draw_source(1)
    params["frames"][:, [SOS, EOS, UNK]] += 8
    beams = jax.device_get(compiled_joint(0.5, beam=4)(params, source, segments))
    for row in range(3):
        text = beams.tokens[row, 0, : beams.lengths[row, 0]]
        assert np.isin(text, [A, B]).all()
    assert beams.lengths[2, 0] == 0, "no frames have no labels"


def test_gains_are_never_above_zero_nor_nan():
    params, (source, segments) = draw_params(2), draw_source(2)
    params["frames"][:, A] = -np.inf
    params["frames"][:, [B, PAD]] *= 30
    frames = frame_log_probs(jnp.asarray(params["frames"][source]), jnp.asarray(segments.sum(-1)))
    scorer = CTCPrefixScorer(frames, blank=PAD, eos_id=EOS)
    step, cache, gains = joint_search(
        lambda tokens, cache: (jnp.zeros((len(tokens), VOCABULARY)), cache),
        History(jnp.zeros((3, 4)), jnp.zeros(3, int)),
        jnp.zeros((3, VOCABULARY)),
        scorer,
        0.5,
    )
    step = jax.jit(step)
    for label in (B, A, B, B, B):
        assert (gains <= 0).all()
        assert not np.isnan(gains).any()
        gains, cache = step(jnp.full((3, 1), label), cache)
    assert (gains == -np.inf).all(), "an impossible prefix has no continuation"


def test_a_weight_that_is_no_share_is_refused():
    params, (source, segments) = draw_params(0), draw_source(0)
    with pytest.raises(ValueError, match=r"weight=1\.5"):
        make_joint_translate(hybrid, ctc_weight=1.5, max_length=3)(params, source, segments)


def test_the_librarys_own_hybrid_model_is_searched():
    config = ModelConfig(
        kind="hybrid",
        layers=1,
        encoder_layers=1,
        width=8,
        heads=2,
        scan=False,
        ctc=CTCConfig(upsample=2, weight=0.4),
    )
    apply, params = pure(build(config, vocabulary=VOCABULARY, source_vocabulary=9))
    random = np.random.default_rng(0)
    move = functools.partial(random.normal, 0, 0.5)
    params = jax.tree.map(lambda leaf: leaf + move(size=leaf.shape).astype(np.float32), params)
    source = jnp.asarray(random.integers(4, 9, (2, 2)))
    segments = jnp.array([[1, 1], [1, 0]])
    options = {"beam": EXHAUSTIVE, "max_length": LENGTH + 1, "length_penalty": 0.0}
    found = make_joint_translate(apply, ctc_weight=0.4, **options)(params, source, segments)

    # What the search adds up label by label is what the model says of the whole.
    targets = found.tokens[:, 0]
    batch = {
        "source": source,
        "source_segment_ids": segments,
        "inputs": jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=SOS),
        "targets": targets,
        "weights": (jnp.arange(LENGTH + 1) <= found.lengths).astype(jnp.float32),
    }
    np.testing.assert_allclose(make_score(apply)(params, batch), found.log_probs[:, 0], atol=1e-5)

    # With all the weight on CTC, its own search finds the same.
    _, frames = apply(params, source, segments, LENGTH + 1, method="init_joint")
    by_ctc = ctc_beam_search(
        frames.logits, frames.lengths, beam=EXHAUSTIVE, max_length=LENGTH, forbidden=(SOS, EOS, UNK)
    )
    found = make_joint_translate(apply, ctc_weight=1.0, **options)(params, source, segments)
    np.testing.assert_array_equal(found.lengths, by_ctc.lengths)
    for row in range(2):
        length = int(found.lengths[row, 0])
        np.testing.assert_array_equal(found.tokens[row, 0, :length], by_ctc.tokens[row, 0, :length])
    np.testing.assert_allclose(found.log_probs, by_ctc.log_probs, atol=1e-5)
