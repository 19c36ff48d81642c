"""train.py from command line to summary, stopped and resumed, on files of a few kilobytes."""

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

import train as program
from jaxformer import config as configuration
from jaxformer.arguments import parse
from jaxformer.decoding.predict import Translator
from jaxformer.training.checkpoint import Checkpoints
from jaxformer.training.run import RunError, RunFolder, claim, load_run
from jaxformer.training.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
PAIRS = (
    "--data.tokenizer character --data.target-tokenizer word --data.buckets 1 "
    "--data.max-source-length 8 --data.max-target-length 8 "
    "--data.dev-fraction 0.15 --data.test-fraction 0.15 "
    "--model.layers 1 --model.width 16 --model.heads 2 --model.max-length 8 --model.dropout 0.1 "
    "--optimizer.warmup-steps 3 --train.batch-size 4 --train.accumulation 2 --train.ema 0.9 "
    "--train.log-every 2 --eval.every 4 --eval.batch-size 8 --eval.max-batches 1 "
    "--checkpoint.every 3 --decode.beam 1 --mesh.data 1"
)


def write_pairs(path):
    """Words over six letters; the target spells them backwards."""
    draw = random.Random(0)
    words = sorted({"".join(draw.choices("abcdef", k=draw.randint(2, 6))) for _ in range(90)})
    path.write_text("".join(f"{word}\t{' '.join(word[::-1].upper())}\n" for word in words))
    return path


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.tsv")


@pytest.fixture(scope="module")
def arguments(pairs_file):
    """arguments(run, ...): a command line of the tiny pairs run."""

    def make(run, *more, steps=STEPS):
        return [
            "pairs", "--data.files", str(pairs_file), "--run", str(run),
            "--train.steps", str(steps), *PAIRS.split(), *more,
        ]  # fmt: skip

    return make


def train(*argv):
    """Runs train.py's `train` in this process: (exit status, what it printed)."""
    out = io.StringIO()
    status = program.train(parse(list(map(str, argv))), Console(file=out, soft_wrap=True))
    return status, out.getvalue()


@pytest.fixture(scope="module")
def straight(arguments, tmp_path_factory):
    """A run of all steps without a break: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    status, printed = train(*arguments(folder))
    assert status == 0
    return folder, printed


def saved(run, step=STEPS):
    """Every array of a checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        return {
            item: checkpointer.restore(Path(run, "checkpoints", str(step), item).absolute())
            for item in ("params", "optimizer", "ema")
        }


def steps_of(run):
    return sorted(int(path.name) for path in Path(run, "checkpoints").iterdir() if path.is_dir())


def metrics(run):
    return [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in read_metrics(Path(run, "metrics.jsonl"))
    ]


def assert_same_run(run, other):
    """Parameters, optimiser state, average and metrics are bitwise equal."""
    one, two = saved(run), saved(other)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert metrics(run) == metrics(other)


def raise_at(monkeypatch, step, number=signal.SIGTERM):
    """A signal after a step's computation."""
    count = program.TrainingProgress.count
    calls = []

    def counted(self, tokens):
        calls.append(tokens)
        if len(calls) == step:
            signal.raise_signal(number)
        return count(self, tokens)

    monkeypatch.setattr(program.TrainingProgress, "count", counted)


# ------------------------------------------------------------------ A whole run


def test_run_says_first_what_it_is(straight):
    folder, printed = straight
    said = dict(line.split(":", 1) for line in printed.splitlines() if ":" in line)
    assert said["run"].strip() == str(folder)
    assert "1 of 8 x cpu (cpu)" in said["devices"]
    assert "1 + 1 layers" in said["model"] and "parameters" in said["model"]
    assert "xla" in said["attention"]
    assert "train: " in printed and "examples" in printed


def test_run_folder_holds_everything(straight):
    folder, _ = straight
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoints", "config.json", "lock", "loss.png", "metrics.jsonl", "summary.md",
        "tokenizers",
    }  # fmt: skip
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert configuration.load(folder / "config.json").run == str(folder)


def test_metrics_have_train_and_dev_lines_at_their_steps(straight):
    folder, _ = straight
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if line["kind"] == "dev"] == [4, 8]
    assert {"loss", "accuracy", "tokens"} <= set(lines[-1])
    assert {"learning_rate", "gradient_norm", "tokens_per_second"} <= set(lines[0])


def test_summary_has_scores_samples_and_the_next_commands(straight):
    folder, printed = straight
    page = (folder / "summary.md").read_text()
    assert page in printed
    assert "PER %" in page and "beam 1" in page and "(test split, parameters of step 8)" in page
    assert "| source | predicted | right |" in page
    assert f"jaxformer predict {folder}" in page


def test_longer_training_learns(arguments, tmp_path):
    options = ["--optimizer.learning-rate", "0.005", "--eval.every", "0", "--checkpoint.every=0"]
    train(*arguments(tmp_path / "run", *options, steps=150))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", "train")]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]
    assert steps_of(tmp_path / "run") == [150]


def test_run_name_defaults_to_preset_and_date(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = arguments("x", steps=0)
    place = line.index("--run")
    status, _ = train(*line[:place], *line[place + 2 :])
    assert status == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pairs-20")


# ------------------------------------------------------------------ Stop and resume


def test_stopped_and_resumed_equals_straight_bitwise(straight, arguments, tmp_path, monkeypatch):
    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        raise_at(patch, step=5)
        status, printed = train(*arguments(run))
    assert status == 128 + signal.SIGTERM == 143
    assert steps_of(run)[-1] == 5
    assert f"stopped:   at step 5; go on with: python train.py {run} --resume" in printed
    assert not (run / "summary.md").exists()
    status, printed = train(run, "--resume")
    assert status == 0
    assert "from step 5" in printed
    assert_same_run(run, straight[0])


def test_killed_and_resumed_equals_straight_bitwise(
    straight, arguments, compiled_as_here, tmp_path
):
    run = tmp_path / "killed"
    kill = (
        "import os, signal, sys, train\n"
        "count, calls = train.TrainingProgress.count, []\n"
        "def counted(self, tokens):\n"
        "    calls.append(tokens)\n"
        "    if len(calls) == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    count(self, tokens)\n"
        "train.TrainingProgress.count = counted\n"
        "sys.exit(train.main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", kill, *arguments(run)],
        cwd=ROOT,
        env=environment() | compiled_as_here,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    # What was cut short, of a checkpoint or of a line, must not matter.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "kind": "tr')
    status, printed = train(run, "--resume")
    assert status == 0
    assert "from step 3" in printed or "from step 6" in printed
    assert_same_run(run, straight[0])


def environment():
    paths = [str(ROOT), str(ROOT / "kernels")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def test_script_told_to_stop_saves_and_exits_with_143(arguments, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments(run, "--eval.every", "0", steps=10**6)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    last = printed.splitlines()[-1]
    assert last.endswith(f"go on with: python train.py {run} --resume")
    assert f"at step {steps_of(run)[-1]}" in last.replace(",", "")
    assert "Traceback" not in errors


def test_signal_during_an_evaluation_still_saves_the_step(arguments, tmp_path, monkeypatch):
    mean_loss = program.mean_loss

    def interrupted(*given):
        signal.raise_signal(signal.SIGTERM)
        return mean_loss(*given)

    monkeypatch.setattr(program, "mean_loss", interrupted)
    status, _ = train(*arguments(tmp_path / "run"))
    assert status == 143
    assert steps_of(tmp_path / "run")[-1] == 5


def test_finished_run_resumed_only_writes_its_summary_again(straight, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(straight[0], run)
    (run / "summary.md").unlink()
    status, _ = train(run, "--resume")
    assert status == 0
    assert (run / "summary.md").exists()
    assert_same_run(run, straight[0])
    with pytest.raises(RunError, match="already holds a run: add --resume"):
        train(run)


def test_configuration_given_back_reproduces_the_run(straight, tmp_path):
    status, _ = train(straight[0] / "config.json", "--run", tmp_path / "again")
    assert status == 0
    assert_same_run(tmp_path / "again", straight[0])
    first, second = (
        json.loads((run / "config.json").read_text()) for run in (straight[0], tmp_path / "again")
    )
    assert first | {"run": None} == second | {"run": None}


def test_second_start_in_a_folder_is_refused(straight, arguments):
    before = (straight[0] / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="already holds a run: add --resume to go on"):
        train(*arguments(straight[0]))
    assert (straight[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--model.width", "32"], "model.width"),
        (["--optimizer.learning-rate", "0.5"], "optimizer.learning_rate"),
        (["--data.buckets", "3"], "data.buckets"),
        (["--train.accumulation", "1"], "train.accumulation"),
        (["--seed", "5"], "seed"),
    ],
)
def test_resume_with_changed_options_is_refused_by_name(straight, options, name):
    with pytest.raises(RunError, match=f"changed: {name}"):
        train(straight[0], "--resume", *options)


def test_resume_on_other_data_is_refused(straight, pairs_file):
    before = pairs_file.read_text()
    pairs_file.write_text(before.replace("A B", "B A"))
    try:
        with pytest.raises(RunError, match="the training data is not what this run began with"):
            train(straight[0], "--resume")
    finally:
        pairs_file.write_text(before)


def test_folder_in_use_by_another_process_is_refused(straight):
    with (
        claim(RunFolder(straight[0]), resume=True),
        pytest.raises(RunError, match="another process trains in"),
    ):
        train(straight[0], "--resume")


def test_resume_without_a_run_is_refused(arguments, tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        train(*arguments(tmp_path / "nothing", "--resume"))
    with pytest.raises(RunError, match="--resume needs --run DIR"):
        train("g2p", "--resume")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ What is kept and moved


def test_moved_run_predicts_the_same_without_its_data(straight, pairs_file, tmp_path):
    sources = ["abc", "fade", "bb"]

    def predict(folder):
        loaded = load_run(folder)
        config = dataclasses.replace(
            loaded.config, decode=dataclasses.replace(loaded.config.decode, max_length=6)
        )
        return Translator(loaded.apply, loaded.tokenizers, config)(loaded.params, sources)

    before = predict(straight[0])
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(straight[0], moved)
    hidden = [path.rename(path.with_suffix(".away")) for path in (straight[0], pairs_file)]
    try:
        assert predict(moved) == before
    finally:
        for path, old in zip(hidden, (straight[0], pairs_file), strict=True):
            path.rename(old)
    assert [len(found) for found in before] == [1, 1, 1]


def test_newest_and_best_checkpoints_are_kept(arguments, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(
        program, "mean_loss", lambda *given: {"loss": next(losses), "accuracy": 0.5, "tokens": 1.0}
    )
    options = ["--checkpoint.every", "2", "--eval.every", "2", "--checkpoint.keep", "1"]
    train(*arguments(tmp_path / "run", *options))
    assert steps_of(tmp_path / "run") == [4, 8]
    assert load_run(tmp_path / "run").step == 4
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    assert (checkpoints.best, checkpoints.latest) == (4, 8)
    checkpoints.close()


def test_run_predicts_with_the_average_where_one_is_kept(straight):
    loaded = load_run(straight[0], step=STEPS)
    arrays = saved(straight[0])
    for (path, found), average, plain in zip(
        jax.tree_util.tree_leaves_with_path(loaded.params),
        jax.tree.leaves(arrays["ema"]),
        jax.tree.leaves(arrays["params"]),
        strict=True,
    ):
        np.testing.assert_array_equal(found, average, err_msg=str(path))
        assert (np.asarray(average) != np.asarray(plain)).any(), path


def test_run_without_dev_and_test_splits_works(arguments, tmp_path):
    options = ["--data.dev-fraction", "0", "--data.test-fraction", "0"]
    status, _ = train(*arguments(tmp_path / "run", *options, steps=3))
    assert status == 0
    assert {line["kind"] for line in metrics(tmp_path / "run")} == {"train"}
    assert load_run(tmp_path / "run").step == 3


# ------------------------------------------------------------------ Refusals


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    return program.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.heads", "3"], "model.width=16 must be a multiple of model.heads=3"),
        (["--model.attention", "xlaa"], "did you mean 'xla'"),
        (["--data.files", "missing.tsv"], "missing.tsv does not exist"),
        (["--data.max-target-length", "4"], "pairs.tsv:"),
        (["--model.max-length", "6"], "raise model.max_length"),
        (["--decode.beam", "0"], "decode.beam must be positive"),
        (["--tracking.wandb", "project"], "pip install 'jaxformer[wandb]'"),
        (["--tracking.tensorboard"], "pip install 'jaxformer[tensorboard]'"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else None,
)
def test_what_cannot_work_is_one_line_and_leaves_no_folder(
    arguments, tmp_path, monkeypatch, capsys, change, message
):
    for extra in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, extra, None)
    status = run_main(monkeypatch, *arguments(tmp_path / "run", *change))
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_unknown_preset_names_the_nearest_and_exits_with_two(monkeypatch, capsys):
    assert run_main(monkeypatch, "paris") == 2
    error = capsys.readouterr().err
    assert "did you mean 'pairs'" in error and error.count("\n") == 1


def test_unknown_option_names_the_nearest_and_leaves_no_folder(
    arguments, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *arguments(tmp_path / "run", "--model.wdith", "4"))
    assert stopped.value.code == 2
    assert "--model.width" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_loss_that_is_no_number_stops_the_run_with_advice(arguments, tmp_path, monkeypatch, capsys):
    options = ["--optimizer.learning-rate", "1e30", "--optimizer.warmup-steps", "0"]
    status = run_main(monkeypatch, *arguments(tmp_path / "run", *options))
    error = capsys.readouterr().err
    assert status == 2
    assert "lower --optimizer.learning-rate" in error and error.count("\n") == 1
