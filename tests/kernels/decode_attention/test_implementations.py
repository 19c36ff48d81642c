"""Every implementation of decode_attention against the reference in float64."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import decode_attention
from jaxformer_kernels.decode_attention.shapes import SHAPES

FEATURES = (
    "few_queries",
    "window",
    "grouped_heads",
    "softcap",
    "sinks",
    "starts",
    "paged",
    "value_head_dim",
)
# Plackett and Burman's design: in its 12 rows every two features occur on and off in all four ways.
DESIGN = [(), *(np.roll([1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0], shift) for shift in range(11))]
COMBINATIONS = [tuple(itertools.compress(FEATURES, row)) for row in DESIGN]


def close(got, want, tolerance=3e-5):
    for name, x, y in zip(("out", "lse"), got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
def test_every_pair_of_features_is_right_or_refused(calls, regime, features):
    call, want = calls.wanted(features, regime.sizes)
    try:
        got = calls.compiled(regime.run, calls.cast(call, jnp.float32))
    except NotImplementedError:
        return
    close(got, want)


def test_rows_that_see_nothing_give_nothing(calls, regime):
    features = ("few_queries", "grouped_heads", "sinks", "softcap")
    call = calls.make_call(features, regime.sizes)
    call["lengths"] = np.where(np.arange(len(call["lengths"])) % 2, 0, call["lengths"])
    call["lengths"] = call["lengths"].astype(np.int32)
    out, lse = calls.compiled(regime.run, calls.cast(call, jnp.float32))
    for b, length in enumerate(call["lengths"]):
        before = max(0, 3 - length)
        assert not np.any(out[b, :before])
        assert np.all(lse[b, :, :before] == -np.inf)
        assert np.all(np.isfinite(lse[b, :, before:]))
        assert np.all(np.any(out[b, before:], axis=-1))


@pytest.mark.parametrize("features", [("few_queries", "grouped_heads", "sinks"), ("paged",)])
def test_a_rerun_is_bitwise_equal(calls, regime, features):
    call = calls.cast(calls.make_call(features, regime.sizes), jnp.float32)
    first, second = (calls.compiled(regime.run, call) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_is_hidden_changes_no_bit(calls, regime):
    features = ("few_queries", "window", "starts")
    call = calls.make_call(features, regime.sizes)
    before = calls.compiled(regime.run, calls.cast(call, jnp.float32))
    s = np.arange(regime.sizes.S)
    first = np.maximum(call["starts"], call["lengths"] - 3 - call["window"][0])
    hidden = (s < first[:, None]) | (s >= call["lengths"][:, None])
    assert np.any(hidden)
    for name in ("k", "v"):
        call[name] = np.where(hidden[..., None, None], 1e4, call[name])
    after = calls.compiled(regime.run, calls.cast(call, jnp.float32))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


@functools.cache
def shape_call(name, head_dim):
    """A named shape in small, in bfloat16, as numpy float32 that bfloat16 holds."""
    shape = SHAPES[name].scaled(length=24, groups=2, head_dim=head_dim)
    rng = np.random.RandomState(0)

    def normal(*axes):
        return np.array(jnp.asarray(rng.standard_normal(axes), jnp.bfloat16), np.float32)

    call = {
        "q": normal(shape.B, shape.T, shape.N, shape.H),
        "k": normal(shape.B, shape.S, shape.K, shape.H),
        "v": normal(shape.B, shape.S, shape.K, shape.H),
        "lengths": rng.randint(shape.T, shape.S + 1, shape.B).astype(np.int32),
    }
    if shape.window is not None:
        call["window"] = shape.window
    if shape.softcap is not None:
        call["softcap"] = shape.softcap
    if shape.sinks:
        call["sinks"] = normal(shape.N)
    return call, shape.page_size


def errors(got, want):
    pairs = zip(got, want, strict=True)
    return [np.abs(np.asarray(x, np.float32) - y).max() for x, y in pairs]


# Shapes that differ in nothing but their size are one shape in small.
SMALL = {shape.scaled(length=24, groups=2, head_dim=16): name for name, shape in SHAPES.items()}


@pytest.mark.parametrize("regime", ["xla", "heads_first", "mosaic_tpu"], indirect=True)
@pytest.mark.parametrize("name", SMALL.values())
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(calls, regime, name):
    call, page_size = shape_call(name, regime.sizes.H)
    want = calls.expected(call, jnp.float32)
    allowed = errors(jax.jit(calls.plain)(calls.cast(call, jnp.bfloat16)), want)
    if page_size is not None:
        first = np.zeros_like(call["lengths"])
        k, v, table = calls.paginate(call["k"], call["v"], call["lengths"], first, page_size)
        call = {**call, "k": k, "v": v, "page_table": table}
    try:
        got = errors(calls.compiled(regime.run, calls.cast(call, jnp.bfloat16)), want)
    except NotImplementedError:
        return
    factor = 3 if "softcap" in call else 2
    for error, bound in zip(got, allowed, strict=True):
        assert error <= factor * bound + 1e-6


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=6)
def test_drawn_shapes_and_lengths_are_right(calls, data):
    """xla alone: each example compiles. Its block is the size that ships: one is enough, or not."""
    draw = data.draw
    K, groups, S = (draw(st.integers(1, high)) for high in (3, 3, 300))
    lengths = draw(st.lists(st.integers(0, S), min_size=1, max_size=4))
    chosen = draw(st.sets(st.sampled_from(FEATURES)))
    sizes = calls.Sizes(
        K=K,
        groups=groups,
        T=draw(st.integers(1, 5)),
        S=S,
        H=draw(st.integers(1, 9)),
        Hv=draw(st.integers(1, 9)),
        window=draw(st.integers(0, S)),
        page_size=draw(st.integers(1, 40)),
        lengths=tuple(lengths),
    )
    call = calls.make_call(tuple(chosen), sizes)
    run = functools.partial(decode_attention, implementation="xla")
    close(calls.compiled(run, calls.cast(call, jnp.float32)), calls.expected(call))
