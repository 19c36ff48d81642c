"""Whole training steps on the GPU, with each attention implementation, beside PyTorch.

bfloat16, AdamW, clipping; synthetic tokens that lie on the device. One contender after the other,
each in a process of its own with the memory to itself. "whole": a row is one document, the work of
everyone. "packed": several documents a row, their boundaries kept by the mask; ours alone, and MFU
counts rows as whole, so the figure flatters who skips what is hidden.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_process import Process, Settings
from benchmarks.train_shapes import Shape
from jaxformer.config import ModelConfig

READY_SECONDS = 300.0
TURN_SECONDS = 90.0
STEPS_A_TURN = 5
DOCUMENTS = 5
FORMULA = "6 a matrix element and token, 12 N H a visible query and key of a layer (causal: half)"
PEAK = 989.4
"""TFLOP/s in bfloat16 by the data sheet of an H100 SXM."""
OURS = "benchmarks.gpu_trainer"
TORCH = "benchmarks.gpu_trainer_torch"

_GPT2 = ModelConfig(
    kind="decoder",
    layers=12,
    width=768,
    heads=12,
    position="learned",
    activation="gelu",
    max_length=2048,
    scan=False,
    compute_dtype="bfloat16",
)
_LLAMA = ModelConfig(
    kind="decoder",
    layers=22,
    width=2048,
    heads=32,
    kv_heads=4,
    feedforward=5632,
    activation="swiglu",
    norm="rmsnorm",
    bias=False,
    tied_embeddings=False,
    max_length=2048,
    scan=False,
    compute_dtype="bfloat16",
)
SHAPES = {
    "gpt2_124m": Shape(_GPT2, vocabulary=50304, batch=16, length=2048),
    # TinyLlama's, arXiv:2401.02385: 1.1 billion parameters.
    "llama_1b": Shape(_LLAMA, vocabulary=32000, batch=8, length=2048),
}


def named(name: str, batch: int, dry: bool) -> Shape:
    """The shape, with so many rows."""
    shape = dataclasses.replace(SHAPES[name], batch=batch)
    return shape.tiny() if dry else shape


def contenders(settings: Settings) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, module, options)."""
    kernel = settings.kernel
    found: list[tuple[str, str, dict[str, Any]]] = [(kernel, OURS, {"attention": kernel})]
    if not settings.dry:
        found += [
            ("torch compile flash", TORCH, {}),
            ("cudnn", OURS, {"attention": "cudnn"}),
            ("xla", OURS, {"attention": "xla"}),
            ("mosaic_gpu scanned", OURS, {"attention": kernel, "scan": True}),
        ]
    found += [(f"{kernel} packed", OURS, {"attention": kernel, "packed": True})]
    if not settings.dry:
        found += [("xla packed", OURS, {"attention": "xla", "packed": True})]
    return found


def rows(settings: Settings, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every model and contender."""
    facts |= {"flops": FORMULA, "peak_tflops": PEAK, "order": "one after the other"}
    with Process("benchmarks.gpu_attention", settings) as process:
        size = 256 if settings.dry else 8192
        peaks = process.ask(settings.within(READY_SECONDS), do="ceilings", size=size)
    facts["ceilings"] = peaks
    for name in SHAPES:
        for contender, module, options in contenders(settings):
            if not settings.wants(f"{name} {contender}"):
                continue
            row = {"model": name, "contender": contender}
            if settings.left <= 0:
                facts.setdefault("left_out", []).append(f"{name} {contender}")
                continue
            yield row | _measured(name, module, options, peaks, settings)


def _measured(name, module, options, peaks, settings: Settings) -> dict[str, Any]:
    """The contender's row; with fewer rows a batch if they do not fit."""
    environment = {"XLA_CLIENT_MEM_FRACTION": "0.93"}
    batch = SHAPES[name].batch
    while True:
        with Process(module, settings, environment=environment) as process:
            ready = process.ask(
                settings.within(READY_SECONDS),
                do="prepare",
                name=name,
                batch=batch,
                dry=settings.dry,
                **options,
            )
            told = ready.get("failed", "")
            if ("RESOURCE_EXHAUSTED" in told or "OutOfMemory" in told) and batch > 1:
                batch //= 2
                continue
            if "parameters" not in ready:
                return ready
            return ready | _timed(process, named(name, batch, settings.dry), peaks, settings)


def _timed(process: Process, shape: Shape, peaks, settings: Settings) -> dict[str, Any]:
    from benchmarks.measure import Times
    from benchmarks.train import flops_of

    taken = []
    for _ in range(settings.turns):
        turn = process.ask(settings.within(TURN_SECONDS), do="turn", steps=STEPS_A_TURN)
        if "seconds" not in turn:
            return turn
        taken.append(turn["seconds"])
    times = Times(tuple(taken))
    rate = flops_of(shape) / times.median / 1e12
    row = times.milliseconds() | {
        "batch": shape.batch,
        "tokens_per_s": round(shape.tokens / times.median),
        "tflops": float(f"{rate:.4g}"),
        "mfu": float(f"{rate / PEAK:.4g}"),
    }
    if peaks.get("matmul_bfloat16_tflops"):
        row["share_of_matmul"] = float(f"{rate / peaks['matmul_bfloat16_tflops']:.4g}")
    return row | process.ask(settings.within(TURN_SECONDS), do="profile")


def batch_of(shape: Shape, packed: bool) -> dict[str, np.ndarray]:
    """Tokens for one step, everything on; `packed`: documents of uneven length."""
    random = np.random.default_rng(0)
    lines = random.integers(0, shape.vocabulary, (shape.batch, shape.length + 1), np.int32)
    place = np.tile(np.arange(shape.length, dtype=np.int32), (shape.batch, 1))
    batch = {
        "inputs": np.ascontiguousarray(lines[:, :-1]),
        "targets": np.ascontiguousarray(lines[:, 1:]),
        "weights": np.ones(place.shape, np.float32),
        "positions": place,
    }
    if packed:
        cuts = np.sort(random.integers(1, shape.length, (shape.batch, DOCUMENTS - 1)), axis=1)
        ids = (place[:, :, None] >= cuts[:, None]).sum(-1).astype(np.int32)
        starts = np.concatenate([np.zeros((shape.batch, 1), np.int64), cuts], axis=1)
        batch["segment_ids"] = ids + 1
        batch["positions"] = (place - np.take_along_axis(starts, ids, axis=1)).astype(np.int32)
    return batch


def answer(state: dict[str, Any], do: str, **arguments: Any) -> dict[str, Any]:
    """In the child, of jax: "prepare", "turn" or "profile"."""
    import jax

    if do == "prepare":
        return _prepare(state, **arguments)
    if do == "turn":
        return {"seconds": _steps(state, arguments["steps"])}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _steps(state, 2)
        return {"costs": largest_costs(Path(folder))}


def _prepare(state, name, batch, dry, attention, packed=False, scan=False) -> dict[str, Any]:
    import jax

    from benchmarks import train_contenders
    from jaxformer import nn

    shape = named(name, batch, dry).with_model(attention=attention, scan=scan)
    step, train_state = train_contenders.make_step(shape)
    tokens = jax.device_put(batch_of(shape, packed))
    compiled = step.lower(train_state, tokens).compile()
    count = nn.count(train_state.params)
    state |= {"step": compiled, "state": train_state, "tokens": tokens}
    first = _steps(state, 1)
    loss = float(state["metrics"]["loss"])
    sizes = compiled.memory_analysis()
    peak = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes if sizes else 0
    return {
        "parameters": count,
        "loss": loss,
        "first_step_s": round(first, 2),
        "memory_gib": round(peak / 2**30, 2),
    }


def _steps(state: dict[str, Any], steps: int) -> float:
    """Seconds a step."""
    import time

    import jax

    start = time.perf_counter()
    for _ in range(steps):
        state["state"], state["metrics"] = state["step"](state["state"], state["tokens"])
    jax.block_until_ready((state["state"], state["metrics"]))
    return (time.perf_counter() - start) / steps


def largest_costs(folder: Path, count: int = 8) -> list[dict[str, Any]]:
    """What took the device longest, by the name of the kernel: share of its time, ms a step."""
    import jax

    taken: dict[str, float] = {}
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "/device:GPU" not in plane.name:
                continue
            for line in plane.lines:
                # Other lines repeat the time of the kernels by the op or module they are of.
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    name = event.name.rstrip("0123456789_.")
                    taken[name] = taken.get(name, 0.0) + event.duration_ns
    total = sum(taken.values())
    largest = sorted(taken.items(), key=_second, reverse=True)[:count]
    return [
        {"kernel": name[:80], "share": round(spent / total, 4), "ms": round(spent / 2e6, 3)}
        for name, spent in largest
    ]


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed, MFU, memory and the three largest costs."""
    columns = ("model", "contender", "batch", "ms", "tokens_per_s", "mfu", "memory_gib")
    table = []
    for row in rows:
        line = {column: row.get(column) for column in columns}
        costs = [f"{cost['kernel'][:28]} {cost['share']:.0%}" for cost in row.get("costs", [])[:3]]
        line["largest"] = "; ".join(costs)
        line["note"] = (row.get("failed") or row.get("hung") or "")[:100]
        table.append(line)
    return table
