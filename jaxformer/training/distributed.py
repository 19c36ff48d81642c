"""Many processes as one run: jax's own runtime joins them, and process 0 speaks for all.

Every process runs the same program on its own devices. What must be the same everywhere and could
differ (the name of a new run, whether its folder is free) is decided by process 0 and told to the
others. With one process everything here does nothing, at no cost.
"""

import importlib.util
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxformer.config import ConfigError, DistributedConfig
from jaxformer.errors import JaxformerError
from jaxformer.sharding import BATCH

LONGEST_WORK_OF_ONE = 24 * 3600
"""Seconds that the others wait at the end while process 0 decodes; were it dead, they would end by
its missing heartbeat."""
LARGEST_MESSAGE = 4096
"""Bytes that process 0 can tell at once."""


def found(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, told from its environment.

    "slurm", "open mpi", "tpu" or "kubernetes"; None for a process that is alone. Raises ConfigError
    where jax cannot join them.
    """
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "open mpi"
    # In a step of a job alone: a batch script or a shell of `salloc` is no one of several.
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "slurm"
    # Set by jax, when it is imported, on machines that have a TPU.
    if environment.get("TPU_ML_PLATFORM") == "JAX" and environment.get("JAX_PLATFORMS") != "cpu":
        return "tpu" if _is_tpu_of_several_hosts(environment) else None
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "kubernetes"
    return None


def _is_tpu_of_several_hosts(environment: Mapping[str, str]) -> bool:
    if int(environment.get("MEGASCALE_NUM_SLICES") or "1") > 1:
        return True
    if "TPU_PROCESS_ADDRESSES_PATH" in environment:
        return True
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "," in hosts
    # jax then asks the machine's metadata, which may well name this host alone.
    return "TPU_SKIP_MDS_QUERY" not in environment


def initialize(config: DistributedConfig) -> None:
    """Joins the processes of a run, before anything touches a device; alone, does nothing.

    By the addresses in `config`, else as Slurm, Open MPI, Kubernetes or a TPU's metadata say.
    Raises ConfigError; a process whose fellows do not come within `config.timeout_seconds` ends
    with status 2 and a line that says so.
    """
    if config.coordinator is not None:
        arguments = _given(config)
    else:
        launcher = found(os.environ) if config.detect else None
        if launcher is None:
            return
        arguments = _detected(launcher)
    waiting = _give_up_after(config)
    try:
        jax.distributed.initialize(
            **arguments,
            # Beyond our own limit: at its end jax aborts the process without saying why.
            initialization_timeout=config.timeout_seconds + 30,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=LONGEST_WORK_OF_ONE,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"the processes cannot be joined: {error}. Give --distributed.coordinator HOST:PORT "
            "(of process 0, a free port), --distributed.num-processes and "
            "--distributed.process-id, or --distributed.no-detect for this process alone"
        ) from error
    finally:
        waiting.cancel()
    # Python would leave by way of a barrier, where the others never come.
    sys.excepthook = _end_at_once
    if config.num_processes not in (None, jax.process_count()):
        raise ConfigError(
            f"this process was started as one of {config.num_processes}, and the run has "
            f"{jax.process_count()}: give all the same --distributed.num-processes"
        )


def _given(config: DistributedConfig) -> dict[str, Any]:
    return {
        "coordinator_address": config.coordinator,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
        "cluster_detection_method": "deactivate",
    }


def _detected(launcher: str) -> dict[str, Any]:
    """What jax cannot tell from the environment by itself. Raises ConfigError."""
    needs = {"kubernetes": ("kubernetes", "'jax[k8s]'")}
    arguments: dict[str, Any] = {}
    if launcher == "open mpi" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        # From release 5 on Open MPI names no address; mpi4py finds one.
        arguments["cluster_detection_method"] = "mpi4py"
        needs["open mpi"] = ("mpi4py", "mpi4py")
    module, package = needs.get(launcher, (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{launcher} started this process, and to find the others jax needs {module}: pip "
            f"install {package}, or give --distributed.coordinator, --distributed.num-processes "
            "and --distributed.process-id, or --distributed.no-detect for this process alone"
        )
    if launcher in ("slurm", "open mpi") and _sees_its_own_devices(os.environ):
        # jax would give each process the one device of its number among those of the machine.
        arguments["local_device_ids"] = []
    return arguments


def _sees_its_own_devices(environment: Mapping[str, str]) -> bool:
    """Whether all GPUs that a process of Slurm or Open MPI sees are its own."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    one_a_machine = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (
        environment.get("SLURM_STEP_NUM_TASKS", "0") == environment.get("SLURM_STEP_NUM_NODES")
    )
    return one_a_machine or (visible != "" and "," not in visible)


def _give_up_after(config: DistributedConfig) -> threading.Timer:
    who, where = "this process", ""
    if config.coordinator is not None:
        who = f"process {config.process_id} of {config.num_processes}"
        where = f" at {config.coordinator}"

    def give_up() -> None:
        _print(
            f"error: {who} waited {config.timeout_seconds} s for the others{where}: start all with "
            "the same coordinator (an address of process 0 that the others reach, a free port) and "
            "number of processes, each with a number of its own from 0 on; or raise "
            "--distributed.timeout-seconds"
        )
        os._exit(2)

    timer = threading.Timer(config.timeout_seconds, give_up)
    timer.daemon = True
    timer.start()
    return timer


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this process prints, and writes what is not written by all."""
    return jax.process_index() == 0


def here() -> str:
    """This process by its number, to open an error with; nothing if it is alone."""
    if not jax.distributed.is_initialized() or not several():
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}: "


def fail(status: int) -> int:
    """The exit status of a process that ends with an error; one of several ends here.

    The others learn of it by its missing heartbeat: at once if it was process 0, else within
    `DistributedConfig.heartbeat_seconds`.
    """
    if jax.distributed.is_initialized() and several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _end_at_once(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    _print("".join([here(), *traceback.format_exception(kind, error, trace)]).rstrip())
    fail(1)


def from_main(make: Callable[[], Any]) -> Any:
    """What `make()` returns in process 0, a small JSON value, in every process.

    A JaxformerError that it raises there is raised everywhere.
    """
    if not several():
        return make()
    if not is_main():
        told = broadcast(None)
        if "error" in told:
            raise JaxformerError(f"as process 0 found: {told['error']}")
        return told["value"]
    try:
        value = make()
    except JaxformerError as error:
        broadcast({"error": str(error)[: LARGEST_MESSAGE // 8]})
        raise
    broadcast({"value": value})
    return value


def broadcast(value: Any) -> Any:
    """A small JSON value of process 0, in every process."""
    if not several():
        return value
    message = np.zeros(LARGEST_MESSAGE, np.uint8)
    if is_main():
        text = json.dumps(value).encode()
        if len(text) > LARGEST_MESSAGE:
            raise ValueError(f"{len(text)} bytes are more than the {LARGEST_MESSAGE} of a message")
        message[: len(text)] = np.frombuffer(text, np.uint8)
    received = multihost_utils.broadcast_one_to_all(message)
    return json.loads(np.asarray(received, np.uint8).tobytes().rstrip(b"\0"))


def require_same(value: str, what: str) -> None:
    """Raises JaxformerError in a process where a value is not that of process 0."""
    if broadcast(value) != value:
        raise JaxformerError(
            f"the {what} of this process is not that of process 0: all must read the same files"
        )


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the part of a batch's rows, of `count` equal parts, for this process to read.

    The smallest that holds all rows its devices compute on. It may be larger than those, where they
    are not neighbours, and the same in several processes, where tensor or context axes reach across
    them.
    """
    if not several():
        return 0, 1
    shares = math.prod(mesh.shape[axis] for axis in BATCH)
    split = NamedSharding(mesh, PartitionSpec(BATCH))
    places = split.addressable_devices_indices_map((shares,)).values()
    return smallest_part({place[0].indices(shares)[0] for place in places if place}, shares)


def smallest_part(needed: Collection[int], shares: int) -> tuple[int, int]:
    """(index, count) of the smallest of `count` equal parts of `shares` that holds all `needed`."""
    for count in range(shares, 0, -1):
        size = shares // count
        parts = {share // size for share in needed}
        if shares % count == 0 and len(parts) == 1:
            return parts.pop(), count
    raise ValueError(f"{needed} are no shares of {shares}")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
