"""Compiles one step in a process of its own, which may take long, crash or be killed.

`python -m jaxformer.plan.worker`: the request as JSON on standard input, the answer as JSON on
standard output. Whatever compilers print goes to standard error. The environment must be that of
`topology.environment` already.
"""

import dataclasses
import json
import os
import re
import sys
import time
from typing import Any

from jaxformer.errors import JaxformerError
from jaxformer.plan.chips import GIB, GPUS_A_HOST
from jaxformer.plan.topology import make_devices, parse_topology

# What makes compiling quicker and hardly changes what is asked here: memory and collectives.
QUICK: dict[str, dict[str, Any]] = {
    "tpu": {"optimization_level": 19},  # O1
    "cpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
    "gpu": {},
}
_LOWERED_FOR = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def main() -> None:
    """Answers the one request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    try:
        answer = compile_step(request)
    except JaxformerError as error:
        answer = {"outcome": "invalid", "why": str(error)}
    json.dump(answer, answers)
    answers.flush()


def compile_step(request: dict[str, Any]) -> dict[str, Any]:
    """What the compiler says of the step of `request`: config, sizes, topology, effort.

    The answer's `outcome` is "ok"; "too_large" where the compiler found no room; or "refused", with
    `why` in one line.
    """
    from jaxformer import config as configuration
    from jaxformer.plan.build import Sizes, make_step
    from jaxformer.plan.hlo import read_program

    topology = parse_topology(request["topology"])
    config = configuration.from_dict(configuration.Config, request["config"])
    started = time.perf_counter()
    step = make_step(config, Sizes(**request["sizes"]), make_devices(topology), topology.platform)
    answer: dict[str, Any] = {
        "memory": dataclasses.asdict(step.memory()),
        "gathered": step.gathered(),
    }
    options = QUICK[topology.platform] if request["effort"] == "low" else {}
    try:
        lowered = step.trace().lower(lowering_platforms=(_LOWERED_FOR[topology.platform],))
        traced = time.perf_counter()
        compiled = lowered.compile(compiler_options=options or None)
    except JaxformerError:
        raise
    except Exception as error:  # a compiler's errors have no common class
        return answer | refusal(error)
    answer["seconds"] = {
        "trace": traced - started,
        "compile": time.perf_counter() - traced,
    }
    hosts_of = GPUS_A_HOST if topology.platform == "gpu" else None
    program = read_program(compiled.as_text(), hosts_of)
    return {
        "outcome": "ok",
        **answer,
        "allotted": allotment(compiled.memory_analysis()),
        "collectives": [dataclasses.asdict(one) for one in program.collectives],
        "kernels": program.kernels,
        "unknown_loops": program.unknown_loops,
    }


def allotment(found: Any) -> dict[str, int]:
    """Bytes of a compiled program on one device, their `total`, and the `peak` of what is alive.

    On a TPU the temporaries are more than there is ever room for: the peak is what is needed.
    """
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values()), "peak": found.peak_memory_in_bytes}


def refusal(error: Exception) -> dict[str, Any]:
    """Why a compiler did not compile, in one line, and how much memory it found wanting."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text and (room := _room(text)):
        needed, available = room
        return {"outcome": "too_large", "why": text[:400], "needed": needed, "available": available}
    return {"outcome": "refused", "why": f"{type(error).__name__}: {text[:400]}"}


def _room(text: str) -> tuple[float, float] | None:
    """Bytes of memory needed and there, where a message tells both."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (
        rf"[Uu]sed {size} of {size} hbm",
        rf"required for HLO temporaries \({size}\) exceeds available HBM \({size}\)",
    ):
        if match := re.search(pattern, text):
            needed, there = match.group(1, 2), match.group(3, 4)
            return _bytes(*needed), _bytes(*there)
    return None


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


if __name__ == "__main__":
    main()
