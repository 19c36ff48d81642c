"""What is compiled: calls of real models through the public functions, forward and backward.

Imports jax, so a worker sets the environment that jax reads before it imports this.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer_kernels import Dropout, Mask, attention, tuning
from jaxformer_kernels.attention import api as attention_api
from jaxformer_kernels.attention import shapes as attention_shapes
from jaxformer_kernels.ctc import api as ctc_api
from jaxformer_kernels.ctc import shapes as ctc_shapes
from jaxformer_kernels.decode_attention import api as decode_api
from jaxformer_kernels.decode_attention import shapes as decode_shapes
from jaxformer_kernels.linear_cross_entropy import api as projection_api
from jaxformer_kernels.linear_cross_entropy import shapes as projection_shapes

FORWARD, BACKWARD = "forward", "forward + backward"


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile.

    Attributes:
        op: name of the public function.
        call: the shape's name, and "+" with a feature that the model's own call does not have.
        passes: FORWARD or BACKWARD.
        dtype: of the operands.
        build: () -> (function, its arguments as shapes).
        small: whether it is among the few that stand for all.
    """

    op: str
    call: str
    passes: str
    dtype: str
    build: Callable[[], tuple[Callable, tuple]]
    small: bool = False

    @property
    def name(self) -> str:
        """As `attention llama3_8b bfloat16 forward`."""
        return f"{self.op} {self.call} {self.dtype} {self.passes}"


def all_cases(implementation: str) -> list[Case]:
    """The cases of every op that has this implementation; names are unique."""
    found = []
    for implementations, cases in (
        (attention_api.IMPLEMENTATIONS, attention_cases),
        (decode_api.IMPLEMENTATIONS, decode_cases),
        (projection_api.IMPLEMENTATIONS, projection_cases),
        (ctc_api.IMPLEMENTATIONS, ctc_cases),
    ):
        if implementation in implementations:
            found += cases(implementation)
    return found


def attention_cases(implementation: str) -> Iterator[Case]:
    """The named shapes and the tuned ones in bfloat16, one with every other feature, two dtypes."""
    shapes = {name: (shape, shape.H) for name, shape in attention_shapes.SHAPES.items()}
    if implementation == "mosaic_gpu":
        shapes |= tuned_shapes()
    calls = [(name, "", "bfloat16") for name in shapes]
    calls += [("llama3_8b", feature, "bfloat16") for feature in _EXTRAS]
    calls += [("llama3_8b", "", "float16"), ("odd_length", "", "float32")]
    for name, extra, dtype in calls:
        for passes in (FORWARD, BACKWARD):
            yield Case(
                op="attention",
                call=f"{name}+{extra}" if extra else name,
                passes=passes,
                dtype=dtype,
                build=functools.partial(
                    _attention, implementation, *shapes[name], extra, dtype, passes
                ),
                small=(name, extra) in _SMALL and dtype == "bfloat16",
            )


_SMALL = {("gemma2_9b_local", ""), ("gpt_oss_local", ""), ("llama3_8b", "packed")}


def tuned_shapes() -> dict[str, tuple[attention_shapes.Shape, int]]:
    """A call (shape, Hv) for every pair of head dims that block sizes were found for."""
    heads = {
        key
        for path in Path(tuning.__file__).parent.glob("*/attention.json")
        for kernel in json.loads(path.read_text(encoding="utf-8")).values()
        if isinstance(kernel, dict)
        for key in kernel
    }
    found = {}
    for key in sorted(heads):
        H, Hv = map(int, key.split(","))
        found[f"tuned_{H}_{Hv}"] = (attention_shapes.Shape(1, 2048, 2048, 8, 2, H), Hv)
    return found


def decode_cases(implementation: str) -> Iterator[Case]:
    """The named shapes in bfloat16, forward only."""
    for name, shape in decode_shapes.SHAPES.items():
        yield Case(
            op="decode_attention",
            call=name,
            passes=FORWARD,
            dtype="bfloat16",
            build=functools.partial(_decode, implementation, shape),
            small=name in ("llama3_8b", "llama3_8b_pages_of_64"),
        )


def projection_cases(implementation: str) -> Iterator[Case]:
    """The named shapes in bfloat16; the gradients come from the tiles of `xla`."""
    for name, shape in projection_shapes.SHAPES.items():
        yield Case(
            op="linear_cross_entropy",
            call=name,
            passes=FORWARD,
            dtype="bfloat16",
            build=functools.partial(_projection, implementation, shape),
            small=name == "llama3_8b",
        )


def ctc_cases(implementation: str) -> Iterator[Case]:
    """The named shapes in float32, and one in bfloat16."""
    calls = [(name, "float32") for name in ctc_shapes.SHAPES] + [("word_pieces", "bfloat16")]
    for name, dtype in calls:
        for passes in (FORWARD, BACKWARD):
            yield Case(
                op="ctc_loss",
                call=name,
                passes=passes,
                dtype=dtype,
                build=functools.partial(
                    _ctc, implementation, ctc_shapes.SHAPES[name], dtype, passes
                ),
                small=(name, dtype) == ("word_pieces", "float32"),
            )


def _int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


# Feature -> the fields of `Mask`, and the options of `attention`, that it adds to a call.
_EXTRAS: dict[str, Callable[[Any], tuple[dict, dict]]] = {
    "packed": lambda x: (
        {"q_segment_ids": _int32(x.B, x.T), "kv_segment_ids": _int32(x.B, x.S)},
        {},
    ),
    "lengths": lambda x: ({"kv_end": _int32(x.B)}, {}),
    "offset": lambda x: ({"q_offset": _int32(x.B)}, {}),
    "array": lambda x: ({"array": jax.ShapeDtypeStruct((x.B, 1, x.T, x.S), jnp.bool_)}, {}),
    "dropout": lambda x: (
        {},
        {"dropout": Dropout(0.1, jax.ShapeDtypeStruct((2,), jnp.uint32))},
    ),
    "lse": lambda x: ({}, {"return_lse": True}),
}


def _attention(implementation, shape, Hv, extra, dtype, passes):
    def array(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H
    operands = {"q": array(B, T, N, H), "k": array(B, S, K, H), "v": array(B, S, K, Hv)}
    if shape.bias:
        operands["bias"] = array(1, N, T, S)
    if shape.sinks:
        operands["sinks"] = array(N, dtype="float32")
    fields, options = _EXTRAS[extra](shape) if extra else ({}, {})
    offset = fields.pop("q_offset", shape.S - shape.T if shape.causal else 0)
    mask = Mask(causal=shape.causal, window=shape.window, q_offset=offset, **fields)
    arrays = {"mask": mask, "dropout": options.pop("dropout", None)}

    def forward(operands, arrays):
        return attention(
            **operands, **arrays, **options, softcap=shape.softcap, implementation=implementation
        )

    return _passes(forward, operands, arrays, passes)


def _passes(forward, operands, arrays, passes):
    """(function, arguments): `forward`, or it and the gradients of `operands`."""
    if passes == FORWARD:
        return forward, (operands, arrays)

    def backward(operands, arrays, cotangents):
        outputs, pull = jax.vjp(lambda operands: forward(operands, arrays), operands)
        return outputs, pull(cotangents)

    return backward, (operands, arrays, jax.eval_shape(forward, operands, arrays))


def _decode(implementation, shape):
    def array(*sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(sizes, dtype)

    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H
    cache, table = (B, S, K, H), None
    if shape.page_size is not None:
        pages = S // shape.page_size
        cache, table = (B * pages, shape.page_size, K, H), _int32(B, pages)
    arrays = {
        "q": array(B, T, N, H),
        "k": array(*cache),
        "v": array(*cache),
        "lengths": _int32(B),
        "page_table": table,
        "sinks": array(N, dtype="float32") if shape.sinks else None,
    }

    def forward(arrays):
        return decode_api.decode_attention(
            **arrays, window=shape.window, softcap=shape.softcap, implementation=implementation
        )

    return forward, (arrays,)


def _projection(implementation, shape):
    tokens, D, V = shape.tokens, shape.D, shape.V
    arrays = {
        "x": jax.ShapeDtypeStruct((tokens, D), jnp.bfloat16),
        "w": jax.ShapeDtypeStruct((V, D) if shape.transposed else (D, V), jnp.bfloat16),
        "labels": _int32(tokens),
        "weights": jax.ShapeDtypeStruct((tokens,), jnp.float32),
    }

    def forward(arrays):
        return projection_api.linear_cross_entropy(
            **arrays,
            softcap=shape.softcap,
            label_smoothing=shape.label_smoothing,
            z_loss=shape.z_loss,
            transposed=shape.transposed,
            implementation=implementation,
        )

    return forward, (arrays,)


def _ctc(implementation, shape, dtype, passes):
    arrays = {
        "logit_lengths": _int32(shape.B),
        "labels": _int32(shape.B, shape.N),
        "label_lengths": _int32(shape.B),
    }

    def forward(logits, arrays):
        return ctc_api.ctc_loss(logits, **arrays, implementation=implementation)

    logits = jax.ShapeDtypeStruct((shape.B, shape.T, shape.V), dtype)
    return _passes(forward, logits, arrays, passes)
