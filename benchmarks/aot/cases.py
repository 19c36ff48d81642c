"""What is compiled: calls of real models through the public functions, forward and backward.

Imports jax, so a worker sets the environment that jax reads before it imports this.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer_kernels import Dropout, Mask, attention
from jaxformer_kernels.attention import api as attention_api
from jaxformer_kernels.attention.shapes import SHAPES

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
    for implementations, cases in ((attention_api.IMPLEMENTATIONS, attention_cases),):
        if implementation in implementations:
            found += cases(implementation)
    return found


def attention_cases(implementation: str) -> Iterator[Case]:
    """The named shapes in bfloat16; one with every other feature; odd ones in other dtypes."""
    calls = [(name, "", "bfloat16") for name in SHAPES]
    calls += [("llama3_8b", feature, "bfloat16") for feature in _EXTRAS]
    calls += [("llama3_8b", "", "float16"), ("odd_length", "", "float32")]
    for shape, extra, dtype in calls:
        for passes in (FORWARD, BACKWARD):
            yield Case(
                op="attention",
                call=f"{shape}+{extra}" if extra else shape,
                passes=passes,
                dtype=dtype,
                build=functools.partial(
                    _attention, implementation, SHAPES[shape], extra, dtype, passes
                ),
                small=(shape, extra) in _SMALL and dtype == "bfloat16",
            )


_SMALL = {
    ("llama3_8b", ""),
    ("gemma2_9b_local", ""),
    ("gpt_oss_local", ""),
    ("llama3_8b", "packed"),
}


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


def _attention(implementation, shape, extra, dtype, passes):
    def array(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H
    operands = {"q": array(B, T, N, H), "k": array(B, S, K, H), "v": array(B, S, K, H)}
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
