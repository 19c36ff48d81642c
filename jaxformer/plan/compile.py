"""Asks the worker to compile a step, and makes of whatever happens one answer."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from jaxformer import config as configuration
from jaxformer.config import Config
from jaxformer.errors import JaxformerError
from jaxformer.plan.build import Sizes
from jaxformer.plan.topology import Topology, environment, require_compiler

WORKER = (sys.executable, "-m", "jaxformer.plan.worker")


@dataclass(frozen=True)
class Request:
    """A step to compile, and how."""

    config: Config
    sizes: Sizes
    topology: Topology
    effort: str = "low"
    timeout: float = 300.0
    """Seconds."""


def ask(request: Request) -> dict[str, Any]:
    """The worker's answer; see `worker.compile_step`.

    A compiler that crashes, or takes longer than the timeout and is then killed, has refused.
    Raises TopologyError where there is no compiler, and JaxformerError on what cannot be built.
    """
    topology = request.topology
    require_compiler(topology.platform)
    message = {
        "config": configuration.to_dict(request.config),
        "sizes": dataclasses.asdict(request.sizes),
        "topology": topology.name,
        "effort": request.effort,
    }
    with tempfile.TemporaryFile(mode="w+", errors="replace") as errors:
        process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(topology),
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(message), timeout=request.timeout)
        except subprocess.TimeoutExpired:
            return {
                "outcome": "refused",
                "why": f"the compiler took more than {request.timeout:g} s",
            }
        finally:
            _end(process)
        if not said:
            errors.seek(0)
            return {"outcome": "refused", "why": f"the compiler crashed: {_last(errors.read())}"}
    answer = json.loads(said)
    if answer["outcome"] == "invalid":
        raise JaxformerError(answer["why"])
    return answer


def _environment(topology: Topology) -> dict[str, str]:
    settings = environment(topology.platform, topology.devices)
    if "XLA_FLAGS" in settings:
        settings["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {settings['XLA_FLAGS']}".strip()
    # What is not run need not be kept; and times are those of compiling, not of reading back.
    settings["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    # The child is to import what this process would.
    settings["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {**os.environ, **settings}


def _end(process: subprocess.Popen) -> None:
    """Ends the worker, and whatever it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _last(text: str) -> str:
    """The line of a log that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "F0" in line or "Check failed" in line]
    return (telling or lines or ["without a word"])[-1][:400]
