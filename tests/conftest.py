"""What every test runs under: CPU, eight devices, checked shapes, compiled code kept on disk.

JAXFORMER_TEST_PLATFORM=gpu is for `pytest -m mosaic_gpu` on a Hopper GPU: kernels run on the chip.
"""

import gc
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = os.environ.get("JAXFORMER_TEST_PLATFORM") == "gpu"

# In the environment rather than in jax.config, so that the programs a test starts inherit them.
if ON_GPU:
    # What kernels are held to is computed there too, and by default a float32 product is TF32.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("MPLBACKEND", "agg")

# Compiling is most of what the tests do. They hold our programs to their tolerances, not XLA's
# optimiser, so here it does little. JAX_DISABLE_MOST_OPTIMIZATIONS=0 has it do what users get, as
# .ci/run does on the newest jax. The fusion emitters, which take the better part of a compilation,
# can be left out of jax 0.10 alone: a flag that XLA does not know ends the process. A program is
# compiled in one piece, too: programs are small, and each worker has one core.
QUICK = not ON_GPU and os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
FLAGS = os.environ.get("XLA_FLAGS", "")
if QUICK and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        f"{FLAGS} --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
FLAGS_HERE = os.environ.get("XLA_FLAGS", "")

# Imports and tracing make much that garbage collection would go through again and again.
gc.set_threshold(50_000, 20, 50)

import hypothesis
import jax
import jaxtyping
import pytest

# Eight devices, so that any test can build a mesh; they cost a one-device test nothing that can be
# measured. Set here alone: a program that a test starts has one device, as on a laptop.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)

# XLA reads its flags once, here; the programs that a test starts are compiled as users' are.
jax.config.update("jax_disable_most_optimizations", QUICK)
jax.devices()
if ON_GPU and jax.default_backend() != "gpu":
    pytest.exit(f"JAXFORMER_TEST_PLATFORM=gpu, but jax runs on {jax.default_backend()}", 3)
os.environ["XLA_FLAGS"] = FLAGS

# Shape and dtype annotations are checked in tests only, and only in modules imported after this.
# A GPU machine has what was brought along: there the kernels, which have no annotations, count.
if not ON_GPU or importlib.util.find_spec("beartype"):
    jaxtyping.install_import_hook(["jaxformer", "jaxformer_kernels"], "beartype.beartype")

# Compilation makes the first example slow, so no deadline; a build must not be red by luck.
hypothesis.settings.register_profile(
    "jaxformer", deadline=None, max_examples=25, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("jaxformer")


@pytest.fixture(scope="session")
def compiled_as_here():
    """Environment of a program that is to compute bit for bit what this process does."""
    return {"XLA_FLAGS": FLAGS_HERE, "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(QUICK))}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Order the tests, and skip what cannot run here."""
    skip_what_cannot_run(items)
    if hasattr(config, "workerinput"):
        # Workers take a file at a time: the long ones first, so that all end together.
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Look for garbage only among what tests make."""
    gc.collect()
    gc.freeze()


def skip_what_cannot_run(items):
    """Kernels in the Mosaic GPU interpreter where there is none, saying so."""
    reason = None
    if ON_GPU:
        return
    if jax.__version_info__ < (0, 11, 2):
        reason = f"the Mosaic GPU interpreter needs jax >= 0.11.2, this is {jax.__version__}"
    elif int(os.environ.get("NPROC", "0")) < 8:
        # Its callbacks wait for each other: with a thread a core, two cores hang.
        reason = "the Mosaic GPU interpreter needs NPROC=16: run `make test-mosaic-gpu`"
    for item in items:
        if reason and item.get_closest_marker("mosaic_gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
