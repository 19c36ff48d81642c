"""Bounds of a step's time are what their formulas say."""

import dataclasses

import pytest

from jaxformer import presets
from jaxformer.plan.chips import CPU, H100, TPUS, Chip
from jaxformer.plan.estimate import bound, recomputed_flops, step_flops
from jaxformer.plan.hlo import Collective
from jaxformer.training.memory import Memory

CONFIG = presets.get("llama2-7b")
FLOPS = step_flops(CONFIG, 32_000)
MEMORY = Memory(parameters=100, optimizer=200, gradients=100, activations=1000, batch=1)


def test_the_flops_are_six_a_parameter_and_token_and_those_of_attention():
    tokens, weights = 1024 * 4096, 6_738_415_616 - 32_000 * 4096 - 65 * 4096
    assert FLOPS.layers + FLOPS.output == pytest.approx(6 * weights * tokens)
    assert step_flops(presets.get("g2p-lstm"), 43) is None


@pytest.mark.parametrize(
    ("remat", "again"),
    [
        ("none", 0.0),
        ("dots", FLOPS.attention / 3),
        ("dots_no_batch", FLOPS.attention / 3),
        ("full", (FLOPS.layers + FLOPS.attention) / 3),
    ],
)
def test_remat_adds_the_part_of_a_forward_pass_that_it_throws_away(remat, again):
    model = dataclasses.replace(CONFIG.model, remat=remat)
    assert recomputed_flops(dataclasses.replace(CONFIG, model=model), FLOPS) == again


def test_the_bound_is_the_largest_of_three():
    chip = Chip("toy", flops=1e15, memory=1e9, bandwidth=1e3, links=10.0, network=2.0)
    near = Collective("all-gather", 8, 3, 500.0)
    far = Collective("all-reduce", 16, 1, 100.0, between_hosts=True)
    found = bound(CONFIG, chip, 64, FLOPS, MEMORY, 50, [near, far])
    assert found.compute_seconds == pytest.approx((FLOPS.total + found.recomputed * 64) / 64 / 1e15)
    # The state and the gradients there and back, parameters three times, activations twice.
    assert found.memory_seconds == pytest.approx((2 * 400 + 3 * 50 + 2 * 1000) / 1e3)
    assert found.link_seconds == pytest.approx(500 / 10 + 100 / 2)
    assert (found.seconds, found.limit) == (found.link_seconds, "links")
    assert found.mfu(1e15) == pytest.approx(FLOPS.total / 64 / 1e15 / 100)


@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("dots", 2), ("full", 3)])
def test_parameters_are_read_once_a_pass_and_micro_batch(remat, passes):
    model = dataclasses.replace(CONFIG.model, remat=remat)
    train = dataclasses.replace(CONFIG.train, accumulation=4)
    config = dataclasses.replace(CONFIG, model=model, train=train)
    nothing = Memory(0, 0, 0, 0, 0)
    assert bound(config, H100, 8, FLOPS, nothing, 50, []).moved == 4 * passes * 50


def test_full_remat_leaves_three_quarters_of_the_peak_at_most():
    found = bound(CONFIG, TPUS["v5p"], 64, FLOPS, MEMORY, 50, [])
    assert found.limit == "compute"
    assert 0.74 < found.mfu(TPUS["v5p"].flops) < 0.77


def test_nothing_is_said_of_what_is_not_known():
    assert bound(CONFIG, CPU, 8, FLOPS, MEMORY, 50, []) is None
    assert bound(CONFIG, H100, 8, None, MEMORY, 50, []) is None
