import random

import pytest

from jaxformer.config import DataConfig
from jaxformer.data import build_tokenizers, encode_corpus, load_corpus


@pytest.fixture
def write(tmp_path):
    """Writes bytes or text to a file in the test's own folder and returns its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return write_file


@pytest.fixture
def make_pairs(write):
    """Encoded pairs, 90/5/5 by hash, some with two references: (config, tokenizers, data)."""

    def make(count=400, **options):
        generator = random.Random(0)
        lines = []
        for number in range(count):
            source = f"{number:x}" + "s" * generator.randrange(20)
            for letter in "ab"[: 1 + number % 2]:
                lines.append(f"{source}\t" + " ".join(letter * generator.randrange(1, 16)))
        path = write("pairs.tsv", "\n".join(lines) + "\n")
        options = {"tokenizer": "character", "dev_fraction": 0.1, "test_fraction": 0.1} | options
        config = DataConfig(kind="pairs", files=(path,), **options)
        corpus = load_corpus(config)
        tokenizers = build_tokenizers(corpus, config)
        return config, tokenizers, encode_corpus(corpus, tokenizers, config)

    return make


@pytest.fixture
def make_text(write):
    """Encoded documents of given sizes: (config, tokenizers, data)."""

    def make(sizes=(1, 5, 40, 100, 3, 77), **options):
        names = [
            write(f"text/{number}.txt", "".join(chr(97 + (number + i) % 26) for i in range(size)))
            for number, size in enumerate(sizes)
        ]
        options = {"length": 16, "dev_fraction": 0.0, "test_fraction": 0.0} | options
        config = DataConfig(kind="text", files=tuple(names), **options)
        corpus = load_corpus(config)
        tokenizers = build_tokenizers(corpus, config)
        return config, tokenizers, encode_corpus(corpus, tokenizers, config)

    return make
