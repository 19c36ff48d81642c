"""The n-gram automaton is held to Kneser-Ney's formula, evaluated as it is written."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.decoding import NGram, ctc_beam_search
from tests.decoding.ctc_enumeration import label_log_probs, log_softmax

PAD, SOS, EOS, UNK, A, B = range(6)
VOCABULARY = 6
IDS = {"vocabulary": VOCABULARY, "sos_id": SOS, "eos_id": EOS, "pad_id": PAD}
sequences = st.lists(st.lists(st.sampled_from([UNK, A, B]), max_size=6), min_size=1, max_size=8)


def written_out(texts, order):
    """P(token | context) by the formula, with dictionaries: a function of context and token."""
    texts = [(SOS, *text, EOS) for text in texts]
    grams = collections.Counter(
        text[i : i + n]
        for text in texts
        for n in range(1, order + 1)
        for i in range(len(text) - n + 1)
    )
    before = collections.defaultdict(set)
    for gram in grams:
        if len(gram) > 1:
            before[gram[1:]].add(gram[0])
    counts = [collections.defaultdict(dict) for _ in range(order)]
    for gram, count in grams.items():
        if gram != (SOS,):
            longest = len(gram) == order or gram[0] == SOS
            counts[len(gram) - 1][gram[:-1]][gram[-1]] = count if longest else len(before[gram])

    def probability(context, token):
        if len(context) >= order:
            context = context[len(context) - order + 1 :]
        level = counts[len(context)]
        shorter = probability(context[1:], token) if context else float(token not in (PAD, SOS)) / 4
        if context not in level:
            return shorter
        values = [count for after in level.values() for count in after.values()]
        once, twice = values.count(1), values.count(2)
        discount = once / (once + 2 * twice) if once and twice else 0.5
        after = level[context]
        own = max(after.get(token, 0) - discount, 0)
        return (own + discount * len(after) * shorter) / sum(after.values())

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@settings(max_examples=15)
@given(texts=sequences)
def test_every_probability_is_that_of_the_formula(order, texts):
    model = NGram.train(texts, order=order, **IDS)
    probability = written_out(texts, order)
    for length in range(4):
        every = np.array(list(itertools.product([UNK, A, B], repeat=length)), int)
        log_probs, state = model(jnp.zeros(len(every), int), None)
        for tokens in every.T:
            log_probs, state = model(jnp.asarray(tokens), state)
        found = np.exp(np.asarray(log_probs))
        wanted = [
            [probability((SOS, *read), token) for token in range(VOCABULARY)]
            for read in every.tolist()
        ]
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
        assert found[:, [PAD, SOS]].sum() == 0


def test_frequent_sequences_are_likelier_and_unseen_ones_possible():
    model = NGram.train([[A, B, A]] * 5 + [[B, B], [A]], order=3, **IDS)
    total = {}
    for text in ([A, B, A], [B, A, A], [UNK]):
        log_probs, state = model(jnp.zeros(1, int), None)
        total[tuple(text)] = 0.0
        for token in [*text, EOS]:
            total[tuple(text)] += float(log_probs[0, token])
            log_probs, state = model(jnp.array([token]), state)
    assert total[A, B, A] > total[B, A, A] > -np.inf
    assert total[UNK,] > -np.inf


def test_a_search_with_it_ranks_as_enumeration_does():
    texts = [[A, B, A], [A, A, B], [B], [A, B]]
    model = NGram.train(texts, order=3, **IDS)
    probability = written_out(texts, 3)
    logits = np.random.default_rng(0).normal(0, 1, (2, 4, VOCABULARY)).astype(np.float32)
    search = functools.partial(
        ctc_beam_search,
        beam=40,
        n_best=40,
        max_length=4,
        forbidden=(SOS, EOS, UNK),
        language_model=model,
        language_model_weight=0.6,
        eos_id=EOS,
    )
    beams = jax.device_get(jax.jit(search)(jnp.asarray(logits), jnp.array([4, 3])))
    for row, length in enumerate((4, 3)):
        wanted = {
            labels: total
            + 0.6
            * sum(
                np.log(probability((SOS, *labels[:i]), token))
                for i, token in enumerate((*labels, EOS))
            )
            for labels, total in label_log_probs(log_softmax(logits[row]), length, (A, B)).items()
        }
        found = {
            tuple(beams.tokens[row, place, : beams.lengths[row, place]].tolist()): score
            for place, score in enumerate(beams.scores[row])
            if np.isfinite(score)
        }
        assert found == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize(
    ("texts", "order", "message"),
    [
        ([], 2, "at least one"),
        ([[A]], 0, "order=0"),
        ([[A, EOS]], 2, "token 2"),
        ([[A, 6]], 2, "token 6"),
        ([[A, PAD]], 2, "token 0"),
    ],
)
def test_bad_arguments_are_refused(texts, order, message):
    with pytest.raises(ValueError, match=message):
        NGram.train(texts, order=order, **IDS)
