"""Shapes of the output projection in real models, by name; tests run them in small.

Widths, vocabularies and soft caps are those of the published configurations. Tokens are what one
device holds in training.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One linear_cross_entropy call of a real model.

    Attributes:
        tokens, D, V: sizes.
        transposed: whether w is [V, D], the tied embedding.
        softcap, label_smoothing, z_loss: as in `linear_cross_entropy`.
    """

    tokens: int
    D: int
    V: int
    transposed: bool = False
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def scaled(self, tokens: int, D: int, V: int) -> "Shape":
        """The same kind of call in small, for tests: sizes of at most these, V odd if it was."""
        if self.V > V:
            V += (self.V - V) % 2
        return dataclasses.replace(
            self, tokens=min(self.tokens, tokens), D=min(self.D, D), V=min(self.V, V)
        )


SHAPES = {
    # arXiv:2407.21783
    "llama3_8b": Shape(16384, 4096, 128256),
    # arXiv:2307.09288
    "llama2_7b": Shape(16384, 4096, 32000),
    # arXiv:2408.00118
    "gemma2_9b": Shape(8192, 3584, 256000, transposed=True, softcap=30.0),
    # Radford et al. 2019
    "gpt2": Shape(16384, 768, 50257, transposed=True),
    # arXiv:2204.02311, with its z-loss
    "palm_8b": Shape(8192, 4096, 256000, transposed=True, z_loss=1e-4),
    # arXiv:1706.03762, base, with its label smoothing
    "vaswani_base": Shape(25000, 512, 37000, transposed=True, label_smoothing=0.1),
    "characters": Shape(768, 128, 65, transposed=True),
    "phonemes": Shape(1536, 128, 43, transposed=True, label_smoothing=0.05),
    "one_token": Shape(1, 8, 2),
    "odd": Shape(1001, 72, 1003, softcap=5.0, label_smoothing=0.1, z_loss=1e-3),
}
