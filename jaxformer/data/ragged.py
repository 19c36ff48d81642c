"""Sequences of differing length, as one flat array with offsets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxformer.data.tokenizers import PAD


@dataclass(frozen=True)
class Ragged:
    """Sequences of differing length in one array: sequence i is tokens[offsets[i]:offsets[i+1]]."""

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def build(
        cls,
        sequences: Sequence[np.ndarray],
        vocabulary: int,
        *,
        first: int | None = None,
        last: int | None = None,
    ) -> "Ragged":
        """Joins sequences, in two bytes a token where the vocabulary allows it.

        Each gets `first` before it and `last` behind it: no other place adds special tokens.
        """
        before, behind = int(first is not None), int(last is not None)
        lengths = [len(sequence) + before + behind for sequence in sequences]
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        tokens = np.empty(offsets[-1], np.uint16 if vocabulary <= 2**16 else np.int32)
        for sequence, start, end in zip(sequences, offsets[:-1], offsets[1:], strict=True):
            tokens[start + before : end - behind] = sequence
        if first is not None:
            tokens[offsets[:-1]] = first
        if last is not None:
            tokens[offsets[1:] - 1] = last
        return cls(tokens, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64[len(self)]."""
        return np.diff(self.offsets)

    def count(self, token: int) -> int:
        """How often a token occurs."""
        return int((self.tokens == token).sum())

    def gather(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences `rows` side by side; a row of -1 is empty.

        Returns ids int32[len(rows), width], padded with 0, and where they are real, bool of the
        same shape.
        """
        places, real = self.places(rows, width)
        return np.where(real, self.tokens[places], PAD).astype(np.int32), real

    def places(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in `tokens` the sequences `rows` stand, int64[len(rows), width].

        And which of these places are real, bool of the same shape; the others are 0.
        """
        present = rows >= 0
        safe = np.where(present, rows, 0)
        starts = self.offsets[safe]
        lengths = np.where(present, self.offsets[safe + 1] - starts, 0)
        columns = np.arange(width)
        real = columns < lengths[:, None]
        return np.where(real, starts[:, None] + columns, 0), real
