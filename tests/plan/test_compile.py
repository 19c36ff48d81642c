"""The compiler's process: whatever becomes of it, there is one answer in one line."""

import sys
import time
from pathlib import Path

import pytest

from jaxformer import presets
from jaxformer.errors import JaxformerError
from jaxformer.plan import compile as compiling
from jaxformer.plan.build import Sizes
from jaxformer.plan.compile import Request, ask
from jaxformer.plan.topology import parse_topology
from jaxformer.plan.worker import refusal


def answer_of(program, monkeypatch, timeout=20.0):
    """What `ask` makes of a worker that is this Python program."""
    monkeypatch.setattr(compiling, "WORKER", (sys.executable, "-c", program))
    return ask(Request(presets.get("text"), Sizes(260), parse_topology("cpu:8"), timeout=timeout))


def runs(pid):
    """Whether a process is there and is more than an entry in a table."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_compiler_that_takes_too_long_is_killed_with_all_it_started(tmp_path, monkeypatch):
    note = tmp_path / "pids"
    program = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"note = open({str(note)!r}, 'w')\n"
        "note.write(f'{os.getpid()} {child.pid}')\n"
        "note.close()\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    answer = answer_of(program, monkeypatch, timeout=2.0)
    assert answer == {"outcome": "refused", "why": "the compiler took more than 2 s"}
    assert time.monotonic() - started < 20
    pids = note.read_text().split()
    end = time.monotonic() + 10
    while any(runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert [runs(pid) for pid in pids] == [False, False]


def test_a_crash_is_one_line_with_what_the_compiler_said_last(monkeypatch):
    program = "import os, sys; print('F0000 Check failed: x\\n\\n', file=sys.stderr, flush=True)\n"
    answer = answer_of(program + "os.abort()", monkeypatch)
    assert answer == {"outcome": "refused", "why": "the compiler crashed: F0000 Check failed: x"}


def test_what_cannot_be_built_is_an_error_of_the_user(monkeypatch):
    program = 'print(\'{"outcome": "invalid", "why": "make it even"}\')'
    with pytest.raises(JaxformerError, match="make it even"):
        answer_of(program, monkeypatch)


def test_the_compilers_process_sees_no_accelerator_and_the_right_number_of_devices(monkeypatch):
    program = (
        "import json, os, jax\n"
        "print(json.dumps({'outcome': 'ok', 'devices': len(jax.devices()),"
        " 'kept': jax.config.jax_enable_compilation_cache}))"
    )
    answer = answer_of(program, monkeypatch, timeout=60.0)
    assert answer == {"outcome": "ok", "devices": 8, "kept": False}


GIB = 2**30


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (720.00G) exceeds available HBM (95.73G).\nSee",
            720 * GIB,
            95.73 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.45G of 15.75G hbm. "
            "Exceeded hbm capacity by 7.70G.",
            23.45 * GIB,
            15.75 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: used 512.0M of 0.25G hbm", 0.5 * GIB, 0.25 * GIB),
    ],
)
def test_too_little_memory_is_read_of_the_message(message, needed, available):
    answer = refusal(RuntimeError(message))
    assert answer["outcome"] == "too_large"
    assert answer["needed"] == pytest.approx(needed)
    assert answer["available"] == pytest.approx(available)
    assert "\n" not in answer["why"]


def test_other_refusals_are_one_line():
    answer = refusal(NotImplementedError("Mosaic\n  kernels"))
    assert answer == {"outcome": "refused", "why": "NotImplementedError: Mosaic kernels"}
    vmem = refusal(RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"))
    assert vmem["outcome"] == "refused"
