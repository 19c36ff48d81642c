"""Shapes of decoding in real models, by name; tests run them scaled down, benchmarks as they are.

Head counts, head dims and options are those of the published configurations. Batch and room are
what one device holds when it serves.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One decode_attention call of a real model.

    Attributes:
        B, T, S, N, K, H: sizes of the axes; Hv = H. A row has room for S positions.
        window, softcap, sinks: as in `decode_attention`.
        page_size: positions a page holds; None for a cache of contiguous rows.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    sinks: bool = False
    page_size: int | None = None

    def scaled(self, length: int, groups: int, head_dim: int) -> "Shape":
        """The same kind of call in small, for tests.

        Args:
            length: S is at most this; the window's share of it stays, roughly, and a page's.
            groups: at most so many key-value heads, and at most so many query heads for each.
            head_dim: at most so large.
        """
        factor = max(1.0, self.S / length)

        def shrink(size):
            return None if size is None else max(1, int(size / factor)) if size else 0

        K = min(self.K, groups)
        return dataclasses.replace(
            self,
            B=min(self.B, 3),
            S=shrink(self.S),
            N=K * min(self.N // self.K, groups),
            K=K,
            H=min(self.H, head_dim),
            window=None if self.window is None else tuple(map(shrink, self.window)),
            page_size=None if self.page_size is None else max(8, shrink(self.page_size)),
        )


SHAPES = {
    # arXiv:2307.09288
    "llama2_7b": Shape(8, 1, 4096, 32, 32, 128),
    # arXiv:2407.21783
    "llama3_8b": Shape(16, 1, 8192, 32, 8, 128),
    "llama3_8b_long": Shape(1, 1, 131072, 32, 8, 128),
    "llama3_8b_speculative": Shape(16, 4, 8192, 32, 8, 128),
    "llama3_8b_pages_of_16": Shape(16, 1, 8192, 32, 8, 128, page_size=16),
    "llama3_8b_pages_of_64": Shape(16, 1, 8192, 32, 8, 128, page_size=64),
    "llama3_8b_pages_of_128": Shape(16, 1, 8192, 32, 8, 128, page_size=128),
    # one of eight devices that split the heads
    "llama2_70b_eighth": Shape(32, 1, 4096, 8, 1, 128),
    # arXiv:2408.00118; 9B: every other layer sees 4096 tokens back
    "gemma2_9b_global": Shape(8, 1, 8192, 16, 8, 256, softcap=50.0),
    "gemma2_9b_local": Shape(8, 1, 8192, 16, 8, 256, window=(4095, 0), softcap=50.0),
    # arXiv:2508.10925; every other layer sees 128 tokens
    "gpt_oss_global": Shape(16, 1, 8192, 64, 8, 64, sinks=True),
    "gpt_oss_local": Shape(16, 1, 8192, 64, 8, 64, window=(127, 0), sinks=True),
    "subwords": Shape(8, 1, 256, 6, 6, 64),
    "odd_length": Shape(2, 2, 1000, 6, 2, 64),
}
