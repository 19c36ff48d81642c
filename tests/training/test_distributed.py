"""What processes of one run agree on, and how each finds the others, told in one process."""

import dataclasses
import os
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxformer.config import (
    Config,
    ConfigError,
    DistributedConfig,
    MeshConfig,
    ParallelConfig,
    check,
)
from jaxformer.errors import JaxformerError
from jaxformer.sharding import make_mesh
from jaxformer.training import distributed
from jaxformer.training import run as run_folder
from jaxformer.training.parallel import Parallel
from jaxformer.training.run import RunError, RunFolder
from jaxformer.training.stopping import StopRequest
from tests.training.launchers import A_TPU, KUBERNETES, OPEN_MPI, SLURM


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"HOME": "/", "JAX_PLATFORMS": "cpu"}, None),
        (SLURM, "slurm"),
        # A single task, a batch script, a shell inside an allocation: nobody else to wait for.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        (OPEN_MPI, "open mpi"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM | OPEN_MPI, "open mpi"),
        (KUBERNETES, "kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (A_TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        (A_TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (A_TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
        (A_TPU | KUBERNETES | {"TPU_WORKER_HOSTNAMES": "a"}, None),
        (A_TPU, "tpu"),
        (A_TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (A_TPU | {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),
    ],
)
def test_launcher_is_told_from_the_environment(environment, launcher):
    assert distributed.found(environment) == launcher


@pytest.fixture
def joined(monkeypatch):
    """What `initialize` would give jax, in an environment of a test's making."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)

    def initialize(environment, **options):
        monkeypatch.setattr(os, "environ", environment)
        distributed.initialize(DistributedConfig(**options))
        return calls

    return initialize


def test_process_that_is_alone_joins_nobody(joined):
    assert joined({}) == []
    assert joined(SLURM, detect=False) == []


def test_addresses_of_the_command_line_go_to_jax_unchanged(joined):
    (given,) = joined(
        SLURM, coordinator="host:123", num_processes=1, process_id=0, heartbeat_seconds=7
    )
    assert given["coordinator_address"] == "host:123"
    assert (given["num_processes"], given["process_id"]) == (1, 0)
    assert given["cluster_detection_method"] == "deactivate"
    assert given["heartbeat_timeout_seconds"] == 7


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        (SLURM, False),  # two of a machine, which see all GPUs: jax gives each one of them
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, True),  # one a machine: all GPUs are its own
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, True),  # --gpus-per-task=1
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, False),
        (OPEN_MPI, False),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    ],
)
def test_process_gets_the_gpus_that_are_its_own(joined, environment, own):
    (given,) = joined(environment)
    assert given.get("local_device_ids") == ([] if own else None)


def test_launchers_that_jax_cannot_ask_alone_name_the_package(joined, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jax\[k8s\]'.*no-detect"):
        joined(KUBERNETES)
    newer = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    with pytest.raises(ConfigError, match="pip install mpi4py"):
        joined(newer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "missing: num_processes, process_id"),
        ({"num_processes": 2, "process_id": 0}, "missing: coordinator"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "0 to 1"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "must be positive"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds must be positive"),
    ],
)
def test_half_an_address_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(Config(), distributed=DistributedConfig(**options)))


@pytest.mark.parametrize(
    ("needed", "shares", "part"),
    [
        ({0}, 1, (0, 1)),
        ({0, 1}, 2, (0, 1)),
        ({2, 3}, 4, (1, 2)),
        ({3}, 4, (3, 4)),
        ({0, 1, 4, 5}, 16, (0, 2)),  # a square of a TPU's torus: rows that are no neighbours
        ({3, 4}, 8, (0, 1)),
        ({2, 3}, 6, (1, 3)),
        ({3, 4, 5}, 6, (1, 2)),
    ],
)
def test_a_process_reads_the_smallest_equal_part_that_holds_its_rows(needed, shares, part):
    assert distributed.smallest_part(needed, shares) == part


def test_alone_everything_stays_as_it_is():
    def refuse():
        raise JaxformerError("taken")

    assert distributed.is_main() and not distributed.several()
    assert distributed.here() == ""
    assert distributed.from_main(lambda: "here") == "here"
    with pytest.raises(JaxformerError, match=r"^taken$"):
        distributed.from_main(refuse)
    distributed.require_same("anything", "data")
    assert distributed.fail(3) == 3


def test_stop_of_several_is_what_jax_agreed_on(monkeypatch):
    agreed = 4
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: n == agreed)
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with StopRequest(several=True) as stop:
            signal.raise_signal(signal.SIGINT)
            assert told == [signal.SIGTERM]  # where jax listens
            assert [stop.after(step) for step in (1, 2, 3)] == [False] * 3
            assert stop.after(4) and stop.number == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        # What comes after the loop can be ended.
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_folder_that_a_process_does_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEEN_WITHIN", 1)
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    with pytest.raises(RunError, match="that all machines share"):
        run_folder._await(RunFolder(tmp_path / "elsewhere").lock)


@pytest.mark.parametrize(
    ("told", "lacking"),
    [
        (None, 0),
        ({"bytes_in_use": 5}, 0),
        ({"bytes_limit": 100, "bytes_in_use": 40}, 0),
        ({"bytes_limit": 100, "bytes_in_use": 50}, 10),
    ],
)
def test_what_a_device_lacks_to_hold_all_parameters(told, lacking):
    parallel = Parallel(make_mesh(MeshConfig(data=2)), ParallelConfig())
    device = SimpleNamespace(memory_stats=lambda: told)
    object.__setattr__(parallel, "mesh", SimpleNamespace(size=2, local_devices=[device]))
    assert parallel.lacking({"weight": jax.ShapeDtypeStruct((3, 5), np.float32)}) == lacking
