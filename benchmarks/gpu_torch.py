"""Attention and decoding by torch on the GPU, for a process of its own."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_cases import Case

SECONDS_A_TURN = 0.03
MOST_CALLS = 400


def answer(state: dict[str, Any], do: str, **arguments: Any) -> dict[str, Any]:
    """In the child: "prepare" a contender of a case, or do a "turn" of it."""
    if do == "turn":
        run, calls = state["ready"][arguments["contender"]]
        return {"seconds": seconds_a_call(run, calls)}
    prepare = _prepare_decoding if do == "decode" else _prepare
    return prepare(state, **arguments)


def seconds_a_call(run: Callable[[], Any], calls: int) -> float:
    """Seconds of the device for one of `calls` calls that are queued at once."""
    import torch

    _wait(torch)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(torch)
    return (time.perf_counter() - start) / calls


def _device(torch) -> str:
    """A GPU, or the CPU for a try without one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(torch) -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _calls_a_turn(run: Callable[[], Any]) -> int:
    run()
    estimate = seconds_a_call(run, 3)
    return max(1, min(MOST_CALLS, round(SECONDS_A_TURN / estimate)))


def _prepare(state, case, gradients, contender, dry) -> dict[str, Any]:
    import torch

    made = Case(**case)
    if state.get("case") != (made, gradients):
        state.clear()
        torch.cuda.empty_cache()
        state |= {"case": (made, gradients), "ready": {}, "given": _operands(torch, made)}
    if made.dropout or made.sinks or made.kv_range:
        return {"refused": "not made for torch here"}
    q, k, v, cotangent = state["given"]
    leaves = [x.detach().requires_grad_(gradients) for x in (q, k, v)]
    try:
        attend, chosen = _BY[contender](torch, made)
        _wait(torch)
        before = torch.cuda.memory_allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

        def run():
            with chosen():
                if not gradients:
                    with torch.no_grad():
                        return (attend(*leaves),)
                out = attend(*leaves)
                return (out, *torch.autograd.grad(out, leaves, cotangent))

        found = run()
    except NotImplementedError as refusal:
        return {"refused": str(refusal)[:160]}
    except RuntimeError as failure:
        return {"refused": " ".join(str(failure).split())[:160]}
    _wait(torch)
    peak = _peak(torch) - before
    kept = sum(x.numel() * x.element_size() for x in found)
    errors = _errors(torch, made, state["given"], found)
    del found
    calls = _calls_a_turn(run)
    state["ready"][contender] = run, calls
    memory = {"temporaries_mib": round(max(0, peak - kept) / 2**20, 1)}
    return {"calls_a_turn": calls} | memory | errors


def _operands(torch, case: Case) -> tuple:
    """q, k, v and the cotangent of out, [B, N, T, H]."""
    torch.manual_seed(0)

    def draw(heads, length):
        # As models have them: [B, T, N, H] in memory.
        x = torch.randn(case.B, length, heads, case.H, device=_device(torch))
        return x.to(getattr(torch, case.dtype)).transpose(1, 2)

    return (
        draw(case.N, case.T),
        draw(case.K, case.keys),
        draw(case.K, case.keys),
        draw(case.N, case.T),
    )


def _sdpa(backend: str):
    def make(torch, case: Case):
        if case.window or case.softcap or case.documents:
            raise NotImplementedError("no window, softcap or documents without a mask array")
        if case.causal and case.keys != case.T:
            raise NotImplementedError("causal with other keys than queries")

        def attend(q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, enable_gqa=case.N != case.K
            )

        chosen = getattr(torch.nn.attention.SDPBackend, backend)
        return attend, lambda: torch.nn.attention.sdpa_kernel(chosen)

    return make


def _flex(torch, case: Case):
    """FlexAttention, compiled; for what flash and cuDNN do not have."""
    if not (case.window or case.softcap or case.documents):
        raise NotImplementedError("timed where there is a window, a softcap or documents")
    from torch.nn.attention import flex_attention as flex

    segments = case.segments()
    ids = None if segments is None else torch.from_numpy(segments).to(_device(torch))

    def visible(b, h, query, key):
        seen = query >= key if case.causal else query >= 0
        if case.window is not None:
            seen = seen & (query - key <= case.window)
        return seen if ids is None else seen & (ids[query] == ids[key])

    def capped(score, b, h, query, key):
        return case.softcap * torch.tanh(score / case.softcap)

    mask = flex.create_block_mask(visible, None, None, case.T, case.keys, device="cuda")
    compiled = torch.compile(flex.flex_attention)

    def attend(q, k, v):
        return compiled(
            q,
            k,
            v,
            score_mod=capped if case.softcap else None,
            block_mask=mask,
            enable_gqa=case.N != case.K,
        )

    return attend, contextlib.nullcontext


_BY: dict[str, Callable] = {
    "torch_flash": _sdpa("FLASH_ATTENTION"),
    "torch_cudnn": _sdpa("CUDNN_ATTENTION"),
    "torch_flex": _flex,
}


def _errors(torch, case: Case, given: tuple, found: tuple) -> dict[str, Any]:
    """Of out and gradients of one row's first group of heads, against float32."""
    group = case.N // case.K
    q, k, v, cotangent = (
        x[:1, :heads].float().detach() for x, heads in zip(given, (group, 1, 1, group), strict=True)
    )
    # TF32 is off by default.
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keys, values = (x.expand(-1, group, -1, -1) for x in leaves[1:])
    logits = leaves[0] @ keys.transpose(-1, -2) * case.H**-0.5
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    hidden = _hidden(torch, case)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    out = logits.softmax(-1) @ values
    want = (out, *torch.autograd.grad(out, leaves, cotangent)) if len(found) > 1 else (out,)
    names = ("out", "dq", "dk", "dv")[: len(want)]
    errors = {
        name: float((x[:1, : y.shape[1]].float() - y).detach().abs().max())
        for name, x, y in zip(names, found, want, strict=True)
    }
    name = max(errors, key=lambda name: errors[name])
    return {"error_of": name, "error": float(f"{errors[name]:.4g}")}


def _hidden(torch, case: Case):
    query = torch.arange(case.T, device=_device(torch))[:, None] + case.offset
    key = torch.arange(case.keys, device=_device(torch))[None]
    hidden = query < key if case.causal else None
    if case.window is not None:
        hidden = hidden | (query - key > case.window)
    segments = case.segments()
    if segments is not None:
        ids = torch.from_numpy(segments).to(_device(torch))
        hidden = hidden | (ids[:, None] != ids[None])
    return hidden


def _prepare_decoding(state, shape, contender, calls) -> dict[str, Any]:
    """`calls` steps, each with a cache of its own, in a CUDA graph: one is over in microseconds."""
    import torch

    state.clear()
    torch.cuda.empty_cache()
    B, S, N, K, H = (shape[name] for name in "BSNKH")

    def draw(*sizes):
        return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)

    q = draw(B, N, 1, H)
    caches = [tuple(draw(B, S, K, H).transpose(1, 2) for _ in range(2)) for _ in range(calls)]

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=N != K)

    backend = {"torch_flash": "FLASH_ATTENTION", "torch_cudnn": "CUDNN_ATTENTION"}[contender]
    chosen = getattr(torch.nn.attention.SDPBackend, backend)
    try:
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(chosen):
            aside = torch.cuda.Stream()
            with torch.cuda.stream(aside):
                attend(q, *caches[0])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = q
                for k, v in caches:
                    out = attend(out, k, v)
    except RuntimeError as failure:
        return {"refused": " ".join(str(failure).split())[:160]}
    graph.replay()
    state["kept"] = q, caches, out
    state["ready"] = {contender: (graph.replay, _calls_a_turn(graph.replay))}
    return {"calls_a_turn": calls * state["ready"][contender][1]}
