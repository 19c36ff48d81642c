"""What a program sets before it computes: what is kept of compiled code, and of memory.

jax can keep what XLA compiled in a folder, under a hash of the program, the compiler's options and
the versions; a later process reads it back in place of compiling, and computes the same to the last
bit. `train.py` and `jaxformer` turn this on:

- `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
- `JAX_COMPILATION_CACHE_DIR` names another folder; jax's own settings then hold unchanged.
- Otherwise the folder is `$XDG_CACHE_HOME/jaxformer/xla/<machine>` (`~/.cache/...` by default).
  It grows to 512 MiB, then loses what was longest unused, and may be deleted at any time. Several
  processes may share it. Only its owner may read it, for what lies there is executed.

On a CPU a step's arrays are allocated anew each time. By its own rules glibc gives large ones back
to the system, which fills them with zeros, page by page, when they are next touched: a fifth of the
time of a training step. `keep_memory` tells it to keep them, and asks Linux for pages of 2 MiB,
which the processor finds in fewer steps than ones of 4 KiB. `MALLOC_...` variables or
`GLIBC_TUNABLES` in the environment win.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax

LARGEST_CACHE = 512 * 2**20
"""Bytes."""
LEAST_SECONDS = 0.05
"""What compiles faster than this is not worth a file."""
UNFINISHED_SECONDS = 60

_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
"""Packages that bring jax other devices."""

# Of <malloc.h>: parameter of mallopt -> value.
_KEEP_MEMORY = {
    -4: 0,  # M_MMAP_MAX: no array is a mapping of its own
    -1: -1,  # M_TRIM_THRESHOLD: nothing at the end of the heap is given back
    -2: 64 * 2**20,  # M_TOP_PAD: the heap grows by at least so many bytes
    -8: 1,  # M_ARENA_MAX: threads share it, for another's heap is too small for large arrays
}

_LARGE_PAGE = 2 * 2**20
_MADV_HUGEPAGE = 14  # of <sys/mman.h>


def keep_compiled() -> Path | None:
    """Lets jax keep compiled programs in the user's cache folder.

    Returns the folder; None if the user chose otherwise or it cannot be written to.
    """
    chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ or _setting("jax_compilation_cache_dir")
    if chosen or not _setting("jax_enable_compilation_cache"):
        return None
    folder = cache_folder()
    if folder is None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST_CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def keep_memory() -> bool:
    """Lets memory that was freed stay with this process, in large pages, for the next step to use.

    To be called before jax's first computation, which starts threads with heaps of their own. The
    process then holds on to the most it ever needed at once. Returns whether it was done: only with
    glibc, where jax can have no device but the CPU, and where the user set nothing.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc" or not _only_cpu():
        return False
    libc = ctypes.CDLL(None)
    kept = all(libc.mallopt(parameter, value) for parameter, value in _KEEP_MEMORY.items())
    if kept:
        _ask_for_large_pages(libc)
    return kept


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Lets the heap, as far as it is likely to grow, consist of large pages where Linux has them.

    They are asked for by address: so the heap is made to reach that far, which takes no memory
    until it is touched. Of a system that allows no such reach nothing is asked.
    """
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    start = libc.malloc(size)
    if start is None:
        return
    first = -(-start // _LARGE_PAGE) * _LARGE_PAGE
    length = (start + size - first) // _LARGE_PAGE * _LARGE_PAGE
    libc.madvise(first, length, _MADV_HUGEPAGE)
    libc.free(start)


def cache_folder() -> Path | None:
    """The folder of compiled programs, made if missing; None if there can be none."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():
            base = Path.home() / ".cache"
        folder = base / "jaxformer" / "xla" / _machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return None
        _remove_unfinished(folder)
    except (OSError, RuntimeError):  # RuntimeError: a user without home
        return None
    return folder


def _only_cpu() -> bool:
    """Whether jax will compute on the CPU, told without starting it."""
    if platforms := _setting("jax_platforms"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATORS)


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


def _machine() -> str:
    """A hash of the processor's features: code for one may be illegal on another.

    A home folder is often shared between machines.
    """
    features = platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            # The first processor's; there may be hundreds.
            features += next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features += platform.processor()
    return hashlib.sha256(features.encode()).hexdigest()[:12]


def _remove_unfinished(folder: Path) -> None:
    """Removes programs whose writer was killed before it noted the time, its last act.

    jax would stumble over them at each start, and never replace them.
    """
    names = {entry.name for entry in os.scandir(folder)}
    for name in names:
        key = name.removesuffix("-cache")
        if key != name and f"{key}-atime" not in names:
            path = folder / name
            if time.time() - path.stat().st_mtime > UNFINISHED_SECONDS:
                path.unlink(missing_ok=True)
