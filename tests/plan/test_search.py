"""Changes that make a step smaller keep what it computes; meshes fit the model and the machine."""

import dataclasses

import pytest

from jaxformer import presets
from jaxformer.config import MeshConfig
from jaxformer.plan.build import Sizes, least_memory
from jaxformer.plan.search import changed, meshes, smaller
from jaxformer.sharding import mesh_shape

LLAMA = presets.get("llama2-70b")


def with_(config, **groups):
    parts = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in groups.items()
    }
    return dataclasses.replace(config, **parts)


def test_remat_is_tried_before_accumulation_and_that_before_fsdp():
    config = with_(LLAMA, model={"remat": "none"}, train={"batch_size": 32})
    tried = [str(change) for change in smaller(config, 8)]
    assert tried == [
        "--model.remat dots",
        "--model.remat full",
        "--model.remat full --train.batch-size 16 --train.accumulation 2",
        "--model.remat full --train.batch-size 8 --train.accumulation 4",
        "--mesh.data 4 --mesh.fsdp 2",
        "--mesh.data 4 --mesh.fsdp 2 --model.remat full",
        "--mesh.data 2 --mesh.fsdp 4",
        "--mesh.data 2 --mesh.fsdp 4 --model.remat full",
        "--mesh.data 1 --mesh.fsdp 8",
        "--mesh.data 1 --mesh.fsdp 8 --model.remat full",
        "--model.remat full --mesh.data 1 --mesh.fsdp 8 --train.batch-size 16 --train.accumulation"
        " 2",
        "--model.remat full --mesh.data 1 --mesh.fsdp 8 --train.batch-size 8 --train.accumulation"
        " 4",
    ]


@pytest.mark.parametrize("fsdp", [1, 4, 8])
@pytest.mark.parametrize("remat", ["none", "dots_no_batch", "full"])
def test_no_change_alters_the_batch_or_the_number_of_devices(fsdp, remat):
    config = with_(LLAMA, model={"remat": remat}, mesh={"fsdp": fsdp}, train={"batch_size": 64})
    for change in smaller(config, 8):
        train = change.config.train
        assert train.batch_size * train.accumulation == 64
        sizes = mesh_shape(change.config.mesh, 8)
        shares = sizes["data"] * sizes["fsdp"]
        assert shares == 8
        assert train.batch_size % shares == 0
        assert "none" not in str(change)


def test_options_say_what_was_changed():
    change = changed(LLAMA, {"mesh.fsdp": 4, "train.batch_size": 2})
    assert change.options == ("--mesh.fsdp 4", "--train.batch-size 2")
    assert (change.config.mesh.fsdp, change.config.train.batch_size) == (4, 2)
    assert str(changed(LLAMA, {})) == "as it is"


def test_meshes_take_all_devices_and_divide_heads_and_rows():
    found = [change.config.mesh for change in meshes(LLAMA, 512)]
    assert {mesh.tensor for mesh in found} == {1, 2, 4, 8}  # of 8 key-value heads
    assert all(mesh.data * mesh.fsdp * mesh.tensor == 512 for mesh in found)
    assert len(set(found)) == len(found) == 16
    few_rows = with_(LLAMA, train={"batch_size": 128})
    assert {change.config.mesh.tensor for change in meshes(few_rows, 512)} == {4, 8}


def test_the_state_takes_sixteen_bytes_a_parameter_over_all_devices():
    sizes = Sizes(32_000)
    one = least_memory(LLAMA, sizes, 1)
    assert one == pytest.approx(16 * 68_976_648_192, rel=1e-6)
    split = dataclasses.replace(LLAMA, mesh=MeshConfig(fsdp=64, tensor=2))
    vectors = 16 * 161 * 8192  # norms are whole on every device
    assert least_memory(split, sizes, 128) == pytest.approx((one - vectors) / 128 + vectors, 1e-6)
    copies = dataclasses.replace(LLAMA, mesh=MeshConfig(data=4, fsdp=2))
    assert least_memory(copies, sizes, 8) == pytest.approx((one + vectors) / 2, 1e-6)
