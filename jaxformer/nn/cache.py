"""Keys and values of what was read before, so that decoding feeds one token at a time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

# So many beams share their slots. Each is shown all places, so the work grows with their square: of
# 16 a step takes 0.78 of the time that slots of their own would, measured on a CPU.
_MOST_SHARING = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The key-value cache of a decoder stack.

    Rows of different length are padded on the left: row b's first token stands in slot `start[b]`,
    and every row's next token goes into the same slot `index`, so a write is one slice.

    Layers are stacked along a leading axis L or, where `unrolled`, each has arrays of its own, in
    which rows and heads are one axis and slots the next: what a CPU reads fastest.
    C counts the sources: one a row, or one for every B / C rows beside each other.

    W rows that `repeat` made of each of C rows of an unrolled cache share their slots, each of
    which then has W places beside each other: [C * K, S * W, H]. To reorder them moves `writer`
    alone.
    """

    keys: Float[Array, "L B S K H"] | tuple[Float[Array, "BK SW H"], ...]
    values: Float[Array, "L B S K H"] | tuple[Float[Array, "BK SW H"], ...]
    index: Int[Array, ""]
    """The next free slot."""
    start: Int[Array, " B"]
    """The first slot of each row that holds a token."""
    cross_keys: Float[Array, "L C Z K H"] | tuple[Float[Array, "CK Z H"], ...] | None = None
    """Keys of the encoded source, computed once."""
    cross_values: Float[Array, "L C Z K H"] | tuple[Float[Array, "CK Z H"], ...] | None = None
    source_segment_ids: Int[Array, "C Z"] | None = None
    """1 where the source has a token, 0 where it is padding."""
    writer: Int[Array, "B S"] | None = None
    """Which of the W rows that share their slots wrote what row b has in slot s."""

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
        if self.writer is not None:
            return self.writer.shape[1]
        return self.keys[0].shape[1] if isinstance(self.keys, tuple) else self.keys.shape[2]

    def unrolled(self) -> "Cache":
        """The same cache with an array a layer, so that no layer is cut out to be read.

        `layer` is a Python number from then on.
        """
        if isinstance(self.keys, tuple):
            return self
        fields = (self.keys, self.values, self.cross_keys, self.cross_values)
        keys, values, cross_keys, cross_values = (
            x if x is None else tuple(_flat(layer) for layer in x) for x in fields
        )
        return dataclasses.replace(
            self, keys=keys, values=values, cross_keys=cross_keys, cross_values=cross_values
        )

    def positions(self, tokens: int) -> Int[Array, "B T"]:
        """Places of the next `tokens` tokens, counted from each row's start (never negative)."""
        slots = self.index + jnp.arange(tokens, dtype=jnp.int32)
        return jnp.maximum(slots[None] - self.start[:, None], 0)

    def read(self, layer: Int[Array, ""] | int) -> tuple[Array, Array]:
        """Keys and values of one layer, [B, S, K, H]."""
        rows = self.start.shape[0]
        if self.writer is not None:
            return self._own(self.keys[layer]), self._own(self.values[layer])
        return _layer(self.keys, layer, rows), _layer(self.values, layer, rows)

    def read_heads_first(
        self, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """`read` of an unrolled cache whose rows share no slots, as it lies in memory."""
        assert isinstance(layer, int) and self.writer is None
        rows = self.start.shape[0]
        return _by_rows(self.keys[layer], rows), _by_rows(self.values[layer], rows)

    def read_shared(
        self, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "C SW K H"], Float[Array, "C SW K H"], Bool[Array, "C W SW"]]:
        """Keys and values of rows that share their slots, and which places each of them has."""
        assert isinstance(layer, int) and self.writer is not None
        width = self._width
        keys, values = (
            rearrange(x[layer], "(C K) SW H -> C SW K H", C=self.start.shape[0] // width)
            for x in (self.keys, self.values)
        )
        has = self.writer[:, :, None] == jnp.arange(width)
        return keys, values, rearrange(has, "(C W) S place -> C W (S place)", W=width)

    def read_source(self, layer: Int[Array, ""] | int) -> tuple[Array, Array]:
        """Keys and values of the source for one layer, [C, Z, K, H]."""
        assert self.cross_keys is not None and self.cross_values is not None
        assert self.source_segment_ids is not None
        rows = self.source_segment_ids.shape[0]
        return _layer(self.cross_keys, layer, rows), _layer(self.cross_values, layer, rows)

    def write(
        self, layer: Int[Array, ""] | int, keys: Float[Array, "B T K H"], values: Array
    ) -> "Cache":
        """This cache with the next tokens' keys and values of one layer; `index` stays."""
        writer = self.writer
        if writer is not None:
            own = jnp.arange(writer.shape[0], dtype=writer.dtype) % self._width
            new = jnp.broadcast_to(own[:, None], keys.shape[:2])
            writer = jax.lax.dynamic_update_slice(writer, new, (0, self.index))
        return dataclasses.replace(
            self,
            keys=self._written(self.keys, layer, keys),
            values=self._written(self.values, layer, values),
            writer=writer,
        )

    def advance(self, tokens: int) -> "Cache":
        """This cache after `tokens` tokens were written into every layer."""
        return dataclasses.replace(self, index=self.index + tokens)

    def take(self, rows: Int[Array, " R"]) -> "Cache":
        """The cache of these rows, in this order, each with slots and a source of its own."""
        if self.writer is not None:
            return self._apart().take(rows)
        sources = None if self.source_segment_ids is None else self.source_segment_ids.shape[0]
        of_source = rows if sources is None else rows // (self.start.shape[0] // sources)
        return dataclasses.replace(
            self.reorder(rows),
            cross_keys=_gather(self.cross_keys, of_source, sources),
            cross_values=_gather(self.cross_values, of_source, sources),
            source_segment_ids=_rows(self.source_segment_ids, of_source, 0),
        )

    def repeat(self, count: int) -> "Cache":
        """Each row `count` times, beside each other; they share their source (beam search)."""
        if self.writer is not None:
            return self._apart().repeat(count)
        rows = jnp.repeat(jnp.arange(self.start.shape[0]), count)
        if not isinstance(self.keys, tuple) or not 1 < count <= _MOST_SHARING:
            return self.reorder(rows)
        keys, values = (
            tuple(_with_places(layer, count) for layer in x) for x in (self.keys, self.values)
        )
        start = _rows(self.start, rows, 0)
        # What is there already stands in the first place of each slot.
        writer = jnp.broadcast_to(0 * start[:, None], (rows.size, self.length))
        return dataclasses.replace(self, keys=keys, values=values, start=start, writer=writer)

    def reorder(self, rows: Int[Array, " R"]) -> "Cache":
        """`take` where rows change places only with rows that share their source and slots."""
        start = _rows(self.start, rows, 0)
        if self.writer is not None:
            assert rows.shape == self.start.shape
            return dataclasses.replace(self, writer=_rows(self.writer, rows, 0), start=start)
        return dataclasses.replace(
            self,
            keys=_gather(self.keys, rows, self.start.shape[0]),
            values=_gather(self.values, rows, self.start.shape[0]),
            start=start,
        )

    @property
    def _width(self) -> int:
        """W: rows that share their slots."""
        assert self.writer is not None
        return self.keys[0].shape[1] // self.writer.shape[1]

    def _own(self, layer: Float[Array, "CK SW H"]) -> Float[Array, "B S K H"]:
        """What each row has of a layer whose slots are shared."""
        assert self.writer is not None
        rows, slots = self.writer.shape
        places = jnp.arange(slots) * self._width + self.writer
        shared = _by_rows(layer, rows // self._width)
        return shared[jnp.arange(rows)[:, None] // self._width, :, places]

    def _apart(self) -> "Cache":
        """The same cache with slots of its own for every row."""
        keys, values = (
            tuple(_flat(self._own(layer)) for layer in x) for x in (self.keys, self.values)
        )
        return dataclasses.replace(self, keys=keys, values=values, writer=None)

    def _written(self, stored: Any, layer: Int[Array, ""] | int, new: Array) -> Any:
        if isinstance(stored, tuple):
            old, width = stored[layer], 1 if self.writer is None else self._width
            # In the shape that products read: XLA would take a reshape of the cache into the
            # write, which is then no longer in place.
            new = rearrange(new, "(C W) T K H -> (C K) (T W) H", W=width).astype(old.dtype)
            written = jax.lax.dynamic_update_slice(old, new, (0, self.index * width, 0))
            return (*stored[:layer], written, *stored[layer + 1 :])
        place = (layer, 0, self.index, 0, 0)
        return jax.lax.dynamic_update_slice(stored, new[None].astype(stored.dtype), place)


def _flat(layer: Float[Array, "B S K H"]) -> Float[Array, "BK S H"]:
    return jnp.swapaxes(layer, 1, 2).reshape(-1, layer.shape[1], layer.shape[3])


def _with_places(layer: Float[Array, "CK S H"], count: int) -> Float[Array, "CK SW H"]:
    """A layer with `count` places a slot, of which the first holds what it had."""
    places = jnp.pad(layer[:, :, None], ((0, 0), (0, 0), (0, count - 1), (0, 0)))
    return rearrange(places, "CK S W H -> CK (S W) H")


def _by_rows(layer: Float[Array, "BK S H"], rows: int) -> Float[Array, "B K S H"]:
    return layer.reshape(rows, -1, *layer.shape[1:])


def _layer(stored: Any, layer: Int[Array, ""] | int, rows: int) -> Array:
    if isinstance(stored, tuple):
        return jnp.swapaxes(_by_rows(stored[layer], rows), 1, 2)
    return jnp.take(stored, layer, axis=0)


def _gather(stored: Any, rows: Int[Array, " R"], of: int | None) -> Any:
    """`rows` of `of`, of every layer."""
    if isinstance(stored, tuple):
        assert of is not None
        gathered = (_rows(_by_rows(layer, of), rows, 0) for layer in stored)
        return tuple(layer.reshape(-1, *layer.shape[2:]) for layer in gathered)
    return _rows(stored, rows, 1)


def _rows(leaf: Array | None, rows: Int[Array, " R"], axis: int) -> Any:
    return None if leaf is None else jnp.take(leaf, rows, axis=axis, mode="clip")
