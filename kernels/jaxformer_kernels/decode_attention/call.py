"""What one call of decode_attention needs, in the words implementations declare support in."""

import dataclasses

import jax.numpy as jnp

FEATURES = frozenset(
    {
        "float64",
        "grouped_heads",
        "heads_first",
        "lse",
        "paged",
        "sinks",
        "softcap",
        "starts",
        "value_head_dim",
        "window",
    }
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when a call is traced; `left` is the window's reach."""

    scale: float
    softcap: float | None
    left: int | None
    heads_first: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes, dtype and features of one call.

    Attributes:
        B, T, S, N, K, H, Hv: sizes of the axes; S is what a row has room for.
        page_size: positions a page holds; None where the cache is not paged.
        dtype: of q, k and v.
        features: names out of `FEATURES`.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    page_size: int | None
    dtype: jnp.dtype
    features: frozenset[str]

    @property
    def rows(self) -> int:
        """Queries that read one key-value head: T of each of the N // K heads."""
        return self.N // self.K * self.T


def describe(q, v, starts, page_table, sinks, window, softcap, heads_first, return_lse) -> Call:
    """The `Call` that these arguments, already validated, make."""
    B, T, N, H = q.shape
    K, S = v.shape[1:3] if heads_first else v.shape[2:0:-1]
    Hv, page_size = v.shape[3], None
    if page_table is not None:
        page_size, S = S, S * page_table.shape[1]
    given = {
        "float64": q.dtype == jnp.float64,
        "grouped_heads": K != N,
        "heads_first": heads_first,
        "lse": return_lse,
        "paged": page_table is not None,
        "sinks": sinks is not None,
        "softcap": softcap is not None,
        "starts": starts is not None,
        "value_head_dim": Hv != H,
        "window": window is not None and window[0] is not None,
    }
    features = frozenset(name for name, used in given.items() if used)
    return Call(B, T, S, N, K, H, Hv, page_size, q.dtype, features)
