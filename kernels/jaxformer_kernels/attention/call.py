"""What one call of attention needs, in the words implementations declare their support in."""

import dataclasses

import jax.numpy as jnp

from jaxformer_kernels.attention.mask import Mask

FEATURES = frozenset(
    {
        "bias",
        "causal",
        "dropout",
        "float64",
        "grouped_heads",
        "kv_range",
        "lse",
        "mask_array",
        "q_offset",
        "segments",
        "sinks",
        "softcap",
        "traced_q_offset",
        "value_head_dim",
        "window",
    }
)


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes, dtype and features of one call.

    Attributes:
        B, T, S, N, K, H, Hv: sizes of the axes.
        dtype: of q, k and v.
        features: names out of `FEATURES`.
        bounds: the mask's (left, right), from causal and window together.
    """

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: jnp.dtype
    features: frozenset[str]
    bounds: tuple[int | None, int | None] = (None, None)


def describe(q, k, v, bias, mask: Mask, sinks, softcap, dropout, return_lse) -> Call:
    """The `Call` that these arguments, already validated, make."""
    B, T, N, H = q.shape
    S, K, Hv = v.shape[1:]
    given = {
        "bias": bias is not None,
        "sinks": sinks is not None,
        "softcap": softcap is not None,
        "dropout": dropout is not None,
        "lse": return_lse,
        "grouped_heads": K != N,
        "value_head_dim": Hv != H,
        "float64": q.dtype == jnp.float64,
    }
    features = frozenset(name for name, used in given.items() if used) | mask.features
    return Call(B, T, S, N, K, H, Hv, q.dtype, features, mask.bounds)
