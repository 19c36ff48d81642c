"""Keys and values of what was read before, so that decoding feeds one token at a time."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The key-value cache of a decoder stack.

    Rows of different length are padded on the left: row b's first token stands in slot `start[b]`,
    and every row's next token goes into the same slot `index`, so a write is one slice.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    index: Int[Array, ""]
    """The next free slot."""
    start: Int[Array, " B"]
    """The first slot of each row that holds a token."""
    cross_keys: Float[Array, "L B Z K H"] | None = None
    """Keys of the encoded source, computed once."""
    cross_values: Float[Array, "L B Z K H"] | None = None
    source_segment_ids: Int[Array, "B Z"] | None = None
    """1 where the source has a token, 0 where it is padding."""

    @staticmethod
    def empty(
        *,
        layers: int,
        batch: int,
        length: int,
        kv_heads: int,
        head_dim: int,
        dtype: jnp.dtype,
        start: Int[Array, " B"] | None = None,
    ) -> "Cache":
        """A cache with room for `length` tokens."""
        zeros = jnp.zeros((layers, batch, length, kv_heads, head_dim), dtype)
        if start is None:
            start = jnp.zeros(batch, jnp.int32)
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32), start)

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.keys.shape[2]

    def positions(self, tokens: int) -> Int[Array, "B T"]:
        """Places of the next `tokens` tokens, counted from each row's start (never negative)."""
        slots = self.index + jnp.arange(tokens, dtype=jnp.int32)
        return jnp.maximum(slots[None] - self.start[:, None], 0)

    def write(
        self, layer: Int[Array, ""] | int, keys: Float[Array, "B T K H"], values: Array
    ) -> "Cache":
        """This cache with the next tokens' keys and values of one layer; `index` stays."""
        place = (layer, 0, self.index, 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, keys[None].astype(self.keys.dtype), place),
            values=jax.lax.dynamic_update_slice(
                self.values, values[None].astype(self.values.dtype), place
            ),
        )

    def advance(self, tokens: int) -> "Cache":
        """This cache after `tokens` tokens were written into every layer."""
        return dataclasses.replace(self, index=self.index + tokens)

    def take(self, rows: Int[Array, " R"]) -> "Cache":
        """The cache of these rows, in this order (beam search reorders with it)."""

        def gather(leaf: Array | None, axis: int) -> Array | None:
            return None if leaf is None else jnp.take(leaf, rows, axis=axis, mode="clip")

        return dataclasses.replace(
            self,
            keys=jnp.take(self.keys, rows, axis=1, mode="clip"),
            values=jnp.take(self.values, rows, axis=1, mode="clip"),
            start=jnp.take(self.start, rows, axis=0, mode="clip"),
            cross_keys=gather(self.cross_keys, 1),
            cross_values=gather(self.cross_values, 1),
            source_segment_ids=gather(self.source_segment_ids, 0),
        )
