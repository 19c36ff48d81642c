"""Block sizes of the Hopper attention kernels, each kernel alone, over all that fit.

Every candidate is checked against the blocks in use; one that fails or hangs is left out. What is
fastest, by the sum of the times with and without a causal mask, goes into a file of the form of
`jaxformer_kernels/tuning/<device>/attention.json`, to be copied there.
"""

import dataclasses
import datetime
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_cases import TOKENS, WIDTH, Case
from benchmarks.gpu_process import Process, Settings
from jaxformer_kernels.attention.mosaic_gpu_sm90_blocks import Blocks, choose, fits

HEAD_DIMS = (128, 64, 256)
KERNELS = ("forward", "dq", "dkv")
LENGTH = 4096
CANDIDATE_SECONDS = 40.0
# Norm of the difference to the blocks in use, of that of the result: both round to bfloat16.
TOLERANCE = 1e-2
# A product's operands in shared memory go by 64, whatever the registers had room for.
COLUMNS = {"forward": (64, 128, 192, 256), "dq": (64, 128), "dkv": (64, 128)}
STAGES = (2, 3, 4, 1)
# Products of a tile and of the tiles of its rows, in units of 2 H a visible pair.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}


def candidates(kernel: str, H: int) -> list[Blocks]:
    """The blocks in use, then all others that fit."""
    groups = (2,) if kernel == "forward" else (2, 1)
    apart = (False,) if kernel == "forward" else (False, True)
    every = [
        Blocks(columns, stages, group, one)
        for stages, columns, group, one in itertools.product(STAGES, COLUMNS[kernel], groups, apart)
    ]
    used = choose(kernel, H, H)
    return [used, *(it for it in every if it != used and fits(kernel, it, H, H))]


def rows(settings: Settings, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every kernel, head dim and candidate."""
    facts["measured"] = f"B T = {TOKENS}, N H = {WIDTH}, T = {LENGTH}, causal and not, bfloat16"
    facts["found"], facts["searched"] = {}, {}
    with Process("benchmarks.gpu_tune", settings) as process:
        for H, kernel in itertools.product(HEAD_DIMS[: 1 if settings.dry else None], KERNELS):
            if not settings.wants(f"{kernel} d{H}"):
                continue
            tried = []
            every = candidates(kernel, H)[: 2 if settings.dry else None]
            for blocks in every:
                if settings.left <= 0:
                    break
                answer = process.ask(
                    settings.within(CANDIDATE_SECONDS),
                    kernel=kernel,
                    H=H,
                    blocks=dataclasses.asdict(blocks),
                    turns=settings.turns,
                    dry=settings.dry,
                )
                tried.append({"kernel": kernel, "H": H} | dataclasses.asdict(blocks) | answer)
                yield tried[-1]
            facts["searched"][f"{kernel} d{H}"] = f"{len(tried)} of {len(every)}"
            best = fastest(tried)
            if best is not None:
                facts["found"].setdefault(kernel, {})[f"{H},{H}"] = best
                _write(settings, facts["found"])


def fastest(tried: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The blocks with the smallest sum of times among those whose results are right."""
    right = [row for row in tried if row.get("right")]
    if not right:
        return None
    best = min(right, key=lambda row: row["causal_ms"] + row["full_ms"])
    defaults = {"groups": 2, "apart": False}
    sizes = {field.name: best[field.name] for field in dataclasses.fields(Blocks)}
    return {name: x for name, x in sizes.items() if defaults.get(name) != x or name not in defaults}


def _write(settings: Settings, found: dict[str, Any]) -> None:
    """The winners so far, in the form that `jaxformer_kernels.tuning` reads."""
    from jaxformer_kernels import _compat

    kind = _compat.gpu_kind()
    folder = settings.output / "tuning" / re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
    folder.mkdir(parents=True, exist_ok=True)
    head = f"timed on {kind}, {datetime.date.today().isoformat()}, T {LENGTH}, causal and not"
    (folder / "attention.json").write_text(rendered({"found": head} | found), encoding="utf-8")


def rendered(record: dict[str, Any]) -> str:
    """JSON with every pair of head dims on a line of its own."""
    lines = []
    for name, value in record.items():
        if isinstance(value, str):
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
            continue
        inner = [
            f'    "{dims}": {{ {json.dumps(blocks)[1:-1]} }}' for dims, blocks in value.items()
        ]
        lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def answer(state: dict[str, Any], kernel: str, H: int, blocks, turns: int, dry: bool):
    """One candidate, in the child: whether it is right, and its times."""
    made = Blocks(**blocks)
    found: dict[str, Any] = {"right": True}
    for causal in (True, False):
        key = f"{kernel} {H} {causal}"
        if key not in state:
            for other in [name for name in state if not name.startswith(f"{kernel} {H} ")]:
                del state[other]
            state[key] = _prepare(kernel, H, causal, dry)
        case, operands, want = state[key]
        milliseconds, difference = _time(kernel, made, case, operands, want, turns, dry)
        name = "causal" if causal else "full"
        found["right"] &= difference <= TOLERANCE
        found[f"{name}_ms"] = float(f"{1e3 * milliseconds:.4g}")
        found[f"{name}_difference"] = float(f"{difference:.2g}")
        flops = 2 * PRODUCTS[kernel] * case.N * case.H * case.pairs()
        found[f"{name}_tflops"] = float(f"{flops / milliseconds / 1e12:.4g}")
    return found


def _prepare(kernel, H, causal, dry):
    """The case, the operands of all kernels, and what the blocks in use give."""
    import jax

    from benchmarks import gpu_calls

    case = Case("tuned", TOKENS // LENGTH, LENGTH, WIDTH // H, WIDTH // H, H, causal=causal)
    if dry:
        case = dataclasses.replace(case.tiny(), H=H, N=1, K=1, B=1)
    given, cotangents = gpu_calls.operands(case), gpu_calls.draw_cotangents(case)
    operands = given | {"dout": cotangents["out"]}
    if not dry and kernel != "forward":
        operands |= jax.jit(lambda given: _row_numbers(case, given, cotangents["out"]))(given)
    run = jax.jit(_launcher(kernel, choose(kernel, H, H), case, dry))
    return case, operands, run(operands)


def _launcher(kernel: str, blocks: Blocks, case: Case, dry: bool):
    """operands -> what the kernel computes."""
    from benchmarks import gpu_calls

    if dry:
        return lambda given: gpu_calls.ours(case, "xla")({x: given[x] for x in "qkv"}, {})["out"]

    def launch(given):
        from jaxformer_kernels.attention import mosaic_gpu_sm90_dkv as dkv
        from jaxformer_kernels.attention import mosaic_gpu_sm90_dq as dq
        from jaxformer_kernels.attention import mosaic_gpu_sm90_forward as forward

        options, given = _options(case), _masked(kernel, blocks, case, given)
        if kernel == "forward":
            given = {name: x for name, x in given.items() if name not in ("dout", "lse", "delta")}
            return forward.forward(options, blocks, given)[0]
        if kernel == "dq":
            return dq.query_gradient(options, blocks, given)
        return dkv.key_value_gradients(options, blocks, given)

    return launch


def _options(case: Case):
    from jaxformer_kernels import _compat, dispatch
    from jaxformer_kernels.attention.mosaic_gpu_sm90_tiles import Options

    return Options(
        T=case.T,
        S=case.keys,
        scale=case.H**-0.5,
        softcap=None,
        rate=0.0,
        bias_gradient=False,
        interpret=_compat.gpu_interpreter(dispatch.interpreter()),
    )


def _masked(kernel: str, blocks: Blocks, case: Case, given):
    """The operands with those of the mask for these blocks, as `mosaic_gpu` adds them."""
    from benchmarks import gpu_calls
    from jaxformer_kernels.attention import mosaic_gpu
    from jaxformer_kernels.attention.mosaic_gpu_sm90_blocks import ROWS

    mask = gpu_calls.options(case)["mask"]
    prefix = "kv" if kernel == "dkv" else "q"
    ragged = prefix == "q" and case.keys % blocks.columns
    if not (mosaic_gpu.is_masked(mask) or ragged):
        return given
    rows = blocks.groups * ROWS
    return given | mosaic_gpu.mask_operands(prefix, mask, case.T, case.keys, rows, blocks.columns)


def _row_numbers(case: Case, given, dout):
    """lse in units of log2 and delta, of each query, as the backward kernels take them."""
    import jax.numpy as jnp

    from benchmarks import gpu_calls
    from jaxformer_kernels import attention

    out, lse = attention(
        **given, **gpu_calls.options(case), return_lse=True, implementation="mosaic_gpu"
    )
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), dout.astype(jnp.float32))
    return {"lse": lse * 1.4426950408889634, "delta": delta}


def _time(kernel, blocks, case, operands, want, turns, dry) -> tuple[float, float]:
    """Seconds of a launch, and the norm of its difference to `want` over that of `want`."""
    import statistics

    import jax
    import jax.numpy as jnp

    from benchmarks import gpu_calls

    compiled = jax.jit(_launcher(kernel, blocks, case, dry)).lower(operands).compile()
    found = compiled(operands)

    def squares(tree):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(tree))

    difference = jax.tree.map(lambda x, y: x.astype(jnp.float32) - y, found, want)
    share = float(jnp.sqrt(squares(difference) / squares(want)))

    def run():
        return compiled(operands)

    calls = gpu_calls.calls_a_turn(run)
    return statistics.median(gpu_calls.seconds_a_call(run, calls) for _ in range(turns)), share


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks in use and the fastest, for every kernel and head dim."""
    table = []
    for kernel, H in dict.fromkeys((row["kernel"], row["H"]) for row in rows):
        tried = [row for row in rows if (row["kernel"], row["H"]) == (kernel, H)]
        best = (facts.get("found") or {}).get(kernel, {}).get(f"{H},{H}")
        fast = [row for row in tried if row.get("right")]
        fast.sort(key=lambda row: row["causal_ms"] + row["full_ms"])
        line = {"kernel": f"{kernel} d{H}", "fastest": json.dumps(best)}
        line["tried"] = facts["searched"].get(f"{kernel} d{H}", "")
        for name, row in (("in_use", tried[0]), ("best", fast[0] if fast else {})):
            line |= {f"{name}_{x}": row.get(x) for x in ("causal_tflops", "full_tflops")}
        table.append(line)
    return table
