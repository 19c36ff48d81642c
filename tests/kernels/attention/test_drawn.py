"""Shapes and masks that hypothesis draws, and the Hopper kernels on every two features."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxformer_kernels import Dropout, Mask, attention, interpreting
from tests.kernels.attention.calls import FEATURES, cast, compiled, draw, errors, make_call, plain

# Each example compiles an implementation and the reference.
few = functools.partial(
    settings, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
SIDE = st.one_of(st.none(), st.integers(0, 9))


@st.composite
def calls(draw_one, scale=1, largest_head=9):
    """(differentiable operands, options) with any shapes, lengths up to 14 times `scale`."""
    choose = functools.partial(lambda strategy: draw_one(strategy))
    B, K, groups = (choose(st.integers(1, high)) for high in (2, 2, 3))
    T, S = choose(st.integers(1, 12 * scale)), choose(st.integers(1, 14 * scale))
    H, Hv = choose(st.integers(1, largest_head)), choose(st.integers(1, largest_head))
    N = K * groups
    operands = {"q": draw(0, B, T, N, H), "k": draw(1, B, S, K, H), "v": draw(2, B, S, K, Hv)}
    if choose(st.booleans()):
        sizes = [choose(st.sampled_from((1, size))) for size in (B, N, T, S)]
        operands["bias"] = draw(3, *sizes)
    if choose(st.booleans()):
        operands["sinks"] = draw(4, N)
    options = {"mask": choose(masks(B, N, T, S))}
    if choose(st.booleans()):
        options["softcap"] = 2.0
    if choose(st.booleans()):
        options["dropout"] = Dropout(0.4, jax.random.key(11))
    return operands, options


@st.composite
def masks(draw_one, B, N, T, S):
    """A mask with any of its fields, its positions a little beyond the edges too."""
    position = st.integers(-3, S + 3)
    rng = np.random.RandomState(draw_one(st.integers(0, 99)))
    fields = {}
    for name, of_one in (
        ("q_offset", st.integers(-3, S)),
        ("kv_start", position),
        ("kv_end", position),
    ):
        if draw_one(st.booleans()):
            of_rows = st.lists(of_one, min_size=B, max_size=B)
            fields[name] = draw_one(st.one_of(of_one, of_rows.map(jnp.array)))
    if draw_one(st.booleans()):
        fields["q_segment_ids"] = jnp.asarray(np.sort(rng.randint(0, 3, (B, T))))
        fields["kv_segment_ids"] = jnp.asarray(rng.randint(0, 3, (B, S)))
    if draw_one(st.booleans()):
        sizes = [draw_one(st.sampled_from((1, size))) for size in (B, N, T, S)]
        fields["array"] = jnp.asarray(rng.rand(*sizes) < 0.7)
    window = draw_one(st.one_of(st.none(), st.tuples(SIDE, SIDE)))
    return Mask(causal=draw_one(st.booleans()), window=window, **fields)


reference = functools.partial(attention, implementation="reference")


@pytest.mark.slow
@few(max_examples=8)
@given(call=calls())
def test_drawn_shapes_and_masks_are_right_or_refused(fast_implementation, call):
    operands, options = call
    operands = cast(operands, jnp.float32)
    try:
        got = compiled(fast_implementation, options)(operands)
    except NotImplementedError:
        return
    for name, want in compiled(reference, options)(operands).items():
        np.testing.assert_allclose(got[name], want, rtol=3e-5, atol=3e-5, err_msg=name)


def check_hopper(operands, options):
    """The parity rule, in bfloat16."""
    operands = cast(operands, jnp.bfloat16)
    want = compiled(reference, options)(cast(operands, jnp.float32))
    want = {name: np.asarray(x) for name, x in want.items()}
    hopper = functools.partial(attention, implementation="mosaic_gpu")
    on_gpu = jax.default_backend() == "gpu"
    with contextlib.nullcontext() if on_gpu else interpreting():
        got = jax.block_until_ready(compiled(hopper, options)(operands))
    np.testing.assert_array_equal(np.isinf(got["lse"]), np.isinf(want["lse"]))
    allowed = errors(compiled(plain, options)(operands), want)
    factor = 3 if "softcap" in options else 2
    for name, error in errors(got, want).items():
        # A result in bfloat16 that the plain computation happens to hit exactly is rounded, too.
        rounding = np.abs(want[name][np.isfinite(want[name])]).max(initial=0.0) / 256
        assert error <= factor * allowed[name] + rounding, f"{name}: {error} > {allowed[name]}"


@pytest.mark.slow
@pytest.mark.mosaic_gpu
@few(max_examples=4)
@given(call=calls(scale=10, largest_head=70))
def test_drawn_shapes_and_masks_are_right_on_hopper(call):
    check_hopper(*call)


# Plackett and Burman's design: in its 12 rows every two features occur on and off in all four ways.
ROW = (1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0)
DESIGN = [(), *(tuple(np.compress(np.roll(ROW, i), FEATURES[:11])) for i in range(11))]


@pytest.mark.slow
@pytest.mark.mosaic_gpu
@pytest.mark.parametrize("features", DESIGN, ids="+".join)
def test_every_pair_of_features_is_right_on_hopper(features):
    check_hopper(*make_call((*features, "grouped_heads"), sizes=(1, 70, 90, 2, 1, 64, 64)))
