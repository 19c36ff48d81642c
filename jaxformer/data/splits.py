"""Who belongs to train, dev and test: a stable hash, and the check that nothing is on two sides."""

import hashlib
from collections.abc import Iterable, Mapping

from jaxformer.config import DataConfig
from jaxformer.data.corpus import SPLITS, Example, OnBad, PairCorpus, Report, require_filled

EMPTY_SPLIT_FIX = (
    "give more data, raise data.dev_fraction or data.test_fraction, "
    "or name separate files with --data.dev-files and --data.test-files"
)

Line = tuple[str, str, str]
"""`file:line`, source, target."""


def fractions(config: DataConfig) -> tuple[float, float]:
    """Shares of `files` held out as dev and test: none where separate files are given."""
    return (
        0.0 if config.dev_files else config.dev_fraction,
        0.0 if config.test_files else config.test_fraction,
    )


def wanted_splits(config: DataConfig) -> list[str]:
    """The splits that must hold something."""
    dev, test = fractions(config)
    return (
        ["train"]
        + ["dev"] * bool(config.dev_files or dev)
        + ["test"] * bool(config.test_files or test)
    )


def hash_split(key: str, dev_fraction: float, test_fraction: float) -> str:
    """The split of a key: the same on every machine, in every run, whatever else is in the data."""
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < test_fraction:
        return "test"
    return "dev" if share < test_fraction + dev_fraction else "train"


def remove_leaks(
    keys: Mapping[str, dict[str, str]], report: Report, on_bad: OnBad, what: str
) -> None:
    """Sees to it that a key stands in one split alone.

    `keys[split][key]` is where the key was read. With `on_bad='skip'` the copy further from the
    test split is deleted, so that the held-out splits stay whole. Raises DataError.
    """
    for kept, cleaned in (("test", "train"), ("test", "dev"), ("dev", "train")):
        for key in [key for key in keys[cleaned] if key in keys[kept]]:
            report.reject(
                on_bad,
                keys[cleaned][key],
                f"{what} is in the {cleaned} and in the {kept} split",
                f"remove it from the {cleaned} files",
                detail=f"also at {keys[kept][key]}",
            )
            del keys[cleaned][key]


def split_pairs(
    lines: Mapping[str, Iterable[Line]], config: DataConfig, report: Report
) -> PairCorpus:
    """Merges lines of equal source into examples and gives each example its split.

    `lines['train']` comes from `config.files`, of which the shares for dev and test are taken by
    hash of the source; `lines['dev']` and `lines['test']` come from separate files, if any. Equal
    references of a source count once; their order is that of the lines. Raises DataError if a
    source is on two sides or a split is empty.
    """
    merged: dict[str, dict[str, dict[str, str]]] = {split: {} for split in SPLITS}
    dev_fraction, test_fraction = fractions(config)
    for named_split in SPLITS:
        for location, source, target in lines.get(named_split, ()):
            split = named_split
            if split == "train":
                split = hash_split(source, dev_fraction, test_fraction)
            references = merged[split].setdefault(source, {})
            if target in references:
                report.skip("repeated pair, kept once", location)
            references.setdefault(target, location)
    first = {
        split: {source: next(iter(refs.values())) for source, refs in sources.items()}
        for split, sources in merged.items()
    }
    remove_leaks(first, report, config.on_bad, "a source")
    splits = {
        split: tuple(
            Example(source, tuple(merged[split][source]), tuple(merged[split][source].values()))
            for source in sources
        )
        for split, sources in first.items()
    }
    require_filled(splits, wanted_splits(config), report, EMPTY_SPLIT_FIX)
    for split, examples in splits.items():
        report.count(split, "examples", len(examples))
        report.count(split, "references", sum(len(example.references) for example in examples))
    return PairCorpus(splits, report)
