"""Compile to sm_90a machine code with NVIDIA's assembler, and read what it says of each kernel."""

import os
import re
from pathlib import Path

from jaxformer.plan.topology import SHARED_MEMORY, environment, make_devices, parse_topology

IMPLEMENTATION = "mosaic_gpu"
CHIPS = ("h100",)
SMALL_CHIPS = CHIPS
# Kernels that have no matrix product to do, by name.
NO_MATMUL = ()

_dumps: Path | None = None


def prepare(dumps: Path) -> None:
    """Set what jax and Mosaic GPU read when they are loaded: no GPU, and a folder for dumps."""
    global _dumps
    _dumps = dumps
    os.environ.update(environment("gpu"), MOSAIC_GPU_DUMP_TO=str(_dumps))


def compile_case(case, chip: str) -> dict:
    """Compile `case` for one H100.

    Returns:
        seconds; the program's memory in bytes; for every kernel its registers a thread, bytes of
        spills, bytes of shared memory, and the number of wgmma instructions.
    """
    from benchmarks.aot import worker
    from jaxformer_kernels import compiling_for

    device = make_devices(parse_topology("h100:1"))[0]
    worker.empty(_dumps)
    with compiling_for("gpu"):
        compiled, seconds = worker.timed_compile(case, device, "cuda")
    return {
        "seconds": seconds,
        "memory": worker.memory(compiled),
        "kernels": [kernel_report(path) for path in sorted(_dumps.glob("*.ptxas"))],
    }


def kernel_report(ptxas: Path) -> dict:
    """The figures of one kernel, from the files that were dumped beside this one."""
    resources = ptxas.with_suffix(".resources.txt")
    return {
        "name": re.sub(r"_\d+$", "", ptxas.stem),
        **assembler_report(ptxas.read_text(errors="replace")),
        "shared_memory": shared_memory(resources.read_text()) if resources.exists() else None,
        "wgmma": ptxas.with_suffix(".ptx").read_text(errors="replace").count("wgmma.mma_async"),
    }


def assembler_report(text: str) -> dict:
    """Registers a thread and bytes of spills, the largest of all functions in the text."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)]
    return {"registers": max(registers, default=None), "spills": max(spills, default=None)}


def shared_memory(text: str) -> int | None:
    """Bytes of shared memory: scratch, and eight for every barrier."""
    scratch = re.search(r"smem_scratch_bytes=(\d+)", text)
    if not scratch:
        return None
    barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", text)
    return int(scratch[1]) + 8 * sum(int(size) * int(count) for size, count in barriers)


def faults(result: dict, chip: str) -> list[str]:
    """What is wrong with a case that compiled, in words."""
    wrong = []
    if not result["kernels"]:
        wrong.append("the program holds no Mosaic GPU kernel")
    for kernel in result["kernels"]:
        name = kernel["name"]
        if kernel["registers"] is None:
            wrong.append(f"{name}: the assembler said nothing")
        if kernel["spills"]:
            wrong.append(f"{name}: {kernel['spills']} bytes of spills")
        if kernel["shared_memory"] and kernel["shared_memory"] > SHARED_MEMORY:
            wrong.append(f"{name}: {kernel['shared_memory']} bytes of shared memory")
        if not kernel["wgmma"] and name not in NO_MATMUL:
            wrong.append(f"{name}: no wgmma, the tensor cores are not used")
    return wrong


def describe(kernel: dict) -> str:
    """A kernel's figures on one line."""
    shared = "?" if kernel["shared_memory"] is None else f"{kernel['shared_memory'] / 1024:.0f} KiB"
    return (
        f"{kernel['name']}: {kernel['registers']} registers, {kernel['spills']} B spills, "
        f"shared {shared}, {kernel['wgmma']} wgmma"
    )
