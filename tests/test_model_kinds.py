"""Every kind of model from train.py to the command line: trained, stopped, resumed, asked."""

import io
import json
import math
import random
import signal
from pathlib import Path

import jax
import matplotlib.image as png
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

import train as program
from jaxformer.arguments import parse
from jaxformer.cli import main
from jaxformer.training.tracking import read_metrics

STEPS = 4
SMALL = (
    "--model.layers 1 --model.encoder-layers 1 --model.width 16 --model.heads 2 "
    "--model.dropout 0.1 --optimizer.warmup-steps 2 --train.batch-size 8 --train.log-every 1 "
    "--train.label-smoothing 0 --eval.batch-size 8 --eval.every 2 --checkpoint.every 2 "
    f"--train.steps {STEPS} --mesh.data 2"
)
PAIRS = (
    "pairs --data.tokenizer character --data.target-tokenizer word --data.buckets 1 "
    "--data.max-source-length 8 --data.max-target-length 8 --model.max-length 16 "
    "--data.dev-fraction 0.1 --data.test-fraction 0.2 --decode.beam 2"
)
KINDS = {
    "recurrent": f"{PAIRS} --model.kind recurrent --model.recurrent.context additive "
    "--train.sampling.schedule linear --train.sampling.scope sequence",
    "ctc": f"{PAIRS} --model.kind ctc",
    "hybrid": f"{PAIRS} --model.kind hybrid",
    "digits": "digits-ctc --data.lines 60 --data.digits-per-line 2 4 --data.buckets 1 "
    "--data.dev-fraction 0.2 --data.test-fraction 0.2 --model.ctc.channels 2 3",
}


def train(kind, folder, run, *more):
    argv = [*KINDS[kind].split(), *SMALL.split(), "--run", str(run), *more]
    if kind != "digits":
        argv += ["--data.files", str(folder / "pairs.tsv")]
    out = io.StringIO()
    assert program.train(parse(argv), Console(file=out, soft_wrap=True)) == 0
    return out.getvalue()


def write_pairs(folder):
    """Words over four letters, and their letters."""
    draw = random.Random(0)
    words = sorted({"".join(draw.choices("abcd", k=draw.randint(2, 6))) for _ in range(60)})
    (folder / "pairs.tsv").write_text("".join(f"{w}\t{' '.join(w.upper())}\n" for w in words))


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(kind, run folder, its data's folder, what training printed)."""
    folder = tmp_path_factory.mktemp(request.param)
    write_pairs(folder)
    printed = train(request.param, folder, folder / "run")
    return request.param, folder / "run", folder, printed


def arrays(run):
    """Every array of the last checkpoint, by item."""
    folder = Path(run, "checkpoints", str(STEPS))
    items = [item for item in ("params", "optimizer", "statistics") if (folder / item).exists()]
    with ocp.StandardCheckpointer() as checkpointer:
        return {item: checkpointer.restore((folder / item).absolute()) for item in items}


def losses(run):
    """Every metric but speed, of every logged step."""
    lines = read_metrics(Path(run, "metrics.jsonl"))
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def ask(capsys, *arguments):
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def test_a_stopped_and_resumed_run_is_bitwise_the_straight_one(trained, tmp_path, monkeypatch):
    kind, run, folder, _ = trained
    count = program.TrainingProgress.count
    calls = []

    def interrupted(self, tokens):
        calls.append(tokens)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        count(self, tokens)

    monkeypatch.setattr(program.TrainingProgress, "count", interrupted)
    argv = [*KINDS[kind].split(), *SMALL.split(), "--run", str(tmp_path / "run")]
    if kind != "digits":
        argv += ["--data.files", str(folder / "pairs.tsv")]
    console = Console(file=io.StringIO())
    assert program.train(parse(argv), console) == 128 + signal.SIGTERM
    assert program.train(parse([str(tmp_path / "run"), "--resume"]), console) == 0
    straight, resumed = arrays(run), arrays(tmp_path / "run")
    assert ("statistics" in straight) == (kind == "digits")
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert losses(run) == losses(tmp_path / "run")


def test_its_scores_are_those_of_evaluate(trained, capsys):
    kind, run, _, _ = trained
    scores = json.loads("\n".join(ask(capsys, "evaluate", run, "--json")))
    assert scores["examples"] > 5
    assert 0 <= scores["wer"] <= 1 and math.isfinite(scores["loss"])
    page = (run / "summary.md").read_text()
    assert f"{100 * scores['wer']:.2f}" in page
    assert ("string error" in page) == (kind == "digits")


def test_it_says_whether_labels_fit_into_frames(trained):
    kind, _, _, printed = trained
    assert ("fits into its source's frames" in printed) == (kind != "recurrent")


def test_it_predicts_and_scores_what_it_is_given(trained, capsys, tmp_path):
    kind, run, _, _ = trained
    if kind == "digits":
        picture = np.ones((20, 60))
        picture[4:16, 10:14] = picture[4:16, 40:44] = 0.0
        png.imsave(tmp_path / "line.png", picture, cmap="gray")
        assert len(ask(capsys, "predict", run, "--input", tmp_path / "line.png")) == 1
        return
    (tmp_path / "words").write_text("abcd\nbad\n")
    lines = ask(capsys, "predict", run, "--input", tmp_path / "words", "--n-best", 2)
    found = [line.split("\t") for line in lines]
    assert {source for source, _, _ in found} == {"abcd", "bad"}
    # With a search this narrow CTC's own figure may lack paths; a decoder's is the score exactly.
    pairs = "".join(f"{source}\t{target}\n" for source, target, _ in found if target)
    if kind == "recurrent" and pairs:
        (tmp_path / "pairs").write_text(pairs)
        scored = ask(capsys, "score", run, "--input", tmp_path / "pairs")
        given = [float(score) for _, target, score in found if target]
        np.testing.assert_allclose([float(line) for line in scored], given, atol=2e-3)


def test_it_shows_where_it_looked(trained, capsys, tmp_path):
    kind, run, _, _ = trained
    if kind == "digits":
        source = ("--input", run / "line.png")
    else:
        source = ("--source", "abcd")
    ask(capsys, "show", run, *source, "--output", tmp_path / "seen.png")
    assert png.imread(tmp_path / "seen.png").shape[0] > 100


def test_a_decoder_that_attends_to_nothing_has_nothing_to_show(tmp_path, capsys):
    write_pairs(tmp_path)
    options = ("--model.recurrent.context", "final", "--train.steps", "0")
    train("recurrent", tmp_path, tmp_path / "run", *options)
    with pytest.raises(SystemExit):
        ask(capsys, "show", tmp_path / "run", "--source", "abcd")
    assert "attends to nothing" in capsys.readouterr().err
