"""Text: documents from files, or the running Python's own standard library."""

import sysconfig
from collections.abc import Iterable
from pathlib import Path

from jaxformer.config import DataConfig
from jaxformer.data.corpus import (
    SPLITS,
    DataError,
    Document,
    Report,
    TextCorpus,
    require_filled,
)
from jaxformer.data.files import find_files, read_text
from jaxformer.data.splits import (
    EMPTY_SPLIT_FIX,
    fractions,
    hash_split,
    remove_leaks,
    wanted_splits,
)

LIBRARY_LEFT_OUT = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "encodings",  # tables of code points
        "idlelib",  # often packaged apart from the rest
        "lib2to3",
        "pydoc_data",  # the language reference as string literals
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


def load_text(config: DataConfig) -> TextCorpus:
    """Documents, one a file; without `config.files`, those of the running Python's library.

    `split='hash'` gives each document the split of a stable hash of its text, so that equal files
    are on one side wherever they lie; `split='tail'` cuts every document into train, dev and test
    parts, in this order. Raises DataError on a missing or empty file, on invalid UTF-8, on a
    document that is in two splits, and on an empty split.
    """
    report = Report()
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    dev_fraction, test_fraction = fractions(config)
    train = _documents(config.files, "files", config, report) if config.files else _library(report)
    for document in train:
        split = "train"
        if config.split == "hash":
            split = hash_split(document.text, dev_fraction, test_fraction)
        documents[split].append(document)
    documents["dev"] += _documents(config.dev_files, "dev-files", config, report)
    documents["test"] += _documents(config.test_files, "test-files", config, report)

    names = {
        split: {document.text: document.name for document in items}
        for split, items in documents.items()
    }
    remove_leaks(names, report, config.on_bad, "a document")
    for split, items in documents.items():
        documents[split] = [document for document in items if document.text in names[split]]
    if config.split == "tail":
        whole, documents["train"] = documents["train"], []
        for document in whole:
            for split, part in _tail(document, dev_fraction, test_fraction).items():
                documents[split].append(part)
    splits = {split: tuple(items) for split, items in documents.items()}
    fix = EMPTY_SPLIT_FIX + ", or cut every text with --data.split tail"
    require_filled(splits, wanted_splits(config), report, fix)
    for split, items in splits.items():
        report.count(split, "documents", len(items))
        report.count(split, "characters", sum(len(document.text) for document in items))
    return TextCorpus(splits, report)


def _documents(
    patterns: tuple[str, ...], option: str, config: DataConfig, report: Report
) -> Iterable[Document]:
    for path in find_files(patterns, option, report):
        text = read_text(path, report, config.on_bad)
        if text is not None:
            yield Document(str(path), text)


def _library(report: Report) -> Iterable[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if LIBRARY_LEFT_OUT.isdisjoint(path.parts[len(root.parts) :])
    )
    if not paths:
        raise DataError(
            f"this Python has no library source under {root}. Fix: name files with --data.files"
        )
    for path in paths:
        # Nobody can mend the library, so what is empty or not UTF-8 in it is counted, not refused.
        text = read_text(path, report, "skip")
        if text is not None:
            yield Document(path.relative_to(root).as_posix(), text)


def _tail(document: Document, dev_fraction: float, test_fraction: float) -> dict[str, Document]:
    size = len(document.text)
    # Rounded, as 1 - 0.05 - 0.05 is a little less than 0.9 in floating point.
    first = int(size * round(1 - dev_fraction - test_fraction, 12))
    second = int(size * round(1 - test_fraction, 12))
    parts = {"train": (0, first), "dev": (first, second), "test": (second, size)}
    return {
        split: Document(f"{document.name}[{start}:{end}]", document.text[start:end])
        for split, (start, end) in parts.items()
        if start < end
    }
