"""Names of machines mean what clouds sell, and a wrong one is answered by the nearest."""

import importlib.util

import pytest

from jaxformer.plan.topology import (
    TopologyError,
    environment,
    known_names,
    parse_topology,
    require_compiler,
)


@pytest.mark.parametrize(
    ("name", "means", "devices"),
    [
        ("v5p:8x8x16", "v5p:8x8x16", 1024),
        ("v5p-128", "v5p:4x4x4", 64),  # cores, two a chip
        ("v5p-1024", "v5p:8x8x8", 512),
        ("v4-8", "v4:2x2x1", 4),
        ("v5e-256", "v5e:16x16", 256),  # chips
        ("v5litepod-16", "v5e:4x4", 16),
        ("V6E-8", "v6e:2x4", 8),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),  # two devices of jax a chip
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("v5e:3x5", "v5e:3x5", 15),
        ("h100:1", "h100:1", 1),
        ("h100:8", "h100:8", 8),
        ("h100:16", "h100:16", 16),
        ("cpu:8", "cpu:8", 8),
    ],
)
def test_a_name_stands_for_a_machine(name, means, devices):
    topology = parse_topology(name)
    assert (topology.name, topology.devices) == (means, devices)
    assert parse_topology(topology.name) == topology


def test_every_known_name_works():
    assert len({parse_topology(name).name for name in known_names()}) > 30


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5q-128", "did you mean v5p-128"),
        ("a100:8", "did you mean h100:8"),
        ("v5p", "v5p:4x4x4"),
        ("v5p:8x8", "3 dimensions, such as v5p:4x4x4"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v5p-100", "did you mean v5p-128"),
        ("v5p-127", "counts cores, two a chip"),
        ("v5e-250", "did you mean v5e-256"),
        ("h100:12", "h100:16"),
        ("cpu:0", "cpu:1"),
        ("", "cpu:8"),
    ],
)
def test_a_wrong_name_is_answered_by_the_nearest(name, says):
    with pytest.raises(TopologyError, match=says):
        parse_topology(name)


def test_gpus_of_several_hosts_are_told_from_those_of_one():
    assert parse_topology("h100:8").shape == (1, 8)
    assert parse_topology("h100:32").shape == (4, 8)
    assert "4 hosts of 8" in parse_topology("h100:32").words


@pytest.mark.parametrize(
    ("platform", "package"), [("tpu", r"jax\[tpu\]=="), ("gpu", "jax-cuda13-plugin==")]
)
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(
    monkeypatch, platform, package
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=f"pip install .*{package}"):
        require_compiler(platform)
    require_compiler("cpu")


def test_no_compile_looks_for_an_accelerator():
    for platform in ("cpu", "gpu", "tpu"):
        assert environment(platform, 8)["JAX_PLATFORMS"] == "cpu"
    assert environment("cpu", 8)["XLA_FLAGS"].endswith("device_count=8")
