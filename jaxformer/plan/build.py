"""The training step of a configuration from shapes alone, placed on a mesh of any devices."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from jaxformer import models, nn, sharding
from jaxformer.config import Config, ConfigError, DataConfig
from jaxformer.data import image_height
from jaxformer.data.tokenizers import SPECIALS
from jaxformer.nn.parameters import Params
from jaxformer.training.memory import Memory, residuals, size
from jaxformer.training.optimizer import make_optimizer, make_schedule
from jaxformer.training.parallel import Parallel, check_parallel, state_specs
from jaxformer.training.state import TrainState, init_state
from jaxformer.training.step import make_train_step
from jaxformer_kernels import compiling_for


@dataclass(frozen=True)
class Sizes:
    """What the data would tell: how many tokens there are, and how high images."""

    vocabulary: int
    source_vocabulary: int | None = None
    image_height: int | None = None


@dataclass(frozen=True)
class Step:
    """A training step that could be compiled, and the shapes that it is for."""

    mesh: Mesh
    axes: Params
    """The axis names of every parameter."""
    apply: Any
    jitted: Any
    state: TrainState
    batch: dict[str, Any]
    config: Config
    platform: str

    def trace(self) -> Any:
        """Traced for the platform, which chooses the kernels."""
        with compiling_for(self.platform):
            return self.jitted.trace(self.state, self.batch)

    def memory(self) -> Memory:
        """What one device must hold, by what it is for.

        Exact for what has a place on the mesh. Activations are those of one device, divided by the
        axes over which rows and sequences are split, and by `tensor` where an axis is split over
        it; they are what the backward pass reads, without what an operation needs while it runs.
        """
        with compiling_for(self.platform):
            kept = residuals(
                self.apply, self.state, _micro(self.batch, self.config), self.config.train
            )
        parameters = _share(self.state.params)
        gradients = sum(
            prod(leaf.sharding.shard_shape(leaf.shape)) * 4
            for leaf in jax.tree.leaves(self.state.params)
        )
        return Memory(
            parameters=parameters + _share(self.state.statistics),
            optimizer=_share(self.state.optimizer_state) + _share(self.state.ema),
            gradients=gradients * (1 if self.config.train.accumulation == 1 else 2),
            activations=round(sum(_divided(leaf, self.mesh, self.config) for leaf in kept)),
            batch=_share(self.batch),
        )

    def gathered(self) -> int:
        """Bytes of the parameters that one device multiplies by, all put together but for their
        division by hand over heads and width.
        """
        tensor, item = (
            self.mesh.shape["tensor"],
            jnp.dtype(self.config.model.compute_dtype).itemsize,
        )
        return sum(
            prod(leaf.shape)
            * item
            // (tensor if "tensor" in getattr(leaf.sharding, "spec", ()) else 1)
            for leaf in jax.tree.leaves(self.state.params)
        )


def sizes_of(
    config: Config, vocabulary: int | None = None, source_vocabulary: int | None = None
) -> Sizes:
    """The vocabularies that the data is taken to have: given, or the most its tokenizers allow.

    Raises ConfigError where neither says.
    """
    data = config.data
    source = None
    if vocabulary is None:
        vocabulary = _known(_target_tokenizer(data), data, "--vocabulary")
    if data.kind in ("pairs", "pronunciation"):
        source = source_vocabulary
        if source is None and data.shared_vocabulary:
            source = vocabulary
        if source is None:
            source = _known(_source_tokenizer(data), data, "--source-vocabulary")
    return Sizes(vocabulary, source, image_height(data))


def _target_tokenizer(data: DataConfig) -> str:
    if data.kind == "pronunciation":
        return "phonemes"
    if data.kind == "digits":
        return "digits"
    return (
        data.tokenizer if data.kind == "text" or data.shared_vocabulary else data.target_tokenizer
    )


def _source_tokenizer(data: DataConfig) -> str:
    return "letters" if data.kind == "pronunciation" else data.tokenizer


def _known(tokenizer: str, data: DataConfig, option: str) -> int:
    # CMUdict has 39 phonemes (69 with stress) and 27 letters.
    known = {
        "bpe": data.vocabulary_size,
        "byte": len(SPECIALS) + 256,
        "phonemes": len(SPECIALS) + (69 if data.keep_stress else 39),
        "letters": len(SPECIALS) + 27,
        "digits": len(SPECIALS) + 10,
    }
    if tokenizer not in known:
        raise ConfigError(
            f"how many tokens a {tokenizer} tokenizer finds depends on the data: give {option} N"
        )
    return known[tokenizer]


def make_model(config: Config, sizes: Sizes, axis_name: tuple[str, ...] | None = None) -> Any:
    """The model without arrays."""
    return models.abstract(
        config.model,
        vocabulary=sizes.vocabulary,
        source_vocabulary=sizes.source_vocabulary,
        image_height=sizes.image_height,
        axis_name=axis_name,
    )


def sharding_table(config: Config, sizes: Sizes, devices: int) -> list[tuple[str, str, str, str]]:
    """For every parameter its name, axes with sizes, split, and the share of one device."""
    model = make_model(config, sizes)
    return sharding.table(nn.parameter_axes(model), nn.pure(model)[1], _any_mesh(config, devices))


def least_memory(config: Config, sizes: Sizes, devices: int) -> int:
    """Bytes of parameters, optimiser's state and gradients on one device, whatever is compiled."""
    mesh = _any_mesh(config, devices)
    model = make_model(config, sizes)
    axes, template = nn.parameter_axes(model), _template(config, model)[1]
    specs = (
        sharding.parameter_specs(axes, template.params, mesh)
        if config.parallel.mode == "jit"
        else jax.tree.map(lambda leaf: PartitionSpec(), template.params)
    )
    parts = jax.tree.map(
        lambda leaf, spec: (
            prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        ),
        template,
        state_specs(template, specs),
    )
    wide = 4 / jnp.dtype(config.model.param_dtype).itemsize
    return sum(jax.tree.leaves(parts)) + round(wide * sum(jax.tree.leaves(parts.params)))


def _template(config: Config, model: Any) -> tuple[Any, TrainState]:
    """The optimiser, and the shapes of the state before the first step."""
    optimizer = make_optimizer(config.optimizer, config.train.steps, nn.parameter_axes(model))
    make_state = partial(init_state, optimizer=optimizer, ema=config.train.ema is not None)
    params, statistics = nn.pure(model)[1], nn.statistics(model)
    return optimizer, jax.eval_shape(make_state, params, statistics=statistics)


def _any_mesh(config: Config, devices: int) -> AbstractMesh:
    shape = sharding.mesh_shape(config.mesh, devices)
    return AbstractMesh(tuple(shape.values()), tuple(shape))


def make_step(config: Config, sizes: Sizes, devices: list[Any], platform: str) -> Step:
    """The step that `train.py` would run on these devices. Raises ConfigError, MeshError."""
    mesh = sharding.make_mesh(config.mesh, devices)
    check_parallel(config, mesh)
    parallel = Parallel(mesh, config.parallel)
    with compiling_for(platform):
        model = make_model(config, sizes, parallel.manual_axes or None)
        axes = nn.parameter_axes(model)
        apply, params = nn.pure(model)
        optimizer, template = _template(config, model)
    step = make_train_step(
        apply,
        optimizer,
        make_schedule(config.optimizer, config.train.steps),
        config.train,
        config.seed,
        axis_names=parallel.manual_axes,
        constrain=parallel.gradient_constraint(params, axes),
    )
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.batch_place(x))
        for name, x in batch_shapes(config, sizes).items()
    }
    return Step(
        mesh=mesh,
        axes=axes,
        apply=apply,
        jitted=parallel.compile(step, config.train.accumulation),
        state=parallel.state(template, axes),
        batch=batch,
        config=config,
        platform=platform,
    )


def batch_shapes(config: Config, sizes: Sizes) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of a step as the data of this kind has it; of pairs in the longest bucket."""
    data, rows = config.data, config.train.batch_size * config.train.accumulation
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    length = data.length if data.kind == "text" else data.max_target_length
    for name in ("inputs", "targets", "segment_ids"):
        shapes[name] = ((rows, length), jnp.int32)
    shapes["weights"] = ((rows, length), jnp.float32)
    if data.kind == "text":
        shapes["positions"] = ((rows, length), jnp.int32)
    else:
        source = (rows, data.max_source_length)
        shapes["source_segment_ids"] = (source, jnp.int32)
        shapes["source"] = (
            (source, jnp.int32)
            if sizes.image_height is None
            else ((*source, sizes.image_height), jnp.float32)
        )
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _micro(batch: dict[str, Any], config: Config) -> dict[str, Any]:
    parts = config.train.accumulation
    return {
        name: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
    }


def _share(tree: Any) -> int:
    """Bytes of one device's part of arrays that have a place."""
    return sum(
        prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _divided(leaf: jax.ShapeDtypeStruct, mesh: Mesh, config: Config) -> float:
    """Bytes of one device's part of an activation, whose axes are told by their sizes."""
    model, sizes = config.model, mesh.shape
    rows = sizes["data"] * sizes["fsdp"] * sizes["context"]
    head = model.head_dim or model.width // model.heads
    split = {
        model.heads,
        model.kv_heads or model.heads,
        model.heads * head,
        model.feedforward or 4 * model.width,
    }
    split |= {2 * size for size in split} | {3 * model.heads * head}
    over_tensor = any(axis in split - {model.width} for axis in leaf.shape[1:])
    return size(leaf) / rows / (sizes["tensor"] if over_tensor else 1)
