"""Error rates of predicted sequences, and scales of the loss."""

import math
from collections.abc import Hashable, Iterable, Sequence

Tokens = Sequence[Hashable]


def edit_distance(first: Tokens, second: Tokens) -> int:
    """Fewest insertions, deletions and substitutions of tokens that turn one into the other.

    Any sequences of comparable tokens: strings compare by character, lists by element. Takes
    len(first) * len(second) steps (Levenshtein 1966; Wagner and Fischer 1974).
    """
    # distances[j]: of the tokens of `first` so far to the first j tokens of `second`.
    distances = list(range(len(second) + 1))
    for i, token in enumerate(first, start=1):
        diagonal, distances[0] = distances[0], i
        for j, other in enumerate(second, start=1):
            substitution = diagonal + (token != other)
            diagonal = distances[j]
            distances[j] = min(substitution, diagonal + 1, distances[j - 1] + 1)
    return distances[-1]


def token_error_rate(
    predictions: Iterable[Tokens], references: Iterable[Sequence[Tokens]]
) -> float:
    """Edits a reference token: the phoneme error rate where tokens are phonemes.

        sum over examples of distance(prediction, r) / sum over examples of length(r)

    where r is the example's closest reference, of equally close ones the longest. It can exceed 1.

    Args:
        predictions: one sequence an example.
        references: for each example, all sequences that count as right, at least one.

    Raises:
        ValueError: no examples, different numbers of predictions and references, an example
            without references, or nothing but empty references.
    """
    edits = length = 0
    for prediction, accepted in _examples(predictions, references):
        distance, negative_length = min(
            (edit_distance(prediction, reference), -len(reference)) for reference in accepted
        )
        edits += distance
        length -= negative_length
    if length == 0:
        raise ValueError("All references are empty, so they have no error rate: check the data.")
    return edits / length


def sequence_error_rate(
    predictions: Iterable[Tokens], references: Iterable[Sequence[Tokens]]
) -> float:
    """Share of examples whose prediction equals none of its references.

    The word error rate where an example is a word to be pronounced.

    Args:
        predictions: one sequence an example.
        references: for each example, all sequences that count as right, at least one.

    Raises:
        ValueError: no examples, different numbers of predictions and references, or an example
            without references.
    """
    wrong = [
        all(list(prediction) != list(reference) for reference in accepted)
        for prediction, accepted in _examples(predictions, references)
    ]
    return sum(wrong) / len(wrong)


def perplexity(total_nats: float, tokens: float | int) -> float:
    """exp(total_nats / tokens), infinite where that overflows.

    Args:
        total_nats: summed negative natural log-probability of the targets.
        tokens: number of targets (their summed weight).

    Raises:
        ValueError: no tokens.
    """
    if tokens <= 0:
        raise ValueError(f"Perplexity over {tokens} tokens is undefined: score at least one.")
    try:
        return math.exp(total_nats / tokens)
    except OverflowError:
        return math.inf


def bits_per_byte(total_nats: float, bytes_scored: int) -> float:
    """total_nats / (ln 2 * bytes_scored), which compares models across tokenizers.

    Args:
        total_nats: summed negative natural log-probability of the targets.
        bytes_scored: length in UTF-8 bytes of the text that those targets spell.

    Raises:
        ValueError: no bytes.
    """
    if bytes_scored <= 0:
        raise ValueError(f"Bits per byte over {bytes_scored} bytes is undefined: score some text.")
    return total_nats / (math.log(2) * bytes_scored)


def _examples(
    predictions: Iterable[Tokens], references: Iterable[Sequence[Tokens]]
) -> list[tuple[Tokens, Sequence[Tokens]]]:
    predictions, references = list(predictions), list(references)
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} examples: give one for each."
        )
    if not predictions:
        raise ValueError("An error rate over no examples is undefined: give at least one.")
    for number, accepted in enumerate(references):
        if len(accepted) == 0:
            raise ValueError(f"Example {number} has no references: leave it out, or give one.")
    return list(zip(predictions, references, strict=True))
