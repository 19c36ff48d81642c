"""The mesh, and the ordered rules from axis letters to its axes.

A mesh has the axes of `AXES`, most of them of size 1. The batch is split over `data` and `fsdp`,
sequences over `context`, heads, feed-forward width and vocabulary over `tensor`; of parameters
`fsdp` holds a share of each matrix. Who places arrays, and the compiler, do the rest: a model only
says which axes its arrays have (`constrain`), and does nothing where there is no mesh.
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxformer.config import MeshConfig
from jaxformer.errors import JaxformerError

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""The axes of every mesh, those first whose devices speak least with each other."""
BATCH = ("data", "fsdp")
"""The mesh axes that rows are divided over."""


class MeshError(JaxformerError):
    """A mesh that cannot be made of these devices; the message says what to change."""


class Rule(NamedTuple):
    """An axis of a parameter that is split over an axis of the mesh."""

    axis: str
    mesh_axis: str
    unless: str = ""
    """Not of parameters that have this axis too."""


RULES = (
    Rule("E", "expert"),
    Rule("V", "tensor"),
    Rule("N", "tensor"),
    Rule("K", "tensor"),
    # The four gates of an LSTM lie side by side in F: a share of it would be of other gates.
    Rule("F", "tensor", unless="R"),
    Rule("D", "fsdp"),
)
"""Tried in this order; each axis of the mesh serves one axis of a parameter. An axis whose size
the mesh's does not divide stays whole, and of a vector every axis but those over `tensor`."""

ACTIVATIONS = {
    "B": BATCH,
    "T": ("context",),
    "S": ("context",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
"""The mesh axes that an axis of an activation is split over; others stay whole."""

ContextMethod = Literal["ring", "all_to_all"]
_context_method: contextvars.ContextVar[ContextMethod] = contextvars.ContextVar(
    "context_method", default="ring"
)


@contextlib.contextmanager
def context_by(method: ContextMethod) -> Generator[None]:
    """Attend over sequences that are split by this method in what is traced inside this context."""
    token = _context_method.set(method)
    try:
        yield
    finally:
        _context_method.reset(token)


def context_method() -> ContextMethod:
    """What `context_by` was given; ring outside it."""
    return _context_method.get()


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of every axis, with -1 filled in. Raises MeshError where they do not fit."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    written = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise MeshError(f"mesh.{axis}={size} must be positive, or -1 for all devices left")
    if sizes["expert"] != 1:
        raise MeshError("mesh.expert is reserved for mixtures of experts: leave it at 1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise MeshError(f"only one axis of the mesh can be -1, not {' and '.join(free)}")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if devices % taken:
            raise MeshError(
                f"mesh {written} does not divide {devices} devices: {taken} is no divisor of "
                f"{devices}"
            )
        sizes[free[0]] = devices // taken
    elif taken > devices:
        raise MeshError(
            f"mesh {written} needs {taken} devices and there are {devices}: make an axis smaller, "
            "or try it on a CPU with XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{taken}"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of these devices, by default all; of fewer where the configuration names fewer.

    Neighbours on the last axes are neighbours in the machine. Devices of several TPU slices are
    told apart by the data axis, which speaks least. Raises MeshError.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(config, len(devices))
    shape, count = tuple(sizes.values()), math.prod(sizes.values())
    if count < len(devices) and len({device.process_index for device in devices}) > 1:
        raise MeshError(
            f"the mesh has {count} of {len(devices)} devices, and of several processes all must "
            "take part: set --mesh.data -1"
        )
    return Mesh(_arranged(shape, devices[:count]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if shape[0] % len(slices):
            raise MeshError(
                f"mesh.data={shape[0]} must be a multiple of the {len(slices)} slices, between "
                "which the network is slow"
            )
        within = (shape[0] // len(slices), *shape[1:])
        between = (len(slices),) + (1,) * (len(shape) - 1)
        return mesh_utils.create_hybrid_device_mesh(
            within, between, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def active() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, as far as the compiler divides the work over it.

    None where there is none, every axis is of size 1 or divided by hand already, inside
    `jax.shard_map`, or it is not one of `make_mesh`: the axes of others mean what others say.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if _ours(mesh) and free_axes(mesh) else None


def _ours(mesh: AbstractMesh) -> bool:
    return set(AXES) <= set(mesh.axis_names)


def free_axes(mesh: AbstractMesh | Mesh) -> tuple[str, ...]:
    """The axes of more than one device that are not divided by hand already."""
    manual = getattr(mesh, "manual_axes", ())
    return tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in manual)


def divides(axis: str) -> bool:
    """Whether the active mesh divides arrays over this axis."""
    mesh = active()
    return mesh is not None and axis in free_axes(mesh)


def manual_axes() -> tuple[str, ...]:
    """The axes of AXES and more than one device that are divided by hand here.

    A mesh that is not one of `make_mesh`, such as that of `jax.pmap`, can only divide rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = AXES if _ours(mesh) else BATCH
    return tuple(axis for axis in known if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def device_index(axes: Sequence[str]) -> Any:
    """The number of this device among those of some manual axes, the last counting fastest."""
    sizes = jax.sharding.get_abstract_mesh().shape
    index = 0
    for axis in axes:
        index = index * sizes[axis] + jax.lax.axis_index(axis)
    return index


def by_hand(letter: str) -> tuple[Any, int]:
    """Which part of an activation's axis this device holds, and of how many.

    (0, 1) but where the axis is divided by hand.
    """
    manual = manual_axes()
    axes = tuple(axis for axis in ACTIVATIONS.get(letter, ()) if axis in manual)
    sizes = jax.sharding.get_abstract_mesh().shape
    return device_index(axes), math.prod(sizes[axis] for axis in axes)


def spec(letters: str, shape: Sequence[int], mesh: AbstractMesh | Mesh) -> PartitionSpec:
    """How an activation with these axes ("B T D") is split: see ACTIVATIONS.

    An axis that the mesh does not divide stays whole. One that is divided by hand is left out.
    """
    free = free_axes(mesh)
    entries: list[Any] = []
    for letter, size in zip(letters.split(), shape, strict=True):
        wanted = tuple(axis for axis in ACTIVATIONS.get(letter, ()) if axis in free)
        parts = math.prod(mesh.shape[axis] for axis in wanted)
        entries.append(wanted if wanted and size % parts == 0 else None)
    return PartitionSpec(*entries)


def on_each_device(
    function: Callable[..., Any], mesh: AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """The function, run by every device of the active mesh on its parts of the arguments."""
    # Over axes of one device too: a Pallas kernel may stand where no axis is left to the compiler.
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes)


def axes_in(spec: Iterable[Any]) -> tuple[str, ...]:
    """The mesh axes that a PartitionSpec, or some entries of one, name."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return tuple(itertools.chain.from_iterable(entries))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """x, with its axes split as `spec` says; x itself where no mesh is active."""
    mesh = active()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters, x.shape, mesh))


def parameter_spec(
    axes: Sequence[str], shape: Sequence[int], mesh: AbstractMesh | Mesh
) -> PartitionSpec:
    """How a parameter with these axis names is split, by the ordered RULES."""
    entries: dict[int, str] = {}
    matrix = sum(name != "L" for name in axes) > 1
    for rule in RULES:
        size = mesh.shape[rule.mesh_axis]
        if size == 1 or rule.unless in axes or not (matrix or rule.mesh_axis == "tensor"):
            continue
        for place, name in enumerate(axes):
            taken = place in entries or rule.mesh_axis in entries.values()
            if name == rule.axis and not taken and shape[place] % size == 0:
                entries[place] = rule.mesh_axis
    return PartitionSpec(*(entries.get(place) for place in range(len(axes))))


def parameter_specs(axes: Any, params: Any, mesh: AbstractMesh | Mesh) -> Any:
    """A PartitionSpec for every parameter.

    `axes` names the axes of each (`jaxformer.nn.parameter_axes`), `params` are arrays or shapes.
    """
    return jax.tree.map(
        lambda names, leaf: parameter_spec(names, leaf.shape, mesh),
        axes,
        params,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def named(specs: Any, mesh: Mesh) -> Any:
    """The same tree with a NamedSharding in place of each PartitionSpec."""
    return jax.tree.map(
        lambda entry: NamedSharding(mesh, entry),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def table(axes: Any, params: Any, mesh: AbstractMesh | Mesh) -> list[tuple[str, str, str, str]]:
    """For every parameter: its name, axes with sizes, split, and share of one device in words."""
    rows = []
    specs = parameter_specs(axes, params, mesh)
    flat_axes = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    flat = jax.tree_util.tree_leaves_with_path(params)
    flat_specs = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    for (path, leaf), names, split in zip(flat, flat_axes, flat_specs, strict=True):
        sized = " ".join(f"{name}={size}" for name, size in zip(names, leaf.shape, strict=True))
        over = ", ".join(
            f"{name}: {axis}" for name, axis in zip(names, split, strict=True) if axis is not None
        )
        parts = math.prod(mesh.shape[axis] for axis in split if axis is not None)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows.append((name, sized, over or "whole", f"1/{parts}"))
    return rows
