"""How a token's place enters the model: added vectors, rotations, or biases on the scores."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxformer import sharding
from jaxformer.nn.parameters import parameter
from jaxformer_kernels import zigzag


def token_places(rows: int, tokens: int, *, causal: bool) -> Int[Array, "B T"]:
    """The place of every token in its sequence, where it is nothing else but 0, 1, 2, ...

    Where a mesh divides sequences, those that are read causally come in the order of
    `jaxformer_kernels.zigzag`. Where it does so by hand, these are the places of this device's.
    """
    part, parts = sharding.by_hand("T")
    if not causal or not (parts > 1 or sharding.divides("context")):
        order = jnp.arange(tokens, dtype=jnp.int32) + part * tokens
    else:
        devices = jax.sharding.get_abstract_mesh().shape["context"]
        order = jnp.asarray(zigzag(devices, tokens * parts), jnp.int32)
        if parts > 1:
            order = jax.lax.dynamic_slice_in_dim(order, part * tokens, tokens)
    return order[None].repeat(rows, 0)


def sinusoidal(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Sines in the first half of the width, cosines in the second (Vaswani et al., 2017).

    Wavelengths form a geometric sequence from 2 pi to 10000 * 2 pi. float32.
    """
    half = (width + 1) // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half) / max(half - 1, 1))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]


def rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], base: float = 10_000.0
) -> Float[Array, "B T N H"]:
    """Rotates each head's pairs (i, i + H/2) by position / base**(2i/H) (Su et al., 2021)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def alibi_slopes(heads: int) -> Float[np.ndarray, " N"]:
    """Slopes of the linear biases, one a head (Press, Smith & Lewis, 2022).

    For a power of two the geometric sequence 2**(-8/N), 2**(-16/N), ...; otherwise the sequence of
    the power of two below, and then every second slope of the one above.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, below + 1) / below)
    above = 2.0 ** (-4.0 * np.arange(1, 2 * below + 1) / below)
    return np.concatenate([slopes, above[::2]])[:heads].astype(np.float32)


def alibi(heads: int, distance: Int[Array, "T S"]) -> Float[Array, "1 N T S"]:
    """Bias -slope * |distance| on the attention scores; `distance` is key minus query place."""
    return -jnp.abs(distance)[None, None].astype(jnp.float32) * alibi_slopes(heads)[:, None, None]


class RelativeBias(nnx.Module):
    """A learned bias for each head and bucket of distances (T5: Raffel et al., 2020).

    Half of the buckets hold exact distances, the other half distances on a logarithmic scale up to
    `max_distance`; with `bidirectional` keys before and after the query have buckets of their own.
    """

    def __init__(
        self,
        heads: int,
        *,
        buckets: int,
        max_distance: int,
        bidirectional: bool,
        rngs: nnx.Rngs,
        param_dtype: str = "float32",
    ):
        self.buckets = buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.table = parameter(
            jax.nn.initializers.normal(0.02),
            {"buckets": buckets, "N": heads},
            rngs=rngs,
            dtype=param_dtype,
        )

    def __call__(self, distance: Int[Array, "T S"]) -> Float[Array, "1 N T S"]:
        bias = self.table[...].astype(jnp.float32)[self.bucket(distance)]
        return jnp.moveaxis(bias, -1, 0)[None]

    def bucket(self, distance: Int[Array, "T S"]) -> Int[Array, "T S"]:
        """The bucket of each distance (key minus query place)."""
        buckets, offset = self.buckets, 0
        if self.bidirectional:
            buckets //= 2
            offset = jnp.where(distance > 0, buckets, 0)
            steps = jnp.abs(distance)
        else:
            steps = jnp.maximum(-distance, 0)
        exact = buckets // 2
        scale = (buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (jnp.log(jnp.maximum(steps, 1) / exact) * scale).astype(jnp.int32)
        return offset + jnp.where(steps < exact, steps, jnp.minimum(far, buckets - 1))
