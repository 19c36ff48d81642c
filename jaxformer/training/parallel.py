"""One training step, run on a mesh in one of three ways: jit, shard_map or pmap.

jit: arrays are placed by the rules of `jaxformer.sharding` and the compiler divides the step.
shard_map, pmap: every device runs the step on its rows, and the step sums over the devices.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxformer import sharding
from jaxformer.config import Config, ConfigError, ParallelConfig
from jaxformer.data import Batch
from jaxformer.nn.parameters import Params
from jaxformer.training.distributed import process_share
from jaxformer.training.state import TrainState
from jaxformer_kernels.context_attention import zigzag

Arrays = dict[str, Any]
Step = Callable[[TrainState, Arrays], tuple[TrainState, Arrays]]


@dataclass(frozen=True)
class Parallel:
    """Where the arrays of a run lie, and how its step is compiled."""

    mesh: Mesh
    config: ParallelConfig

    @property
    def alone(self) -> bool:
        """Whether there is but one device: nothing is then placed or divided."""
        return self.mesh.size == 1

    @functools.cached_property
    def share(self) -> tuple[int, int]:
        """(index, count): the part of the rows of every batch that this process reads."""
        return process_share(self.mesh)

    @property
    def manual_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the step is divided by hand."""
        wanted = {"jit": (), "shard_map": ("data", "context"), "pmap": ("data",)}
        return tuple(axis for axis in wanted[self.config.mode] if self.mesh.shape[axis] > 1)

    def state(self, template: TrainState, axes: Params) -> TrainState:
        """The shapes of a state, each with its place on the mesh.

        `axes` names the axes of every parameter (`jaxformer.nn.parameter_axes`). The optimiser's
        state and the moving average lie where the parameters do.
        """
        if self.alone:
            return jax.tree.map(lambda leaf: _shape(leaf, self._single), template)
        specs = self.parameter_specs(template.params, axes)
        places = state_specs(template, specs)
        return jax.tree.map(
            lambda leaf, spec: _shape(leaf, NamedSharding(self.mesh, spec)), template, places
        )

    def parameter_specs(self, params: Params, axes: Params) -> Params:
        """How each parameter is split: not at all where the step is divided by hand."""
        if self.config.mode != "jit":
            return jax.tree.map(lambda leaf: PartitionSpec(), params)
        return sharding.parameter_specs(axes, params, self.mesh)

    def batch(self, rows: Batch) -> Arrays:
        """A batch on the mesh, in the order of tokens that attention expects there.

        `rows` are this process's `share` of it.
        """
        if self.alone:
            return rows
        return {
            name: _placed(array, self.batch_place(array), self.share)
            for name, array in self.reordered(rows).items()
        }

    def batch_shapes(self, rows: Batch) -> Arrays:
        """The shapes of such a batch, with their places: what a step is compiled for."""
        if self.alone:
            return rows
        return {
            name: jax.ShapeDtypeStruct(
                (array.shape[0] * self.share[1], *array.shape[1:]),
                array.dtype,
                sharding=self.batch_place(array),
            )
            for name, array in rows.items()
        }

    def reordered(self, rows: Batch) -> Batch:
        """Rows of text in the order that divides causal attention evenly over `context`."""
        parts = self.mesh.shape["context"]
        if parts == 1:
            return rows
        order = zigzag(parts, rows["inputs"].shape[1])
        return {name: x[:, order] if x.ndim > 1 else x for name, x in rows.items()}

    def gradient_constraint(self, params: Params, axes: Params) -> Callable[[Params], Params]:
        """A function that has gradients lie where their parameters do."""
        if self.alone or self.config.mode != "jit":
            return lambda gradient: gradient
        specs = self.parameter_specs(params, axes)
        return lambda gradient: jax.lax.with_sharding_constraint(
            gradient, sharding.named(specs, self.mesh)
        )

    def compile(self, step: Step, accumulation: int = 1) -> Any:
        """The jitted step; it takes the state's memory for the new state.

        A batch holds `accumulation` micro-batches, one after the other.
        """
        if not self.manual_axes:
            return jax.jit(self.on_mesh(step), donate_argnums=0)
        pmap = self.config.mode == "pmap"
        run = self._pmapped(step) if pmap else self.on_mesh(self._shard_mapped(step))

        def divided(state: TrainState, batch: Arrays) -> Any:
            # A device's rows are its share of every micro-batch, as they are under jit.
            parts = {"A": accumulation, "N": self.mesh.shape["data"]}
            return run(
                state,
                {
                    name: rearrange(x, "(A N B) ... -> (N A B) ...", **parts)
                    for name, x in batch.items()
                },
            )

        return jax.jit(divided, donate_argnums=0)

    def lacking(self, params: Params) -> int:
        """Bytes that a device has too few to hold all parameters; 0 where it does not tell."""
        known = self.mesh.local_devices[0].memory_stats() or {}
        if self.alone or "bytes_limit" not in known:
            return 0
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        return max(needed + known.get("bytes_in_use", 0) - known["bytes_limit"], 0)

    def on_one_device(self, params: Params) -> Params:
        """Parameters gathered to this process's first device, for decoding."""
        if self.alone:
            return params
        if jax.process_count() == 1:
            return jax.device_put(params, self.mesh.devices.flat[0])
        whole = jax.tree.map(lambda leaf: NamedSharding(self.mesh, PartitionSpec()), params)
        copies = jax.jit(lambda tree: tree, out_shardings=whole)(params)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), copies)

    def on_mesh(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which while it is traced knows the mesh."""
        if self.alone:
            return function

        def traced(*arguments: Any) -> Any:
            mesh = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
            with mesh, sharding.context_by(self.config.context):
                return function(*arguments)

        return traced

    def batch_place(self, array: Any) -> Sharding:
        """Where an array of a batch, or its shape, lies: rows over BATCH, tokens over context."""
        return self._single if self.alone else NamedSharding(self.mesh, self._batch_spec(array))

    @property
    def _single(self) -> Sharding:
        return SingleDeviceSharding(self.mesh.devices.item())

    def _batch_spec(self, array: Any) -> PartitionSpec:
        context = self.mesh.shape["context"] > 1 and array.ndim > 1
        rest = ("context" if context else None,) if array.ndim > 1 else ()
        return PartitionSpec(sharding.BATCH, *rest)

    def _shard_mapped(self, step: Step) -> Step:
        def run(state: TrainState, batch: Arrays) -> Any:
            whole = PartitionSpec()
            # Unchecked: with the check on, the gradient of a parameter that all devices share comes
            # out summed already, and the step's own sum would multiply it.
            mapped = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(whole, {name: self._batch_spec(x) for name, x in batch.items()}),
                out_specs=(whole, whole),
                check_vma=False,
            )
            return mapped(state, batch)

        return run

    def _pmapped(self, step: Step) -> Step:
        devices = self.mesh.devices.flatten().tolist()
        mapped = jax.pmap(
            step, axis_name="data", in_axes=(None, 0), out_axes=(None, None), devices=devices
        )

        def run(state: TrainState, batch: Arrays) -> Any:
            rows = {
                name: rearrange(x, "(N B) ... -> N B ...", N=len(devices))
                for name, x in batch.items()
            }
            return mapped(state, rows)

        return run


def state_specs(state: TrainState, specs: Params) -> TrainState:
    """How every array of a state is split, given how the parameters are.

    An array of the optimiser's state belongs to the parameter at the end of its path, and is split
    as that one is where it has its shape. (`optax.tree.map_params` tells the same from the
    optimiser's `init`, but not for optimisers that look at the parameters there, as Muon does.)
    """
    known = {
        tuple(str(key) for key in path): (spec, leaf.shape)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(state.params),
            jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, PartitionSpec)),
            strict=True,
        )
    }

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        names = tuple(str(key) for key in path)
        for start in range(len(names)):
            found = known.get(names[start:])
            if found is not None and found[1] == leaf.shape:
                return found[0]
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, state)


def check_parallel(config: Config, mesh: Mesh) -> None:
    """Refuses what this mesh cannot do. Raises ConfigError naming the field and the fix."""
    sizes, mode = mesh.shape, config.parallel.mode
    shares = sizes["data"] * sizes["fsdp"]
    for name, rows in (
        ("train.batch_size", config.train.batch_size),
        ("eval.batch_size", config.eval.batch_size),
    ):
        _require(
            rows % shares == 0,
            f"{name}={rows} does not divide over {shares} devices (mesh.data={sizes['data']}, "
            f"mesh.fsdp={sizes['fsdp']}): make it a multiple of {shares}, or set --mesh.data to a "
            "divisor of it",
        )
    possible = {"jit": sharding.AXES, "shard_map": ("data", "context"), "pmap": ("data",)}[mode]
    for axis in sharding.AXES:
        _require(
            sizes[axis] == 1 or axis in possible,
            f"parallel.mode={mode!r} divides over {' and '.join(possible)} alone, and "
            f"mesh.{axis}={sizes[axis]}: use --parallel.mode jit",
        )
    _require(
        mode != "pmap" or len({device.process_index for device in mesh.devices.flat}) == 1,
        "parallel.mode='pmap' is for one process: use --parallel.mode jit",
    )
    _require(
        mode == "jit" or config.train.sampling.schedule == "none",
        "train.sampling draws for all rows at once: use --parallel.mode jit",
    )
    _check_tensor(config, sizes["tensor"])
    _check_context(config, sizes["context"], sizes["tensor"])


def _check_tensor(config: Config, tensor: int) -> None:
    model = config.model
    kv_heads = model.kv_heads or model.heads
    for name, heads in (("heads", model.heads), ("kv_heads", kv_heads)):
        fits = heads % tensor == 0 or (name == "kv_heads" and tensor % heads == 0)
        _require(
            fits,
            f"model.{name}={heads} does not divide over mesh.tensor={tensor}: choose a mesh.tensor "
            f"that divides it, and split the matrices by mesh.fsdp",
        )


def _check_context(config: Config, context: int, tensor: int) -> None:
    if context == 1:
        return
    model, length = config.model, config.data.length
    _require(
        config.data.kind == "text",
        f"mesh.context={context} splits long rows of text, not data.kind={config.data.kind!r}: "
        "use mesh.data",
    )
    _require(
        length % (2 * context) == 0,
        f"data.length={length} must be a multiple of twice mesh.context={context}",
    )
    _require(
        model.position not in ("alibi", "relative"),
        f"model.position={model.position!r} adds a bias of every pair of tokens, which "
        "mesh.context does not split: use model.position='rotary'",
    )
    _require(
        model.attention_dropout == 0,
        "model.attention_dropout is not for mesh.context above 1: set it to 0",
    )
    heads = model.heads // tensor
    _require(
        config.parallel.context == "ring" or heads % context == 0,
        f"parallel.context='all_to_all' exchanges heads, and {heads} do not divide over "
        f"mesh.context={context}: use --parallel.context ring",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _shape(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _placed(rows: np.ndarray, place: Sharding, share: tuple[int, int]) -> jax.Array:
    index, count = share
    if jax.process_count() == 1:
        return jax.device_put(rows, place)
    held, start = len(rows), index * len(rows)
    shape = (held * count, *rows.shape[1:])

    def fetch(where: tuple[slice, ...] | None) -> np.ndarray:
        assert where is not None
        first, last, _ = where[0].indices(shape[0])
        return rows[(slice(first - start, last - start), *where[1:])]

    return jax.make_array_from_callback(shape, place, fetch)
