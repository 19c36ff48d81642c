"""Attention on the GPU beside what one would use instead, by turns, in the time of the device.

A turn queues so many calls at once that the device, not the host, is waited for. jax and torch have
a process each. FLOPs are counted by `gpu_cases.Case.flops`; the peak is that of a large matmul of
the same dtype on random numbers, in this run. backward = forward+backward less forward, by medians.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_cases import Case, table
from benchmarks.gpu_process import Process, Settings

FORWARD, BACKWARD = "forward", "forward+backward"
PREPARE_SECONDS = 90.0
TURN_SECONDS = 30.0
FORMULA = "4 N H P FLOPs forward, 14 N H P with gradients, P = visible pairs of a query and a key"
TORCH = ("torch_flash", "torch_cudnn", "torch_flex")


def rows(settings: Settings, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every case, pass and contender."""
    facts["flops"] = FORMULA
    with (
        Process("benchmarks.gpu_attention", settings) as jax_process,
        Process("benchmarks.gpu_torch", settings) as torch_process,
    ):
        peaks = jax_process.ask(
            settings.within(PREPARE_SECONDS), do="ceilings", size=256 if settings.dry else 8192
        )
        facts["ceilings"] = peaks
        for case in table()[8:9] if settings.dry else table():
            if not settings.wants(case.name):
                continue
            run = case.tiny() if settings.dry else case
            if settings.left <= 0:
                facts.setdefault("left_out", []).append(case.name)
                continue
            forward: dict[str, float] = {}
            for passes in (FORWARD, BACKWARD):
                race = _Race(jax_process, torch_process, settings)
                for row in race.rows(run, passes == BACKWARD, peaks):
                    about = {"case": case.name, "pass": passes}
                    yield about | row | _backward_alone(forward, row, run, passes, peaks)


def _backward_alone(forward, row, case, passes, peaks) -> dict[str, Any]:
    """What is left of forward+backward without the forward pass."""
    if "ms" not in row:
        return {}
    if passes == FORWARD:
        forward[row["contender"]] = row["ms"]
        return {}
    if row["contender"] not in forward or row["ms"] <= forward[row["contender"]]:
        return {}
    milliseconds = row["ms"] - forward[row["contender"]]
    rate = (case.flops(True) - case.flops()) / milliseconds / 1e9
    return {"backward_ms": _short(milliseconds), "backward_tflops": _short(rate)} | _share(
        "backward_share_of_peak", rate, case, peaks
    )


class _Race:
    """One call, all who can make it by turns."""

    def __init__(self, jax_process: Process, torch_process: Process, settings: Settings):
        self._processes = {"jax": jax_process, "torch": torch_process}
        self._settings = settings

    def rows(self, case: Case, gradients: bool, peaks: dict) -> Iterator[dict[str, Any]]:
        from benchmarks.measure import Times

        names = [("jax", name) for name in _of_jax(self._settings)]
        names += [("torch", name) for name in TORCH] if not self._settings.dry else []
        made = {"case": case.as_json(), "gradients": gradients}
        facts, taken = {}, {name: [] for _, name in names}
        for process, name in names:
            facts[name] = self._ask(
                process, PREPARE_SECONDS, do="prepare", contender=name, **made,
                dry=self._settings.dry,
            )  # fmt: skip
        for _ in range(self._settings.turns):
            for process, name in names:
                if {"failed", "hung", "cut_off", "refused"} & set(facts[name]):
                    continue
                answer = self._ask(process, TURN_SECONDS, do="turn", contender=name)
                if "seconds" in answer:
                    taken[name].append(answer["seconds"])
                else:
                    facts[name] |= answer
        mine = next((taken[name] for _, name in names[:1]), [])
        for _, name in names:
            row: dict[str, Any] = {"contender": name}
            if not taken[name]:
                yield row | {"note": " ".join(f"{k}: {v}" for k, v in facts[name].items())[:200]}
                continue
            times = Times(tuple(taken[name]))
            rate = case.flops(gradients) / times.median / 1e12
            row |= times.milliseconds() | {"tflops": _short(rate)}
            row |= _share("share_of_peak", rate, case, peaks)
            if len(mine) == len(taken[name]):
                row["ours_share"] = _short(Times(tuple(mine)).ratio(times)[0])
            yield row | facts[name]

    def _ask(self, process: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        return self._processes[process].ask(self._settings.within(seconds), **arguments)


def _of_jax(settings: Settings) -> list[str]:
    from benchmarks.kernel_competitors import installed

    names = [settings.kernel, "jax_nn_cudnn", "tokamax", "jax_nn"]
    left_out = {"jax_nn_cudnn"} if settings.dry else set()
    left_out |= set() if installed("tokamax") else {"tokamax"}
    return [name for name in names if name not in left_out]


def _share(name: str, rate: float, case: Case, peaks: dict[str, Any]) -> dict[str, Any]:
    peak = peaks.get(f"matmul_{case.dtype}_tflops")
    return {name: _short(rate / peak)} if peak else {}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def answer(state: dict[str, Any], do: str, **arguments: Any) -> dict[str, Any]:
    """In the child, of jax."""
    from benchmarks import gpu_calls

    if do == "ceilings":
        return gpu_calls.ceilings(arguments["size"])
    if do == "turn":
        run, calls = state["ready"][arguments["contender"]]
        return {"seconds": gpu_calls.seconds_a_call(run, calls)}
    return _prepare(state, **arguments)


def _prepare(state, case, gradients, contender, dry) -> dict[str, Any]:
    import jax

    from benchmarks import gpu_calls

    made = Case(**case)
    if state.get("case") != (made, gradients):
        state.clear()
        jax.clear_caches()
        state |= {"case": (made, gradients), "ready": {}, **_operands(made, gradients)}
    given, cotangents = state["given"], state["cotangents"]
    try:
        function = gpu_calls.contenders(made, dry)[contender]()
        program = gpu_calls.program(function, gradients)
        compiled = jax.jit(program).lower(given, cotangents).compile()
    except NotImplementedError as refusal:
        return {"refused": " ".join(str(refusal).split())[:160]}

    def run():
        return compiled(given, cotangents)

    found = run()
    _, part = gpu_calls.one_group(made, found)
    errors = gpu_calls.errors(part, state["want"])
    del found, part
    calls = gpu_calls.calls_a_turn(run)
    state["ready"][contender] = run, calls
    worst = gpu_calls.worst(errors, state["allowed"])
    return {"calls_a_turn": calls} | gpu_calls.memory(compiled) | worst


def _operands(case: Case, gradients: bool) -> dict[str, Any]:
    """Operands, cotangents, and of one row and head what is exact and the plain error."""
    from benchmarks import gpu_calls

    given = gpu_calls.operands(case)
    cotangents = {"out": gpu_calls.draw_cotangents(case)["out"]} if gradients else {}
    smaller, part = gpu_calls.one_group(case, given)
    of_part = gpu_calls.one_group(case, cotangents)[1] if gradients else None
    want = gpu_calls.exact(smaller, part, of_part, lse=False)

    def plain(operands, integers):
        return {"out": gpu_calls.plain(smaller)(operands, integers)["out"]}

    allowed = gpu_calls.errors(gpu_calls.results(plain, part, of_part), want)
    return {"given": given, "cotangents": cotangents, "want": want, "allowed": allowed}


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """TFLOP/s of everyone, a line for each case and pass."""
    lines: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = row["case"], row["pass"]
        line = lines.setdefault(key, {"case": key[0], "pass": key[1]})
        line[row["contender"]] = row.get("tflops", "-")
        if row["pass"] == BACKWARD and "backward_tflops" in row:
            line[row["contender"]] = f"{row['tflops']:.4g} ({row['backward_tflops']:.4g})"
    return list(lines.values())
