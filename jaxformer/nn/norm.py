"""Normalisation of the last axis, or over a batch; statistics in float32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxformer.nn.parameters import parameter
from jaxformer_kernels import _compat


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias (Ba, Kiros & Hinton, 2016)."""

    def __init__(
        self,
        axes: dict[str, int],
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-5,
        bias: bool = True,
        param_dtype: str = "float32",
    ):
        self.epsilon = epsilon
        self.scale, self.bias = _scale_and_bias(axes, bias, rngs, param_dtype)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        bias = None if self.bias is None else self.bias[...]
        return normalise(x, self.scale[...], bias, self.epsilon, True)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale (Zhang & Sennrich, 2019)."""

    def __init__(
        self,
        axes: dict[str, int],
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-5,
        param_dtype: str = "float32",
    ):
        self.epsilon = epsilon
        self.scale = parameter(jax.nn.initializers.ones, axes, rngs=rngs, dtype=param_dtype)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return normalise(x, self.scale[...], None, self.epsilon, False)


def normalise(
    x: Float[Array, "*P D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    epsilon: float,
    centred: bool,
) -> Float[Array, "*P D"]:
    """x over the root of its mean square, by rows; `centred`: after its mean was subtracted.

    In float32 within, and x's dtype again. The backward pass keeps x and two numbers a row, where
    derivatives by rule would keep several arrays as large as x in float32.
    """
    return _normalised(*_compat.vary_alike(x, scale, bias), epsilon, centred)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalised(x, scale, bias, epsilon, centred):
    return _normalise(x, scale, bias, epsilon, centred)[0]


def _normalise(x, scale, bias, epsilon, centred):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True) if centred else None
    shifted = wide if mean is None else wide - mean
    factor = jax.lax.rsqrt(jnp.square(shifted).mean(-1, keepdims=True) + epsilon)
    y = shifted * factor * scale
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype), (x, mean, factor, scale, bias)


def _normalise_backward(epsilon, centred, saved, cotangent):
    x, mean, factor, scale, bias = saved
    # Else XLA would keep the forward pass's intermediate arrays, which it finds here again.
    x = jax.lax.optimization_barrier(x)
    wide, dy = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    normal = (wide if mean is None else wide - mean) * factor
    rows = tuple(range(x.ndim - 1))
    g = dy * scale
    dx = g - normal * (g * normal).mean(-1, keepdims=True)
    if centred:
        dx = dx - g.mean(-1, keepdims=True)
    dscale = (dy * normal).sum(rows).astype(scale.dtype)
    dbias = None if bias is None else dy.sum(rows).astype(bias.dtype)
    return (dx * factor).astype(x.dtype), dscale, dbias


_normalised.defvjp(_normalise, _normalise_backward)


class BatchNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, by channel (Ioffe & Szegedy, 2015).

    In training, mean and variance are those of the batch: over all axes but the last, and only over
    the places that `mask` calls real. They also move the running mean and (unbiased) variance, with
    weight `momentum`; in evaluation those are normalised with. A batch with one real place has no
    variance: it leaves the running variance as it is, and comes out as the bias. One with none
    changes no statistics. Places that are not real come out as 0.

    Under `jit` the statistics of a sharded batch are those of all of it. Inside `shard_map` or
    `pmap`, `axis_name` names the mesh axes over which they are shared.
    """

    def __init__(
        self,
        axes: dict[str, int],
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        bias: bool = True,
        axis_name: str | tuple[str, ...] | None = None,
        param_dtype: str = "float32",
    ):
        self.epsilon = epsilon
        self.momentum = momentum
        self.axis_name = axis_name
        self.scale, self.bias = _scale_and_bias(axes, bias, rngs, param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros(tuple(axes.values()), jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(tuple(axes.values()), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "*P D"],
        *,
        mask: Bool[Array, "..."] | None = None,
        training: bool = False,
    ) -> Float[Array, "*P D"]:
        """`mask` broadcasts against the places, x.shape[:-1]; None: all of them are real."""
        real = _real_places(mask, x)
        wide = _only(real, x.astype(jnp.float32))
        if training:
            reduced = tuple(range(x.ndim - 1))
            mean, variance, count = _moments(wide, real, reduced, self.axis_name)
            self._move(mean.reshape(-1), variance.reshape(-1), count.reshape(()))
        else:
            mean, variance = self.mean[...], self.variance[...]
        y = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return _only(real, y).astype(x.dtype)

    def _move(self, mean: Array, variance: Array, count: Array) -> None:
        """Moves the running statistics towards those of a batch of `count` real places."""
        unbiased = variance * count / jnp.maximum(count - 1, 1)
        for running, new, least in ((self.mean, mean, 1), (self.variance, unbiased, 2)):
            old = running[...]
            moved = old + self.momentum * (jax.lax.stop_gradient(new) - old)
            running[...] = jnp.where(jax.lax.stop_gradient(count) >= least, moved, old)


class GroupNorm(nnx.Module):
    """LayerNorm over groups of channels and all places of an example (Wu & He, 2018).

    The statistics of x [B, ..., D] are taken for each of the B examples and each group of D /
    groups neighbouring channels, over the places that `mask` calls real; all others come out as 0.
    Raises ValueError where the channels do not fall into equal groups.
    """

    def __init__(
        self,
        groups: int,
        axes: dict[str, int],
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-5,
        bias: bool = True,
        param_dtype: str = "float32",
    ):
        (channels,) = axes.values()
        if groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels do not fall into {groups} equal groups")
        self.groups = groups
        self.epsilon = epsilon
        self.scale, self.bias = _scale_and_bias(axes, bias, rngs, param_dtype)

    def __call__(
        self, x: Float[Array, "B *P D"], *, mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "B *P D"]:
        """`mask` broadcasts against the places, x.shape[:-1]; None: all of them are real."""
        real = _real_places(mask, x)
        wide = _only(real, x.astype(jnp.float32))
        grouped = wide.reshape(*x.shape[:-1], self.groups, -1)
        inner = None if real is None else real[..., None]
        reduced = (*range(1, x.ndim - 1), x.ndim)
        mean, variance, _ = _moments(grouped, inner, reduced, None)
        y = ((grouped - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return _only(real, y).astype(x.dtype)


def _scale_and_bias(
    axes: dict[str, int], bias: bool, rngs: nnx.Rngs, dtype: str
) -> tuple[nnx.Param, nnx.Param | None]:
    """Ones, and zeros where there is a bias."""
    scale = parameter(jax.nn.initializers.ones, axes, rngs=rngs, dtype=dtype)
    if not bias:
        return scale, None
    return scale, parameter(jax.nn.initializers.zeros, axes, rngs=rngs, dtype=dtype)


def _real_places(mask: Array | None, x: Array) -> Array | None:
    """The mask with an axis for every axis of x, the last of size 1."""
    return None if mask is None else jnp.broadcast_to(mask, x.shape[:-1])[..., None]


def _only(real: Array | None, x: Array) -> Array:
    """x, with zeros where it is not real: a choice, not a product, for padding may be infinite."""
    return x if real is None else jnp.where(real, x, 0.0)


def _moments(
    x: Array, real: Array | None, reduced: tuple[int, ...], axis_name: str | tuple[str, ...] | None
) -> tuple[Array, Array, Array]:
    """Mean and variance of the real places, zeros where there are none; and how many there are.

    x is zero where it is not real. Squares are summed around the mean, in a second pass: a sum of
    plain squares loses a variance that is small beside the mean.
    """

    def total(values: Array) -> Array:
        values = values.sum(reduced, keepdims=True)
        return values if axis_name is None else jax.lax.psum(values, axis_name)

    ones = jnp.ones((*x.shape[:-1], 1), jnp.float32)
    count = total(_only(real, ones))
    if x.ndim - 1 in reduced:
        count = count * x.shape[-1]
    divisor = jnp.maximum(count, 1)
    mean = total(x) / divisor
    return mean, total(jnp.square(_only(real, x - mean))) / divisor, count
