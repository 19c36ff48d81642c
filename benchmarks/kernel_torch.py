"""The calls by torch, for a process of its own: `serve` is a contender of `benchmarks.contest`.

Threads that torch leaves spinning, and memory that it keeps, then touch no other contender's turn.
"""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import kernel_shapes

Tensors = dict[str, Any]


def serve(cuda: bool = False) -> tuple[Callable, dict[str, Any]]:
    """A contender: a turn with `prepare=` makes a call ready, one without runs it.

    Args:
        cuda: run on the GPU.
    """
    torch: Any = importlib.import_module("torch")
    device = "cuda" if cuda and torch.cuda.is_available() else "cpu"
    ready: dict[str, Callable] = {}

    def turn(prepare: dict[str, Any] | None = None) -> dict[str, Any]:
        if prepare is None:
            ready["program"]()
            return {}
        ready.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        save = prepare.pop("save")
        try:
            ready["program"] = program(**prepare, device=device)
            found = ready["program"]()
        except (NotImplementedError, RuntimeError) as refusal:
            return {"refused": f"{refusal}".splitlines()[0]}
        arrays: dict[str, Any] = {name: as_numpy(x) for name, x in found.items()}
        np.savez(Path(save), **arrays)
        return {"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}

    return turn, {"threads": torch.get_num_threads(), "device": device}


def program(op: str, shape: dict, dtype: str, gradients: bool, device: str = "cpu") -> Callable:
    """() -> results and, if wanted, gradients of all operands, of the call that jax has too."""
    made = type(next(iter(kernel_shapes.SHAPES[op].values())))(**shape)
    floating, whole = kernel_shapes.operands(op, made)
    return program_of(op, made, floating, whole, dtype, gradients, device)


def program_of(op, shape, floating, whole, dtype="float32", gradients=True, device="cpu"):
    """The same of operands in numpy."""
    torch: Any = importlib.import_module("torch")
    operands = {
        name: torch.from_numpy(x).to(device=device, dtype=getattr(torch, dtype))
        for name, x in floating.items()
    }
    integers = {name: torch.from_numpy(x).to(device) for name, x in whole.items()}
    function = _FUNCTIONS[op](torch, shape, device)

    def forward():
        with torch.no_grad():
            found = function(operands, integers)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    if not gradients:
        return forward
    cotangents = {
        name: torch.tensor(kernel_shapes.cotangent(i, tuple(x.shape))).to(x)
        for i, (name, x) in enumerate(sorted(forward().items()))
    }
    for x in operands.values():
        x.requires_grad_()

    def backward():
        found = function(operands, integers)
        names = sorted(found)
        wanted = torch.autograd.grad(
            [found[name] for name in names],
            list(operands.values()),
            [cotangents[name] for name in names],
        )
        if device == "cuda":
            torch.cuda.synchronize()
        return found | {f"d{name}": x for name, x in zip(operands, wanted, strict=True)}

    return backward


def as_numpy(tensor) -> np.ndarray:
    """Its numbers; those of bfloat16 in float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _attention(torch, shape, device):
    kernel_shapes.refuse("scaled_dot_product_attention", softcap=shape.softcap, sinks=shape.sinks)
    aligned = shape.window is None and (not shape.causal or shape.T == shape.S)
    mask = None
    if not aligned:
        mask = torch.from_numpy(kernel_shapes.visible_array("attention", shape)).to(device)

    def call(operands, integers):
        q, k, v = (operands[name].transpose(1, 2) for name in "qkv")
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=operands.get("bias", mask),
            is_causal=aligned and shape.causal,
            enable_gqa=shape.N != shape.K,
        )
        return {"out": out.transpose(1, 2)}

    if shape.bias and (shape.causal or mask is not None):
        raise NotImplementedError("scaled_dot_product_attention: a bias or a mask, not both")
    return call


def _decode(torch, shape, device):
    kernel_shapes.refuse(
        "scaled_dot_product_attention",
        softcap=shape.softcap,
        sinks=shape.sinks,
        page_table=shape.page_size,
    )
    visible = kernel_shapes.visible_array("decode_attention", shape)
    mask = torch.from_numpy(visible).to(device)

    def call(operands, integers):
        q, k, v = (operands[name].transpose(1, 2) for name in "qkv")
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=shape.N != shape.K
        )
        return {"out": out.transpose(1, 2)}

    return call


def _projection(torch, shape, device):
    def call(operands, integers):
        x, w, labels = operands["x"], operands["w"], integers["labels"].long()
        logits = torch.nn.functional.linear(x, w if shape.transposed else w.T).float()
        if shape.softcap is not None:
            logits = shape.softcap * torch.tanh(logits / shape.softcap)
        loss = torch.nn.functional.cross_entropy(
            logits, labels, label_smoothing=shape.label_smoothing
        )
        if shape.z_loss:
            loss = loss + shape.z_loss * (torch.logsumexp(logits, -1) ** 2).mean()
        return {"loss": loss}

    return call


def _ctc(torch, shape, device):
    loss = torch.nn.CTCLoss(reduction="none")

    def call(operands, integers):
        log_p = operands["logits"].log_softmax(-1).transpose(0, 1)
        lengths = integers["logit_lengths"], integers["label_lengths"]
        return {"loss": loss(log_p, integers["labels"], *lengths)}

    return call


_FUNCTIONS: dict[str, Callable] = {
    "attention": _attention,
    "linear_cross_entropy": _projection,
    "decode_attention": _decode,
    "ctc_loss": _ctc,
}


def options(op: str, shape, dtype: str, gradients: bool) -> dict[str, Any]:
    """Arguments of `program` as JSON has them."""
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    return {"op": op, "shape": fields, "dtype": dtype, "gradients": gradients}
