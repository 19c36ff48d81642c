"""Every implementation against the reference in float64: outputs, log-sum-exp and all gradients."""

import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import Mask, attention
from jaxformer_kernels.attention.shapes import SHAPES
from tests.kernels.attention.calls import (
    FEATURES,
    SMALL,
    cast,
    compiled,
    errors,
    make_call,
    outcome,
    plain,
    shape_call,
)

B, T, S, N, K, H, HV = SMALL


@functools.cache
def expected(features):
    operands, options = make_call(features)
    with jax.enable_x64(True):
        run = functools.partial(attention, implementation="reference")
        result = outcome(run, cast(operands, jnp.float64), options)
    return {name: np.asarray(x) for name, x in result.items()}


def check(run, features):
    operands, options = make_call(features)
    try:
        got = compiled(run, options)(cast(operands, jnp.float32))
    except NotImplementedError:
        return
    for name, want in expected(features).items():
        np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-5, err_msg=name)


def covering_rows(strength, rows=((), FEATURES)):
    """`rows` and few more: every `strength` features occur in all their on/off combinations."""
    rng = random.Random(0)
    wanted = {
        assignment
        for names in itertools.combinations(FEATURES, strength)
        for assignment in (
            tuple(zip(names, values, strict=True))
            for values in itertools.product((False, True), repeat=strength)
        )
    }
    rows = list(rows)
    while True:
        covered = {
            tuple((name, name in row) for name in names)
            for row in rows
            for names in itertools.combinations(FEATURES, strength)
        }
        missing = sorted(wanted - covered)
        if not missing:
            return [tuple(row) for row in rows]

        def gain(row, missing=missing):
            return sum(all((name in row) == on for name, on in a) for a in missing)

        candidates = (tuple(name for name in FEATURES if rng.random() < 0.5) for _ in range(30))
        rows.append(max(candidates, key=gain))


PAIRS = covering_rows(2)


@pytest.mark.parametrize("features", PAIRS, ids="+".join)
def test_every_pair_of_features_is_right_or_refused(implementation, features):
    check(implementation, features)


@pytest.mark.slow
@pytest.mark.parametrize("features", covering_rows(3, PAIRS)[len(PAIRS) :], ids="+".join)
def test_every_three_features_are_right_or_refused(implementation, features):
    """Those that the pairs above leave out."""
    check(implementation, features)


@functools.cache
def shape_errors(name):
    """(operands, options, float32 reference, largest errors of the plain bf16 computation)."""
    operands, options = shape_call(SHAPES[name].scaled(length=24, heads=2, head_dim=16))
    operands = cast(operands, jnp.bfloat16)
    exactly = cast(operands, jnp.float32)
    want = compiled(functools.partial(attention, implementation="reference"), options)(exactly)
    want = {name: np.asarray(x) for name, x in want.items()}
    return operands, options, want, errors(compiled(plain, options)(operands), want)


@pytest.mark.parametrize(
    "fast_implementation", ["xla_one_pass", "xla_blocked", "mosaic_tpu"], indirect=True
)
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(fast_implementation, name):
    operands, options, want, allowed = shape_errors(name)
    got = errors(compiled(fast_implementation, options)(operands), want)
    factor = 3 if "softcap" in options else 2
    for result, error in got.items():
        assert error <= factor * allowed[result] + 1e-6, f"{result}: {error} > {allowed[result]}"


def test_a_rerun_is_bitwise_equal(fast_implementation):
    operands, options = make_call(("causal", "bias", "sinks", "dropout", "grouped_heads"))
    run = compiled(fast_implementation, options)
    operands = cast(operands, jnp.float32)
    first, second = run(operands), run(operands)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_rows_that_see_nothing_give_nothing_and_get_no_gradient(implementation):
    """Row 0 of the first sequence sees no key; the second sequence sees none at all."""
    operands, options = make_call(("bias", "sinks", "softcap", "grouped_heads"))
    visible = np.ones((B, 1, T, S), bool)
    visible[0, :, 0], visible[1] = False, False
    options["mask"] = Mask(array=jnp.asarray(visible))
    operands = cast(operands, jnp.float32)

    def loss(operands):
        out, lse = implementation(**operands, **options, return_lse=True)
        # exp, as in a merge of partial results, and a square, which is infinite here.
        return jnp.sum(out**2) + jnp.sum(jnp.exp(lse)) + jnp.sum(lse[:, :, 1:] ** 2), (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(operands)
    assert not np.any(out[0, 0]) and not np.any(out[1])
    assert np.all(lse[0, :, 0] == -np.inf) and np.all(lse[1] == -np.inf)
    assert np.all(np.isfinite(lse[0, :, 1:]))
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), name
    assert not np.any(gradients["q"][0, 0]) and not np.any(gradients["q"][1])
    assert not np.any(gradients["k"][1]) and not np.any(gradients["v"][1])
    assert not np.any(gradients["bias"][:, :, 0])

    options["mask"] = Mask(kv_end=0)
    gradients, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(operands)
    assert not np.any(out) and np.all(lse == -np.inf)
    for name, gradient in gradients.items():
        assert not np.any(gradient), name


def test_an_infinite_bias_hides_like_a_mask(implementation):
    operands, _ = make_call(())
    q, k, v = cast(operands, jnp.float32).values()
    visible = jnp.asarray(np.random.RandomState(0).rand(1, 1, T, S) < 0.5).at[:, :, 2].set(False)
    bias = jnp.where(visible, 0.0, -jnp.inf)
    out, pull = jax.vjp(lambda q, bias: implementation(q, k, v, bias=bias), q, bias)
    np.testing.assert_array_equal(out, implementation(q, k, v, mask=Mask(array=visible)))
    dq, dbias = pull(out)
    assert np.all(np.isfinite(dq)) and not np.any(np.where(visible, 0.0, dbias))


def test_one_document_of_a_packed_row_never_touches_another_bitwise(fast_implementation):
    operands, _ = make_call(())
    q, k, v = (x[:, :T] for x in cast(operands, jnp.float32).values())
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 0, 0, 0]])
    mask = Mask(causal=True, q_segment_ids=ids, kv_segment_ids=ids)
    first = (ids == 1)[:, :, None, None]

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: fast_implementation(q, k, v, mask=mask), q, k, v)
        return out, *pull(jnp.cos(q[..., :HV]))

    before = run(q, k, v)
    after = run(*(jnp.where(first, 3 * x + 1, x) for x in (q, k, v)))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.where(first, 0, x), np.where(first, 0, y))
        assert np.any(np.where(first, x != y, False))


def test_a_token_never_touches_what_came_before_it_bitwise(fast_implementation):
    operands, _ = make_call(())
    q, k, v = (x[:, :T] for x in cast(operands, jnp.float32).values())
    run = jax.jit(lambda q, k, v: fast_implementation(q, k, v, mask=Mask(causal=True)))
    before = run(q, k, v)
    for t in range(T):
        after = run(*(x.at[:, t].multiply(-2.0) for x in (q, k, v)))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert np.any(before[:, t] != after[:, t])
