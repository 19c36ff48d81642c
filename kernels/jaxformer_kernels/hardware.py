"""What keeps Pallas kernels from running here, in words, for `Implementation.limits`."""

import importlib.util
from collections.abc import Iterator

from jaxformer_kernels import _compat, dispatch

_ANYWHERE = "on any machine: `with jaxformer_kernels.interpreting():`"


def tpu_lacks(dtype) -> Iterator[str]:
    """What keeps a Mosaic TPU kernel from operands of this dtype, or from this platform."""
    if dispatch.interpreter() is None and dispatch.platform() != "tpu":
        yield f"the {dispatch.platform()} platform ({_ANYWHERE})"
    if dtype.name not in ("float32", "bfloat16"):
        yield f"{dtype} (it has float32 and bfloat16)"


def hopper_lacks(dtype) -> Iterator[str]:
    """What keeps a Mosaic GPU kernel for sm_90 from operands of this dtype, or from this device."""
    if dispatch.interpreter() is None:
        if dispatch.platform() != "gpu":
            yield f"the {dispatch.platform()} platform ({_ANYWHERE})"
        elif not _compat.is_hopper():
            yield "this GPU (sm_90, that is H100 and H200, only)"
    elif not _compat.HAS_GPU_INTERPRETER:
        yield "interpretation by this jax (0.11.2 or newer does)"
    if importlib.util.find_spec("absl") is None:
        yield "an installation without absl-py (pip install absl-py)"
    if dtype.name not in ("bfloat16", "float16"):
        yield f"{dtype} (it has bfloat16 and float16)"
