"""The decoding benchmark at its smallest size: every contender finds the same."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import decode
from benchmarks.decode_contenders import answer_file, prompts, weights

SHAPE = decode.SMALL


def record(folder):
    (path,) = folder.glob("*_decode_*.json")
    return json.loads(path.read_text())


def check_rows(rows, implementation):
    rows = [row for row in rows if row["implementation"] == implementation]
    for row in rows:
        assert row["prefill_tokens_per_s"] > 0
        assert np.isfinite(row["decode_tokens_per_s"])  # in small, noise outweighs a token's time
        if implementation != decode.OURS:
            assert row["equal_tokens"] == 1
            assert row["logits_error"] < decode.TOLERANCE
    return {(row["batch"], row["beam"]) for row in rows}


def test_cached_decoding_agrees_with_the_full_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert decode.main(["--small", "--output", str(tmp_path)]) == 0
    rows = record(tmp_path)["rows"]
    assert check_rows(rows, decode.OURS) == set(decode.SMALL_CELLS)
    for row in rows:
        assert row["log_prob_error"] < decode.TOLERANCE
        assert row["cache_mib"] > 0
    assert "not installed" in capsys.readouterr().out


def test_all_contenders_find_the_same(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    decode.main(["--small", "--output", str(tmp_path)])
    rows = record(tmp_path)["rows"]
    assert check_rows(rows, "transformers") == set(decode.SMALL_CELLS)
    assert check_rows(rows, "recomputation") == {(2, 1)}


def save(folder, name, *, logits, tokens, **more):
    np.savez(answer_file(folder, name, (2, 1)), logits=logits, tokens=tokens, **more)


def answers():
    """Tokens that are the likeliest of their logits, [B, T] and [B, new + 1, V]."""
    logits = np.random.default_rng(0).normal(size=(2, SHAPE.new + 1, SHAPE.vocabulary))
    tokens = np.concatenate([prompts(SHAPE, 2), logits[:, :-1].argmax(-1)], axis=1)
    return logits, tokens


def verdict(folder, name):
    found = decode.parity(str(folder), name, (2, 1), SHAPE)
    decode.check(name, (2, 1), found, strict=True)
    return found


def test_what_is_equal_passes(tmp_path):
    logits, tokens = answers()
    for name in (decode.OURS, "other"):
        save(tmp_path, name, logits=logits, tokens=tokens)
    assert verdict(tmp_path, "other") == {"regret": 0, "equal_tokens": 1, "logits_error": 0}


def test_other_logits_other_tokens_and_wrong_log_probabilities_fail(tmp_path):
    logits, tokens = answers()
    save(tmp_path, decode.OURS, logits=logits, tokens=tokens)
    save(tmp_path, "other", logits=logits + 1e-3, tokens=tokens)
    with pytest.raises(decode.ParityError, match="logits_error"):
        verdict(tmp_path, "other")
    tokens[0, -1] = (tokens[0, -1] + 1) % SHAPE.vocabulary
    save(tmp_path, "other", logits=logits, tokens=tokens)
    with pytest.raises(decode.ParityError, match="regret"):
        verdict(tmp_path, "other")
    save(tmp_path, decode.OURS, logits=logits, tokens=tokens, log_probs=np.zeros(2))
    with pytest.raises(decode.ParityError, match="log_prob_error"):
        verdict(tmp_path, decode.OURS)


def test_special_tokens_are_never_the_likeliest():
    assert not weights(SHAPE)["wte"][:4].any()
    assert prompts(SHAPE, 3).min() >= 4


@pytest.mark.parametrize("arguments", [["--turns", "0"], ["--new", "1"]])
def test_bad_input_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        decode.parse(arguments)
    assert "must be at least" in capsys.readouterr().err
