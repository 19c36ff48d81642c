"""Several real processes on this machine, that train as one; none outlives its test."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONE_OF_THEM = Path(__file__).with_name("one_process.py")


class Processes:
    """`count` processes that run a program with the same arguments, with `devices` each.

    `options(number)` are more of them for each, `variables(number)` its environment. To be used as
    a context manager; `wait` returns the exit statuses, `printed` and `errors` what they said.
    """

    def __init__(
        self,
        program,
        *,
        count,
        folder,
        devices=1,
        joined=True,
        options=lambda number: (),
        variables=lambda number: {},
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.running = folder, []
        port = free_port()
        for number in range(count):
            given = variables(number)
            flags = given.get("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
            flags += f" --xla_force_host_platform_device_count={devices}"
            place = ()
            if joined and count > 1:
                place = (
                    "--distributed.coordinator", f"127.0.0.1:{port}",
                    "--distributed.num-processes", str(count),
                    "--distributed.process-id", str(number),
                )  # fmt: skip
            with (
                (folder / f"out{number}").open("w") as out,
                (folder / f"err{number}").open("w") as err,
            ):
                self.running.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, (*program, *options(number), *place))],
                        cwd=ROOT,
                        env=environment() | given | {"XLA_FLAGS": flags},
                        stdout=out,
                        stderr=err,
                        # A group of its own, so that none of its children can be left behind.
                        start_new_session=True,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def wait(self, seconds=240):
        """The exit status of each."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 1)) for process in self.running]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.said()}") from None

    def said(self):
        """Everything, for a test that failed."""
        return "\n".join(
            f"--- process {number}\n{self.printed(number)}{self.errors(number)}"
            for number in range(len(self.running))
        )

    def printed(self, number):
        lines = (self.folder / f"out{number}").read_text().splitlines(keepends=True)
        # The library below jax's collectives on CPUs greets each of its peers.
        return "".join(line for line in lines if line.strip() and "[Gloo]" not in line)

    def errors(self, number):
        return (self.folder / f"err{number}").read_text()


def environment():
    paths = [str(ROOT), str(ROOT / "kernels")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
