"""Compile for TPUs with their own compiler, and read what it says about each kernel."""

import os
import re
from pathlib import Path

from jaxformer.plan.topology import environment, make_devices, parse_topology

IMPLEMENTATION = "mosaic_tpu"
CHIPS = ("v5e", "v5p", "v6e")
SMALL_CHIPS = ("v5e",)
_TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# The most a kernel may ask for of the chip's vector memory, in MiB.
VMEM_MIB = {"v5e": 128, "v5p": 63, "v6e": 127}

_dumps: Path | None = None


def prepare(dumps: Path) -> None:
    """Set what libtpu reads when it is loaded: no TPU, and a folder for what it has to say."""
    global _dumps
    _dumps = dumps
    os.environ.update(
        environment("tpu"),
        # Only what is read below: all of it is a hundred megabytes a kernel.
        LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={_dumps} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=original|final_bundles",
    )


def compile_case(case, chip: str) -> dict:
    """Compile `case` for one device of that chip.

    Returns:
        seconds; the program's memory in bytes; for every kernel its static schedule length in
        bundles and its vector memory in bytes.
    """
    from benchmarks.aot import worker
    from jaxformer_kernels import compiling_for

    device = make_devices(parse_topology(_TOPOLOGY[chip]))[0]
    worker.empty(_dumps)
    with compiling_for("tpu"):
        compiled, seconds = worker.timed_compile(case, device, "tpu")
    names = kernel_names(compiled.as_text())
    texts = {path.name: path for path in _dumps.iterdir() if path.suffix == ".txt"}
    return {
        "seconds": seconds,
        "memory": worker.memory(compiled),
        "kernels": [{"name": plain_name(name), **kernel_report(name, texts)} for name in names],
    }


def kernel_names(hlo: str) -> list[str]:
    """Names of the Pallas kernels in a compiled program."""
    return re.findall(
        r'%(\S+) = [^\n]*? custom-call\([^\n]*custom_call_target="tpu_custom_call"', hlo
    )


def plain_name(name: str) -> str:
    """`transpose_jvp_attention_backward__.1` → `attention_backward`."""
    return re.sub(r"^(transpose_|jvp_)+|_*(\.\d+)?$", "", name)


def kernel_report(name: str, files: dict[str, Path]) -> dict:
    """Bundles and vector memory of one kernel, from the compiler's files; None where none says."""
    own = {file: path for file, path in files.items() if f"-{name}-" in file}
    report: dict = {"bundles": None, "vmem": None}
    for file, path in sorted(own.items()):
        if "schedule-analysis_final_bundles" in file:
            report["bundles"] = bundles(path.read_text(errors="replace"))
        elif file.endswith("-original.txt"):
            report["vmem"] = vector_memory(path.read_text(errors="replace"))
    return report


def bundles(text: str) -> int | None:
    """Instruction bundles of the final schedule, the body of a loop counted once."""
    found = re.search(r"total scheduled bundles:\s+(\d+)", text)
    return int(found[1]) if found else None


def vector_memory(text: str) -> int:
    """Bytes of all allocations in vector memory: scratch, and windows with their buffers."""
    sizes = dict(re.findall(r"(#allocation\d+) \[.*?space=vmem, size = (0x[0-9a-f]+)", text))
    return sum(int(size, 16) for size in sizes.values())


def faults(result: dict, chip: str) -> list[str]:
    """What is wrong with a case that compiled, in words."""
    wrong = []
    if not result["kernels"]:
        wrong.append("the program holds no kernel (no tpu_custom_call)")
    for kernel in result["kernels"]:
        if kernel["vmem"] and kernel["vmem"] > VMEM_MIB[chip] * 2**20:
            wrong.append(f"{kernel['name']}: {kernel['vmem'] / 2**20:.1f} MiB of vector memory")
    return wrong


def describe(kernel: dict) -> str:
    """A kernel's figures on one line."""
    vmem = "?" if kernel["vmem"] is None else f"{kernel['vmem'] / 2**20:.1f} MiB"
    return f"{kernel['name']}: {kernel['bundles']} bundles, VMEM {vmem}"
