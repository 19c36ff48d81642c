"""Pairs: TSV files, a line a pair, source<TAB>target."""

from collections.abc import Iterator
from pathlib import Path

from jaxformer.config import DataConfig
from jaxformer.data.corpus import PairCorpus, Report
from jaxformer.data.files import find_files, read_lines
from jaxformer.data.splits import Line, split_pairs


def load_pairs(config: DataConfig) -> PairCorpus:
    """Pairs as examples; lines of equal source are references of one example.

    White space around source and target is removed. `config.dev_files` and `config.test_files`
    are separate splits; where they are not given, sources are split by a stable hash. Raises
    DataError on a missing or empty file, invalid UTF-8, a line without a tab or with several, an
    empty side, and a source that is in two splits.
    """
    report = Report()
    files = {
        "train": find_files(config.files, "files", report),
        "dev": find_files(config.dev_files, "dev-files", report),
        "test": find_files(config.test_files, "test-files", report),
    }
    lines = {
        split: (line for path in paths for line in _pairs(path, config, report))
        for split, paths in files.items()
    }
    return split_pairs(lines, config, report)


def _pairs(path: Path, config: DataConfig, report: Report) -> Iterator[Line]:
    for location, line in read_lines(path, report, config.on_bad):
        sides = [side.strip() for side in line.split("\t")]
        if len(sides) != 2:
            reason = "no tab in the line" if len(sides) == 1 else "more than one tab in the line"
            fix = "write source<TAB>target, with one tab between them"
            report.reject(config.on_bad, location, reason, fix)
        elif not all(sides):
            side = "target" if sides[0] else "source"
            fix = f"write the {side}, or remove the line"
            report.reject(config.on_bad, location, f"empty {side}", fix)
        else:
            yield location, sides[0], sides[1]
