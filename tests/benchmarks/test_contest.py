"""Contenders are processes of their own: memory, turns and ends."""

import numpy as np
import pytest

from benchmarks import contest


def test_peak_of_memory_is_the_contenders_own_not_that_of_whoever_started_it():
    held = np.ones(2**27, np.float32)  # 512 MiB
    peak = contest.Contender("types:SimpleNamespace", {}).stop()["peak_mib"]
    assert peak < held.nbytes / 2**20 / 2


def test_contender_that_fails_to_get_ready_is_named():
    with pytest.raises(contest.ContestError, match="types:nothing"):
        contest.Contender("types:nothing", {})
