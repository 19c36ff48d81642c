"""Decoding on the GPU: bytes of the cache a second, beside a large copy's and beside others.

One program takes several steps, each with a cache of its own, so that none finds its cache in L2
and the host is not waited for; the output of a step is the query of the next.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_process import Process, Settings

PREPARE_SECONDS = 90.0
TURN_SECONDS = 20.0
LARGEST_CACHE = 10e9
"""Bytes: jax and torch each hold one, and what they compute with."""
COLD = 256e6
"""Bytes of caches that a program goes through at least, several times the L2."""
MOST_CALLS = 64
# Of jax, of torch.
CONTENDERS = (("mosaic_gpu", "xla", "jax_nn"), ("torch_flash", "torch_cudnn"))
SIZES = [(B, S) for S in (8192, 1024, 32768, 131072) for B in (1, 8, 64)]


def shapes() -> list[dict[str, Any]]:
    """Llama 3 8B's heads at every size, then others' at one."""
    found = [{"B": B, "T": 1, "S": S, "N": 32, "K": 8, "H": 128} for B, S in SIZES]
    found += [
        {"B": 8, "T": 1, "S": 8192, "N": 32, "K": 32, "H": 128},
        {"B": 8, "T": 1, "S": 8192, "N": 64, "K": 8, "H": 64},
        {"B": 8, "T": 1, "S": 8192, "N": 16, "K": 8, "H": 256},
    ]
    return [shape for shape in found if cache_bytes(shape) <= LARGEST_CACHE]


def cache_bytes(shape: dict[str, Any]) -> float:
    """Of the keys and values of one layer, in bfloat16: what a step must read."""
    return 4.0 * shape["B"] * shape["S"] * shape["K"] * shape["H"]


def rows(settings: Settings, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every shape and contender."""
    from benchmarks.measure import Times

    facts["bytes"] = "4 B S K H, the keys and values once"
    with (
        Process("benchmarks.gpu_decode", settings) as jax_process,
        Process("benchmarks.gpu_torch", settings) as torch_process,
    ):
        peaks = jax_process.ask(
            settings.within(PREPARE_SECONDS), do="ceilings", size=256 if settings.dry else 8192
        )
        facts["ceilings"] = peaks
        ours, others = CONTENDERS
        names = [(jax_process, name) for name in ours if not settings.dry or name != "mosaic_gpu"]
        names += [(torch_process, name) for name in others] if not settings.dry else []
        for shape in shapes()[: 1 if settings.dry else None]:
            name = " ".join(f"{key}{value}" for key, value in shape.items())
            if not settings.wants(name):
                continue
            if settings.left <= 0:
                facts.setdefault("left_out", []).append(name)
                continue
            run = shape | {"B": 2, "S": 128, "N": 4, "K": 2, "H": 64} if settings.dry else shape
            calls = int(min(MOST_CALLS, max(4, -(-COLD // cache_bytes(run)))))
            calls = 2 if settings.dry else calls
            # One after the other: every process holds but one contender's caches.
            for process, contender in names:
                row: dict[str, Any] = {"shape": name, "contender": contender}
                found = process.ask(
                    settings.within(PREPARE_SECONDS),
                    do="decode",
                    shape=run,
                    contender=contender,
                    calls=calls,
                )
                taken = []
                for _ in range(settings.turns if "calls_a_turn" in found else 0):
                    turn = process.ask(
                        settings.within(TURN_SECONDS), do="turn", contender=contender
                    )
                    if "seconds" not in turn:
                        found |= turn
                        break
                    taken.append(turn["seconds"] / calls)
                if taken:
                    times = Times(tuple(taken))
                    rate = cache_bytes(run) / times.median / 1e9
                    row |= times.milliseconds() | {"gb_per_s": float(f"{rate:.4g}")}
                    if "copy_gb_per_s" in peaks:
                        row["share_of_copy"] = float(f"{rate / peaks['copy_gb_per_s']:.3g}")
                yield row | found


def answer(state: dict[str, Any], do: str, **arguments: Any) -> dict[str, Any]:
    """In the child, of jax."""
    from benchmarks import gpu_calls

    if do == "ceilings":
        return gpu_calls.ceilings(arguments["size"])
    if do == "turn":
        run, calls = state["ready"]
        return {"seconds": gpu_calls.seconds_a_call(run, calls)}
    return _prepare(state, **arguments)


def _prepare(state, shape, contender, calls) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from benchmarks import gpu_calls, kernel_calls
    from benchmarks.kernel_competitors import jax_nn_decode
    from jaxformer_kernels.decode_attention.shapes import Shape

    made = Shape(**shape)
    if state.get("shape") != made:
        state.clear()
        state |= {"shape": made, "operands": _operands(made, calls)}
    q, caches = state["operands"]
    lengths = jnp.full(made.B, made.S, jnp.int32)
    ours, _, _ = kernel_calls.functions("decode_attention", made)
    function = jax_nn_decode(made) if contender == "jax_nn" else ours(contender)

    # Lowered once, however often it is called.
    @jax.jit
    def step(q, k, v):
        return function({"q": q, "k": k, "v": v}, {"lengths": lengths[: len(q)]})["out"]

    @jax.jit
    def steps(q, caches):
        for k, v in caches:
            q = step(q, k, v)
        return q

    try:
        compiled = steps.lower(q, caches).compile()
    except NotImplementedError as refusal:
        return {"refused": " ".join(str(refusal).split())[:160]}

    def run():
        return compiled(q, caches)

    state["ready"] = run, gpu_calls.calls_a_turn(run)
    first = [x[:1] for x in (q, *caches[0])]
    with gpu_calls.exactly():
        wide = [x.astype(jnp.float32) for x in first]
        want = ours("xla")(dict(zip("qkv", wide, strict=True)), {"lengths": lengths[:1]})["out"]
    error = gpu_calls.errors({"out": step(*first)}, {"out": want})["out"]
    made_calls = {"calls_a_turn": calls * state["ready"][1]}
    return made_calls | {"error": gpu_calls.short(error)} | gpu_calls.memory(compiled)


def _operands(shape: Any, calls: int):
    import jax

    def draw(seed, *sizes):
        return jax.random.normal(jax.random.key(seed), sizes, "bfloat16")

    sizes = shape.B, shape.S, shape.K, shape.H
    caches = [(draw(2 * i, *sizes), draw(2 * i + 1, *sizes)) for i in range(calls)]
    return draw(2 * calls, shape.B, 1, shape.N, shape.H), caches


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """GB/s of everyone, a line for each shape."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["shape"], {"shape": row["shape"]})
        line[row["contender"]] = row.get("gb_per_s", "-")
    return list(lines.values())
