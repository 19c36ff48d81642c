"""Compiled programs kept in the user's cache folder: where, for whom, and with the same results."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxformer import runtime

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import hashlib, jax
from jaxformer.runtime import keep_compiled
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
folder = keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x = jax.random.normal(jax.random.key(0), (64, 64))
x = jax.jit(lambda x: jax.nn.softmax(x @ x.T))(x)
print(folder, sum(hits), hashlib.sha256(bytes(memoryview(jax.device_get(x)))).hexdigest())
"""


def execute(program, environment):
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("JAX_COMPILATION", "JAX_PERS", "MALLOC_", "GLIBC_"))
    }
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def own_process(program, environment):
    """The words that a process of its own prints."""
    return execute(program, environment).stdout.split()


def run(cache, **environment):
    """[folder, programs read from it, hash of the result] of a process, and what it complained."""
    ended = execute(PROGRAM, {"XDG_CACHE_HOME": str(cache)} | environment)
    return ended.stdout.split(), ended.stderr


@pytest.fixture
def own_settings(monkeypatch):
    """jax's settings as a user finds them, put back afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_second_process_reads_what_the_first_compiled_and_computes_the_same(tmp_path):
    (folder, hits, result), errors = run(tmp_path)
    assert hits == "0" and errors == ""
    assert Path(folder).parent == tmp_path / "jaxformer" / "xla"
    assert Path(folder).stat().st_mode & 0o077 == 0
    (_, hits, again), errors = run(tmp_path)
    assert int(hits) > 0 and errors == ""
    (_, hits, without), _ = run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert hits == "0"
    assert result == again == without


def test_own_folder_of_the_user_stays_the_one_that_is_used(tmp_path):
    (folder, _, _), _ = run(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert folder == "None"
    assert any(tmp_path.glob("theirs/*-cache")) and not (tmp_path / "ours").exists()


def test_switched_off_nothing_is_written(tmp_path):
    (folder, _, _), _ = run(tmp_path / "cache", JAX_ENABLE_COMPILATION_CACHE="false")
    assert folder == "None" and not (tmp_path / "cache").exists()


def test_home_serves_where_no_cache_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runtime.cache_folder().is_relative_to(tmp_path / ".cache" / "jaxformer" / "xla")


def test_folder_that_cannot_be_made_means_no_cache_and_no_error(
    tmp_path, monkeypatch, own_settings
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert runtime.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_cache_is_bounded(tmp_path, monkeypatch, own_settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.keep_compiled() == runtime.cache_folder()
    assert jax.config.jax_compilation_cache_max_size == runtime.LARGEST_CACHE


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = runtime.cache_folder()
    for name in ("whole-cache", "whole-atime", "half-cache", "being-written-cache"):
        (folder / name).write_bytes(b"x" * 8)
    old = time.time() - 2 * runtime.UNFINISHED_SECONDS
    for name in ("whole-cache", "half-cache"):
        os.utime(folder / name, (old, old))
    runtime.cache_folder()
    names = {path.name for path in folder.iterdir()}
    assert names == {"whole-cache", "whole-atime", "being-written-cache"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({"JAX_PLATFORMS": "cpu"}, "True"),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}, "False"),
        ({"JAX_PLATFORMS": "tpu,cpu"}, "False"),
    ],
)
def test_memory_is_kept_where_the_cpu_computes_and_the_user_set_nothing(environment, kept):
    found = own_process(
        "from jaxformer.runtime import keep_memory; print(keep_memory())", environment
    )
    assert found == [kept]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_kept_memory_is_touched_for_the_first_time_only_once():
    program = """
import resource
from jaxformer.runtime import keep_memory
{keep}
import jax.numpy as jnp
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jnp.ones((4096, 4096)).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3): faults()
print(min(faults() for _ in range(5)))
"""
    kept, given_back = (
        int(own_process(program.format(keep=keep), {"JAX_PLATFORMS": "cpu"})[0])
        for keep in ("keep_memory()", "")
    )
    assert kept < 100 < given_back


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or platform.libc_ver()[0] != "glibc",
    reason="large pages are asked for of glibc on a Linux that has them",
)
@pytest.mark.parametrize(("keep", "asked"), [("keep_memory()", True), ("", False)])
def test_arrays_lie_where_large_pages_were_asked_for(keep, asked):
    program = f"""
from jaxformer.runtime import keep_memory
{keep}
import jax.numpy as jnp
x = jnp.ones((4096, 4096)).block_until_ready()
address, inside = x.unsafe_buffer_pointer(), False
for line in open("/proc/self/smaps"):
    head = line.split()[0]
    if "-" in head:
        first, last = (int(part, 16) for part in head.split("-"))
        inside = first <= address < last
    elif inside and head == "VmFlags:":
        print("hg" in line.split())
"""
    assert own_process(program, {"JAX_PLATFORMS": "cpu"}) == [str(asked)]
