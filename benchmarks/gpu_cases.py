"""The calls that the GPU suite makes of attention. No jax, for torch's process reads them too."""

import dataclasses
from typing import Any

import numpy as np

from jaxformer_kernels.attention.shapes import Shape

TOKENS = 2**14
"""B T of the table of speeds, as published ones have it."""
WIDTH = 2048
"""N H of it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention.

    Attributes:
        name: of the case.
        B, T, S, N, K, H: sizes of the axes; S = 0 means T.
        causal, softcap, sinks: as in `attention`.
        window: so many keys before its own place a query sees.
        documents: so many are packed into every row.
        dropout: its rate.
        kv_range: only some of the keys are there, fewer in every other row.
        dtype: of q, k and v.
    """

    name: str
    B: int
    T: int
    N: int
    K: int
    H: int
    S: int = 0
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    documents: int | None = None
    dropout: float = 0.0
    kv_range: bool = False
    dtype: str = "bfloat16"

    @property
    def keys(self) -> int:
        """S."""
        return self.S or self.T

    @property
    def offset(self) -> int:
        """Place of the first query among the keys."""
        return self.keys - self.T if self.causal or self.window else 0

    def shape(self) -> Shape:
        """What of the call `kernel_competitors` knows."""
        return Shape(
            self.B,
            self.T,
            self.keys,
            self.N,
            self.K,
            self.H,
            causal=self.causal,
            window=None if self.window is None else (self.window, 0),
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def segments(self) -> np.ndarray | None:
        """Id of the document of each token, [T]; every row is cut alike, into uneven parts."""
        if self.documents is None:
            return None
        cuts = np.random.RandomState(0).choice(self.T - 1, self.documents - 1, replace=False)
        return np.searchsorted(np.sort(cuts + 1), np.arange(self.T), side="right").astype(np.int32)

    def ranges(self) -> tuple[np.ndarray, np.ndarray] | None:
        """First key and one past the last of every row, [B]."""
        if not self.kv_range:
            return None
        rows = np.arange(self.B) % 2
        return (3 * rows).astype(np.int32), (self.keys - rows * (self.keys // 3)).astype(np.int32)

    def pairs(self) -> float:
        """Visible pairs of a query and a key, in all rows."""
        place = np.arange(self.T) + self.offset
        low, high = np.zeros(self.T, np.int64), np.full(self.T, self.keys)
        if self.causal or self.window is not None:
            high = np.minimum(high, place + 1)
        if self.window is not None:
            low = np.maximum(low, place - self.window)
        segments = self.segments()
        if segments is not None:
            low = np.maximum(low, np.searchsorted(segments, segments, side="left"))
            high = np.minimum(high, np.searchsorted(segments, segments, side="right"))
        ranges = self.ranges()
        if ranges is None:
            return float(self.B * np.maximum(0, high - low).sum())
        first, end = ranges
        spans = np.minimum(high, end[:, None]) - np.maximum(low, first[:, None])
        return float(np.maximum(0, spans).sum())

    def flops(self, gradients: bool = False) -> float:
        """4 N H P forward, 14 N H P with gradients; P = visible pairs."""
        return (14.0 if gradients else 4.0) * self.N * self.H * self.pairs()

    def tiny(self) -> "Case":
        """The same kind of call in small."""
        T = 96 if self.T > 96 else self.T
        return dataclasses.replace(
            self,
            B=min(self.B, 2),
            T=T,
            S=0 if not self.S else T + 32,
            N=2 if self.N > self.K else min(self.N, 2),
            K=1 if self.N > self.K else min(self.K, 2),
            H=16,
            window=None if self.window is None else 40,
            documents=None if self.documents is None else 3,
        )

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return dataclasses.asdict(self)

    def short(self) -> str:
        """Sizes and options in a line."""
        words = [f"B{self.B} T{self.T} S{self.keys} N{self.N} K{self.K} H{self.H}", self.dtype]
        flags = ("causal", "window", "softcap", "sinks", "documents", "dropout", "kv_range")
        for name in flags:
            value = getattr(self, name)
            if value:
                words.append(name if value is True else f"{name} {value}")
        return " ".join(words)


CHECKS: dict[str, tuple[Case, ...]] = {
    "lengths": (
        Case("T 1 of S 64", 3, 1, 4, 4, 128, S=64, causal=False),
        Case("T 1 of S 7", 2, 1, 4, 2, 64, S=7, causal=False),
        Case("T 100 of S 1000", 2, 100, 4, 4, 128, S=1000),
        Case("T 1000 of S 1000", 2, 1000, 4, 4, 64),
        Case("T 1000, not causal", 2, 1000, 4, 4, 128, causal=False),
        Case("T 4097", 1, 4097, 2, 2, 128),
        Case("T 4097, not causal", 1, 4097, 2, 2, 64, causal=False),
        Case("T 1k", 4, 1024, 8, 8, 128),
        Case("T 4k", 1, 4096, 4, 4, 128),
        Case("T 16k", 1, 2**14, 1, 1, 128),
        Case("T 16k, not causal", 1, 2**14, 1, 1, 64, causal=False),
        Case("many blocks", 4, 2048, 16, 16, 64),
    ),
    "head dims": tuple(
        Case(f"d {H}{'' if causal else ', not causal'}", 2, 1000, 4, 2, H, causal=causal)
        for H in (64, 80, 96, 128, 192, 256)
        for causal in (True, False)
    ),
    "features": (
        Case("grouped 8:1", 2, 2048, 16, 2, 128),
        Case("packed", 2, 2048, 4, 4, 128, documents=9),
        Case("packed, not causal", 2, 1000, 4, 4, 64, documents=5, causal=False),
        Case("packed 4k, grouped", 1, 4096, 8, 1, 64, documents=16),
        Case("window", 2, 2048, 4, 4, 128, window=255),
        Case("window 1k, softcap", 1, 4096, 4, 2, 128, window=1023, softcap=50.0),
        Case("window 1k, softcap, d 256", 1, 4096, 4, 2, 256, window=1023, softcap=50.0),
        Case("softcap", 2, 1024, 4, 4, 128, softcap=20.0),
        Case("sinks", 2, 1024, 8, 1, 64, sinks=True),
        Case("sinks, window", 2, 2048, 8, 1, 64, sinks=True, window=127),
        Case("dropout", 2, 1024, 4, 4, 128, dropout=0.1),
        Case("dropout, grouped", 2, 1000, 8, 2, 64, dropout=0.3),
        Case("kv range", 2, 1000, 4, 4, 128, causal=False, kv_range=True),
        Case("kv range, grouped", 4, 1024, 8, 2, 64, causal=False, kv_range=True),
    ),
    "float16": (
        Case("fp16", 2, 1000, 4, 4, 128, dtype="float16"),
        Case("fp16 d 64, grouped", 2, 2048, 8, 1, 64, dtype="float16"),
        Case("fp16 d 256", 1, 1024, 4, 4, 256, dtype="float16"),
        Case("fp16 packed", 2, 2048, 4, 4, 128, dtype="float16", documents=7),
        Case("fp16 window, softcap", 2, 1024, 4, 4, 64, dtype="float16", window=127, softcap=30.0),
    ),
}

RERUNS = (
    Case("causal", 2, 2048, 16, 16, 128),
    Case("not causal, d 64", 2, 2048, 16, 16, 64, causal=False),
    Case("d 256, odd", 2, 1000, 8, 8, 256),
    Case("grouped 8:1, packed", 2, 4096, 16, 2, 128, documents=9),
    Case("window, softcap, sinks", 2, 2048, 8, 1, 64, window=255, softcap=50.0, sinks=True),
    Case("dropout", 2, 1024, 16, 16, 128, dropout=0.1),
)


def table() -> tuple[Case, ...]:
    """The cases that are timed, the most telling first, for a budget may end early."""
    cases = []
    for H in (128, 64, 256):
        for T in (4096, 16384, 1024, 512):
            for causal in (True, False):
                name = f"d{H} T{T} {'causal' if causal else 'full'}"
                cases.append(Case(name, TOKENS // T, T, WIDTH // H, WIDTH // H, H, causal=causal))
    extra = (
        Case("grouped d128 T4096", 4, 4096, 16, 2, 128),
        Case("packed d128 T4096", 4, 4096, 16, 16, 128, documents=9),
        Case("window softcap d128 T16384", 1, 16384, 16, 16, 128, window=1023, softcap=50.0),
        Case("window softcap d256 T16384", 1, 16384, 8, 8, 256, window=1023, softcap=50.0),
    )
    return tuple(cases[:8]) + extra + tuple(cases[8:])
