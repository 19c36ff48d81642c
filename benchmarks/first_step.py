"""Seconds from the start of a process to the end of its first training step, of shape `small`.

Ours is all of `train.py`: it reads a text, builds a tokenizer, writes its first line of metrics.
PyTorch's is `torch_models.trainer`: the model and one step, on batches made in memory.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import contest

_ROOT = Path(__file__).resolve().parent.parent
_LONGEST = 300.0


def seconds(*, torch: bool, compiled: bool, repeats: int) -> dict[str, dict[str, float]]:
    """By contender: cold, and the median of starts that find compiled code in a cache."""
    programs: dict[str, Callable[[Path], float]] = {"jaxformer": _ours}
    if torch:
        programs["torch eager"] = lambda cache: _torch(cache, compiled=False)
    if torch and compiled:
        programs["torch compile"] = lambda cache: _torch(cache, compiled=True)
    found = {}
    for name, start in programs.items():
        with tempfile.TemporaryDirectory() as folder:
            cold = start(Path(folder))
            warm = [start(Path(folder)) for _ in range(repeats)]
        found[name] = {
            "first_step_cold_s": round(cold, 2),
            "first_step_warm_s": round(statistics.median(warm), 2),
        }
    return found


def _ours(cache: Path) -> float:
    """Starts `train.py` and waits for the metrics of step 1."""
    text = cache / "text.txt"
    if not text.exists():
        text.write_text(_characters(200_000), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(_ROOT / "train.py"), "shakespeare-char-cpu"]
        command += ["--data.files", str(text), "--run", str(run), "--train.log_every", "1"]
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=_environment(XDG_CACHE_HOME=cache),
            stdout=subprocess.DEVNULL,
        )
        try:
            return _wait_for_line(run / "metrics.jsonl", process) - start
        finally:
            process.kill()
            process.wait()


def _wait_for_line(path: Path, process: subprocess.Popen) -> float:
    """The time at which the file has its first line."""
    end = time.perf_counter() + _LONGEST
    while time.perf_counter() < end:
        if path.exists() and '"train' in path.read_text(encoding="utf-8"):
            return time.perf_counter()
        if process.poll() is not None:
            raise contest.ContestError(
                f"train.py ended with status {process.returncode} before its first step; what it "
                "said is above"
            )
        time.sleep(0.01)
    raise contest.ContestError(f"train.py had not done a step after {_LONGEST:.0f} s")


def _torch(cache: Path, *, compiled: bool) -> float:
    contender = contest.Contender(
        "benchmarks.torch_models:trainer",
        {"shape": "small", "compile": compiled, "first_steps": 1, "steps_per_turn": 1},
        env={"TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )
    contender.kill()
    return contender.facts["ready_s"]


def _environment(**changed: Path) -> dict[str, str]:
    environment = os.environ | {name: str(value) for name, value in changed.items()}
    # A folder of the user's own would come before that of XDG_CACHE_HOME, and be warm.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    paths = [str(_ROOT), str(_ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _characters(count: int) -> str:
    """A text of 65 different characters, as Tiny Shakespeare has."""
    letters = np.array([chr(code) for code in range(33, 97)] + ["\n"])
    return "".join(np.random.default_rng(0).choice(letters, count))
