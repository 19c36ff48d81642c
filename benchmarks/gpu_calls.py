"""Attention in jax for the GPU suite: operands drawn on the device, calls, errors, and times."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_calls
from benchmarks.gpu_cases import Case
from benchmarks.kernel_calls import Arrays, Function
from benchmarks.kernel_competitors import jax_nn_attention, tokamax_attention
from benchmarks.kernel_shapes import refuse
from jaxformer_kernels import Dropout, Mask, attention

SECONDS_A_TURN = 0.03
"""Of device time: so many calls are queued one behind the other that the host is done long before
the device, and the time of a call is that of the device."""
MOST_CALLS = 400


def operands(case: Case, seed: int = 0) -> Arrays:
    """q, k, v, and sinks where there are any; standard normal."""
    shapes: dict[str, tuple[int, ...]] = {"q": (case.B, case.T, case.N, case.H)}
    shapes |= dict.fromkeys("kv", (case.B, case.keys, case.K, case.H))
    if case.sinks:
        shapes["sinks"] = (case.N,)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape).astype(case.dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def options(case: Case) -> dict[str, Any]:
    """Keyword arguments of `attention` besides the operands."""
    segments, ranges = case.segments(), case.ranges()
    ids = None if segments is None else jnp.tile(segments, (case.B, 1))
    first, end = (None, None) if ranges is None else map(jnp.asarray, ranges)
    mask = Mask(
        causal=case.causal,
        window=None if case.window is None else (case.window, 0),
        q_offset=case.offset,
        q_segment_ids=ids,
        kv_segment_ids=ids,
        kv_start=first,
        kv_end=end,
    )
    dropout = Dropout(case.dropout, jax.random.key(7)) if case.dropout else None
    return {"mask": mask, "softcap": case.softcap, "dropout": dropout}


def ours(case: Case, implementation: str, *, lse: bool = False) -> Function:
    """The call by one of our implementations."""

    def call(operands, integers):
        found = attention(
            **operands, **options(case), return_lse=lse, implementation=implementation
        )
        return {"out": found[0], "lse": found[1]} if lse else {"out": found}

    return call


def plain(case: Case) -> Function:
    """The call as one writes it first, every step in the dtype of the operands."""

    def call(operands, integers):
        out, lse = kernel_calls.plain_attention(**operands, **options(case))
        return {"out": out, "lse": lse}

    return call


def contenders(case: Case, dry: bool) -> dict[str, Callable[[], Function]]:
    """Everyone of jax who may know the call, ours first; a function that may refuse it."""
    mine = "xla" if dry else "mosaic_gpu"
    shape = case.shape()
    found: dict[str, Callable[[], Function]] = {
        mine: lambda: ours(case, mine),
        "jax_nn_cudnn": lambda: _known(case, jax_nn_attention(shape, "cudnn")),
        "tokamax": lambda: _known(case, tokamax_attention(shape)),
        "jax_nn": lambda: _known(case, jax_nn_attention(shape)),
    }
    return found


def _known(case: Case, function: Function) -> Function:
    refuse("it", packed_documents=case.documents, dropout=case.dropout, kv_range=case.kv_range)
    return function


def results(function: Function, given: Arrays, cotangents: Arrays | None) -> Arrays:
    """What the call gives, with the gradients of its operands if there are cotangents."""
    return jax.jit(program(function, cotangents is not None))(given, cotangents or {})


def program(function: Function, gradients: bool) -> Callable[[Arrays, Arrays], Arrays]:
    """(operands, cotangents) -> results and gradients."""

    def backward(given, cotangents):
        found = jax.eval_shape(function, given, {})
        fitting = {name: cotangents[name].astype(x.dtype) for name, x in found.items()}
        return kernel_calls.with_gradients(function, given, {}, fitting)

    return backward if gradients else lambda given, cotangents: function(given, {})


def draw_cotangents(case: Case) -> Arrays:
    """Of out and of lse, standard normal; that of out as the dtype of the call holds it."""
    one, two = jax.random.split(jax.random.key(99))
    out = jax.random.normal(one, (case.B, case.T, case.N, case.H)).astype(case.dtype)
    return {"out": out, "lse": jax.random.normal(two, (case.B, case.N, case.T))}


@contextlib.contextmanager
def exactly() -> Generator[None]:
    """Products of float32 in float32: by default this chip does them in TF32."""
    with jax.default_matmul_precision("highest"):
        yield


def exact(case: Case, given: Arrays, cotangents: Arrays | None, lse: bool) -> Arrays:
    """The call in float32, in blocks, so that any length fits."""
    wide = {name: x.astype(jnp.float32) for name, x in given.items()}
    with exactly():
        return results(ours(case, "xla", lse=lse), wide, cotangents)


def errors(got: Arrays, want: Arrays) -> dict[str, float]:
    """Result -> largest difference, infinite where one is not finite and the other is."""
    return {name: float(_error(got[name], x)) for name, x in want.items() if name in got}


@jax.jit
def _error(got, want):
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    # Of a row that sees nothing lse is -inf on both sides.
    same = (got == want) | ~(jnp.isfinite(got) | jnp.isfinite(want))
    difference = jnp.where(same, 0.0, jnp.abs(got - want))
    return jnp.max(jnp.where(jnp.isnan(difference), jnp.inf, difference), initial=0.0)


def one_group(case: Case, arrays: Arrays) -> tuple[Case, Arrays]:
    """One row and one key-value head with its query heads, which depend on nothing else."""
    G = case.N // case.K
    heads = {"k": 1, "v": 1, "dk": 1, "dv": 1}
    smaller = dataclasses.replace(case, B=1, N=G, K=1)
    part = {
        name: x[:1, :G] if name == "lse" else x[:1, :, : heads.get(name, G)]
        for name, x in arrays.items()
    }
    return smaller, part


def worst(found: dict[str, float], allowed: dict[str, float]) -> dict[str, Any]:
    """The result whose error is the largest share of the plain computation's."""
    name = max(found, key=lambda name: found[name] / max(allowed[name], 1e-12))
    return {
        "error_of": name,
        "error": short(found[name]),
        "plain_error": short(allowed[name]),
    }


def seconds_a_call(run: Callable[[], Any], calls: int) -> float:
    """Seconds of the device for one of `calls` calls that are queued at once."""
    start = time.perf_counter()
    for _ in range(calls):
        found = run()
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / calls


def calls_a_turn(run: Callable[[], Any]) -> int:
    """How many calls fill a turn."""
    run_once = seconds_a_call(run, 1)
    estimate = seconds_a_call(run, 3) if run_once < 1 else run_once
    return int(np.clip(round(SECONDS_A_TURN / estimate), 1, MOST_CALLS))


def ceilings(size: int) -> dict[str, float | None]:
    """TFLOP/s of a large matmul and GB/s of a large copy, on random numbers."""
    reached = {}
    for dtype in ("bfloat16", "float16"):
        one, two = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
        multiply = jax.jit(functools.partial(jnp.dot, preferred_element_type=jnp.dtype(dtype)))
        reached[f"matmul_{dtype}_tflops"] = 2 * size**3 / _median(multiply, one, two) / 1e12
    x = jax.random.normal(jax.random.key(2), (4, size, size))
    copy = jax.jit(lambda x: x + 1)
    reached["copy_gb_per_s"] = 2 * x.nbytes / _median(copy, x) / 1e9
    return {name: short(value) for name, value in reached.items()}


def _median(function, *arguments) -> float:
    jax.block_until_ready(function(*arguments))

    def run():
        return function(*arguments)

    calls = calls_a_turn(run)
    return float(np.median([seconds_a_call(run, calls) for _ in range(7)]))


def memory(compiled: Any) -> dict[str, float | None]:
    """MiB of temporaries of a compiled program."""
    sizes = compiled.memory_analysis()
    return {} if sizes is None else {"temporaries_mib": short(sizes.temp_size_in_bytes / 2**20)}


def short(value: float) -> float | None:
    """Four digits; None of what is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
