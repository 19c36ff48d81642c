"""metrics.jsonl, the extras, and the request to stop."""

import dataclasses
import json
import signal
import sys

import pytest

from jaxformer.config import Config, TrackingConfig
from jaxformer.training.stopping import StopRequest
from jaxformer.training.tracking import Tracker, TrackingError, read_metrics, require_installed


def write(path, steps, start=0):
    tracker = Tracker(path, Config(), start_step=start)
    for step in steps:
        tracker.write(step, "train", {"loss": 1.0 / step})
        if step % 2 == 0:
            tracker.write(step, "dev", {"loss": 2.0 / step})
    tracker.close()


def test_a_line_is_one_object_with_step_and_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "kind": "train", "loss": 1.0},
        {"step": 2, "kind": "train", "loss": 0.5},
        {"step": 2, "kind": "dev", "loss": 1.0},
    ]
    assert [line["step"] for line in read_metrics(path, "train")] == [1, 2]
    assert [line["loss"] for line in read_metrics(path, "dev")] == [1.0]


def test_every_line_is_on_disk_at_once(tmp_path):
    tracker = Tracker(tmp_path / "metrics.jsonl", Config())
    tracker.write(1, "train", {"loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    tracker.close()


def test_going_on_from_a_step_writes_what_came_after_it_anew(tmp_path):
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    write(straight, range(1, 8))
    write(resumed, range(1, 6))
    write(resumed, range(4, 8), start=3)
    assert resumed.read_text() == straight.read_text()


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    path.write_text(path.read_text()[:-9])
    write(path, [3], start=3)
    assert [line["step"] for line in read_metrics(path, "train")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "options"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "project"})]
)
def test_missing_tracker_is_refused_by_its_extra(monkeypatch, name, options):
    config = dataclasses.replace(Config(), tracking=TrackingConfig(**options))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackingError, match=rf"pip install 'jaxformer\[{name}\]'"):
        require_installed(config)
    require_installed(Config())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop and stop.number == number
    assert signal.getsignal(number) is before


def test_second_signal_stops_at_once():
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
