"""A corpus as token ids: flat arrays with offsets, checked for length, counted for the report."""

import dataclasses
import hashlib
from dataclasses import dataclass, field

import numpy as np

from jaxformer.config import DataConfig
from jaxformer.data.corpus import (
    SPLITS,
    Corpus,
    Document,
    Example,
    LineCorpus,
    PairCorpus,
    Report,
    TextCorpus,
    require_filled,
)
from jaxformer.data.images import Images
from jaxformer.data.lengths import Shape, choose_shapes, cover, padding_share
from jaxformer.data.ragged import Ragged
from jaxformer.data.splits import wanted_splits
from jaxformer.data.tokenizers import EOS, SOS, UNK, Tokenizer, Tokenizers


@dataclass(frozen=True)
class Stream:
    """The documents of a split, end to end, each behind one sos.

    `documents` holds sos + text a document; `bytes` is the UTF-8 size of the texts, which turns a
    loss into bits per byte.
    """

    documents: Ragged
    names: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class TextData:
    """Encoded documents by split."""

    splits: dict[str, Stream]
    report: Report

    @property
    def filled(self) -> tuple[str, ...]:
        """The splits that hold something."""
        return tuple(name for name, stream in self.splits.items() if len(stream.documents))

    def fingerprint(self) -> str:
        """A hash of what is trained on: equal data gives equal batches."""
        documents = self.splits["train"].documents
        return _hash(documents.tokens, documents.lengths)


@dataclass(frozen=True)
class PairSplit:
    """The pairs of a split, one item a (source, reference).

    `sources` has one sequence an example and `targets` one an item, each ending in eos (but an
    image, which has no such column); `item_example[item]` is the item's example in `examples`.
    `shapes` are the (S, T) of batches.
    """

    examples: tuple[Example, ...]
    sources: Ragged
    targets: Ragged
    item_example: np.ndarray
    shapes: tuple[Shape, ...] = field(default=())

    def source(self, example: int) -> str | np.ndarray:
        """The source of an example as it was read: a text, or an image uint8[columns, height]."""
        if isinstance(self.sources, Images):
            return self.sources[example]
        return self.examples[example].source

    @property
    def item_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Source and target length of every item, eos included, int64[items] each."""
        return self.sources.lengths[self.item_example], self.targets.lengths


@dataclass(frozen=True)
class PairData:
    """Encoded pairs by split."""

    splits: dict[str, PairSplit]
    report: Report

    @property
    def filled(self) -> tuple[str, ...]:
        """The splits that hold something."""
        return tuple(name for name, split in self.splits.items() if split.examples)

    def fingerprint(self) -> str:
        """A hash of what is trained on: equal data gives equal batches."""
        train = self.splits["train"]
        sequences = (train.sources, train.targets)
        parts = [part for ragged in sequences for part in (ragged.tokens, ragged.lengths)]
        return _hash(*parts, train.item_example)


Data = TextData | PairData


def encode_corpus(corpus: Corpus, tokenizers: Tokenizers, config: DataConfig) -> Data:
    """Turns a corpus into ids and completes its report (tokens, unknown tokens, padding).

    Raises DataError on a source or target that is longer than the model takes, and if nothing of a
    split remains.
    """
    if isinstance(corpus, TextCorpus):
        return _encode_text(corpus, tokenizers.target)
    if isinstance(corpus, LineCorpus):
        return _encode_lines(corpus, tokenizers.target, config)
    if tokenizers.source is None:
        raise ValueError("pairs need a source tokenizer")
    return _encode_pairs(corpus, tokenizers.source, tokenizers.target, config)


def _encode_text(corpus: TextCorpus, tokenizer: Tokenizer) -> TextData:
    report = corpus.report.copy()
    splits = {}
    for split in SPLITS:
        documents = corpus.splits[split]
        splits[split] = stream = _stream(documents, tokenizer)
        report.count(split, "tokens", len(stream.documents.tokens))
        if split != "train":
            report.count(split, "unknown tokens", stream.documents.count(UNK))
    return TextData(splits, report)


def _stream(documents: tuple[Document, ...], tokenizer: Tokenizer) -> Stream:
    sequences = tokenizer.encode_all([document.text for document in documents])
    size = sum(len(document.text.encode("utf-8")) for document in documents)
    names = tuple(document.name for document in documents)
    return Stream(Ragged.build(sequences, len(tokenizer), first=SOS), names, size)


def _encode_pairs(
    corpus: PairCorpus, source: Tokenizer, target: Tokenizer, config: DataConfig
) -> PairData:
    report = corpus.report.copy()
    splits = {}
    for split in SPLITS:
        splits[split] = encoded = encode_examples(
            corpus.splits[split], source, target, config, report
        )
        report.count(split, "source tokens", len(encoded.sources.tokens))
        report.count(split, "target tokens", len(encoded.targets.tokens))
        if split != "train":
            report.count(split, "unknown source tokens", encoded.sources.count(UNK))
            report.count(split, "unknown target tokens", encoded.targets.count(UNK))
    require_filled(
        {split: encoded.examples for split, encoded in splits.items()},
        wanted_splits(config),
        report,
        "give shorter examples, or raise data.max_source_length and data.max_target_length",
    )
    return _in_shapes(splits, config, report)


def _encode_lines(corpus: LineCorpus, target: Tokenizer, config: DataConfig) -> PairData:
    report = corpus.report.copy()
    splits = {}
    for split in SPLITS:
        examples = corpus.splits[split]
        targets = target.encode_all([example.references[0] for example in examples])
        splits[split] = encoded = PairSplit(
            examples,
            Images.join(corpus.images[split]),
            Ragged.build(targets, len(target), last=EOS),
            np.arange(len(examples)),
        )
        report.count(split, "columns of pixels", len(encoded.sources.tokens))
        report.count(split, "target tokens", len(encoded.targets.tokens))
    return _in_shapes(splits, config, report)


def _in_shapes(splits: dict[str, PairSplit], config: DataConfig, report: Report) -> PairData:
    """The splits with the shapes of their batches, chosen for the train split."""
    limits = (config.max_source_length, config.max_target_length)
    shapes = choose_shapes(*splits["train"].item_lengths, config.buckets, limits)
    share = padding_share(*splits["train"].item_lengths, shapes)
    report.notes.append(
        "batch shapes (source x target): "
        + ", ".join(f"{s} x {t}" for s, t in shapes)
        + f"; {share:.1%} of the train tokens are padding"
    )
    shaped = {
        split: dataclasses.replace(encoded, shapes=cover(shapes, *encoded.item_lengths, limits))
        for split, encoded in splits.items()
    }
    return PairData(shaped, report)


def encode_examples(
    examples: tuple[Example, ...],
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    config: DataConfig,
    report: Report,
) -> PairSplit:
    """Examples as ids; what is too long is an error or counted, as `config.on_bad` says."""
    encoded_sources = source_tokenizer.encode_all([example.source for example in examples])
    encoded_targets = iter(
        target_tokenizer.encode_all([text for example in examples for text in example.references])
    )
    kept: list[Example] = []
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    item_example: list[int] = []
    for example, source in zip(examples, encoded_sources, strict=True):
        own_targets = [next(encoded_targets) for _ in example.references]
        if not _fits(source, "source", example.location(), config, report):
            continue
        fitting = [
            number
            for number, target in enumerate(own_targets)
            if _fits(target, "target", example.location(number), config, report)
        ]
        if fitting:
            targets += [own_targets[number] for number in fitting]
            item_example += [len(kept)] * len(fitting)
            sources.append(source)
            kept.append(
                Example(
                    example.source,
                    tuple(example.references[number] for number in fitting),
                    tuple(example.location(number) for number in fitting),
                )
            )
    return PairSplit(
        tuple(kept),
        Ragged.build(sources, len(source_tokenizer), last=EOS),
        Ragged.build(targets, len(target_tokenizer), last=EOS),
        np.array(item_example, np.int64),
    )


def _fits(
    sequence: np.ndarray, side: str, location: str, config: DataConfig, report: Report
) -> bool:
    limit = config.max_source_length if side == "source" else config.max_target_length
    length = len(sequence) + 1
    if length <= limit:
        return True
    report.reject(
        config.on_bad,
        location,
        f"{side} longer than data.max_{side}_length={limit}",
        f"shorten it, or raise data.max_{side}_length (and model.max_length, if that is less)",
        detail=f"{length} tokens, <eos> included",
    )
    return False


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        # Ids in one width, whatever they are stored in; pixels, which are many, as they are.
        kind = np.uint8 if array.dtype == np.uint8 else np.int64
        digest.update(np.ascontiguousarray(array, kind).tobytes())
    return digest.hexdigest()[:16]
