"""Shapes of CTC in real models, by name; tests run them in small.

Frames a second, classes and labels are those of the published models, for utterances as long as
such data has; batches are what one device holds.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One ctc_loss call of a real model.

    Attributes:
        B, T, V, N: sizes of the axes.
    """

    B: int
    T: int
    V: int
    N: int

    def scaled(self, B: int, T: int, V: int, N: int) -> "Shape":
        """The same kind of call in small, for tests: sizes of at most these."""
        return Shape(min(self.B, B), min(self.T, T), min(self.V, V), min(self.N, N))


SHAPES = {
    "phonemes": Shape(8, 400, 100, 50),
    "word_pieces": Shape(8, 400, 1000, 100),
    "characters": Shape(16, 400, 64, 60),
    # arXiv:1512.02595: 20 ms frames, half a minute of speech
    "deep_speech_2": Shape(32, 1500, 29, 400),
    # arXiv:2006.11477, its letters; 16 s
    "wav2vec2": Shape(16, 800, 32, 250),
    # arXiv:2005.08100 with CTC alone: 40 ms frames and word pieces
    "conformer": Shape(64, 400, 1024, 80),
    "spelling": Shape(256, 48, 43, 20),
    "digits": Shape(64, 120, 11, 12),
    "odd": Shape(9, 203, 17, 128),
    "one_frame": Shape(1, 1, 2, 1),
}
