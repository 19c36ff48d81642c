"""Steps through the real compilers of TPU and H100, where they are installed: `make plan-check`."""

import importlib.util
import json

import pytest

from jaxformer.cli import main

SMALL = (
    "text",
    "--model.compute-dtype=bfloat16",
    "--model.layers=2",
    "--model.heads=2",
    "--model.kv-heads=2",
    "--model.scan",
    "--train.batch-size=16",
    "--eval.batch-size=16",
    "--json",
)


def planned(capsys, *arguments):
    capsys.readouterr()
    main(["plan", *SMALL, *arguments])
    return json.loads(capsys.readouterr().out)


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: make plan-check")


@needs("libtpu")
def test_a_small_tpu_slice_is_planned(capsys):
    plan = planned(capsys, "--topology=v5e:2x2", "--mesh.fsdp=2", "--mesh.tensor=2")
    assert (plan["outcome"], plan["fits"], plan["unknown_loops"]) == ("ok", True, 0)
    # The fused kernels are in, and run in each of both layers.
    assert {name for name in plan["kernels"] if name.startswith("attention")} >= {
        "attention_forward",
        "attention_backward",
    }
    assert plan["kernels"]["attention_backward"] == 2
    assert {one["devices"] for one in plan["collectives"]} >= {2}
    assert 0 < plan["bound"]["mfu"] < 1
    assert plan["needed"] >= plan["memory"]["parameters"] + plan["memory"]["optimizer"]


@needs("libtpu")
def test_what_does_not_fit_a_tpu_says_by_how_much(capsys):
    plan = planned(
        capsys,
        "--topology=v5e:2x2",
        "--model.width=8192",
        "--model.feedforward=32768",
        "--model.heads=64",
        "--model.kv-heads=64",
        "--model.layers=8",
        "--no-propose",
    )
    assert (plan["outcome"], plan["fits"]) == ("too_large", False)
    assert plan["needed"] > plan["available"] == pytest.approx(15.75 * 2**30)


@needs("jax_cuda13_plugin")
def test_h100s_are_planned_and_what_leaves_a_host_goes_over_the_network(capsys):
    plan = planned(capsys, "--topology=h100:16", "--mesh.fsdp=8")
    assert (plan["outcome"], plan["fits"], plan["unknown_loops"]) == ("ok", True, 0)
    assert {one["between_hosts"] for one in plan["collectives"]} == {False, True}
    assert plan["bound"]["sent_between_hosts"] > 0
    assert 0 < plan["bound"]["mfu"] < 1
