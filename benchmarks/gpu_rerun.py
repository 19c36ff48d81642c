"""Whether a rerun is bitwise equal: every case many times, forward and backward."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_cases import RERUNS, Case
from benchmarks.gpu_process import Process, Settings

CASE_SECONDS = 120.0


def rows(settings: Settings, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every case."""
    facts["repeats"] = settings.repeats
    with Process("benchmarks.gpu_rerun", settings) as process:
        for case in RERUNS[-1:] if settings.dry else RERUNS:
            if not settings.wants(case.name):
                continue
            run = case.tiny() if settings.dry else case
            row = {"case": case.name, "run": run.short()}
            if settings.left <= 0:
                yield row | {"verdict": "left out"}
                continue
            answer = process.ask(
                settings.within(CASE_SECONDS),
                case=run.as_json(),
                kernel=settings.kernel,
                repeats=settings.repeats,
            )
            verdict = next((key for key in ("hung", "failed", "cut_off") if key in answer), None)
            yield row | ({"verdict": verdict} if verdict else {}) | answer


def answer(
    state: dict[str, Any], case: dict[str, Any], kernel: str, repeats: int
) -> dict[str, Any]:
    """One case, in the child; the results are compared on the device."""
    import jax
    import jax.numpy as jnp

    from benchmarks import gpu_calls

    made = Case(**case)
    given, cotangents = gpu_calls.operands(made), gpu_calls.draw_cotangents(made)
    run = jax.jit(gpu_calls.program(gpu_calls.ours(made, kernel, lse=True), gradients=True))
    first = run(given, cotangents)

    @jax.jit
    def differing(one, two):
        def bits(x):
            return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

        return jax.tree.map(lambda x, y: jnp.sum(bits(x) != bits(y)), one, two)

    unequal: dict[str, int] = {}
    for _ in range(repeats):
        for name, count in jax.device_get(differing(first, run(given, cotangents))).items():
            if count:
                unequal[name] = unequal.get(name, 0) + 1
    finite = all(bool(jnp.all(jnp.isfinite(x))) for x in first.values())
    if unequal:
        told = ", ".join(f"{name} in {count}" for name, count in unequal.items())
        return {"verdict": f"differs: {told} of {repeats}"}
    return {"verdict": "equal" if finite else "equal, but not finite", "repeats": repeats}


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """All of them."""
    return [{"case": row["case"], "verdict": row["verdict"]} for row in rows]
