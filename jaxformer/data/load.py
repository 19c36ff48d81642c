"""From a configuration to a corpus."""

from jaxformer.config import DataConfig
from jaxformer.data.corpus import Corpus
from jaxformer.data.digits import load_digits_lines
from jaxformer.data.pairs import load_pairs
from jaxformer.data.pronunciation import load_pronunciation
from jaxformer.data.text import load_text


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the data and splits it into train, dev and test.

    A TextCorpus for text, a LineCorpus for digits, a PairCorpus for pronunciation and pairs; its
    `report` counts what was read and what was left out. Raises DataError, which names the file,
    the line and the fix.
    """
    if config.kind == "text":
        return load_text(config)
    if config.kind == "digits":
        return load_digits_lines(config)
    if config.kind == "pairs":
        return load_pairs(config)
    return load_pronunciation(config)
