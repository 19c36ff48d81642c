"""Beam search is held to exhaustive enumeration with a model small enough to enumerate."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.decoding import beam_search, greedy

PAD, SOS, EOS, A, B, C = range(6)
VOCABULARY, HIDDEN = 6, 4
SPECIAL = {"eos_id": EOS, "pad_id": PAD, "forbidden": (SOS,)}
# More than all hypotheses of four tokens: 3 ** 3 live ones with four extensions each.
EXHAUSTIVE, LENGTH = 128, 4


class History(NamedTuple):
    """A recurrent model's state and weights, with the batch on the second axis."""

    hidden: jax.Array  # [HIDDEN, B]
    inputs: jax.Array  # [VOCABULARY, HIDDEN, B]: weights a row, so that rows are different models
    outputs: jax.Array  # [HIDDEN, VOCABULARY, B]

    def take(self, indices):
        return jax.tree.map(lambda leaf: leaf[..., indices], self)


def step(tokens, cache):
    fed = jnp.take_along_axis(cache.inputs, tokens.reshape(1, 1, -1), axis=0)[0]
    hidden = jnp.tanh(0.7 * cache.hidden + fed)
    logits = jnp.sum(hidden[:, None] * cache.outputs, axis=0).T
    return logits, cache._replace(hidden=hidden)


def prompted(models):
    """The cache and the logits after <sos> of a batch of models."""
    inputs, outputs = (jnp.stack(part, axis=-1) for part in zip(*models, strict=True))
    cache = History(jnp.zeros((HIDDEN, len(models))), inputs, outputs)
    logits, cache = step(jnp.full((len(models), 1), SOS), cache)
    return cache, logits


def random_model(seed, whole_numbers=False, eos_bias=0.0):
    """Weights drawn from the seed; whole numbers with a constant hidden state make many ties."""
    random = np.random.default_rng(seed)
    inputs = random.normal(0, 1, (VOCABULARY, HIDDEN))
    outputs = random.normal(0, 1.5, (HIDDEN, VOCABULARY))
    if whole_numbers:
        inputs = np.full_like(inputs, 100.0)
        outputs = random.integers(-1, 2, outputs.shape).astype(float)
    outputs[:, EOS] += eos_bias
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(outputs, jnp.float32)


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(beam_search, step, **SPECIAL, **options))


@functools.cache
def compiled_greedy(**options):
    return jax.jit(functools.partial(greedy, step, **SPECIAL, **options))


def teacher(model):
    """The model once more, in float64: from a prefix to the log-probabilities of what follows."""
    inputs, outputs = (np.asarray(part, np.float64) for part in model)

    @functools.cache
    def log_probs(prefix):
        hidden = np.zeros(HIDDEN)
        for token in (SOS, *prefix):
            hidden = np.tanh(0.7 * hidden + inputs[token])
        logits = hidden @ outputs
        return logits - np.log(np.sum(np.exp(logits)))

    return log_probs


def enumerate_hypotheses(model, alpha, min_length, max_length=LENGTH):
    """The score of every finished and of every unfinished hypothesis of a model."""
    log_probs = teacher(model)
    finished, unfinished = {}, {}
    for length in range(max_length + 1):
        penalty = ((5 + min(length + 1, max_length)) / 6) ** alpha
        for prefix in itertools.product((A, B, C), repeat=length):
            total = sum(log_probs(prefix[:i])[token] for i, token in enumerate(prefix))
            if length == max_length:
                unfinished[prefix] = total / penalty
            elif length >= min_length:
                finished[(*prefix, EOS)] = (total + log_probs(prefix)[EOS]) / penalty
    return finished, unfinished


def hypotheses(beams, row):
    """The non-empty hypotheses of a row as (tokens, score, finished)."""
    found = []
    for tokens, length, score, finished in zip(
        *(
            np.asarray(field[row])
            for field in (beams.tokens, beams.lengths, beams.scores, beams.finished)
        ),
        strict=True,
    ):
        if np.isfinite(score):
            kept = length + finished
            assert (tokens[kept:] == PAD).all()
            assert EOS not in tokens[:length]
            assert (tokens[length] == EOS) if finished else length == len(tokens)
            found.append((tuple(tokens[:kept].tolist()), score, bool(finished)))
        else:
            assert (tokens == PAD).all()
            assert length == 0
            assert not finished
    return found


OPTIONS = [
    {"length_penalty": alpha, "min_length": min_length, "n_best": n_best}
    for alpha, min_length, n_best in [
        (0.0, 0, 1),
        (0.0, 2, 3),
        (0.6, 0, 1),
        (0.6, 1, 50),
        (3.0, 0, 1),
        (3.0, 0, 4),
        (-1.0, 0, 1),
        (-1.0, 2, 2),
    ]
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(max_examples=12)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=3, max_size=3), ties=st.booleans())
def test_a_large_enough_beam_equals_exhaustive_enumeration(options, seeds, ties):
    models = [random_model(seed, whole_numbers=ties) for seed in seeds]
    search = compiled(beam=EXHAUSTIVE, max_length=LENGTH, **options)
    beams = search(*prompted(models))
    for row, model in enumerate(models):
        finished, unfinished = enumerate_hypotheses(
            model, options["length_penalty"], options["min_length"]
        )
        best = sorted(finished.values(), reverse=True)
        best = (best + sorted(unfinished.values(), reverse=True))[: options["n_best"]]
        found = hypotheses(beams, row)
        np.testing.assert_allclose([score for _, score, _ in found], best, atol=3e-6)
        assert len({tokens for tokens, _, _ in found}) == len(found)
        for tokens, score, ended in found:
            assert (finished if ended else unfinished)[tokens] == pytest.approx(score, abs=3e-6)
        if not ties:
            top = max(finished, key=finished.get)
            assert found[0][0] == top


def test_a_length_penalty_waits_for_a_longer_hypothesis_that_scores_higher():
    # <eos> at once has -1.0; three sure tokens and <eos> have -1.2 over a larger penalty.
    continuation = np.log(-np.expm1(-1.0))
    table = np.full((4, VOCABULARY), -50.0)
    table[0, EOS], table[0, A] = -1.0, continuation
    table[1:3, A] = 0.0
    table[3, EOS] = 0.0
    search = functools.partial(table_search, table, beam=2, max_length=4)
    assert hypotheses(search(length_penalty=0.0), 0)[0][0] == (A, A, A, EOS)
    table[0, EOS], table[0, A] = continuation, -1.0
    assert hypotheses(search(length_penalty=0.0), 0)[0][0] == (EOS,)
    longer = hypotheses(search(length_penalty=3.0), 0)[0]
    assert longer[0] == (A, A, A, EOS)
    assert longer[1] == pytest.approx(-1.0 / (9 / 6) ** 3, abs=1e-5)
    # A shorter limit takes the chance away.
    assert hypotheses(search(length_penalty=3.0, max_length=3), 0)[0][0] == (EOS,)


def test_a_negative_length_penalty_waits_for_the_next_token_and_not_for_the_last():
    # <eos> at once has -1.0; a likelier token, then a sure <eos>, has -0.46 * 7 / 6.
    table = np.full((9, VOCABULARY), -50.0)
    table[0, EOS], table[0, A] = -1.0, np.log(-np.expm1(-1.0))
    table[1:, EOS] = 0.0
    found = hypotheses(table_search(table, beam=2, max_length=9, length_penalty=-1.0), 0)
    assert found[0][0] == (A, EOS)
    assert found[0][1] == pytest.approx(table[0, A] * 7 / 6, abs=1e-5)


class Place(NamedTuple):
    position: jax.Array

    def take(self, indices):
        return Place(self.position[indices])


def table_search(table, rows=1, **options):
    """Beam search over a model whose logits depend on the position alone."""

    @jax.jit
    def search(table):
        def look_up(tokens, cache):
            del tokens
            return table[cache.position], Place(cache.position + 1)

        cache, logits = Place(jnp.ones(rows, jnp.int32)), jnp.tile(table[0], (rows, 1))
        return beam_search(look_up, cache, logits, **(SPECIAL | options))

    return search(jnp.asarray(table, jnp.float32))


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 3.0, -1.0])
@pytest.mark.parametrize("min_length", [0, 3])
def test_beam_one_equals_greedy_under_any_length_penalty(length_penalty, min_length):
    prompt = prompted([random_model(seed, eos_bias=0.3) for seed in range(24)])
    options = {"max_length": 7, "min_length": min_length}
    beams = compiled(beam=1, length_penalty=length_penalty, **options)(*prompt)
    wanted = compiled_greedy(**options)(*prompt)
    np.testing.assert_array_equal(beams.tokens[:, 0], wanted.tokens)
    np.testing.assert_array_equal(beams.lengths[:, 0], wanted.lengths)
    np.testing.assert_array_equal(beams.finished[:, 0], wanted.finished)
    np.testing.assert_allclose(beams.log_probs[:, 0], wanted.log_probs, atol=1e-5)
    assert len(set(wanted.lengths.tolist())) > 2, "the rows should end at different places"


@pytest.mark.parametrize("options", [{"beam": 3, "n_best": 2}, {"beam": 1}], ids=str)
@pytest.mark.parametrize("length_penalty", [0.0, 1.5])
def test_a_batch_equals_its_rows_one_by_one(options, length_penalty):
    # Some models end at once and some almost never, so rows stop at very different steps.
    models = [random_model(seed, eos_bias=(-2.0, 0.0, 2.0)[seed % 3]) for seed in range(9)]
    search = compiled(max_length=8, length_penalty=length_penalty, **options)
    together = search(*prompted(models))
    for row, model in enumerate(models):
        alone = search(*prompted([model]))
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_array_equal(together.finished[row], alone.finished[0])
        # XLA sums a softmax in an order that depends on the batch size: one unit in the last place.
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=1e-6)
        np.testing.assert_allclose(together.log_probs[row], alone.log_probs[0], rtol=1e-6)


def plain_beam_search(model, beam, max_length, alpha):
    """Beam search as it reads in a textbook: no stopping rule, all finished ones kept."""
    log_probs = teacher(model)
    live, ended = [(0.0, ())], []
    for length in range(1, max_length + 1):
        extensions = sorted(
            (
                (total + log_probs(prefix)[token], (*prefix, token))
                for total, prefix in live
                for token in (EOS, A, B, C)
            ),
            reverse=True,
        )
        penalty = ((5 + length) / 6) ** alpha
        ended += [(t / penalty, tokens) for t, tokens in extensions[:beam] if tokens[-1] == EOS]
        live = [(t, tokens) for t, tokens in extensions if tokens[-1] != EOS][:beam]
    return sorted(ended, reverse=True) + [(total / penalty, tokens) for total, tokens in live]


@pytest.mark.parametrize(("beam", "alpha"), [(2, 0.0), (2, 3.0), (3, 0.6), (5, -1.0)])
@settings(max_examples=8)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=4, max_size=4))
def test_a_narrow_beam_equals_a_plain_search_that_never_stops_early(beam, alpha, seeds):
    models = [random_model(seed) for seed in seeds]
    search = compiled(beam=beam, max_length=6, length_penalty=alpha, n_best=2)
    beams = search(*prompted(models))
    for row, model in enumerate(models):
        wanted = plain_beam_search(model, beam, 6, alpha)[:2]
        found = hypotheses(beams, row)
        assert [tokens for tokens, _, _ in found] == [tokens for _, tokens in wanted]
        np.testing.assert_allclose([s for _, s, _ in found], [s for s, _ in wanted], atol=3e-6)


def test_unfinished_hypotheses_come_back_when_nothing_can_finish():
    model = random_model(5)
    search = compiled(beam=EXHAUSTIVE, max_length=3, min_length=3, length_penalty=0.6, n_best=4)
    beams = search(*prompted([model]))
    _, unfinished = enumerate_hypotheses(model, 0.6, 3, max_length=3)
    assert not beams.finished.any()
    np.testing.assert_array_equal(beams.lengths, 3)
    np.testing.assert_allclose(
        beams.scores[0], sorted(unfinished.values(), reverse=True)[:4], atol=3e-6
    )
    np.testing.assert_allclose(beams.log_probs, beams.scores * (8 / 6) ** 0.6, atol=3e-6)


def test_slots_without_a_hypothesis_are_empty():
    # One letter and <eos> in two tokens: (<eos>), (A, <eos>), and (A, A) unfinished.
    table = np.tile(np.log([1e-9, 1e-9, 0.6, 0.4, 1e-9, 1e-9]), (2, 1))
    beams = table_search(
        table, beam=9, max_length=2, length_penalty=0.0, n_best=5, forbidden=(SOS, B, C)
    )
    found = hypotheses(beams, 0)
    assert [(tokens, ended) for tokens, _, ended in found] == [
        ((EOS,), True),
        ((A, EOS), True),
        ((A, A), False),
    ]
    np.testing.assert_allclose(np.exp([s for _, s, _ in found]), [0.6, 0.24, 0.16], rtol=1e-5)
    np.testing.assert_array_equal(beams.scores[0, 3:], -np.inf)
    np.testing.assert_array_equal(beams.log_probs[0, 3:], -np.inf)


def test_a_vocabulary_of_nothing_but_eos_has_one_hypothesis():
    beams = table_search(
        np.zeros((3, 1)), beam=2, max_length=3, n_best=2, eos_id=0, pad_id=0, forbidden=()
    )
    np.testing.assert_array_equal(beams.scores, [[0.0, -np.inf]])
    np.testing.assert_array_equal(beams.finished, [[True, False]])
    np.testing.assert_array_equal(beams.lengths, 0)


def test_tokens_the_model_rules_out_never_come_back():
    table = np.full((3, VOCABULARY), -np.inf)
    table[0, A] = table[1, B] = table[2, EOS] = 0.0
    beams = table_search(table, beam=4, max_length=3, n_best=4)
    assert [(tokens, score) for tokens, score, _ in hypotheses(beams, 0)] == [((A, B, EOS), 0.0)]
    assert not np.isnan(beams.log_probs).any()


def test_ties_go_to_the_lower_token_and_the_shorter_hypothesis():
    beams = table_search(
        np.zeros((2, VOCABULARY)), beam=12, max_length=2, min_length=1, length_penalty=0.0, n_best=5
    )
    assert [tokens for tokens, _, _ in hypotheses(beams, 0)] == [
        (A, EOS),
        (B, EOS),
        (C, EOS),
        (A, A),
        (A, B),
    ]
    # Three letters over one step each: <eos>, with the lowest id, finishes first.
    certain = np.full((3, VOCABULARY), -np.inf)
    certain[:, [EOS, A]] = 0.0
    beams = table_search(certain, beam=4, max_length=3, length_penalty=-20.0, n_best=2)
    assert [tokens for tokens, _, _ in hypotheses(beams, 0)] == [(EOS,), (A, EOS)]


def test_padding_and_forbidden_tokens_are_never_chosen_and_keep_their_probability():
    logits = jnp.log(jnp.array([0.3, 0.4, 0.2, 0.1, 1e-9, 1e-9]))
    beams = table_search(jnp.tile(logits, (3, 1)), beam=2, max_length=3, length_penalty=0.0)
    assert hypotheses(beams, 0)[0][0] == (EOS,)
    np.testing.assert_allclose(beams.log_probs[0, 0], np.log(0.2), rtol=1e-5)


def test_padding_may_be_the_end_token():
    table = np.tile(np.log([0.1, 0.1, 0.1, 0.5, 0.1, 0.1]), (4, 1))
    table[2:, EOS] = 9.0
    beams = table_search(table, beam=3, max_length=4, length_penalty=0.0, pad_id=EOS)
    length = int(beams.lengths[0, 0])
    assert beams.finished[0, 0]
    np.testing.assert_array_equal(beams.tokens[0, 0, length:], EOS)


def test_sums_are_float32_whatever_the_logits_are():
    model = random_model(3)
    cache, logits = prompted([model])

    def rounded_step(tokens, cache):
        logits, cache = step(tokens, cache)
        return logits.astype(jnp.bfloat16), cache

    search = functools.partial(beam_search, rounded_step, beam=2, max_length=3, **SPECIAL)
    beams = jax.eval_shape(search, cache, logits.astype(jnp.bfloat16))
    assert beams.scores.dtype == beams.log_probs.dtype == jnp.float32


def test_the_loop_ends_with_the_last_row_and_not_at_the_length_limit():
    calls = []

    def counted(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        ending = jnp.where(cache.position >= 4, 20.0, -20.0)
        logits = jnp.zeros((len(tokens), VOCABULARY)).at[:, EOS].set(ending)
        return logits, Place(cache.position + 1)

    cache, logits = Place(jnp.array([1, 2])), jnp.zeros((2, VOCABULARY)).at[:, EOS].set(-20.0)
    search = functools.partial(beam_search, counted, beam=3, max_length=40, **SPECIAL)
    beams = jax.jit(search)(cache, logits)
    jax.effects_barrier()
    # Either row ends once it is fed its place 4, the second one step before the first.
    np.testing.assert_array_equal(beams.lengths, [[4], [3]])
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam": 0}, "beam=0"),
        ({"n_best": 3}, "n_best=3"),
        ({"n_best": 0}, "n_best=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"min_length": 5}, "min_length=5"),
        ({"min_length": -1}, "min_length=-1"),
        ({"eos_id": 6}, "eos_id=6"),
        ({"pad_id": -1}, "pad_id=-1"),
        ({"forbidden": (7,)}, "forbidden=7"),
        ({"forbidden": (SOS, EOS, A, B, C)}, "No token"),
        ({"forbidden": (SOS, A, B, C), "min_length": 1}, "before <eos>"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
    ],
)
def test_bad_arguments_are_refused_by_name(wrong, message):
    options = {"beam": 2, "max_length": 4} | wrong
    with pytest.raises(ValueError, match=message):
        table_search(np.zeros((4, VOCABULARY)), **options)
