"""The one place that knows jax versions (0.10.2, 0.11.2 and 0.12.0.1)."""

import importlib
from typing import Any

import jax
from jax import lax


def varying_axes(array) -> frozenset[str]:
    """The mesh axes over which `array` differs between devices, inside `jax.shard_map`."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def vary(tree, axes: frozenset[str]):
    """Mark every array of `tree` as varying over `axes` (identity outside `jax.shard_map`).

    A custom backward pass and a loop carry must agree on this; the transpose of the cast is the
    sum over the axes, so the gradient of a replicated operand comes out right.
    """

    def cast(array):
        missing = tuple(sorted(axes - varying_axes(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, tree) if axes else tree


def vary_alike(*trees):
    """Cast all arrays of `trees` to vary over the union of the axes any of them varies over."""
    axes = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(trees)))
    return tuple(vary(tree, axes) for tree in trees)


def cudnn_version() -> int | None:
    """The version of cuDNN that jax found, as 91002 for 9.10.2; None where there is none."""
    from jax._src.lib import cuda_versions  # what jax.nn itself asks, and no public name

    try:
        return cuda_versions.cudnn_get_version() if cuda_versions else None
    except RuntimeError:  # the plugin is there, the library is not
        return None


def shape_like(shape, dtype, array) -> jax.ShapeDtypeStruct:
    """A shape that varies over the mesh axes over which `array` does, inside `jax.shard_map`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def is_hopper() -> bool:
    """Whether the GPU is an sm_90, or there is none and code is compiled ahead of time."""
    device = _gpu()
    return device is None or getattr(device, "compute_capability", "9.0") == "9.0"


def gpu_kind() -> str:
    """The kind of the GPU; where there is none, the H100's."""
    device = _gpu()
    return "NVIDIA H100 80GB HBM3" if device is None else device.device_kind


def _gpu():
    return jax.local_devices()[0] if jax.default_backend() == "gpu" else None


def gpu_interpreter(parameters):
    """`dispatch.interpreter()` as `plgpu.kernel` takes it."""
    if parameters is not True:
        return parameters
    # To jax 0.10.2 and its type checker the name is unknown.
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    return plgpu.InterpretGPUParams()


HAS_GPU_INTERPRETER = jax.__version_info__ >= (0, 11, 2)


def load_to_registers(ref, layout):
    """`plgpu.load` of a whole reference, by single elements where no better way is known."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index: dict[str, Any] = {} if jax.__version_info__ >= (0, 11) else {"idx": ()}
    return plgpu.load(ref, **index, layout=layout, optimized=False)
