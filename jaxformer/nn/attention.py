"""Multi-head attention: projections around the attention kernel."""

import functools

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxformer import sharding
from jaxformer.config import ModelConfig
from jaxformer.nn.cache import Cache
from jaxformer.nn.linear import Linear, together
from jaxformer.nn.mesh_attention import attend
from jaxformer.nn.norm import RMSNorm
from jaxformer.nn.position import rotary
from jaxformer.nn.precision import activation_dtype
from jaxformer_kernels import Dropout, Mask, decode_attention

# Measured on a CPU, step by step against `attention`, for layers whose slots stand first: one of
# fewer elements decodes no slower whole, from as many on it pays to read only what the cache holds
# (0.5 to 0.9 of a step's time).
_FEW_TOKENS = 8
_LARGE_LAYER = 1 << 19


class Attention(nnx.Module):
    """Attention of Vaswani et al. (2017), with grouped key-value heads (Ainslie et al., 2023).

    Optional: rotary positions, normalised queries and keys (Dehghani et al., 2023), a soft cap on
    the scores, dropout of the weights. What may be attended to is the mask's matter alone.
    """

    def __init__(self, config: ModelConfig, *, scale: float = 1.0, rngs: nnx.Rngs):
        self.config = config
        head_dim = config.head_dim or config.width // config.heads
        width = {"D": config.width}
        query_axes = {"N": config.heads, "H": head_dim}
        key_axes = {"K": config.kv_heads or config.heads, "H": head_dim}
        linear = functools.partial(
            Linear,
            bias=config.bias,
            rngs=rngs,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
        )
        # Scores start with the variance that the usual scale would give them, whatever the scale
        # (T5 has none, and smaller query weights instead).
        usual = head_dim**-0.5
        query_scale = usual / (config.attention_scale or usual)
        self.query = linear(width, query_axes, scale=query_scale)
        self.key = linear(width, key_axes)
        self.value = linear(width, key_axes)
        self.out = linear(query_axes, width, scale=scale)
        norm = functools.partial(
            RMSNorm,
            {"H": head_dim},
            epsilon=config.norm_epsilon,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.query_norm = norm() if config.qk_norm else None
        self.key_norm = norm() if config.qk_norm else None

    def keys_values(
        self, source: Float[Array, "B S D"], positions: Int[Array, "B S"] | None = None
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of a source; rotated to `positions` where those are given."""
        keys, values = together((self.key, self.value), source)
        return self._ready(keys, self.key_norm, positions), values

    def queries_keys_values(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]]:
        """Queries, and keys and values, of the same x."""
        queries, keys, values = together((self.query, self.key, self.value), x)
        queries = self._ready(queries, self.query_norm, positions)
        return queries, (self._ready(keys, self.key_norm, positions), values)

    def __call__(
        self,
        queries: Float[Array, "B T N H"],
        keys_values: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]],
        *,
        mask: Mask,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends from queries to keys and values."""
        config = self.config
        operands = (array.astype(config.compute_dtype) for array in (queries, *keys_values))
        dropped = (
            Dropout(config.attention_dropout, key)
            if key is not None and config.attention_dropout
            else None
        )
        mixed = attend(
            *operands,
            bias=bias,
            mask=mask,
            softcap=config.attention_softcap,
            scale=config.attention_scale,
            dropout=dropped,
            implementation=config.attention,
        )
        return self.out(mixed)

    def decode(
        self,
        queries: Float[Array, "B T N H"],
        keys_values: tuple[Float[Array, "B _ _ H"], Float[Array, "B _ _ H"]],
        *,
        cache: Cache,
        window: tuple[int | None, int | None] | None,
        heads_first: bool,
    ) -> Float[Array, "B T D"]:
        """Attends from the next tokens to a layer of the cache that holds their keys already.

        That is [B, K, S, H] where `heads_first`, else [B, S, K, H]. Forward only; what a long cache
        has room for and does not hold costs nothing.
        """
        config = self.config
        # What the cache has: to narrow all of it at every step takes longer than to read it.
        dtype = activation_dtype(config.compute_dtype)
        operands = (array.astype(dtype) for array in (queries, *keys_values))
        mixed = decode_attention(
            *operands,
            jnp.broadcast_to(cache.index + queries.shape[1], cache.start.shape),
            starts=cache.start,
            window=window,
            softcap=config.attention_softcap,
            scale=config.attention_scale,
            heads_first=heads_first,
        )
        return self.out(mixed)

    def decode_shared(
        self,
        queries: Float[Array, "B 1 N H"],
        cache: Cache,
        layer: Int[Array, ""] | int,
        *,
        window: tuple[int | None, int | None] | None,
        bias: Float[Array, "1 N 1 S"] | None,
    ) -> Float[Array, "B 1 D"]:
        """`decode` of rows that share their slots, all of which are read once for all of them.

        Each row is shown what it has of them, so that no row's past is ever copied.
        """
        keys, values, has = cache.read_shared(layer)
        width = has.shape[1]
        slots = jnp.arange(has.shape[2]) // width
        seen = (slots >= cache.start[:, None]) & (slots <= cache.index)
        if window is not None and window[0] is not None:
            seen &= slots >= cache.index - window[0]
        config = self.config
        dtype = activation_dtype(config.compute_dtype)
        shared = rearrange(queries, "(C W) 1 N H -> C W N H", W=width)
        mixed = attend(
            *(array.astype(dtype) for array in (shared, keys, values)),
            mask=Mask(array=(has & seen.reshape(has.shape))[:, None]),
            bias=None if bias is None else jnp.repeat(bias, width, axis=-1),
            softcap=config.attention_softcap,
            scale=config.attention_scale,
            implementation=config.attention,
        )
        return self.out(rearrange(mixed, "C W N H -> (C W) 1 N H"))

    def weights(
        self, queries: Float[Array, "B T N H"], keys: Float[Array, "B S K H"], *, mask: Mask
    ) -> Float[Array, "B T N S"]:
        """How much each head of each place attends to each key; for looking at, not speed."""
        # Mixing unit vectors in place of values leaves the weights themselves.
        B, S, K, _ = keys.shape
        units = jnp.broadcast_to(jnp.eye(S, dtype=keys.dtype)[None, :, None], (B, S, K, S))
        config = self.config
        return attend(
            queries,
            keys,
            units,
            mask=mask,
            softcap=config.attention_softcap,
            scale=config.attention_scale,
        )

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries of x, which attends to a source: without positions."""
        return self._ready(self.query(x), self.query_norm, None)

    def _ready(
        self, heads: Float[Array, "B T N H"], norm: RMSNorm | None, positions: Array | None
    ) -> Float[Array, "B T N H"]:
        if norm is not None:
            heads = norm(heads)
        if positions is not None:
            heads = rotary(heads, positions, self.config.rotary_base)
        return heads


def self_attention(
    module: Attention,
    x: Float[Array, "B T D"],
    *,
    mask: Mask,
    bias: Array | None,
    positions: Int[Array, "B T"] | None,
    key: PRNGKeyArray | None,
    cache: Cache | None,
    layer: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Attention of x to itself and, with a cache, to what came before it.

    Returns the output and the cache with x's keys and values written into `layer`.
    """
    queries, (keys, values) = module.queries_keys_values(x, positions)
    if cache is not None:
        cache = cache.write(layer, keys, values)
        if cache.writer is not None and x.shape[1] == 1:
            y = module.decode_shared(queries, cache, layer, window=mask.window, bias=bias)
            return y, cache
        keys, values = cache.read(layer)
        # On a mesh the kernel for decoding would have operands gathered that are split.
        plain = bias is None and module.config.attention is None and sharding.active() is None
        heads_first = isinstance(cache.keys, tuple) and cache.writer is None
        if plain and x.shape[1] <= _FEW_TOKENS and (heads_first or keys.size >= _LARGE_LAYER):
            stored = cache.read_heads_first(layer) if heads_first else (keys, values)
            window = mask.window
            y = module.decode(queries, stored, cache=cache, window=window, heads_first=heads_first)
            return y, cache
    y = module(queries, (keys, values), mask=mask, bias=bias, key=key)
    return y, cache
