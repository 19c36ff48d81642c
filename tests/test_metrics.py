import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.metrics import (
    bits_per_byte,
    edit_distance,
    perplexity,
    sequence_error_rate,
    token_error_rate,
)

words = st.text("abc", max_size=6)


def by_definition(first, second):
    """The distance as the textbook's recursion over prefixes."""

    @functools.cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (first[i - 1] != second[j - 1]),
        )

    return distance(len(first), len(second))


@given(words, words)
def test_edit_distance_equals_its_recursive_definition(first, second):
    assert edit_distance(first, second) == by_definition(first, second)


@given(words, words, words)
def test_edit_distance_is_a_metric(first, second, third):
    assert edit_distance(first, second) == edit_distance(second, first)
    assert (edit_distance(first, second) == 0) == (first == second)
    assert edit_distance(first, third) <= edit_distance(first, second) + edit_distance(
        second, third
    )


def test_edit_distance_of_known_pairs():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance(["K", "AE", "T"], ("K", "AH", "T", "S")) == 2


def test_error_rates_of_a_small_corpus():
    predictions = [["K", "AE", "T"], ["R", "EH", "D"], ["T", "UW"], []]
    references = [
        [["K", "AE", "T"]],
        [["R", "IY", "D"], ["R", "EH", "D"]],  # either is right
        [["D", "UW"], ["D", "UW", "Z", "IH"]],  # the closer is one edit of two away
        [["AH"]],
    ]
    assert token_error_rate(predictions, references) == (0 + 0 + 1 + 1) / (3 + 3 + 2 + 1)
    assert sequence_error_rate(predictions, references) == 2 / 4


def test_token_error_rate_is_over_the_corpus_and_not_a_mean_of_rates():
    assert token_error_rate(["a", "abcd"], [["b"], ["abcd"]]) == 1 / 5


def test_equally_close_references_give_one_rate_in_any_order():
    rate = token_error_rate(["ab"], [["abc", "a"]])
    assert rate == token_error_rate(["ab"], [["a", "abc"]]) == 1 / 3


def test_token_error_rate_can_exceed_one_and_allows_an_empty_reference_among_others():
    assert token_error_rate(["abc"], [["x"]]) == 3
    assert token_error_rate(["", "a"], [[""], ["a"]]) == 0


def test_sequences_are_compared_by_content_and_not_by_type():
    assert sequence_error_rate([("a", "b")], [[["a", "b"]]]) == 0


def test_error_rates_take_iterators():
    assert sequence_error_rate(iter(["a", "b"]), iter([["a"], ["c"]])) == 0.5
    assert token_error_rate(iter(["a", "b"]), iter([["a"], ["c"]])) == 0.5


@pytest.mark.parametrize("rate", [token_error_rate, sequence_error_rate])
def test_error_rates_refuse_what_they_cannot_judge(rate):
    with pytest.raises(ValueError, match="no examples"):
        rate([], [])
    with pytest.raises(ValueError, match="2 predictions for 1 examples"):
        rate(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="Example 1 has no references"):
        rate(["a", "b"], [["a"], []])


def test_token_error_rate_refuses_references_that_are_all_empty():
    with pytest.raises(ValueError, match="empty"):
        token_error_rate(["a"], [[""]])


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert perplexity(12 * math.log(50), 12) == pytest.approx(50)
    assert perplexity(0.0, 3) == 1
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="0 tokens"):
        perplexity(1.0, 0)


def test_bits_per_byte_of_a_uniform_guess_among_bytes_is_eight():
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)
    # Half as many tokens as bytes, each at ln 2 nats: one bit for two bytes.
    assert bits_per_byte(5 * math.log(2), 10) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)
