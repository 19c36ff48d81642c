"""Shapes of attention in real models, by name; tests run them scaled down, benchmarks as they are.

Head counts, head dims and options are those of the published configurations. Batch and length are
what one device holds in training or decoding.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention call of a real model.

    Attributes:
        B, T, S, N, K, H: sizes of the axes; Hv = H.
        causal, window, softcap, sinks: as in `attention`.
        bias: whether there is one, [1, N, T, S].
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False

    def scaled(self, length: int, heads: int, head_dim: int) -> "Shape":
        """The same kind of call in small, for tests.

        Args:
            length: the longer of T and S becomes at most this; their ratio and the window's share
                of the length stay, roughly.
            heads: at most so many key-value heads, and at most so many query heads for each.
            head_dim: at most so large.
        """
        factor = max(self.T, self.S) / length
        if factor <= 1:
            factor = 1

        def shrink(size):
            return None if size is None else max(1, int(size / factor)) if size else 0

        K = min(self.K, heads)
        window = None if self.window is None else tuple(map(shrink, self.window))
        return dataclasses.replace(
            self,
            B=min(self.B, 2),
            T=shrink(self.T),
            S=shrink(self.S),
            N=K * min(self.N // self.K, heads),
            K=K,
            H=min(self.H, head_dim),
            window=window,
        )


SHAPES = {
    # arXiv:2307.09288
    "llama2_7b": Shape(4, 4096, 4096, 32, 32, 128),
    "llama2_70b": Shape(2, 4096, 4096, 64, 8, 128),
    # arXiv:2407.21783
    "llama3_8b": Shape(2, 8192, 8192, 32, 8, 128),
    "llama3_8b_decode": Shape(16, 1, 8192, 32, 8, 128),
    # arXiv:2408.00118; 9B: every other layer sees 4096 tokens back
    "gemma2_9b_global": Shape(1, 8192, 8192, 16, 8, 256, softcap=50.0),
    "gemma2_9b_local": Shape(1, 8192, 8192, 16, 8, 256, window=(4095, 0), softcap=50.0),
    # arXiv:2508.10925; every other layer sees 128 tokens
    "gpt_oss_global": Shape(2, 4096, 4096, 64, 8, 64, sinks=True),
    "gpt_oss_local": Shape(2, 4096, 4096, 64, 8, 64, window=(127, 0), sinks=True),
    # arXiv:2212.04356, large: 448 tokens of text on 1500 frames of audio
    "whisper_cross": Shape(8, 448, 1500, 20, 20, 64, causal=False),
    # arXiv:1910.10683, base; relative position bias
    "t5_encoder": Shape(8, 512, 512, 12, 12, 64, causal=False, bias=True),
    "t5_cross": Shape(8, 114, 512, 12, 12, 64, causal=False),
    "characters": Shape(12, 64, 64, 4, 4, 32),
    "subwords": Shape(8, 256, 256, 6, 6, 64),
    "one_token": Shape(1, 1, 1, 1, 1, 8),
    "seven_keys": Shape(2, 3, 7, 3, 1, 5, causal=False),
    "odd_length": Shape(1, 1000, 1000, 2, 2, 64),
}
