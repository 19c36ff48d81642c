"""Many processes as one run: real ones, joined by jax over gloo, that train, die and go on."""

import dataclasses
import io
import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

import train as program
from jaxformer.arguments import parse
from jaxformer.config import DistributedConfig
from jaxformer.data import build_tokenizers, encode_corpus, load_corpus, training_batches
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.parallel import Parallel
from jaxformer.training.run import load_run
from jaxformer.training.tracking import read_metrics
from tests.training.launchers import OPEN_MPI, SLURM
from tests.training.one_process import NOWHERE, RECORDED
from tests.training.processes import ONE_OF_THEM, Processes

STEPS = 10
ALIKE = 1e-5
"""What sums in another order may change, relative to the largest number of an array."""
HEARTBEAT = 10
FOUR_DEVICES = ("--mesh.data", "2", "--mesh.fsdp", "2")

JOIN = """
import json, sys, jax
from jaxformer.config import DistributedConfig
from jaxformer.errors import JaxformerError
from jaxformer.training import distributed
try:
    distributed.initialize(DistributedConfig(**json.loads(sys.argv[1])))
except JaxformerError as error:
    print(error)
    sys.exit(distributed.fail(2))
print(jax.process_index(), jax.process_count(), distributed.from_main(lambda: jax.process_index()))
def refuse():
    raise JaxformerError("taken")
try:
    distributed.from_main(refuse)
except JaxformerError as error:
    print(distributed.here() + str(error))
"""


def join(folder, count, options, variables=lambda number: {}):
    return Processes(
        ["-c", JOIN],
        count=count,
        folder=folder,
        joined=False,
        options=lambda number: [json.dumps(options(number))],
        variables=variables,
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "open mpi"])
def test_processes_join_by_their_launchers_environment(tmp_path, launcher):
    """The variables are the launcher's, written by hand: neither is needed to run this."""

    def variables(number):
        if launcher == "slurm":
            return SLURM | {
                "SLURM_JOB_ID": str(os.getpid()),
                "SLURM_PROCID": str(number),
                "SLURM_LOCALID": str(number),
            }
        return OPEN_MPI | {
            "OMPI_MCA_orte_hnp_uri": f"{os.getpid() << 12}.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_RANK": str(number),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
        }

    with join(tmp_path, 2, lambda number: {"timeout_seconds": 60}, variables) as started:
        assert started.wait() == [0, 0], started.said()
        assert started.printed(0) == "0 2 0\nprocess 0 of 2: taken\n"
        assert started.printed(1) == "1 2 0\nprocess 1 of 2: as process 0 found: taken\n"


@pytest.mark.slow
def test_processes_that_do_not_fit_together_end_with_one_line(tmp_path):
    port = 20000 + os.getpid() % 20000

    def options(number):
        # 0 and 1 disagree on how many they are; 2 is alone at its address.
        return {
            "coordinator": f"127.0.0.1:{port + (number == 2)}",
            "num_processes": (2, 3, 2)[number],
            "process_id": (0, 1, 1)[number],
            "timeout_seconds": 20 if number < 2 else 2,
            "heartbeat_seconds": 5,
        }

    with join(tmp_path, 3, options) as started:
        statuses = started.wait()
        assert statuses[1:] == [2, 2] and statuses[0] != 0, started.said()
        assert "one of 3, and the run has 2" in started.printed(1)
        (line,) = [line for line in started.errors(2).splitlines() if "error" in line]
        assert "process 1 of 2 waited 2 s" in line and "--distributed.timeout-seconds" in line


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """arguments(run, ...): a command line of a tiny language model with dropout."""
    text = tmp_path_factory.mktemp("data") / "text.txt"
    draw = np.random.default_rng(0)
    text.write_text(" ".join(draw.choice(["one", "two", "three", "many"], 600)))

    def make(run, *more, steps=STEPS):
        options = (
            f"text --data.files {text} --run {run} --train.steps {steps} "
            "--data.tokenizer byte --data.length 16 --data.split tail --model.layers 1 "
            "--model.width 16 --model.heads 2 --model.max-length 16 --model.dropout 0.1 "
            "--model.no-scan --train.batch-size 4 --train.accumulation 2 --train.log-every 2 "
            # Adam would make of rounding, where a gradient is 0, steps of full size.
            "--optimizer.name sgd --optimizer.learning-rate 0.1 --optimizer.schedule constant "
            "--optimizer.warmup-steps 0 --eval.every 0 --eval.batch-size 8 --eval.max-batches 2 "
            "--eval.final-split dev --checkpoint.every 3 "
            f"--distributed.heartbeat-seconds {HEARTBEAT}"
        )
        return [*options.split(), *more]

    return make


@pytest.fixture(scope="module")
def train(arguments, compiled_as_here, tmp_path_factory):
    """train(run, count, devices, ...): starts the processes of a run."""

    def start(run, count, devices, *more, steps=STEPS, at_step=None, number=None, record=False):
        """`at_step`: (process, step, signal), after which it sends itself that signal."""

        def variables(process):
            given = dict(compiled_as_here)
            if at_step is not None and process == at_step[0]:
                given |= {"AT_STEP": str(at_step[1]), "SIGNAL": str(int(at_step[2]))}
            if record:
                given["RECORD"] = str(run.with_name(f"{run.name}-{process}.npz"))
            return given

        return Processes(
            [ONE_OF_THEM, *arguments(run, *more, steps=steps)],
            count=count,
            devices=devices,
            folder=tmp_path_factory.mktemp("said"),
            variables=variables,
        )

    return start


@pytest.fixture(scope="module")
def here(arguments):
    """here(run, ...): does the run in this one process, on as many devices as its mesh has."""

    def run_here(run, *more, steps=STEPS):
        config = parse(arguments(run, *more, steps=steps))
        assert program.train(config, Console(file=io.StringIO())) == 0

    return run_here


def finished(processes):
    with processes:
        assert processes.wait() == [0] * len(processes.running), processes.said()
    return processes


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """Two processes of two devices, undisturbed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    started = finished(train(run, 2, 2, "--mesh.fsdp", "2", record=True))
    return SimpleNamespace(run=run, processes=started)


@pytest.fixture(scope="module")
def killed(train, tmp_path_factory):
    """The same, whose process 1 is killed after its seventh step."""
    run = tmp_path_factory.mktemp("killed") / "run"
    with train(run, 2, 2, "--mesh.fsdp", "2", at_step=(1, 7, signal.SIGKILL)) as started:
        started.running[1].wait(240)
        since = time.monotonic()
        statuses = started.wait(120)
        return SimpleNamespace(run=run, statuses=statuses, seconds=time.monotonic() - since)


def params_of(run, step=STEPS):
    return jax.tree.leaves(load_run(run, step=step).params)


def losses_of(run):
    return [
        (line["step"], line["kind"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")
    ]


def assert_same_bitwise(run, other):
    for left, right in zip(params_of(run), params_of(other), strict=True):
        np.testing.assert_array_equal(left, right)
    assert losses_of(run) == losses_of(other)


def assert_alike(run, other):
    for left, right in zip(params_of(run), params_of(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=ALIKE * np.abs(right).max())
    scored = {(step, kind): loss for step, kind, loss in losses_of(run)}
    for step, kind, loss in losses_of(other):
        assert scored[step, kind] == pytest.approx(loss, rel=ALIKE)


@pytest.mark.slow
def test_first_process_speaks_for_all(straight):
    first, second = (straight.processes.printed(number) for number in (0, 1))
    assert "4 x cpu (cpu)" in first and "mesh: data 2, fsdp 2, 2 processes" in first
    assert "This page:" in first
    assert second == ""
    names = {path.name for path in straight.run.iterdir()}
    assert {"config.json", "tokenizers", "metrics.jsonl", "summary.md", "loss.png"} <= names
    assert [step for step, _, _ in losses_of(straight.run)] == [2, 4, 6, 8, 10, 10]
    kept = json.loads((straight.run / "config.json").read_text())["distributed"]
    assert kept == dataclasses.asdict(DistributedConfig())


def global_batches(run, count):
    """The batches that `count` processes recorded together, and how many held each element."""
    files = [np.load(run.with_name(f"{run.name}-{number}.npz")) for number in range(count)]
    batches = [{} for _ in range(RECORDED)]
    for key in files[0].files:
        number, name = key.split()
        parts = np.stack([file[key] for file in files])
        whole = parts.max(axis=0)
        assert ((parts == whole) | (parts == NOWHERE)).all(), f"{key}: they disagree"
        batches[int(number)][name] = whole
    return batches


def assert_batches_of_one_process(arguments, run, count):
    config = parse(arguments(run))
    corpus = load_corpus(config.data)
    data = encode_corpus(corpus, build_tokenizers(corpus, config.data), config.data)
    rows = config.train.batch_size * config.train.accumulation
    alone = training_batches(data, config.data, batch_size=rows, seed=config.seed)
    for batch in global_batches(run, count):
        for name, array in next(alone).items():
            np.testing.assert_array_equal(batch[name], array)
    alone.close()


@pytest.mark.slow
def test_global_batch_of_two_processes_is_that_of_one(straight, arguments):
    assert_batches_of_one_process(arguments, straight.run, 2)


@pytest.mark.slow
def test_when_one_is_killed_the_others_end_within_the_heartbeat(killed):
    assert killed.statuses[1] == -signal.SIGKILL
    assert killed.statuses[0] not in (0, None)
    assert killed.seconds < 4 * HEARTBEAT
    assert Checkpoints(killed.run / "checkpoints", read_only=True).latest in (3, 6)


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed_bitwise(killed, straight, train, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed.run, run)
    finished(train(run, 2, 2, "--mesh.fsdp", "2", "--resume"))
    assert_same_bitwise(run, straight.run)


@pytest.mark.slow
def test_run_goes_on_on_one_device_and_back(killed, straight, here, train, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed.run, run)
    here(run, "--mesh.data", "1", "--resume", steps=8)
    # Back on fewer devices: each parameter lies in both processes.
    finished(train(run, 2, 1, "--mesh.fsdp", "2", "--resume"))
    assert_alike(run, straight.run)


@pytest.mark.slow
def test_one_process_with_as_many_devices_does_the_same(straight, here, tmp_path):
    here(tmp_path / "run", *FOUR_DEVICES)
    assert_alike(tmp_path / "run", straight.run)


@pytest.mark.slow
def test_four_processes_of_which_the_first_is_killed(straight, here, train, arguments, tmp_path):
    run = tmp_path / "run"
    options = ("--mesh.fsdp", "2")
    with train(run, 4, 1, *options, at_step=(0, 5, signal.SIGKILL), record=True) as started:
        statuses = started.wait()
        assert statuses[0] == -signal.SIGKILL and 0 not in statuses, started.said()
    assert_batches_of_one_process(arguments, run, 4)
    here(run, *FOUR_DEVICES, "--resume")
    assert_alike(run, straight.run)


@pytest.mark.slow
def test_signal_to_one_stops_all_at_the_same_step(train, arguments, tmp_path):
    run = tmp_path / "run"
    # Over `tensor` both processes compute on every row.
    started = train(
        run, 2, 1, "--mesh.tensor", "2", "--checkpoint.every", "0", "--train.log-every", "1000",
        steps=10**6, at_step=(1, 4, signal.SIGTERM), record=True,
    )  # fmt: skip
    with started:
        assert started.wait() == [128 + signal.SIGTERM] * 2, started.said()
    said = started.printed(0).splitlines()[-1]
    step = Checkpoints(run / "checkpoints", read_only=True).latest
    assert step > 4 and f"at step {step:,}" in said
    assert said.endswith(f"go on with: python train.py {run} --resume")
    assert started.printed(1) == ""
    assert_batches_of_one_process(arguments, run, 2)


@pytest.mark.slow
def test_model_too_large_for_one_device_is_scored_by_its_loss_alone(
    arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(Parallel, "lacking", lambda self, params: 2**31)
    monkeypatch.setattr(Parallel, "on_one_device", None)
    printed = io.StringIO()
    config = parse(arguments(tmp_path / "run", "--mesh.data", "2", steps=2))
    assert program.train(config, Console(file=printed, width=200)) == 0
    assert "a device has 2.00 GiB too little" in printed.getvalue()
    page = (tmp_path / "run" / "summary.md").read_text()
    (scored,) = read_metrics(tmp_path / "run" / "metrics.jsonl", "dev")
    assert f"- loss: {scored['loss']:.4f}" in page and "## Samples" not in page


@pytest.mark.slow
def test_process_that_reads_other_data_says_so_by_its_number(train, arguments, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("other words " * 300)
    started = Processes(
        [ONE_OF_THEM, *arguments(tmp_path / "run")],
        count=2,
        folder=tmp_path / "said",
        options=lambda number: ["--data.files", other] if number else [],
    )
    with started:
        statuses = started.wait()
    assert statuses[1] == 2 and statuses[0] != 0
    assert "process 1 of 2: error: the training data of this process is not" in started.errors(1)
    assert not (tmp_path / "run" / "config.json").exists()
