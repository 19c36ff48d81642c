"""Who computes what: all that is visible, once, and under a causal mask as much on each device."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxformer_kernels import Mask
from jaxformer_kernels.context_attention import plan
from jaxformer_kernels.context_attention.order import chunks_of

SIDE = st.none() | st.integers(0, 20)


def computed(causal, window, order, C, T):
    """int [C * T, C * T]: how often the plan computes a visible pair, in the sequence's order."""
    counts = np.zeros((C * T, C * T), int)
    size = T // len(chunks_of(order, C, 0))
    places = [
        np.concatenate([np.arange(c * size, (c + 1) * size) for c in chunks_of(order, C, device)])
        for device in range(C)
    ]
    shift = 0
    for step, choices in plan.stretches(causal, window, order, C, T, T):
        for choice in choices:
            shift += step.came
            for device in range(C):
                for part in step.alternatives[choice[device]]:
                    (t, t_size), (s, s_size) = part.t, part.s
                    shown = np.ones((t_size, s_size), bool)
                    if part.offset is not None:
                        mask = Mask(causal=causal, window=window, q_offset=part.offset)
                        shown = np.asarray(mask.as_array(1, 1, t_size, s_size))[0, 0]
                    queries = places[device][t : t + t_size]
                    keys = places[(device - shift) % C][s : s + s_size]
                    counts[np.ix_(queries, keys)] += shown
    return counts


@hypothesis.given(
    causal=st.booleans(),
    window=st.none() | st.tuples(SIDE, SIDE),
    order=st.sampled_from(["zigzag", "contiguous"]),
    C=st.integers(1, 6),
    half=st.integers(1, 4),
)
@hypothesis.settings(max_examples=60)
def test_every_visible_pair_is_computed_once_and_no_other(causal, window, order, C, half):
    T = 2 * half
    want = Mask(causal=causal, window=window).as_array(1, 1, C * T, C * T)[0, 0]
    np.testing.assert_array_equal(computed(causal, window, order, C, T), np.asarray(want))


def areas(step):
    return {sum(part.t[1] * part.s[1] for part in parts) for parts in step.alternatives}


@pytest.mark.parametrize("C", [2, 4, 7])
def test_zigzag_gives_every_device_as_much_at_each_step(C):
    for step, _ in plan.stretches(True, None, "zigzag", C, 8, 8):
        assert len(areas(step)) == 1
        assert all(len(parts) == 1 for parts in step.alternatives)
    assert any(
        len(areas(step)) > 1 for step, _ in plan.stretches(True, None, "contiguous", C, 8, 8)
    )


def test_keys_do_not_travel_beyond_the_window():
    """A window of one part: the own keys and those of the device before, whatever C."""
    walk = plan.stretches(True, (8, 0), "contiguous", 8, 8, 8)
    assert [(step.came, step.goes, len(choices)) for step, choices in walk] == [
        (0, 1, 1),
        (1, 0, 1),
    ]


def test_steps_that_are_alike_are_one_loop():
    """The program does not grow with the ring."""
    lengths = [len(plan.stretches(True, None, "zigzag", C, 8, 8)) for C in (4, 64)]
    assert lengths == [3, 3]
