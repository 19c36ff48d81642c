"""The named shapes of every op: finding one, making it smaller, and counting its work.

No jax, for a process with another library in it draws its operands here too.
"""

import dataclasses
import difflib
import math
from typing import Any

import ml_dtypes
import numpy as np

from jaxformer_kernels.attention.shapes import SHAPES as ATTENTION
from jaxformer_kernels.ctc.shapes import SHAPES as CTC
from jaxformer_kernels.decode_attention.shapes import SHAPES as DECODE
from jaxformer_kernels.linear_cross_entropy.shapes import SHAPES as PROJECTION

SHAPES: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "linear_cross_entropy": PROJECTION,
    "decode_attention": DECODE,
    "ctc_loss": CTC,
}

FORMULAS = {
    "attention": "4 N H P FLOPs forward, 14 N H P with gradients (7 products; what is computed "
    "again in the backward pass does not count); P = visible pairs of a query and a key in all "
    "rows: of a causal mask or a window only what is seen",
    "linear_cross_entropy": "2 tokens D V FLOPs forward, 6 tokens D V with gradients",
    "decode_attention": "4 N H P FLOPs; P = visible pairs of a query and a key in all rows",
    "ctc_loss": "B T (4 V + 4 (2 N + 1)) operations forward, B T (6 V + 10 (2 N + 1)) with the "
    "gradient; 2 N + 1 = states of a row",
}
ROOFLINE = (
    "roofline = floor / time, floor = max(FLOPs / rate of a large matmul, bytes / rate of a large "
    "copy), both rates measured in this run; bytes = operands, cotangents, results and gradients "
    "once each (of a cache only what is visible). Arrays that fit a cache can pass 1"
)


class UnknownName(ValueError):
    """No such name; the message has the nearest one."""


def nearest(kind: str, name: str, names) -> str:
    """`name` as it stands in `names`; hyphens may stand for underscores.

    Raises:
        UnknownName: it is not there.
    """
    names = list(names)
    found = name.replace("-", "_")
    if found in names:
        return found
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UnknownName(f"unknown {kind} {name!r}; {hint}Available: {', '.join(names)}.")


def refuse(library: str, **lacks: Any) -> None:
    """Raises NotImplementedError if a call needs any of what the library lacks."""
    wanted = [word.replace("_", " ") for word, is_wanted in lacks.items() if is_wanted]
    if wanted:
        raise NotImplementedError(f"{library} has no {', no '.join(wanted)}")


def describe(shape) -> str:
    """As `B1 T4096 S4096 N2 K2 H128 causal`: every size, and every option that is on."""
    words = []
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if value is True:
            words.append(field.name)
        elif isinstance(value, int) and value is not False and len(field.name) < 7:
            words.append(f"{field.name}{' ' if len(field.name) > 1 else ''}{value}")
        elif value not in (None, False, 0):
            words.append(f"{field.name} {value}".replace(", ", ","))
    return " ".join(words)


def lengths(shape) -> np.ndarray:
    """Positions that each row of a decoding call uses: a third of its room to all of it."""
    first = shape.S // 3 if shape.B > 1 else shape.S
    return np.linspace(max(first, shape.T), shape.S, shape.B).astype(np.int32)


def visible(op: str, shape) -> np.ndarray:
    """(first, one past the last) key a query sees, [rows, T, 2]; one row if all are alike."""
    if op == "decode_attention":
        place = lengths(shape)[:, None] - shape.T + np.arange(shape.T)
        causal = True
    else:
        causal = shape.causal
        place = (np.arange(shape.T) + (shape.S - shape.T if causal else 0))[None]
    left, right = shape.window or (None, None)
    first = np.zeros_like(place) if left is None else np.maximum(0, place - left)
    last = np.full_like(place, shape.S - 1)
    if causal:
        last = np.minimum(last, place)
    if right is not None:
        last = np.minimum(last, place + right)
    return np.stack([first, np.maximum(first, last + 1)], axis=-1)


def visible_array(op: str, shape) -> np.ndarray:
    """Bool [rows, 1, T, S], for libraries that take a mask as an array."""
    first, end = np.moveaxis(visible(op, shape), -1, 0)[..., None]
    keys = np.arange(shape.S)
    return ((keys >= first) & (keys < end))[:, None]


def flops(op: str, shape, gradients: bool = False) -> float:
    """Arithmetic of a call by `FORMULAS`."""
    if op == "linear_cross_entropy":
        return (6.0 if gradients else 2.0) * shape.tokens * shape.D * shape.V
    if op == "ctc_loss":
        states = 2 * shape.N + 1
        each = 6 * shape.V + 10 * states if gradients else 4 * shape.V + 4 * states
        return float(shape.B * shape.T * each)
    spans = visible(op, shape)
    pairs = float((spans[..., 1] - spans[..., 0]).sum()) * (shape.B / len(spans))
    return (14.0 if gradients else 4.0) * shape.N * shape.H * pairs


def elements(op: str, shape) -> int:
    """Numbers in the operands, about."""
    if op == "linear_cross_entropy":
        return shape.D * (shape.V + shape.tokens)
    if op == "ctc_loss":
        return shape.B * shape.T * shape.V
    bias = shape.N * shape.T * shape.S if getattr(shape, "bias", False) else 0
    return shape.B * shape.H * (shape.N * shape.T + 2 * shape.K * shape.S) + bias


def shrunk(op: str, shape, share: float):
    """The same kind of call with at most about `share` of the work.

    What models differ in comes last: batch first, then heads, then lengths; of a projection the
    tokens, of CTC rows and then frames and labels. Head dims, widths and vocabularies stay.
    """
    if share >= 1:
        return shape
    if op == "linear_cross_entropy":
        return dataclasses.replace(shape, tokens=max(1, int(shape.tokens * share)))
    smaller = dataclasses.replace(shape, B=max(1, int(shape.B * share)))
    share *= shape.B / smaller.B
    if share >= 1:
        return smaller
    if op == "ctc_loss":
        frames, labels = (max(1, int(size * share)) for size in (shape.T, shape.N))
        return smaller.scaled(smaller.B, frames, shape.V, labels)
    K = max(1, int(shape.K * share))
    smaller = dataclasses.replace(smaller, K=K, N=K * (shape.N // shape.K))
    share *= shape.K / K
    if share < 1:
        power = 1 if op == "decode_attention" else 0.5
        groups = {"decode_attention": "groups", "attention": "heads"}[op]
        length = max(1, int(max(shape.T, shape.S) * share**power))
        smaller = smaller.scaled(length, head_dim=shape.H, **{groups: max(K, shape.N // shape.K)})
    return smaller


def fitted(op: str, shape, *, most_flops: float, most_elements: float):
    """The shape, shrunk to so much arithmetic forward and so many operands if it has more."""
    share = min(most_flops / flops(op, shape), most_elements / elements(op, shape))
    return shrunk(op, shape, share)


def tiny(op: str, shape):
    """The same kind of call as small as it can be and still be one."""
    if op == "linear_cross_entropy":
        return shape.scaled(48, 32, 131)
    if op == "ctc_loss":
        return shape.scaled(2, 24, 12, 5)
    groups = "groups" if op == "decode_attention" else "heads"
    return shape.scaled(48, head_dim=16, **{groups: 2})


def at_length(longest, length: int):
    """An attention call of this length with as many tokens in all as the longest one's."""
    return dataclasses.replace(
        longest, B=max(1, longest.B * longest.T // length), T=length, S=length
    )


_AT_ONCE = 2**20  # in float64; a whole weight matrix of these would be the peak of memory


def draw(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers."""
    generator = np.random.RandomState(seed)
    found = np.empty(shape, np.float32)
    flat = found.reshape(-1)
    for start in range(0, flat.size, _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        part[:] = generator.standard_normal(part.size)
    return found


def operands(op: str, shape) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(what has gradients, whole numbers) of a call, each by name; always the same."""
    if op == "linear_cross_entropy":
        w = draw(1, *((shape.V, shape.D) if shape.transposed else (shape.D, shape.V)))
        labels = np.random.RandomState(2).randint(0, shape.V, shape.tokens).astype(np.int32)
        w *= 1 / math.sqrt(shape.D)
        return {"x": draw(0, shape.tokens, shape.D), "w": w}, {"labels": labels}
    if op == "ctc_loss":
        labels = np.random.RandomState(2).randint(1, shape.V, (shape.B, shape.N))
        whole = {
            "logit_lengths": np.full(shape.B, shape.T, np.int32),
            "labels": labels.astype(np.int32),
            "label_lengths": np.full(shape.B, shape.N, np.int32),
        }
        return {"logits": draw(0, shape.B, shape.T, shape.V)}, whole
    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H
    rows, room = B, S
    whole = {}
    if op == "decode_attention":
        whole["lengths"] = lengths(shape)
        if shape.page_size is not None:
            pages = -(-S // shape.page_size)
            rows, room = B * pages, shape.page_size
            table = np.random.RandomState(5).permutation(rows).reshape(B, pages)
            whole["page_table"] = table.astype(np.int32)
    found = {"q": draw(0, B, T, N, H), "k": draw(1, rows, room, K, H)}
    found["v"] = draw(2, rows, room, K, H)
    if getattr(shape, "bias", False):
        found["bias"] = draw(3, 1, N, T, S)
    if shape.sinks:
        found["sinks"] = draw(4, N)
    return found, whole


def cotangent(index: int, shape: tuple[int, ...]) -> np.ndarray:
    """What gradients of a result start from: 1 of a scalar, else numbers that bfloat16 holds.

    Args:
        index: of the result among the results' sorted names.
        shape: of the result.
    """
    if not shape:
        return np.ones((), np.float32)
    return draw(9 + index, *shape).astype(ml_dtypes.bfloat16).astype(np.float32)
