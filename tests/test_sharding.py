"""The mesh: its shape, its refusals, and the rules by which arrays are split over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxformer import sharding
from jaxformer.config import MeshConfig, ModelConfig
from jaxformer.models import abstract, build
from jaxformer.nn import parameter_axes, pure

P = PartitionSpec
needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def abstract_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def specs(mesh, **options):
    config = ModelConfig(kind="decoder", layers=2, width=32, heads=4, kv_heads=2, **options)
    model = abstract(config, vocabulary=24)
    return sharding.parameter_specs(parameter_axes(model), pure(model)[1], mesh)


def test_minus_one_takes_the_devices_that_are_left():
    sizes = sharding.mesh_shape(MeshConfig(data=-1, fsdp=2, tensor=2), 16)
    assert tuple(sizes.items()) == tuple(zip(sharding.AXES, (4, 2, 1, 1, 2), strict=True))
    assert sharding.mesh_shape(MeshConfig(data=1, fsdp=-1), 6)["fsdp"] == 6


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(data=-1, fsdp=3), 8, "no divisor of 8"),
        (MeshConfig(data=4, tensor=4), 8, "needs 16 devices and there are 8"),
        (MeshConfig(data=-1, fsdp=-1), 8, "only one axis of the mesh can be -1"),
        (MeshConfig(data=1, tensor=0), 8, "mesh.tensor=0 must be positive"),
        (MeshConfig(data=1, expert=2), 8, "mesh.expert is reserved"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(config, devices, message):
    with pytest.raises(sharding.MeshError, match=message):
        sharding.mesh_shape(config, devices)


@needs_eight
def test_a_mesh_has_the_devices_it_names_and_automatic_axes():
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices())
    assert mesh.shape == dict(data=2, fsdp=1, expert=1, context=1, tensor=2)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.devices.flatten().tolist() == jax.devices()[:4]


def test_parameters_are_split_by_the_rules():
    split = specs(abstract_mesh(fsdp=2, tensor=2), tied_embeddings=False)
    blocks = split["decoder"]["blocks"]
    assert split["embedding"]["table"] == P("tensor", "fsdp")
    assert split["output"]["projection"]["kernel"] == P("fsdp", "tensor")
    assert blocks["attention"]["query"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert blocks["attention"]["key"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert blocks["attention"]["query"]["bias"] == P(None, "tensor", None)
    assert blocks["attention"]["out"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert blocks["feedforward"]["up"]["kernel"] == P(None, "fsdp", "tensor")
    assert blocks["feedforward"]["down"]["bias"] == P(None, None)
    assert blocks["attention_norm"]["scale"] == P(None, None)


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    split = specs(abstract_mesh(fsdp=3, tensor=4))
    blocks = split["decoder"]["blocks"]
    assert split["embedding"]["table"] == P("tensor", None)
    assert blocks["attention"]["query"]["kernel"] == P(None, None, "tensor", None)
    assert blocks["attention"]["key"]["kernel"] == P(None, None, None, None)  # two heads


def test_the_gates_of_an_lstm_are_not_split_over_tensor():
    model = abstract(ModelConfig(kind="recurrent", layers=1, width=32), vocabulary=24)
    split = sharding.parameter_specs(
        parameter_axes(model), pure(model)[1], abstract_mesh(fsdp=2, tensor=2)
    )
    of_lstms = [
        (path, spec)
        for path, spec in jax.tree_util.tree_leaves_with_path(
            split, is_leaf=lambda node: isinstance(node, P)
        )
        if "recurrent_kernel" in jax.tree_util.keystr(path)
    ]
    assert of_lstms and all("tensor" not in spec for _, spec in of_lstms)


def test_activations_are_split_as_far_as_they_divide():
    mesh = abstract_mesh(data=2, fsdp=2, context=2, tensor=2)
    assert sharding.spec("B T D", (8, 16, 32), mesh) == P(("data", "fsdp"), "context", None)
    assert sharding.spec("B T N H", (8, 16, 4, 8), mesh) == P(
        ("data", "fsdp"), "context", "tensor", None
    )
    assert sharding.spec("B T N H", (6, 15, 3, 8), mesh) == P(None, None, None, None)
    assert sharding.axes_in(sharding.spec("B T D", (8, 16, 32), mesh)) == (
        "data",
        "fsdp",
        "context",
    )


def test_without_a_mesh_nothing_is_done():
    x = jnp.ones((2, 3))
    assert sharding.active() is None and sharding.constrain(x, "B D") is x
    assert sharding.by_hand("B") == (0, 1) and not sharding.divides("context")


@needs_eight
def test_inside_a_manual_region_the_axes_left_are_active_and_parts_are_known():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())

    def run(x):
        assert sharding.free_axes(sharding.active()) == ("tensor",)
        assert sharding.spec("B N", (4, 4), sharding.active()) == P(None, "tensor")
        index, parts = sharding.by_hand("B")
        assert parts == 4
        return x + index

    with jax.set_mesh(mesh):
        rows = P(("data", "fsdp"))
        found = jax.jit(
            jax.shard_map(run, in_specs=rows, out_specs=rows, axis_names={"data", "fsdp"})
        )(jnp.zeros(8, jnp.int32))
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 2, 2, 3, 3])


def test_the_context_method_is_that_of_the_innermost_context():
    assert sharding.context_method() == "ring"
    with sharding.context_by("all_to_all"):
        assert sharding.context_method() == "all_to_all"
    assert sharding.context_method() == "ring"


def test_the_table_names_every_parameter_with_its_split_and_share():
    config = ModelConfig(kind="decoder", layers=2, width=32, heads=4)
    model = abstract(config, vocabulary=24)
    params = pure(model)[1]
    rows = sharding.table(parameter_axes(model), params, abstract_mesh(fsdp=2, tensor=4))
    assert len(rows) == len(jax.tree.leaves(params))
    table = {name: rest for name, *rest in rows}
    assert table["embedding.table"] == ["V=24 D=32", "V: tensor, D: fsdp", "1/8"]
    assert table["decoder.norm.scale"] == ["D=32", "whole", "1/1"]


@needs_eight
@pytest.mark.parametrize("names", [("x",), ("data",), ("context",), ("tensor",)])
def test_a_model_takes_no_part_in_a_mesh_of_other_make(names):
    """A user's own axes mean what the user says, whatever they are called."""
    config = ModelConfig(kind="decoder", layers=1, width=16, heads=2, max_length=8)
    apply, params = pure(build(config, vocabulary=12))
    tokens = jnp.arange(32).reshape(4, 8) % 12
    want = jax.jit(apply)(params, tokens)
    mesh = jax.make_mesh((4,), names, axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert sharding.active() is None
        np.testing.assert_allclose(jax.jit(apply)(params, tokens), want, rtol=1e-5, atol=1e-6)
    rows = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P(*names)), out_specs=P(*names))
    np.testing.assert_allclose(jax.jit(rows)(params, tokens), want, rtol=1e-5, atol=1e-6)
