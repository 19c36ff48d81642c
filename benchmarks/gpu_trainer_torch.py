"""The models of `gpu_trainer` in PyTorch: compiled, flash attention, autocast, fused AdamW."""

import time
from typing import Any

from benchmarks import gpu_trainer


def answer(state: dict[str, Any], do: str, **arguments: Any) -> dict[str, Any]:
    """In the child: "prepare", "turn" or "profile"."""
    if do == "prepare":
        return _prepare(state, **arguments)
    if do == "turn":
        return {"seconds": _steps(state, arguments["steps"])}
    import torch

    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        _steps(state, 2)
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: event.self_device_time_total, reverse=True)
    total = sum(event.self_device_time_total for event in events)
    costs = [
        {
            "kernel": event.key[:80],
            "share": round(event.self_device_time_total / total, 4),
            "ms": round(event.self_device_time_total / 2e3, 3),
        }
        for event in events[:8]
    ]
    return {"costs": costs}


def _prepare(state, name, batch, dry) -> dict[str, Any]:
    import torch

    from benchmarks import torch_models

    shape = gpu_trainer.named(name, batch, dry)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = torch_models.build(shape)
    optimizer = torch_models.make_optimizer(shape, model, fused=True)
    parameters = list(model.parameters())
    clip_norm = shape.optimizer.clip_norm
    assert clip_norm is not None
    forward = model if dry else torch.compile(model)
    tokens = {
        key: torch.from_numpy(value).long().to(device)
        for key, value in gpu_trainer.batch_of(shape, packed=False).items()
        if key in ("inputs", "targets")
    }
    flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            if dry:
                loss = forward(**tokens)
            else:
                with torch.nn.attention.sdpa_kernel(flash):
                    loss = forward(**tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return loss

    state |= {"step": step, "wait": torch.cuda.synchronize if device == "cuda" else lambda: None}
    first = _steps(state, 1)
    loss = float(state["loss"])
    # What torch.compile does late, and the moments of the optimiser.
    _steps(state, 2)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "parameters": sum(value.numel() for value in parameters),
        "loss": loss,
        "first_step_s": round(first, 2),
        "memory_gib": round(peak / 2**30, 2),
    }


def _steps(state: dict[str, Any], steps: int) -> float:
    """Seconds a step."""
    state["wait"]()
    start = time.perf_counter()
    for _ in range(steps):
        loss = state["step"]()
    state["wait"]()
    state["loss"] = loss.detach()
    return (time.perf_counter() - start) / steps
