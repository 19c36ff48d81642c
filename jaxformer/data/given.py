"""Batches of lines that somebody gives: sources to decode, texts and targets to score."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxformer.config import DataConfig
from jaxformer.data.bucketing import PairBatches
from jaxformer.data.corpus import DataError, Example, Report
from jaxformer.data.encoding import encode_examples
from jaxformer.data.images import HEIGHT, Images
from jaxformer.data.lengths import choose_shapes
from jaxformer.data.pipeline import OnePass
from jaxformer.data.plan import Batch
from jaxformer.data.pronunciation import normalise_word
from jaxformer.data.ragged import Ragged
from jaxformer.data.tokenizers import EOS, PAD, SOS, Tokenizers

SMALLEST_WIDTH = 8


Source = str | np.ndarray
"""A text or, where the data are images, one uint8[columns, height]."""


def source_batches(
    sources: Sequence[Source], tokenizers: Tokenizers, config: DataConfig, *, batch_size: int
) -> list[Batch]:
    """Batches of sources alone, to decode: any text or image, seen in training or not.

    Each has `source`, `source_segment_ids` int32[B, S] and `index` int32[B], the place in
    `sources`, -1 in an empty row; images are float32[B, S, height] as `PairBatches` has them.
    Sources of like length go together. So that few shapes are compiled, S is a power of two (or the
    longest allowed), and B is `batch_size`, or the power of two that holds all sources if there are
    fewer. Raises DataError on an empty source, on one longer than the model takes, and on a text
    where the data are images, or the other way round.
    """
    if not sources:
        return []
    if config.kind == "digits":
        ragged: Ragged = _joined(sources, config.max_source_length)
    else:
        ragged = _encoded(sources, tokenizers, config)
    limit = config.max_source_length
    rows = min(batch_size, _power_of_two(len(ragged)))
    order = np.argsort(ragged.lengths, kind="stable")
    order = np.concatenate([order, np.full(-len(order) % rows, -1)])
    batches = []
    for index in order.reshape(-1, rows):
        longest = int(ragged.lengths[index[index >= 0]].max())
        width = min(max(_power_of_two(longest), SMALLEST_WIDTH), limit)
        source, real = ragged.gather(index, width)
        batches.append(
            {
                "source": source,
                "source_segment_ids": real.astype(np.int32),
                "index": index.astype(np.int32),
            }
        )
    return batches


def _encoded(sources: Sequence[Source], tokenizers: Tokenizers, config: DataConfig) -> Ragged:
    """Texts as ids, checked."""
    if tokenizers.source is None:
        raise ValueError("a language model has no sources to decode")
    limit = config.max_source_length
    sequences = []
    for number, text in enumerate(sources, start=1):
        if not isinstance(text, str):
            raise DataError(f"source {number} is an image. Fix: give text, as in training")
        normal = normal_source(text, config)
        if not normal:
            raise DataError(f"source {number} is empty. Fix: remove the line")
        try:
            sequence = tokenizers.source.encode_array(normal)
        except UnicodeEncodeError:
            fix = "Fix: read the sources as UTF-8"
            raise DataError(f"source {number} is not valid Unicode: {text[:40]!r}. {fix}") from None
        if len(sequence) + 1 > limit:
            raise DataError(
                f"source {number} has {len(sequence) + 1} tokens, <eos> included; the model takes "
                f"{limit}. Fix: shorten {text[:40]!r}"
            )
        sequences.append(sequence)
    return Ragged.build(sequences, len(tokenizers.source), last=EOS)


def _joined(sources: Sequence[Source], limit: int) -> Images:
    """Images, checked."""
    images = []
    for number, image in enumerate(sources, start=1):
        if isinstance(image, str):
            raise DataError(f"source {number} is text. Fix: give images, as in training")
        if image.ndim != 2 or image.shape[1] != HEIGHT or image.dtype != np.uint8:
            raise ValueError(f"an image is uint8[columns, {HEIGHT}], not {image.shape}")
        if not 0 < len(image) <= limit:
            raise DataError(
                f"source {number} is {len(image)} pixels wide at a height of {HEIGHT}; the model "
                f"takes 1 to {limit}. Fix: cut the picture to one line, or into shorter ones"
            )
        images.append(image)
    return Images.join(images)


def pair_batches(
    lines: Sequence[str], tokenizers: Tokenizers, config: DataConfig, *, batch_size: int
) -> Sequence[Batch]:
    """Batches of lines `source<TAB>target`, as `evaluation_batches` gives: `index` is the line.

    Raises DataError on a line without a tab, an empty side, or one longer than the model takes, and
    where the sources are images.
    """
    if config.kind == "digits":
        raise DataError(
            "the sources of this run are images, which no line of text holds. "
            "Fix: `jaxformer evaluate` scores its splits, `jaxformer predict` reads pictures"
        )
    if tokenizers.source is None:
        raise ValueError("a language model has no pairs to score")
    examples = []
    for number, line in enumerate(lines, start=1):
        source, tab, target = line.partition("\t")
        source, target = normal_source(source, config), target.strip()
        if not (tab and source and target):
            raise DataError(f"line {number} is not source<TAB>target: {line[:60]!r}")
        examples.append(Example(source, (target,), (f"line {number}",)))
    if not examples:
        return []
    strict = dataclasses.replace(config, on_bad="error")
    split = encode_examples(tuple(examples), tokenizers.source, tokenizers.target, strict, Report())
    limits = (config.max_source_length, config.max_target_length)
    shapes = choose_shapes(*split.item_lengths, config.buckets, limits)
    split = dataclasses.replace(split, shapes=shapes)
    rows = min(batch_size, _power_of_two(len(examples)))
    return OnePass(PairBatches(split, rows, seed=0, with_index=True))


def text_batches(
    lines: Sequence[str], tokenizers: Tokenizers, *, longest: int, batch_size: int
) -> list[Batch]:
    """Batches of texts, one a row, each with <sos> before and <eos> as its last target.

    Each has `inputs`, `targets` int32[B, T], `weights` float32[B, T], and `index` int32[B], the
    place in `lines`, -1 in an empty row. Raises DataError on a text of more than `longest` tokens,
    <sos> included.
    """
    sequences = [tokenizers.target.encode_array(line) for line in lines]
    for number, (sequence, line) in enumerate(zip(sequences, lines, strict=True), start=1):
        if len(sequence) + 1 > longest:
            raise DataError(
                f"line {number} has {len(sequence) + 1} tokens, <sos> included; the model takes "
                f"{longest}. Fix: shorten {line[:40]!r}"
            )
    rows = min(batch_size, _power_of_two(len(lines))) if lines else 0
    batches = []
    for first in range(0, len(lines), max(rows, 1)):
        part = sequences[first : first + rows]
        width = _width(max(len(sequence) for sequence in part) + 1, longest)
        inputs = np.full((rows, width), PAD, np.int32)
        targets, weights = inputs.copy(), np.zeros((rows, width), np.float32)
        for row, sequence in enumerate(part):
            end = len(sequence)
            inputs[row, : end + 1] = [SOS, *sequence]
            targets[row, : end + 1] = [*sequence, EOS]
            weights[row, : end + 1] = 1
        index = np.full(rows, -1, np.int32)
        index[: len(part)] = np.arange(first, first + len(part))
        batches.append({"inputs": inputs, "targets": targets, "weights": weights, "index": index})
    return batches


def normal_source(source: str, config: DataConfig) -> str:
    """A source as the corpus would have it: trimmed, words to be pronounced in lower case."""
    return normalise_word(source) if config.kind == "pronunciation" else source.strip()


def _width(longest: int, limit: int) -> int:
    """A power of two that holds the longest row, so that few shapes are compiled."""
    return int(min(max(_power_of_two(longest), SMALLEST_WIDTH), limit))


def _power_of_two(number: int) -> int:
    return 1 << (int(number) - 1).bit_length()
