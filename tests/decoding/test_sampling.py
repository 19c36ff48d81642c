"""Sampling against exact probabilities, with a bigram model: a table from token to logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxformer.decoding import (
    filter_logits,
    greedy,
    sample,
    sequence_log_probs,
    token_log_probs,
)

PAD, SOS, EOS, A, B, C, D = range(7)
VOCABULARY = 7
SPECIAL = {"eos_id": EOS, "pad_id": PAD, "forbidden": (SOS,)}
LETTERS = [EOS, A, B, C, D]


class Table(NamedTuple):
    """A bigram model's logits, float32[V, V]: its only memory is the token it is fed."""

    logits: jax.Array


def step(tokens, cache):
    return cache.logits[tokens[:, 0]], cache


def random_table(seed=0, eos_bias=0.0):
    table = np.random.default_rng(seed).normal(0, 1, (VOCABULARY, VOCABULARY))
    table[:, EOS] += eos_bias
    return jnp.asarray(table, jnp.float32)


@functools.cache
def compiled(function=sample, **options):
    @jax.jit
    def run(table, key, **arrays):
        rows = key.shape[0] if key is not None else 5
        logits = jnp.tile(table[SOS], (rows, 1))
        keys = {} if function is greedy else {"key": key}
        return function(step, Table(table), logits, **keys, **arrays, **(SPECIAL | options))

    return run


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def is_likely(counts, probabilities):
    """Whether counts could be draws from the probabilities (chi-square, one in a thousand)."""
    counts, probabilities = np.asarray(counts), np.asarray(probabilities)
    assert (counts[probabilities == 0] == 0).all()
    possible = probabilities > 0
    expected = counts.sum() * probabilities[possible]
    return stats.chisquare(counts[possible], expected).pvalue > 1e-3


def letters_only(logits):
    """The logits with padding and <sos> taken out."""
    return np.where(np.isin(np.arange(VOCABULARY), LETTERS), logits, -np.inf)


def test_frequencies_of_two_tokens_match_the_model():
    table = random_table()
    sampled = compiled(max_length=2)(table, keys(20_000))
    first = softmax(letters_only(table[SOS]))
    joint = np.stack([softmax(letters_only(table[t])) for t in range(VOCABULARY)]) * first[:, None]
    joint[EOS] = 0
    joint[EOS, PAD] = first[EOS]
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(np.asarray(sampled.tokens).T), 1)
    assert is_likely(counts, joint)
    # The test can tell: a temperature of 1.1 is another distribution.
    warmer = compiled(max_length=2, temperature=1.1)(table, keys(20_000))
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(np.asarray(warmer.tokens).T), 1)
    assert not is_likely(counts, joint)


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_frequencies_match_the_filtered_distribution(filters):
    table = 0.3 * random_table(3)
    sampled = compiled(max_length=1, **filters)(table, keys(10_000))
    counts = np.bincount(np.asarray(sampled.tokens[:, 0]), minlength=VOCABULARY)
    logits = filter_logits(jnp.asarray(letters_only(table[SOS]))[None], **filters)[0]
    assert np.isfinite(logits).sum() >= 3
    assert is_likely(counts, softmax(logits))


def kept(probabilities, **filters):
    logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
    return set(np.flatnonzero(np.isfinite(filter_logits(logits, **filters)[0])).tolist())


def test_filters_keep_exactly_the_right_tokens():
    skewed = [0.1, 0.4, 0.05, 0.25, 0.2]
    assert kept(skewed) == {0, 1, 2, 3, 4}
    assert kept(skewed, top_k=2) == {1, 3}
    assert kept(skewed, top_k=9) == {0, 1, 2, 3, 4}
    assert kept(skewed, top_p=0.39) == {1}
    assert kept(skewed, top_p=0.41) == {1, 3}
    assert kept(skewed, top_p=0.64) == {1, 3}
    assert kept(skewed, top_p=0.66) == {1, 3, 4}
    assert kept(skewed, top_p=1e-9) == {1}
    assert kept(skewed, top_p=1.0) == {0, 1, 2, 3, 4}
    assert kept(skewed, min_p=0.49) == {1, 3, 4}
    assert kept(skewed, min_p=0.51) == {1, 3}
    assert kept(skewed, min_p=1.0) == {1}
    assert kept(skewed, min_p=0.0) == {0, 1, 2, 3, 4}
    # Of the three likeliest, renormalised to 0.47, 0.29, 0.24, the nucleus of 0.75 holds two;
    # of all five it would hold three.
    assert kept(skewed, top_k=3, top_p=0.75) == {1, 3}
    assert kept(skewed, top_p=0.75) == {1, 3, 4}
    # The temperature comes first: the squares are 0.01, 0.16, 0.0025, 0.0625, 0.04 of 0.275.
    assert kept(skewed, temperature=0.5, top_p=0.57) == {1}
    assert kept(skewed, temperature=0.5, min_p=0.3) == {1, 3}


def test_ties_stay_by_token_id_and_a_border_that_is_met_exactly_ends_the_nucleus():
    assert kept([0.25, 0.25, 0.25, 0.25], top_k=2) == {0, 1}
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.5) == {0, 1}
    assert kept([0.25, 0.25, 0.25, 0.25], temperature=0.0) == {0}
    assert kept([0.2, 0.3, 0.3, 0.2], temperature=0.0) == {1}


@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6]),
    top_k=st.sampled_from([None, 1, 3, 100]),
    top_p=st.sampled_from([None, 1e-12, 0.5, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.5, 1.0]),
)
@settings(max_examples=60)
def test_the_likeliest_token_always_stays_and_the_filters_only_remove(
    logits, temperature, top_k, top_p, min_p
):
    logits = np.array(logits, np.float32)
    filtered = np.asarray(
        filter_logits(jnp.asarray(logits)[None], temperature, top_k, top_p, min_p)[0]
    )
    assert filtered[np.argmax(logits)] == 0
    assert not np.isnan(filtered).any()
    assert (filtered <= 0).all()
    assert np.isfinite(filtered).sum() <= (top_k or len(logits))
    # What stays is at least as likely as what goes.
    shifted = logits - logits.max()
    gone = shifted[~np.isfinite(filtered)]
    assert gone.size == 0 or shifted[np.isfinite(filtered)].min() >= gone.max()


@pytest.mark.parametrize("eos_bias", [0.0, 1.5])
def test_log_probs_equal_teacher_forced_scores_of_what_was_sampled(eos_bias):
    table = random_table(1, eos_bias)
    filters = {"temperature": 1.7, "top_k": 4, "top_p": 0.95, "min_p": 0.01}
    sampled = compiled(max_length=6, min_length=1, **filters)(table, keys(64))
    fed = jnp.pad(sampled.tokens[:, :-1], ((0, 0), (1, 0)), constant_values=SOS)
    scored = jnp.arange(6) < (sampled.lengths + sampled.finished)[:, None]
    wanted = sequence_log_probs(table[fed], sampled.tokens, scored)
    np.testing.assert_allclose(sampled.log_probs, wanted, atol=1e-5)
    assert sampled.finished.any()
    assert not sampled.finished.all()


def check_shape_of_rows(sampled, max_length):
    """Nothing but padding after <eos>, no <eos> within a row, no special token anywhere."""
    for tokens, length, finished in zip(
        *map(np.asarray, (sampled.tokens, sampled.lengths, sampled.finished)), strict=True
    ):
        assert not np.isin(tokens[:length], [PAD, SOS, EOS]).any()
        assert (tokens[length + finished :] == PAD).all()
        if finished:
            assert tokens[length] == EOS
        else:
            assert length == max_length


@pytest.mark.parametrize("min_length", [0, 3, 8])
def test_nothing_grows_after_eos_and_no_row_ends_too_early(min_length):
    sampled = compiled(max_length=8, min_length=min_length)(random_table(2, 1.0), keys(500))
    check_shape_of_rows(sampled, 8)
    assert (sampled.lengths >= min_length).all()
    # Rows end on their own: every possible length occurs.
    assert set(sampled.lengths.tolist()) == set(range(min_length, 9))


def test_rows_have_length_limits_of_their_own():
    limits = jnp.array([0, 1, 2, 3, 9, 4])
    table = random_table(4, eos_bias=-30.0)
    sampled = compiled(max_length=5)(table, keys(6), row_lengths=limits)
    np.testing.assert_array_equal(sampled.lengths, [0, 1, 2, 3, 5, 4])
    assert not sampled.finished.any()
    whole = compiled(max_length=5)(table, keys(6))
    within = jnp.arange(5) < limits[:, None]
    np.testing.assert_array_equal(sampled.tokens, jnp.where(within, whole.tokens, PAD))


def test_a_batch_equals_its_rows_one_by_one():
    table = random_table(5, 0.5)
    row_keys = keys(12)
    run = compiled(max_length=7, top_p=0.9)
    together = run(table, row_keys)
    for row in range(12):
        alone = run(table, row_keys[row : row + 1])
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_array_equal(together.lengths[row], alone.lengths[0])
        np.testing.assert_allclose(together.log_probs[row], alone.log_probs[0], rtol=1e-6)


def test_one_key_gives_every_row_and_every_place_its_own_draws():
    key, table = jax.random.key(7), jnp.zeros((VOCABULARY, VOCABULARY)).at[:, EOS].set(-1e9)

    def draw(key):
        logits = jnp.tile(table[SOS], (40, 1))
        return sample(step, Table(table), logits, key=key, max_length=40, **SPECIAL).tokens

    tokens = jax.jit(draw)(key)
    folded = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(40))
    np.testing.assert_array_equal(tokens, jax.jit(draw)(folded))
    assert len(np.unique(tokens, axis=0)) == len(np.unique(tokens, axis=1).T) == 40
    assert (tokens != jax.jit(draw)(jax.random.key(8))).any()


def test_greedy_takes_the_likeliest_token_and_breaks_ties_downwards():
    table = jnp.zeros((VOCABULARY, VOCABULARY))
    table = table.at[SOS, PAD].set(9).at[SOS, C].set(2).at[SOS, D].set(2)  # padding is no choice
    table = table.at[C, A].set(1).at[A, EOS].set(1)
    wanted = compiled(greedy, max_length=5)(table, None)
    np.testing.assert_array_equal(wanted.tokens, [[C, A, EOS, PAD, PAD]] * 5)
    np.testing.assert_array_equal(wanted.lengths, 2)
    assert wanted.finished.all()
    cold = compiled(max_length=5, temperature=0.0)(table, keys(5))
    jax.tree.map(np.testing.assert_array_equal, wanted, cold)
    almost = compiled(max_length=5, top_k=1)(table, keys(5))
    jax.tree.map(np.testing.assert_array_equal, wanted, almost)


def test_padding_may_be_the_end_token():
    sampled = compiled(max_length=6, pad_id=EOS)(random_table(6), keys(50))
    assert sampled.finished.any()
    for tokens, length in zip(sampled.tokens.tolist(), sampled.lengths.tolist(), strict=True):
        assert EOS not in tokens[:length]
        assert set(tokens[length:]) <= {EOS}


def test_the_model_is_fed_no_token_that_nothing_follows():
    fed = []

    def watched(tokens, cache):
        jax.debug.callback(lambda tokens: fed.append(tokens[:, 0].tolist()), tokens)
        return step(tokens, cache)

    def run(table, max_length):
        fed.clear()
        logits = jnp.stack([table[SOS], table[A]])
        greedy(watched, Table(table), logits, max_length=max_length, **SPECIAL)
        jax.effects_barrier()
        return fed

    # <sos> -> A -> B -> <eos>, and the second row a token ahead.
    table = jnp.zeros((VOCABULARY, VOCABULARY))
    table = table.at[SOS, A].set(1).at[A, B].set(1).at[B, EOS].set(1)
    assert run(table, 30) == [[A, B], [B, EOS]]
    assert run(table, 2) == [[A, B]]
    assert run(table, 1) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"key": None}, "needs a key"),
        ({"key": jax.random.PRNGKey(0)}, "typed random key"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, "one for each of 2 rows"),
        ({"max_length": 0}, "max_length=0"),
        ({"min_length": 9}, "min_length=9"),
        ({"eos_id": 7}, "eos_id=7"),
        ({"forbidden": [*LETTERS, SOS]}, "No token"),
    ],
)
def test_bad_arguments_are_refused_by_name(wrong, message):
    options = {"key": jax.random.key(0), "max_length": 3} | SPECIAL | wrong
    with pytest.raises(ValueError, match=message):
        sample(step, Table(random_table()), jnp.zeros((2, VOCABULARY)), **options)


def test_token_log_probs_are_a_float32_softmax_of_the_targets():
    random = np.random.default_rng(0)
    logits = random.normal(0, 5, (2, 3, VOCABULARY))
    targets = random.integers(0, VOCABULARY, (2, 3))
    wanted = np.log([[softmax(logits[b, t])[targets[b, t]] for t in range(3)] for b in range(2)])
    log_probs = token_log_probs(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(log_probs, wanted, atol=1e-5)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    assert token_log_probs(rounded, jnp.asarray(targets)).dtype == jnp.float32


def test_sequence_log_probs_leave_out_what_weighs_nothing_even_if_impossible():
    logits = jnp.zeros((2, 3, 4)).at[0, 2, 1].set(-jnp.inf)
    targets = jnp.array([[0, 1, 1], [2, 3, 0]])
    fourth = np.log(1 / 4)
    mask = jnp.array([[True, True, False], [True, True, True]])
    np.testing.assert_allclose(
        sequence_log_probs(logits, targets, mask), [2 * fourth, 3 * fourth], rtol=1e-6
    )
    weights = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        sequence_log_probs(logits, targets, weights), [1.5 * fourth, 0.0], rtol=1e-6
    )
