"""Tokenizers: bytes, characters, white-space words, byte-level BPE; text to ids and back.

In all of them pad is 0, sos 1, eos 2 and unk 3, so a batch can be read without knowing which one
made it. `encode` adds no special token: the one place that does is the packing of documents and
the batching of pairs.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers

from jaxformer.config import DataConfig, TokenizerName
from jaxformer.data.corpus import Corpus, DataError, LineCorpus, TextCorpus

PAD, SOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<sos>", "<eos>", "<unk>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(ABC):
    """Text to ids and back; `len` is the vocabulary size V, specials included.

    `decode` leaves out pad, sos and eos, and shows an unknown as U+FFFD (`<unk>` between words).
    """

    kind: TokenizerName

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text, int32[length], without special tokens."""

    @abstractmethod
    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of ids, without pad, sos and eos."""

    @abstractmethod
    def _values(self) -> dict[str, Any]:
        """What `load` needs, as JSON values."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_array(text).tolist()

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_array` of each text."""
        return [self.encode_array(text) for text in texts]

    def save(self, path: Path) -> None:
        """Writes the tokenizer, whole, as one JSON file."""
        values = {"kind": self.kind, **self._values()}
        Path(path).write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values() == other._values()  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]


class ByteTokenizer(Tokenizer):
    """The bytes of the UTF-8 form: any text, 260 ids, nothing to train, never an unknown."""

    kind: TokenizerName = "byte"

    def __len__(self) -> int:
        return len(SPECIALS) + 256

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + len(SPECIALS)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        unknown = REPLACEMENT.encode("utf-8")
        pieces = (
            bytes([token - len(SPECIALS)]) if token >= len(SPECIALS) else unknown
            for token in map(int, ids)
            if token >= UNK
        )
        return b"".join(pieces).decode("utf-8", errors="replace")

    def _values(self) -> dict[str, Any]:
        return {}


class CharacterTokenizer(Tokenizer):
    """One id a character of the training text (`alphabet`, sorted); others are unknown."""

    kind: TokenizerName = "character"

    def __init__(self, alphabet: Iterable[str]):
        self.alphabet = sorted(set(alphabet))
        self._codes = np.array([ord(character) for character in self.alphabet], np.uint32)

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        """The tokenizer of the characters that occur in the texts."""
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return cls(alphabet)

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.alphabet)

    def encode_array(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        if not self.alphabet:
            return np.full(len(codes), UNK, np.int32)
        places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        ids = np.where(self._codes[places] == codes, places + len(SPECIALS), UNK)
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        pieces = (REPLACEMENT, *self.alphabet)
        return "".join(pieces[token - UNK] for token in map(int, ids) if token >= UNK)

    def _values(self) -> dict[str, Any]:
        return {"alphabet": self.alphabet}


class WordTokenizer(Tokenizer):
    """One id a white-space separated word of the training text (sorted); others are unknown.

    `decode` puts one space between words.
    """

    kind: TokenizerName = "word"

    def __init__(self, words: Iterable[str]):
        self.words = sorted(set(words))
        self._ids = {word: place + len(SPECIALS) for place, word in enumerate(self.words)}

    @classmethod
    def train(cls, texts: Iterable[str]) -> "WordTokenizer":
        """The tokenizer of the words that occur in the texts."""
        words: set[str] = set()
        for text in texts:
            words.update(text.split())
        return cls(words)

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.words)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNK) for word in text.split()]

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        pieces = (SPECIALS[UNK], *self.words)
        return " ".join(pieces[token - UNK] for token in map(int, ids) if token >= UNK)

    def _values(self) -> dict[str, Any]:
        return {"words": self.words}


class BPETokenizer(Tokenizer):
    """Byte-pair encoding over bytes (Sennrich et al. 2016; GPT-2's pre-tokenisation).

    Any text can be encoded and comes back exactly. The library's model knows no special token:
    its ids are shifted past ours, so a text that spells `<eos>` is text and nothing else.
    """

    kind: TokenizerName = "bpe"

    def __init__(self, model: tokenizers.Tokenizer):
        self._model = model

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> "BPETokenizer":
        """Learns merges until there are `vocabulary_size` ids, the four specials included.

        Raises DataError if that leaves no room for the 256 bytes.
        """
        smallest = len(SPECIALS) + 256
        if vocabulary_size < smallest:
            raise DataError(
                f"data.vocabulary_size={vocabulary_size} has no room for the 256 bytes and "
                f"{len(SPECIALS)} special tokens. Fix: at least {smallest}, or a byte tokenizer"
            )
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary_size - len(SPECIALS),
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model)

    def __len__(self) -> int:
        return len(SPECIALS) + self._model.get_vocab_size()

    def encode_array(self, text: str) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(texts)
        return [np.array(encoding.ids, np.int32) + len(SPECIALS) for encoding in encodings]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        pieces: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if token >= len(SPECIALS):
                run.append(token - len(SPECIALS))
            elif token == UNK:
                pieces += [self._model.decode(run), REPLACEMENT]
                run = []
        return "".join([*pieces, self._model.decode(run)])

    def _values(self) -> dict[str, Any]:
        return {"model": json.loads(self._model.to_str())}


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote. Raises DataError if the file is missing or not that."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = values["kind"]
        if kind == "byte":
            return ByteTokenizer()
        if kind == "character":
            return CharacterTokenizer(values["alphabet"])
        if kind == "word":
            return WordTokenizer(values["words"])
        if kind == "bpe":
            return BPETokenizer(tokenizers.Tokenizer.from_str(json.dumps(values["model"])))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Fix: is this a run folder?") from None
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise DataError(f"{path} is not a saved tokenizer ({error!r})") from error
    raise DataError(f"{path}: unknown kind of tokenizer {kind!r}")


def train_tokenizer(kind: TokenizerName, texts: Sequence[str], vocabulary_size: int) -> Tokenizer:
    """Trains a tokenizer; the same texts give the same tokenizer. Raises DataError."""
    if kind == "byte":
        return ByteTokenizer()
    if kind == "character":
        return CharacterTokenizer.train(texts)
    if kind == "word":
        return WordTokenizer.train(texts)
    return BPETokenizer.train(texts, vocabulary_size)


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of a run: `source` may equal `target`; None for text and for images."""

    source: Tokenizer | None
    target: Tokenizer

    def save(self, folder: Path) -> None:
        """Writes `source.json` (pairs only) and `target.json` into a folder, made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.target.save(folder / "target.json")
        if self.source is not None:
            self.source.save(folder / "source.json")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizers":
        """Reads what `save` wrote. Raises DataError."""
        source = Path(folder) / "source.json"
        return cls(
            load_tokenizer(source) if source.exists() else None,
            load_tokenizer(Path(folder) / "target.json"),
        )


def build_tokenizers(corpus: Corpus, config: DataConfig) -> Tokenizers:
    """Trains the tokenizers that a configuration asks for, on the train split alone.

    Raises DataError if one vocabulary is asked of two kinds of tokenizer.
    """
    size = config.vocabulary_size
    if isinstance(corpus, TextCorpus):
        texts = [document.text for document in corpus.splits["train"]]
        return Tokenizers(None, train_tokenizer(config.tokenizer, texts, size))
    if isinstance(corpus, LineCorpus):
        # All ten, whichever digits were drawn: the ids never change their meaning.
        return Tokenizers(None, WordTokenizer("0123456789"))
    source_kind, target_kind = config.tokenizer, config.target_tokenizer
    if config.kind == "pronunciation":
        source_kind, target_kind = "character", "word"
    sources = [example.source for example in corpus.splits["train"]]
    targets = [target for example in corpus.splits["train"] for target in example.references]
    if config.shared_vocabulary:
        if source_kind != target_kind:
            raise DataError(
                f"data.shared_vocabulary needs one kind of tokenizer, not {source_kind!r} for the "
                f"source and {target_kind!r} for the target. Fix: make data.tokenizer and "
                "data.target_tokenizer equal (kind='pairs'), or drop data.shared_vocabulary"
            )
        shared = train_tokenizer(source_kind, sources + targets, size)
        return Tokenizers(shared, shared)
    return Tokenizers(
        train_tokenizer(source_kind, sources, size), train_tokenizer(target_kind, targets, size)
    )
