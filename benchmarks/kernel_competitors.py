"""The calls by other libraries: jax itself, tokamax and optax; torch is in `kernel_torch`."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from benchmarks import kernel_shapes
from benchmarks.kernel_calls import Function

TORCH = "torch"


def competitors(op: str) -> dict[str, Callable[[Any], Function]]:
    """Name -> shape -> the call, which may refuse with NotImplementedError; torch apart."""
    every: dict[str, dict[str, Callable[[Any], Function]]] = {
        "attention": {"jax_nn": jax_nn_attention},
        "linear_cross_entropy": {"optax": optax_projection},
        "decode_attention": {"jax_nn": jax_nn_decode},
        "ctc_loss": {"optax": lambda shape: optax_ctc},
    }
    if jax.default_backend() == "gpu":
        every["attention"]["jax_nn_cudnn"] = lambda shape: jax_nn_attention(shape, "cudnn")
    if installed("tokamax"):
        every["attention"]["tokamax"] = tokamax_attention
        every["linear_cross_entropy"]["tokamax"] = tokamax_projection
    return every[op]


def installed(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None


def _masked(op: str, shape, *, aligned: bool) -> dict[str, Any]:
    """Arguments for what is hidden, for functions that line queries and keys up at the first."""
    causal = getattr(shape, "causal", True)
    if aligned and (not causal or shape.T == shape.S):
        return {"is_causal": causal} | (
            {} if shape.window is None else {"local_window_size": _window(shape)}
        )
    return {"mask": jnp.asarray(kernel_shapes.visible_array(op, shape))}


def _window(shape) -> tuple[int, int]:
    left, right = (shape.S if side is None else side for side in shape.window)
    return left, right


def jax_nn_attention(shape, implementation: Literal["xla", "cudnn"] = "xla") -> Function:
    """`jax.nn.dot_product_attention`."""
    kernel_shapes.refuse("jax.nn.dot_product_attention", softcap=shape.softcap, sinks=shape.sinks)

    def call(operands, integers):
        hidden = _masked("attention", shape, aligned=True)
        out = jax.nn.dot_product_attention(
            operands["q"],
            operands["k"],
            operands["v"],
            bias=operands.get("bias"),
            implementation=implementation,
            **hidden,
        )
        return {"out": out}

    return call


def tokamax_attention(shape) -> Function:
    """`tokamax.dot_product_attention`, which picks its own implementation."""
    kernel_shapes.refuse("tokamax.dot_product_attention", sinks=shape.sinks)
    tokamax: Any = importlib.import_module("tokamax")

    def call(operands, integers):
        hidden = _masked("attention", shape, aligned=True)
        out = tokamax.dot_product_attention(
            operands["q"],
            operands["k"],
            operands["v"],
            bias=operands.get("bias"),
            logits_soft_cap=shape.softcap,
            **hidden,
        )
        return {"out": out}

    return call


def jax_nn_decode(shape) -> Function:
    """`jax.nn.dot_product_attention` of the newest tokens and the whole cache."""
    kernel_shapes.refuse(
        "jax.nn.dot_product_attention",
        softcap=shape.softcap,
        sinks=shape.sinks,
        page_table=shape.page_size,
    )

    def call(operands, integers):
        plain = shape.T == 1 and shape.window is None
        hidden = (
            {"key_value_seq_lengths": integers["lengths"]}
            if plain
            else _masked("decode_attention", shape, aligned=False)
        )
        q, k, v = operands["q"], operands["k"], operands["v"]
        return {"out": jax.nn.dot_product_attention(q, k, v, implementation="xla", **hidden)}

    return call


def optax_projection(shape) -> Function:
    """A plain projection, logits in float32, and optax's cross-entropy of them."""

    def call(operands, integers):
        x, w, labels = operands["x"], operands["w"], integers["labels"]
        logits = (x @ (w.T if shape.transposed else w)).astype(jnp.float32)
        if shape.softcap is not None:
            logits = shape.softcap * jnp.tanh(logits / shape.softcap)
        if shape.label_smoothing:
            targets = optax.smooth_labels(jax.nn.one_hot(labels, shape.V), shape.label_smoothing)
            loss = optax.softmax_cross_entropy(logits, targets)
        else:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if shape.z_loss:
            loss = loss + shape.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return {"loss": loss.mean()}

    return call


def tokamax_projection(shape) -> Function:
    """`tokamax.linear_softmax_cross_entropy_loss`."""
    kernel_shapes.refuse(
        "tokamax.linear_softmax_cross_entropy_loss",
        softcap=shape.softcap,
        label_smoothing=shape.label_smoothing,
        z_loss=shape.z_loss,
    )
    tokamax: Any = importlib.import_module("tokamax")

    def call(operands, integers):
        w = operands["w"].T if shape.transposed else operands["w"]
        loss = tokamax.linear_softmax_cross_entropy_loss(
            operands["x"], integers["labels"], w, reduction="mean"
        )
        return {"loss": loss}

    return call


def optax_ctc(operands, integers):
    """`optax.ctc_loss`, which takes masks for lengths."""
    logits, labels = operands["logits"], integers["labels"]

    def padding(size, lengths):
        return (jnp.arange(size) >= lengths[:, None]).astype(logits.dtype)

    loss = optax.ctc_loss(
        logits,
        padding(logits.shape[1], integers["logit_lengths"]),
        labels,
        padding(labels.shape[1], integers["label_lengths"]),
    )
    return {"loss": loss}
