"""`jaxformer <verb>` on two tiny runs, one of pairs and one of text."""

import io
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import train as program
from jaxformer import presets
from jaxformer.arguments import parse
from jaxformer.cli import main
from jaxformer.data import EOS, SOS, encode_corpus, load_corpus
from jaxformer.training.run import load_run

SMALL = (
    "--model.layers 1 --model.width 16 --model.heads 2 --optimizer.warmup-steps 2 "
    "--optimizer.learning-rate 0.01 --train.batch-size 8 --eval.batch-size 8 --mesh.data 1"
)
PAIRS = (
    "pairs --data.tokenizer character --data.target-tokenizer word --data.buckets 1 "
    "--data.max-source-length 8 --data.max-target-length 8 --model.max-length 8 "
    "--data.dev-fraction 0.1 --data.test-fraction 0.2 --train.steps 40 --decode.beam 2"
)
TEXT = (
    "text --data.split tail --data.tokenizer character --data.length 16 --model.max-length 32 "
    "--data.dev-fraction 0.1 --data.test-fraction 0.1 --train.steps 10"
)


def train(options, data, run):
    argv = [*options.split(), *SMALL.split(), "--data.files", str(data), "--run", str(run)]
    assert program.train(parse(argv), Console(file=io.StringIO())) == 0
    return str(run)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A run that spells words of two to six letters backwards."""
    folder, draw = tmp_path_factory.mktemp("pairs"), random.Random(0)
    words = sorted({"".join(draw.choices("abcd", k=draw.randint(2, 6))) for _ in range(90)})
    lines = [f"{word}\t{' '.join(word[::-1].upper())}\n" for word in words]
    (folder / "pairs.tsv").write_text("".join(lines))
    return train(PAIRS, folder / "pairs.tsv", folder / "run")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 30)
    return train(TEXT, folder / "text.txt", folder / "run")


@pytest.fixture
def run_cli(capsys, monkeypatch):
    """run_cli(*arguments, stdin=b"") -> lines of standard output."""

    def run(*arguments, stdin=b""):
        fed = SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", fed)
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refuse(run_cli, capsys):
    """refuse(*arguments) -> the one line on standard error; the exit code is 2."""

    def run(*arguments, stdin=b""):
        with pytest.raises(SystemExit) as stopped:
            run_cli(*arguments, stdin=stdin)
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert captured.out == ""
        return captured.err

    return run


# ------------------------------------------------------------------ predict

SOURCES = ["abc", "dd", "bacd", "cab"]


def test_predict_prints_a_line_a_source_in_order_whatever_the_batch(pairs, run_cli):
    together = run_cli("predict", pairs, stdin="\n".join(SOURCES).encode())
    assert len(together) == len(SOURCES)
    turned = run_cli("predict", pairs, stdin="\n".join(SOURCES[::-1]).encode())
    assert turned == together[::-1]
    assert len(set(together)) > 1
    assert set(" ".join(together).split()) <= set("ABCD")


def test_predict_reads_a_file_as_it_reads_standard_input(pairs, run_cli, tmp_path):
    (tmp_path / "sources.txt").write_bytes("\r\n".join(SOURCES).encode() + b"\r\n")
    from_file = run_cli("predict", pairs, "--input", tmp_path / "sources.txt")
    assert from_file == run_cli("predict", pairs, stdin="\n".join(SOURCES).encode())


def test_predict_of_nothing_prints_nothing(pairs, run_cli):
    assert run_cli("predict", pairs) == []


def test_n_best_is_ordered_by_score_and_starts_with_the_prediction(pairs, run_cli):
    lines = run_cli(
        "predict", pairs, "--beam", 4, "--n-best", 3, "--length-penalty", 0,
        stdin="\n".join(SOURCES).encode(),
    )  # fmt: skip
    rows = [line.split("\t") for line in lines]
    assert [row[0] for row in rows] == [source for source in SOURCES for _ in range(3)]
    best = run_cli(
        "predict", pairs, "--beam", 4, "--length-penalty", 0, stdin="\n".join(SOURCES).encode()
    )
    for number in range(len(SOURCES)):
        texts = [row[1] for row in rows[3 * number : 3 * number + 3]]
        scores = [float(row[2]) for row in rows[3 * number : 3 * number + 3]]
        assert texts[0] == best[number]
        assert len(set(texts)) == 3
        assert scores == sorted(scores, reverse=True) and scores[0] < 0


def test_n_best_widens_the_beam_where_none_is_given(pairs, run_cli):
    assert len(run_cli("predict", pairs, "--n-best", 5, stdin=b"abc")) == 5


def test_log_probability_of_a_prediction_is_its_score(pairs, run_cli):
    lines = run_cli("predict", pairs, "--beam", 4, "--n-best", 2, stdin=b"abc\nbacd")
    given = "".join("\t".join(line.split("\t")[:2]) + "\n" for line in lines)
    scores = run_cli("score", pairs, stdin=given.encode())
    np.testing.assert_allclose(
        [float(line.split("\t")[2]) for line in lines], [float(s) for s in scores], atol=2e-4
    )


def test_predict_warns_of_letters_that_training_never_saw(pairs, capsys, monkeypatch):
    fed = SimpleNamespace(buffer=io.BytesIO("abż\n".encode()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", fed)
    main(["predict", pairs])
    captured = capsys.readouterr()
    assert "never saw" in captured.err and len(captured.out.splitlines()) == 1


def test_a_line_ends_at_the_line_feed_and_nowhere_else(pairs, run_cli):
    # Form feeds and the Unicode line separator are characters of a source.
    assert len(run_cli("predict", pairs, stdin="ab\fcd\na\u2028b\n".encode())) == 2


# ------------------------------------------------------------------ score


def log_softmax(logits):
    wide = np.asarray(logits, np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_score_of_a_pair_is_the_sum_of_log_probabilities(pairs, run_cli):
    given = [("abc", "C B A"), ("ddc", "A A A"), ("cab", "D D C")]
    loaded = load_run(pairs)
    apply = jax.jit(loaded.apply)
    wanted = []
    for source, target in given:
        ids = loaded.tokenizers.target.encode(target)
        logits = apply(
            loaded.params,
            jnp.array([[*loaded.tokenizers.source.encode(source), EOS]]),
            jnp.array([[SOS, *ids]]),
        )
        wanted.append(log_softmax(logits)[0, range(len(ids) + 1), [*ids, EOS]].sum())
    stdin = "".join(f"{source}\t{target}\n" for source, target in given).encode()
    scores = [float(line) for line in run_cli("score", pairs, stdin=stdin)]
    np.testing.assert_allclose(scores, wanted, atol=1e-4)


def test_score_of_a_text_is_the_sum_of_log_probabilities(text, run_cli):
    given = ["the cat", "on, tat", "ttttttt"]
    loaded = load_run(text)
    apply = jax.jit(loaded.apply)
    wanted = []
    for line in given:
        ids = loaded.tokenizers.target.encode(line)
        logits = apply(loaded.params, jnp.array([[SOS, *ids]]))
        wanted.append(log_softmax(logits)[0, range(len(ids) + 1), [*ids, EOS]].sum())
    scores = [float(line) for line in run_cli("score", text, stdin="\n".join(given).encode())]
    np.testing.assert_allclose(scores, wanted, atol=1e-4)


# ------------------------------------------------------------------ generate


def test_generate_depends_on_the_seed_alone(text, run_cli):
    arguments = ("generate", text, "--prompt", "the ", "--max-new", 20)
    first, again = (run_cli(*arguments, "--seed", 3) for _ in range(2))
    assert first == again
    assert first != run_cli(*arguments, "--seed", 4)
    assert first[0].startswith("the ")
    assert len("\n".join(first)) <= 24


def test_samples_differ_and_greedy_ones_do_not(text, run_cli):
    arguments = ("generate", text, "--prompt", "th", "--max-new", 20, "--samples", 2)
    one, other = "\n".join(run_cli(*arguments)).split("-" * 80)
    assert one.strip() != other.strip()
    one, other = "\n".join(run_cli(*arguments, "--temperature", 0)).split("-" * 80)
    assert one.strip() == other.strip()


def test_text_goes_on_beyond_the_models_window(text, run_cli):
    """The model takes 32 tokens; without <eos> among them, all 60 come."""
    prompt = "the cat sat on the mat, and the dog sat"
    lines = run_cli("generate", text, "--prompt", prompt, "--max-new", 60, "--temperature", 0)
    assert "\n".join(lines).startswith(prompt)
    assert len("\n".join(lines)) == len(prompt) + 60


# ------------------------------------------------------------------ evaluate


def test_evaluate_prints_one_json_object_of_error_rates(pairs, run_cli):
    [line] = run_cli("evaluate", pairs, "--split", "test", "--json")
    scores = json.loads(line)
    assert set(scores) == {"wer", "per", "loss", "examples"}
    loaded = load_run(pairs)
    data = encode_corpus(load_corpus(loaded.config.data), loaded.tokenizers, loaded.config.data)
    examples = data.splits["test"].examples
    assert scores["examples"] == len(examples) > 5
    predicted = run_cli(
        "predict", pairs, stdin="".join(f"{example.source}\n" for example in examples).encode()
    )
    wrong = [
        text not in example.references for text, example in zip(predicted, examples, strict=True)
    ]
    assert scores["wer"] == pytest.approx(np.mean(wrong))
    given = "".join(f"{example.source}\t{example.references[0]}\n" for example in examples)
    nats = sum(float(line) for line in run_cli("score", pairs, stdin=given.encode()))
    tokens = sum(len(example.references[0].split()) + 1 for example in examples)
    assert scores["loss"] == pytest.approx(-nats / tokens, rel=1e-4)


def test_evaluate_of_text_prints_loss_bits_and_perplexity(text, run_cli):
    [line] = run_cli("evaluate", text, "--json")
    scores = json.loads(line)
    assert set(scores) == {"loss", "bits_per_byte", "perplexity"}
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    # A byte a character here, and <eos> besides.
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / math.log(2), rel=0.02)


def test_summary_of_a_text_run_has_its_scores_and_samples(text):
    page = (Path(text) / "summary.md").read_text()
    assert "## Scores (test split" in page
    assert "bits_per_byte" in page and "perplexity" in page
    assert page.count("```") == 6


def test_evaluate_without_json_prints_a_line_a_score(text, run_cli):
    lines = run_cli("evaluate", text, "--split", "dev")
    assert [line.split()[0] for line in lines] == ["loss", "bits_per_byte", "perplexity"]


def test_evaluate_decodes_as_many_examples_as_asked(pairs, run_cli):
    [line] = run_cli("evaluate", pairs, "--split", "dev", "--max-examples", 3, "--json")
    assert json.loads(line)["examples"] == 3


# ------------------------------------------------------------------ show, presets

PNG = b"\x89PNG\r\n\x1a\n"


def test_show_draws_the_loss_curve_and_the_attention_of_a_source(pairs, run_cli, tmp_path):
    lines = run_cli("show", pairs, "--output", tmp_path / "loss.png")
    assert [line.split()[0] for line in lines[:2]] == ["train", "dev"]
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    lines = run_cli("show", pairs, "--source", "abc", "--output", tmp_path / "heat.png")
    assert lines[0] == f"abc -> {run_cli('predict', pairs, stdin=b'abc')[0]}"
    assert lines[1] == str(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(PNG)


def test_presets_are_listed_and_described(run_cli):
    assert [line.split()[0] for line in run_cli("presets")] == presets.names()
    assert "CMUdict" in "\n".join(run_cli("presets", "g2p"))


# ------------------------------------------------------------------ refusals


def test_missing_run_is_refused(refuse, tmp_path):
    for verb in ("predict", "generate", "score", "evaluate"):
        assert "is not a folder" in refuse(verb, tmp_path / "nothing")
    assert "is it a run folder?" in refuse("show", tmp_path / "nothing")
    assert "is this a run folder" in refuse("predict", tmp_path)


def test_run_without_a_checkpoint_is_refused(refuse, pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert "has no checkpoint yet" in refuse("predict", tmp_path / "run", stdin=b"abc")


def test_missing_step_is_refused_with_those_there_are(refuse, pairs):
    assert "has no step 7, only [40]" in refuse("predict", pairs, "--step", 7, stdin=b"abc")


def test_unknown_split_is_refused_with_those_there_are(refuse, pairs):
    message = refuse("evaluate", pairs, "--split", "tset")
    assert "no split 'tset'; it has train, dev, test" in message


def test_input_that_is_not_utf8_is_refused_by_its_byte(refuse, pairs):
    assert "is not UTF-8 (byte 3)" in refuse("predict", pairs, stdin=b"ab\n\xff\n")


def test_missing_input_file_is_refused(refuse, pairs, tmp_path):
    message = refuse("predict", pairs, "--input", tmp_path / "none.txt")
    assert "none.txt cannot be read" in message


def test_too_long_and_empty_sources_are_refused_by_number(refuse, pairs):
    assert "source 2 has 11 tokens" in refuse("predict", pairs, stdin=b"ab\nabcdabcdab\n")
    assert "source 2 is empty" in refuse("predict", pairs, stdin=b"ab\n\nab\n")


def test_more_predictions_than_the_beam_holds_are_refused(refuse, pairs):
    message = refuse("predict", pairs, "--beam", 2, "--n-best", 3, stdin=b"ab")
    assert "--n-best 3 needs a beam of at least 3" in message


@pytest.mark.parametrize("option", ["--beam", "--n-best"])
def test_no_beam_and_no_predictions_are_refused(refuse, pairs, option):
    assert option.lstrip("-") in refuse("predict", pairs, option, 0, stdin=b"ab")


def test_a_line_without_a_tab_is_refused(refuse, pairs):
    assert "line 2 is not source<TAB>target" in refuse("score", pairs, stdin=b"ab\tB A\nab\n")


def test_a_verb_for_the_other_kind_of_model_is_refused(refuse, pairs, text):
    assert "use `jaxformer predict`" in refuse("generate", pairs)
    assert "use `jaxformer generate`" in refuse("predict", text, stdin=b"ab")
    assert "use `jaxformer generate`" in refuse("show", text, "--source", "ab")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--top-p", 1.5), ("--top-k", 0), ("--min-p", 2), ("--temperature", -1), ("--max-new", 0)],
)
def test_sampling_options_out_of_range_are_refused(refuse, text, option, value):
    assert option.lstrip("-").replace("-", "_") in refuse(
        "generate", text, "--max-new", 5, option, value
    ).replace("-", "_")


def test_unknown_verb_is_refused_by_the_command_line(run_cli, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_cli("predcit")
    assert stopped.value.code == 2
    assert "predict" in capsys.readouterr().err


def test_unknown_preset_is_refused_with_the_nearest(refuse):
    assert "did you mean 'g2p'" in refuse("presets", "g2pp")
