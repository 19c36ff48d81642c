"""What is sent, who works how much, and what it costs in memory: read from the programs."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core
from jax.sharding import NamedSharding

from jaxformer_kernels import Mask
from tests.kernels.context_attention.calls import OURS, ring_mesh, split

CAUSAL = Mask(causal=True)


def passes(C, order, T, H=16, mask=CAUSAL):
    """(output and gradients as a function, its arguments as shapes) on C devices."""
    run = split(C, order, dealt_out=True)

    def both(q, k, v, weight):
        out, pull = jax.vjp(lambda *x: run(*x, mask=mask), q, k, v)
        return out, pull(weight)

    ours = NamedSharding(ring_mesh(C), OURS)
    q, kv = (jax.ShapeDtypeStruct((1, T, heads, H), jnp.float32, sharding=ours) for heads in (2, 1))
    return both, (q, kv, kv, q)


def bodies(jaxpr, times=1):
    """(a jaxpr or one within, how often it runs); loops of unknown length count once."""
    yield jaxpr, times
    for equation in jaxpr.eqns:
        inside = times * equation.params.get("length", 1)
        for value in equation.params.values():
            for x in value if isinstance(value, tuple | list) else (value,):
                if isinstance(x, core.ClosedJaxpr | core.Jaxpr):
                    yield from bodies(getattr(x, "jaxpr", x), inside)


def equations(jaxpr):
    """(equation, how often it runs) of all bodies."""
    for body, times in bodies(jaxpr):
        yield from ((equation, times) for equation in body.eqns)


def sent(C, order, mask=CAUSAL):
    """How often an array is sent on, in both passes."""
    function, arguments = passes(C, order, 64, mask=mask)
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return sum(
        times for equation, times in equations(jaxpr) if equation.primitive.name == "ppermute"
    )


def products(jaxpr):
    """Multiplications of all matrix products."""
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            result = math.prod(equation.outvars[0].aval.shape)
            total += times * result * math.prod(left[axis] for axis in contracted)
    return total


@pytest.mark.parametrize("C", [1, 2, 4, 8])
def test_keys_and_values_go_round_once_and_again_with_their_gradients(C):
    """C - 1 times k and v forward and backward; C times dk and dv, the last time home."""
    want = 0 if C == 1 else 2 * (C - 1) + 2 * (C - 1) + 2 * C
    assert sent(C, "zigzag") == want


def test_a_window_sends_to_neighbours_alone():
    """One part wide: k and v once in each pass, dk and dv there and home, whatever C."""
    for C in (4, 8):
        assert sent(C, "contiguous", Mask(causal=True, window=(64 // C, 0))) == 2 + 2 + 4


def test_zigzag_has_every_device_multiply_as_much_at_each_step():
    def branches(order):
        function, arguments = passes(4, order, 64)
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        conditions = [e for e, _ in equations(jaxpr) if e.primitive.name == "cond"]
        assert len(conditions) == 4  # a loop and a last step in either pass
        return [
            [products(branch.jaxpr) for branch in condition.params["branches"]]
            for condition in conditions
        ]

    assert all(len(set(work)) == 1 and work[0] > 0 for work in branches("zigzag"))
    assert all(0 in work for work in branches("contiguous"))


def test_work_does_not_wait_for_what_is_on_its_way():
    """In the loop of either pass: sent before the branch, of which no operand depends on it."""
    function, arguments = passes(4, "zigzag", 64)
    whole = jax.make_jaxpr(function)(*arguments).jaxpr
    loops = [e.params["jaxpr"].jaxpr for e, _ in equations(whole) if e.primitive.name == "scan"]
    rounds = [body for body in loops if any(e.primitive.name == "ppermute" for e in body.eqns)]
    assert len(rounds) == 2
    for body in rounds:
        coming = set()
        for equation in body.eqns:
            operands = {x for x in equation.invars if not isinstance(x, core.Literal)}
            if equation.primitive.name == "cond":
                assert coming and not operands & coming
            elif equation.primitive.name == "ppermute" or operands & coming:
                coming |= set(equation.outvars)


@pytest.fixture(scope="module")
def programs():
    compiled = {}
    for C in (1, 2, 4, 8):
        function, arguments = passes(C, "zigzag", 32768, H=64)
        compiled[C] = jax.jit(function).lower(*arguments).compile()
    return compiled


def test_memory_of_a_device_falls_with_the_ring(programs):
    sizes = [programs[C].memory_analysis().temp_size_in_bytes for C in (1, 2, 4, 8)]
    assert all(smaller < 0.9 * larger for larger, smaller in itertools.pairwise(sizes)), sizes
    assert sizes[-1] < sizes[0] / 3, sizes


def test_nothing_but_neighbours_talk(programs):
    text = programs[4].as_text()
    found = set(
        re.findall(r" (all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(", text)
    )
    assert found == set()
    assert "collective-permute" in text
