"""What an attention call may look at.

A `Mask` says in words (causal, window, segments, ...) which keys a query sees, so that a kernel can
skip what is hidden; `as_array` is its meaning.
"""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_STATIC = ("causal", "window")


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Key s is visible to query t when everything that is given allows it.

    With p = t + q_offset, the query's place among the keys:

    Attributes:
        causal: Python bool: s <= p.
        q_offset: int (static), or integer array, scalar or [B]: the place of query 0 among the
            keys. Used by `causal` and `window` only. In decoding, the number of cached keys.
        window: (left, right), Python ints: p - left <= s <= p + right; None on a side leaves it
            unbounded.
        q_segment_ids, kv_segment_ids: int [B, T] and [B, S]: equal ids see each other. No id is
            special: padding is a segment of its own (by habit id 0), whose rows see each other.
        kv_start, kv_end: int, or integer array, scalar or [B]: kv_start <= s < kv_end.
        array: bool, broadcastable to [B, N, T, S]: True where visible.

    A pytree: `causal`, `window` and an int `q_offset` are static, the rest are leaves. In a batch
    axis 1 stands for any B.

    Raises:
        ValueError, TypeError: a field of the wrong shape or type; the message says what to pass.
    """

    # Of any type to a type checker: __post_init__ refuses the wrong ones, and names the fix.
    causal: Any = False
    q_offset: Any = 0
    window: Any = None
    q_segment_ids: Any = None
    kv_segment_ids: Any = None
    kv_start: Any = None
    kv_end: Any = None
    array: Any = None

    def __post_init__(self):
        if not isinstance(self.causal, bool | np.bool_):
            raise TypeError(
                f"Mask(causal=) is a Python bool, got {type(self.causal).__name__}; "
                "to choose under jit, pass the choice as array=."
            )
        _check_window(self.window)
        if isinstance(self.q_offset, numbers.Integral):
            object.__setattr__(self, "q_offset", int(self.q_offset))
        for name in ("q_offset", "kv_start", "kv_end"):
            _check_position(name, getattr(self, name))
        if (self.q_segment_ids is None) != (self.kv_segment_ids is None):
            given = "kv" if self.q_segment_ids is None else "q"
            other = "q" if given == "kv" else "kv"
            raise ValueError(
                f"Mask got {given}_segment_ids alone; pass {other}_segment_ids too "
                "(the same array, when queries and keys are the same tokens)."
            )
        for name in ("q_segment_ids", "kv_segment_ids"):
            ids = getattr(self, name)
            if ids is not None and (ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer)):
                length = "T" if name.startswith("q") else "S"
                raise ValueError(
                    f"Mask({name}=) is an integer array [B, {length}], "
                    f"got {ids.dtype}{list(ids.shape)}."
                )
        if self.array is not None and (self.array.dtype != bool or self.array.ndim > 4):
            raise TypeError(
                "Mask(array=) is bool (True is visible) and broadcasts to "
                f"[B, N, T, S], got {self.array.dtype}{list(self.array.shape)}; "
                "numbers to add to the logits go in attention(bias=)."
            )

    @property
    def features(self) -> frozenset[str]:
        """Names of what this mask uses, for implementations to support or refuse."""
        given = {
            "causal": self.causal,
            "window": self.window is not None,
            "segments": self.q_segment_ids is not None,
            "kv_range": self.kv_start is not None or self.kv_end is not None,
            "mask_array": self.array is not None,
        }
        if self._uses_offset and not (isinstance(self.q_offset, int) and self.q_offset == 0):
            given["q_offset" if isinstance(self.q_offset, int) else "traced_q_offset"] = True
        return frozenset(name for name, used in given.items() if used)

    @property
    def _uses_offset(self):
        return self.causal or self.window is not None

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """(left, right) of p - left <= s <= p + right, from `window` and `causal` together."""
        left, right = self.window or (None, None)
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return left, right

    def validate(self, B: int, N: int, T: int, S: int) -> None:
        """Raise ValueError, naming the field and the shape it should have, unless this fits."""
        for name, length in (("q_segment_ids", T), ("kv_segment_ids", S)):
            ids = getattr(self, name)
            if ids is not None and (ids.shape[0] not in (1, B) or ids.shape[1] != length):
                raise ValueError(
                    f"Mask({name}=) must be [{B}, {length}] for this call, got {list(ids.shape)}."
                )
        for name in ("q_offset", "kv_start", "kv_end"):
            shape = np.shape(getattr(self, name)) if getattr(self, name) is not None else ()
            if shape not in ((), (1,), (B,)):
                raise ValueError(
                    f"Mask({name}=) must be a scalar or [{B}] for this call, got {list(shape)}."
                )
        if self.array is not None:
            padded = (1,) * (4 - self.array.ndim) + self.array.shape
            if any(size not in (1, full) for size, full in zip(padded, (B, N, T, S), strict=True)):
                raise ValueError(
                    f"Mask(array=) must broadcast to [B, N, T, S] = {[B, N, T, S]}, "
                    f"got {list(self.array.shape)}."
                )

    def as_array(self, B: int, N: int, T: int, S: int) -> jax.Array:
        """The meaning of this mask: bool [B, N, T, S], True where the key is visible.

        Raises:
            ValueError: a field does not fit these sizes.
        """
        self.validate(B, N, T, S)
        visible = self.visible(jnp.arange(T), jnp.arange(S))
        return jnp.broadcast_to(True if visible is None else visible, (B, N, T, S))

    def visible(self, t, s):
        """Visibility of keys at positions `s` [S'] to queries at positions `t` [T'].

        The fields that run along T or S must already be cut to those positions.

        Returns:
            bool, four axes that broadcast to [B, N, T', S']; None when everything is visible.
        """
        left, right = self.bounds
        place = t[:, None] + _column(self.q_offset)
        s = s[None, :]
        tests = []
        if right is not None:
            tests.append(s <= place + right)
        if left is not None:
            tests.append(s >= place - left)
        if self.kv_start is not None:
            tests.append(s >= _column(self.kv_start))
        if self.kv_end is not None:
            tests.append(s < _column(self.kv_end))
        if self.q_segment_ids is not None:
            equal = self.q_segment_ids[:, :, None] == self.kv_segment_ids[:, None, :]
            tests.append(equal[:, None])
        if self.array is not None:
            tests.append(self.array)
        if not tests:
            return None
        result = tests[0]
        for test in tests[1:]:
            result = result & test
        return result.reshape((1,) * (4 - result.ndim) + result.shape)

    def cut(self, t: tuple, s: tuple) -> "Mask":
        """This mask with the fields that run along T or S cut to a block.

        Args:
            t, s: (start, size) of the block's queries and keys; a start may be traced.
        """
        array = self.array
        if array is not None:
            array = array.reshape((1,) * (4 - array.ndim) + array.shape)
            array = _cut(_cut(array, 2, *t), 3, *s)
        return dataclasses.replace(
            self,
            q_segment_ids=_cut(self.q_segment_ids, 1, *t),
            kv_segment_ids=_cut(self.kv_segment_ids, 1, *s),
            array=array,
        )

    def pad(self, t: int, s: int, S: int) -> "Mask":
        """This mask for `t` more queries, and `s` more keys than `S`, which are hidden."""
        if not t and not s:
            return self
        array = self.array
        if array is not None:
            array = array.reshape((1,) * (4 - array.ndim) + array.shape)
            array = _pad(_pad(array, 2, t), 3, s)
        return dataclasses.replace(
            self,
            q_segment_ids=_pad(self.q_segment_ids, 1, t),
            kv_segment_ids=_pad(self.kv_segment_ids, 1, s),
            kv_end=_both(self.kv_end, S, jnp.minimum, min) if s else self.kv_end,
            array=array,
        )

    def __and__(self, other: "Mask") -> "Mask":
        """What both masks show.

        Raises:
            ValueError: no one Mask says it: different `q_offset`s where both count, or different
                segment ids. (Arrays are compared by identity: under jit values are not known.)
        """
        if not isinstance(other, Mask):
            return NotImplemented
        segments = self if self.q_segment_ids is not None else other
        if other.q_segment_ids is not None and not (
            segments.q_segment_ids is other.q_segment_ids
            and segments.kv_segment_ids is other.kv_segment_ids
        ):
            raise ValueError(
                "Masks with two different sets of segment ids do not combine; number "
                "the pairs of ids afresh, or pass one of the two as "
                "array=mask.as_array(B, N, T, S)."
            )
        return Mask(
            causal=self.causal or other.causal,
            q_offset=_common_offset(self, other),
            window=_narrower(self.window, other.window),
            q_segment_ids=segments.q_segment_ids,
            kv_segment_ids=segments.kv_segment_ids,
            kv_start=_both(self.kv_start, other.kv_start, jnp.maximum, max),
            kv_end=_both(self.kv_end, other.kv_end, jnp.minimum, min),
            array=_both(self.array, other.array, jnp.logical_and, None),
        )


def _flatten_with_keys(mask):
    offset_is_static = isinstance(mask.q_offset, int)
    children, static = [], []
    for field in dataclasses.fields(Mask):
        value = getattr(mask, field.name)
        if field.name in _STATIC or (field.name == "q_offset" and offset_is_static):
            static.append((field.name, value))
        else:
            children.append((jax.tree_util.GetAttrKey(field.name), value))
    return children, tuple(static)


def _unflatten(static, children):
    # Not through __init__: JAX builds pytrees of placeholders, which must not be validated.
    mask = object.__new__(Mask)
    static = dict(static)
    children = iter(children)
    for field in dataclasses.fields(Mask):
        value = static[field.name] if field.name in static else next(children)
        object.__setattr__(mask, field.name, value)
    return mask


jax.tree_util.register_pytree_with_keys(Mask, _flatten_with_keys, _unflatten)


def _column(position):
    """A position, scalar or [B], as something that broadcasts against [T, S] or [B, 1, T, S]."""
    return position if np.ndim(position) == 0 else position[:, None, None, None]


def _cut(x, axis, start, size):
    """`size` elements of `x` along `axis` from `start`; all of it where it is None or 1 long."""
    if x is None or x.shape[axis] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _pad(x, axis, count):
    if x is None or x.shape[axis] == 1 or not count:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths, mode="edge")


def _check_window(window):
    if window is None:
        return
    sides = window if isinstance(window, tuple) and len(window) == 2 else (-1, -1)
    for side in sides:
        if side is not None and (not isinstance(side, numbers.Integral) or side < 0):
            raise ValueError(
                f"Mask(window=) is (left, right), each a Python int >= 0 or None, "
                f"got {window!r}; the last W keys, own included, are "
                "window=(W - 1, 0)."
            )


def _check_position(name, value):
    if (value is None and name != "q_offset") or isinstance(value, numbers.Integral):
        return
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or np.ndim(value) > 1:
        got = type(value).__name__ if dtype is None else f"{dtype}{list(np.shape(value))}"
        raise TypeError(f"Mask({name}=) is an int or an integer array, scalar or [B], got {got}.")


def _common_offset(a, b):
    if not b._uses_offset:
        return a.q_offset
    if not a._uses_offset or a.q_offset is b.q_offset:
        return b.q_offset
    if isinstance(a.q_offset, int) and isinstance(b.q_offset, int) and a.q_offset == b.q_offset:
        return a.q_offset
    raise ValueError(
        f"Masks with different q_offset ({a.q_offset} and {b.q_offset}) do not "
        "combine; give both the same object, or pass one of the two as "
        "array=mask.as_array(B, N, T, S)."
    )


def _narrower(a, b):
    if a is None or b is None:
        return b if a is None else a
    return tuple(_both(x, y, None, min) for x, y in zip(a, b, strict=True))


def _both(a, b, of_arrays, of_ints):
    """Combine two optional fields; of Python ints make a Python int."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, int) and isinstance(b, int):
        return of_ints(a, b)
    return of_arrays(a, b)
