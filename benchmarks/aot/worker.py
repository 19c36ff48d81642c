"""Compiles one case after another in a process of its own, which may hang, crash or be killed.

`python -m benchmarks.aot.worker tpu|h100 DUMPS`: a request a line on standard input, {"case",
"chip"}; an
answer a line on standard output, a JSON object with an "outcome" of "ok", "refused" or "failed".
Whatever compilers print goes to standard error.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target = importlib.import_module(f"benchmarks.aot.{sys.argv[1]}")
    target.prepare(Path(sys.argv[2]))
    from benchmarks.aot.cases import all_cases

    cases = {case.name: case for case in all_cases(target.IMPLEMENTATION)}
    for line in sys.stdin:
        request = json.loads(line)
        answer = attempt(target, cases[request["case"]], request["chip"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def attempt(target, case, chip: str) -> dict:
    """Compile, and say how it went."""
    try:
        result = target.compile_case(case, chip)
    except Exception as error:
        # The op's own refusal, not that of a compiler which lacks something half way.
        if isinstance(error, NotImplementedError) and str(error).startswith(f"{case.op}: "):
            return {"outcome": "refused", "why": str(error)}
        traceback.print_exc()
        return {"outcome": "failed", "why": f"{type(error).__name__}: {first_lines(str(error))}"}
    faults = target.faults(result, chip)
    if faults:
        return {"outcome": "failed", "why": "; ".join(faults), **result}
    return {"outcome": "ok", **result}


def first_lines(text: str, limit: int = 500) -> str:
    """The start of a message that may go on for pages, on one line."""
    return " ".join(text.split())[:limit]


def timed_compile(case, device, platform: str):
    """(the compiled case, seconds from trace to machine code), for that one device."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh

    placed = jax.sharding.SingleDeviceSharding(device)
    function, arguments = case.build()
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arguments
    )
    kind = AbstractDevice(
        device_kind=device.device_kind, num_cores=getattr(device, "num_cores", 1), platform=platform
    )
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(function).trace(*arguments)
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    return compiled, time.perf_counter() - start


def memory(compiled) -> dict:
    """Bytes of the program's arguments, outputs and temporaries in the device's main memory."""
    analysis = compiled.memory_analysis()
    return {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }


def empty(folder) -> None:
    """Remove the files in `folder`."""
    for path in folder.iterdir():
        path.unlink()


if __name__ == "__main__":
    main()
