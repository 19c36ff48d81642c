"""One Transformer layer: self-attention, cross-attention where there is a source, feed-forward."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer import sharding
from jaxformer.config import ModelConfig
from jaxformer.nn.attention import Attention, self_attention
from jaxformer.nn.cache import Cache
from jaxformer.nn.dropout import dropout
from jaxformer.nn.feedforward import FeedForward
from jaxformer.nn.norm import LayerNorm, RMSNorm
from jaxformer_kernels import Mask


def make_norm(config: ModelConfig, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    """The normalisation that the configuration names, over the width."""
    make = RMSNorm if config.norm == "rmsnorm" else functools.partial(LayerNorm, bias=config.bias)
    return make(
        {"D": config.width},
        epsilon=config.norm_epsilon,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


class Block(nnx.Module):
    """A layer of an encoder (`cross=False`), of a decoder-only model, or of a decoder with source.

    pre-norm: x + f(norm(x)); post-norm: norm(x + f(x)), for each sub-layer f.
    """

    def __init__(self, config: ModelConfig, *, cross: bool, layers: int, rngs: nnx.Rngs):
        self.config = config
        # Residual branches start small enough that the sum over the depth keeps its variance
        # (Radford et al., 2019); post-norm rescales the sum itself.
        branches = (3 if cross else 2) * layers
        scale = branches**-0.5 if config.norm_placement == "pre" else 1.0
        self.attention = Attention(config, scale=scale, rngs=rngs)
        self.attention_norm = make_norm(config, rngs)
        self.cross_attention = Attention(config, scale=scale, rngs=rngs) if cross else None
        self.cross_attention_norm = make_norm(config, rngs) if cross else None
        self.feedforward = FeedForward(config, scale=scale, rngs=rngs)
        self.feedforward_norm = make_norm(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        source: Float[Array, "B Z D"] | None = None,
        cross_mask: Mask | None = None,
        key: PRNGKeyArray | None = None,
        cache: Cache | None = None,
        layer: Int[Array, ""] | int = 0,
        record: list[Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """One layer. `positions` are given for rotary positions only.

        S counts the keys of the self-attention, Z those of the source. With a cache, keys and
        values of x are written into it, and those of the source are read from it (`source` is then
        None). The weights of the cross-attention are appended to `record`, if given. Returns the
        output and the cache.
        """
        config = self.config
        keys = jax.random.split(key, 6) if key is not None else [None] * 6

        def residual(x: Array, norm: Callable, branch: Callable, key: PRNGKeyArray | None) -> Array:
            if config.norm_placement == "pre":
                y = branch(sharding.constrain(norm(x), "B T D"))
                return sharding.constrain(x + dropout(y, config.dropout, key), "B T D")
            y = norm(x + dropout(branch(x), config.dropout, key))
            return sharding.constrain(y, "B T D")

        def attend(y: Array) -> Array:
            nonlocal cache
            y, cache = self_attention(
                self.attention,
                y,
                mask=mask,
                bias=bias,
                positions=positions,
                key=keys[0],
                cache=cache,
                layer=layer,
            )
            return y

        def attend_source(y: Array) -> Array:
            assert self.cross_attention is not None and cross_mask is not None
            if cache is not None:
                keys_values = cache.read_source(layer)
                # Rows that share a source (beams) attend to it as so many tokens of one row.
                shared = y.reshape(keys_values[0].shape[0], -1, y.shape[-1])
                queries = self.cross_attention.queries(shared)
                mixed = self.cross_attention(queries, keys_values, mask=cross_mask)
                return mixed.reshape(y.shape)
            assert source is not None
            keys_values = self.cross_attention.keys_values(source)
            queries = self.cross_attention.queries(y)
            if record is not None:
                weights = self.cross_attention.weights(queries, keys_values[0], mask=cross_mask)
                record.append(weights)
            return self.cross_attention(queries, keys_values, mask=cross_mask, key=keys[2])

        x = residual(x, self.attention_norm, attend, keys[1])
        if self.cross_attention_norm is not None:
            x = residual(x, self.cross_attention_norm, attend_source, keys[3])
        x = residual(x, self.feedforward_norm, self.feedforward, keys[4])
        return x, cache
