"""Machines by name, and how jax is told to compile for them where they are not.

Nothing here imports jax before a function is called: a compiler reads its environment once.
"""

import difflib
import importlib.util
import re
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from typing import Any, Literal

from jaxformer.errors import JaxformerError
from jaxformer.plan.chips import CPU, GPUS_A_HOST, H100, TPUS, Chip

Platform = Literal["cpu", "gpu", "tpu"]

# Chips of a slice -> its shape, of those that are for rent: cloud.google.com/tpu/docs/v5p, .../v5e.
SHAPES = {
    2: {
        1: (1, 1),
        4: (2, 2),
        8: (2, 4),
        16: (4, 4),
        32: (4, 8),
        64: (8, 8),
        128: (8, 16),
        256: (16, 16),
    },
    3: {
        4: (2, 2, 1),
        8: (2, 2, 2),
        16: (2, 2, 4),
        32: (2, 4, 4),
        64: (4, 4, 4),
        128: (4, 4, 8),
        256: (4, 8, 8),
        512: (8, 8, 8),
        1024: (8, 8, 16),
        2048: (8, 16, 16),
        4096: (16, 16, 16),
    },
}
_ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
    "v7x": "tpu7x",
    "ironwood": "tpu7x",
}

SHARED_MEMORY = 232448
"""Bytes that a block of threads may have on an H100."""
H100_KIND = "NVIDIA H100 80GB HBM3"
H100_TARGET = f"""platform_name: "CUDA" device_description_str: "{H100_KIND}"
runtime_version {{ major: 13 minor: 0 }} dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{ name: "{H100_KIND}"
 cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
 threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
 core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
 shared_memory_per_block: 49152 shared_memory_per_block_optin: {SHARED_MEMORY}
 shared_memory_per_core: 233472
 registers_per_core_limit: 65536 registers_per_block_limit: 65536
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: {int(H100.memory or 0)}
 driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" }}"""
"""What XLA would ask the driver of an H100."""


class TopologyError(JaxformerError):
    """A machine that there is no name or no compiler for; the message says what to change."""


@dataclass(frozen=True)
class Topology:
    """A machine: so many devices of one kind."""

    platform: Platform
    chip: Chip
    shape: tuple[int, ...]
    """TPU: of the torus, in chips. GPU: hosts and GPUs a host. CPU: devices."""

    @property
    def devices(self) -> int:
        """As jax counts them."""
        return prod(self.shape) * self.chip.devices

    @property
    def name(self) -> str:
        """The name that always works, such as v5p:4x4x4."""
        if self.platform == "tpu":
            return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return f"{self.chip.name}:{prod(self.shape)}"

    @property
    def words(self) -> str:
        """The machine in words."""
        if self.platform == "tpu":
            chips = prod(self.shape)
            cores = f", {self.devices} devices" if self.chip.devices > 1 else ""
            return f"{chips} TPU {self.chip.name} chip{'s' * (chips > 1)} in a torus{cores}"
        if self.platform == "gpu":
            hosts, each = self.shape
            return f"{hosts} host{'s' * (hosts > 1)} of {each} x H100"
        return f"{self.devices} CPU devices"


def parse_topology(name: str) -> Topology:
    """The machine that a name stands for.

    `v5p:4x4x4` by its torus, `v5p-128` as clouds sell it (v4, v5p and tpu7x by cores, two a chip;
    v5e and v6e by chips), `h100:8`, `cpu:8`. Raises TopologyError naming the nearest.
    """
    wanted = name.strip().lower()
    if match := re.fullmatch(r"(cpu|h100):(\d+)", wanted):
        return _hosts(match[1], int(match[2]))
    if match := re.fullmatch(r"([a-z0-9]+?)(?:(?::(\d+(?:x\d+)*))|(?:-(\d+)))", wanted):
        chip = TPUS.get(_ALIASES.get(match[1], match[1]))
        if chip and match[2]:
            return _torus(chip, tuple(map(int, match[2].split("x"))))
        if chip:
            return _slice(chip, int(match[3]))
    nearest = difflib.get_close_matches(wanted, known_names(), n=1, cutoff=0.3)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise TopologyError(
        f"no topology {name!r}{hint} There are {', '.join(TPUS)} by torus (v5p:4x4x4) or by size "
        "(v5p-128), h100:8 and cpu:8"
    )


def known_names() -> list[str]:
    """Names that work: one a usual size, both ways of naming it."""
    names = ["cpu:8", "h100:1", "h100:8", "h100:16"]
    for chip in TPUS.values():
        for chips, shape in SHAPES[chip.dimensions].items():
            names += [
                f"{chip.name}:{'x'.join(map(str, shape))}",
                f"{chip.name}-{chips * chip.cores}",
            ]
    return names


def _hosts(kind: str, count: int) -> Topology:
    if count < 1:
        raise TopologyError(f"{kind}:{count} has no device: name at least {kind}:1")
    if kind == "cpu":
        return Topology("cpu", CPU, (count,))
    if count > GPUS_A_HOST and count % GPUS_A_HOST:
        raise TopologyError(
            f"h100:{count}: hosts have {GPUS_A_HOST} GPUs, so more than one have a multiple of "
            f"{GPUS_A_HOST}, such as h100:{-(-count // GPUS_A_HOST) * GPUS_A_HOST}"
        )
    each = min(count, GPUS_A_HOST)
    return Topology("gpu", H100, (count // each, each))


def _torus(chip: Chip, shape: tuple[int, ...]) -> Topology:
    if len(shape) != chip.dimensions or min(shape) < 1:
        example = "x".join(map(str, SHAPES[chip.dimensions][64]))
        raise TopologyError(
            f"{chip.name} chips form a torus of {chip.dimensions} dimensions, such as "
            f"{chip.name}:{example}, not {'x'.join(map(str, shape))}"
        )
    return Topology("tpu", chip, shape)


def _slice(chip: Chip, size: int) -> Topology:
    shapes = SHAPES[chip.dimensions]
    chips = size // chip.cores
    if chips * chip.cores != size or chips not in shapes:
        sizes = [known * chip.cores for known in shapes]
        nearest = min(sizes, key=lambda known: abs(known - size))
        counted = "cores, two a chip" if chip.cores == 2 else "chips"
        raise TopologyError(
            f"{chip.name}-{size} is no usual size ({chip.name}-N counts {counted}); did you mean "
            f"{chip.name}-{nearest}? Any torus can be named by its shape, such as "
            f"{chip.name}:{'x'.join(map(str, shapes[4]))}"
        )
    return Topology("tpu", chip, shapes[chips])


def require_compiler(platform: Platform) -> None:
    """Raises TopologyError, with the command that mends it, where the compiler is missing."""
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "compiling for TPUs needs their compiler, which no TPU is needed for: "
            f'pip install "jax[tpu]=={version("jax")}"'
        )
    if platform == "gpu" and importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise TopologyError(
            "compiling for H100s needs NVIDIA's compiler, which no GPU is needed for: pip install "
            f'"jax-cuda13-plugin=={version("jax")}" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 '
            "absl-py"
        )


def environment(platform: Platform, devices: int = 1) -> dict[str, str]:
    """What must stand in the environment before jax is imported: the machine is not there."""
    settings = {"JAX_PLATFORMS": "cpu"}
    if platform == "cpu":
        settings["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if platform == "tpu":
        settings |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LOG_DIR": "disabled",
        }
    return settings


def make_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, on which nothing can run (but on those of a CPU)."""
    import jax
    from jax.experimental import topologies

    if topology.platform == "cpu":
        return jax.devices("cpu")[: topology.devices]
    if topology.platform == "gpu":
        hosts, each = topology.shape
        described = topologies.get_topology_desc(
            platform="cuda", target_config=H100_TARGET, topology=f"1x{hosts}x{each}"
        )
    else:
        # The two cores of a v4 chip are one device only where that is asked for.
        options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    return list(described.devices)
