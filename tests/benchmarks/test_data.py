"""The benchmark of the input pipelines, in small: parity, and a record of the stated shape."""

import json

import pytest

from benchmarks import data as benchmark
from jaxformer.data.plan import EpochPlans


def test_small_run_checks_parity_and_writes_its_record(tmp_path, capsys):
    arguments = ["--small", "--pipeline", "characters", "--pipeline", "pronunciation"]
    assert benchmark.main([*arguments, "--workers", "0", "1", "--output", str(tmp_path)]) == 0
    [path] = tmp_path.glob("*_data_*.json")
    rows = json.loads(path.read_text())["rows"]
    pipelines = [row for row in rows if row["part"] == "pipeline"]
    assert [(row["pipeline"], row["workers"]) for row in pipelines] == [
        ("characters", 0), ("characters", 1), ("pronunciation", 0), ("pronunciation", 1),
    ]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 for row in pipelines)
    [training] = [row for row in rows if row["part"] == "training"]
    assert training["steps"] == 6 and training["save_ms"] > 0
    assert 0 <= training["waiting_percent"] < 100 and 0 < training["logging_percent"] < 100
    assert "waiting_percent" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["a token less", "another order in workers"])
def test_wrong_batches_are_an_error(wrong, tmp_path, monkeypatch, capsys):
    make = EpochPlans.__getitem__
    if wrong == "a token less":
        monkeypatch.setattr(
            EpochPlans,
            "__getitem__",
            lambda self, n: make(self, n) | {"weights": make(self, n)["weights"] * (n != 0)},
        )
    else:
        iterate = benchmark.training_batches

        def shuffled(data, config, **options):
            return iterate(data, config, **(options | {"seed": config.workers}))

        monkeypatch.setattr(benchmark, "training_batches", shuffled)
    arguments = ["--small", "--pipeline", "characters", "--train", "none", "--workers", "0", "1"]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert ("tokens, the data" if "less" in wrong else "differs with 1 workers") in error
    assert not list(tmp_path.iterdir())


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--workers", "-1"])
    assert "must not be negative" in capsys.readouterr().err
