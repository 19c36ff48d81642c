"""Every implementation against the reference in float64: results, statistics, all gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import linear_cross_entropy
from jaxformer_kernels.linear_cross_entropy.shapes import SHAPES

# Blocks of 32 tokens, 128 columns and 128 of D have a ragged neighbour each.
SHAPE, D, V = (5, 7), 256, 139

FEATURES = ("softcap", "label_smoothing", "z_loss", "weights", "transposed")
OPTIONS = {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.05}

# Eight rows in which any two features occur on and off together in every way, and all of them; what
# is differentiated, "everything" or the objective alone, is a feature too.
ROWS = [
    tuple(itertools.compress((*FEATURES, "everything"), (a, b, c, a ^ b, a ^ c, b ^ c)))
    for a, b, c in itertools.product((False, True), repeat=3)
] + [FEATURES, (*FEATURES, "everything")]


def draw(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape)


def make_call(features, shape=SHAPE, D=D, V=V):
    """(differentiable operands in float64, labels, options) of a call with these features."""
    w = draw(1, D, V)
    operands = {
        "x": draw(0, *shape, D) * D**-0.5,
        "w": w.T if "transposed" in features else w,
    }
    if "weights" in features:
        operands["weights"] = np.random.RandomState(2).randint(0, 3, shape) / 2
    labels = np.random.RandomState(3).randint(0, V, shape)
    options = {name: OPTIONS[name] for name in features if name in OPTIONS}
    return operands, labels, options | {"transposed": "transposed" in features}


def outcome(run, operands, labels, options, everything=False):
    """Results, and the gradients of a function of the objective or of every result."""

    def loss(operands):
        found = run(**operands, labels=labels, **options)
        total = 1.7 * found.objective
        if everything:
            total += jnp.sum(jnp.cos(found.loss)) + jnp.sum(found.lse**2)
        return total, found

    gradients, found = jax.grad(loss, has_aux=True)(operands)
    return found._asdict() | {f"d{name}": g for name, g in gradients.items()}


def cast(operands, dtype):
    return {name: jnp.asarray(x, dtype) for name, x in operands.items()}


def compiled(run, labels, options, everything=False):
    return jax.jit(lambda operands: outcome(run, operands, labels, options, everything))


@functools.cache
def expected(features):
    operands, labels, options = make_call(features)
    with jax.enable_x64(True):
        run = functools.partial(linear_cross_entropy, implementation="reference")
        result = outcome(
            run, cast(operands, jnp.float64), labels, options, "everything" in features
        )
    return {name: np.asarray(x) for name, x in result.items()}


def assert_close(got, want, tolerance=2e-5):
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("features", ROWS, ids="+".join)
def test_every_pair_of_features_is_right(implementation, features):
    operands, labels, options = make_call(features)
    run = compiled(implementation, labels, options, "everything" in features)
    got, want = run(cast(operands, jnp.float32)), expected(features)
    assert got.keys() == want.keys()
    assert_close(got, want)


@pytest.mark.parametrize("features", [(), FEATURES], ids="+".join)
def test_results_without_gradients_are_the_same(implementation, features):
    """Another pass than the one above: nothing is kept for a backward pass."""
    operands, labels, options = make_call(features)
    run = jax.jit(lambda operands: implementation(**operands, labels=labels, **options)._asdict())
    want = expected(features)
    got = run(cast(operands, jnp.float32))
    assert_close(got, {name: want[name] for name in got})


def plain(x, w, labels, weights, *, transposed, softcap=None, label_smoothing=0.0, z_loss=0.0):
    """Cross-entropy as one writes it first, every step in the dtype of the operands."""
    logits = x @ (w.T if transposed else w)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits)
    lse = jax.nn.logsumexp(logits, axis=-1)
    loss = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    smooth = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1) + z_loss * lse**2
    objective = jnp.sum(smooth * weights)
    return linear_cross_entropy(x, w, labels, transposed=transposed)._replace(
        objective=objective, loss=loss, lse=lse
    )


def errors(got, want):
    return {
        name: np.abs(np.asarray(got[name], np.float32) - x).max()
        for name, x in want.items()
        if name != "correct"
    }


@functools.cache
def shape_errors(name):
    """(operands, labels, options, float32 reference, largest errors of plain bf16)."""
    shape = SHAPES[name].scaled(tokens=48, D=128, V=300)
    features = ("weights", "transposed") if shape.transposed else ("weights",)
    operands, labels, options = make_call(features, (shape.tokens,), shape.D, shape.V)
    options |= {name: getattr(shape, name) for name in OPTIONS}
    operands = cast(operands, jnp.bfloat16)
    run = functools.partial(linear_cross_entropy, implementation="reference")
    want = compiled(run, labels, options)(cast(operands, jnp.float32))
    want = {name: np.asarray(x) for name, x in want.items()}
    return (
        operands,
        labels,
        options,
        want,
        errors(compiled(plain, jnp.asarray(labels), options)(operands), want),
    )


@pytest.mark.parametrize(
    "implementation",
    ["xla_one_tile", "xla_tiles_of_all_axes", "mosaic_tpu_blocks"],
    indirect=True,
)
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(implementation, name):
    operands, labels, options, want, allowed = shape_errors(name)
    got = compiled(implementation, labels, options)(operands)
    factor = 2 if options["softcap"] is None else 3
    for result, error in errors(got, want).items():
        assert error <= factor * allowed[result] + 1e-6, f"{result}: {error} > {allowed[result]}"
    forward = jax.jit(lambda operands: implementation(**operands, labels=labels, **options))
    for result, error in errors(forward(operands)._asdict(), {"lse": want["lse"]}).items():
        assert error <= factor * allowed[result] + 1e-6, f"{result}: {error} > {allowed[result]}"


def test_gradients_have_the_dtypes_of_their_operands(implementation):
    operands, labels, options = make_call(("weights",))
    operands = cast(operands, jnp.float32)
    operands["x"] = operands["x"].astype(jnp.bfloat16)
    got = compiled(implementation, labels, options)(operands)
    for name in ("objective", "loss", "lse"):
        assert got[name].dtype == jnp.float32
    assert got["correct"].dtype == bool
    assert {name: got[f"d{name}"].dtype for name in operands} == {
        name: x.dtype for name, x in operands.items()
    }


def test_a_rerun_is_bitwise_equal(implementation):
    operands, labels, options = make_call(FEATURES)
    run = compiled(implementation, labels, options)
    first, second = run(cast(operands, jnp.float32)), run(cast(operands, jnp.float32))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_a_token_without_weight_adds_exactly_nothing_whatever_it_is(implementation):
    operands, labels, options = make_call(FEATURES)
    operands = cast(operands, jnp.float32)
    ignored = np.asarray(operands["weights"]) == 0
    assert ignored.any() and not ignored.all()
    run = jax.jit(lambda operands, labels: outcome(implementation, operands, labels, options))
    before = run(operands, jnp.asarray(labels))
    changed = {**operands, "x": jnp.where(ignored[..., None], 30.0, operands["x"])}
    after = run(changed, jnp.where(ignored, -100, labels))
    for name in ("objective", "dx", "dw"):
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert not np.any(np.asarray(after["dx"])[ignored])
    assert np.isnan(np.asarray(after["loss"])[ignored]).all()
    assert not np.asarray(after["correct"])[ignored].any()


def test_without_any_weight_objective_and_gradients_are_zero(implementation):
    operands, labels, options = make_call(FEATURES)
    operands = cast(operands, jnp.float32)
    operands["weights"] = jnp.zeros_like(operands["weights"])
    got = compiled(implementation, labels, options)(operands)
    for name in ("objective", "dx", "dw"):
        assert not np.any(got[name]), name
    assert np.isfinite(got["dweights"]).all()


@pytest.mark.parametrize("label", [-1, V, -100, 2**31 - 1])
def test_a_label_that_no_token_has_makes_the_objective_not_a_number(implementation, label):
    operands, labels, options = make_call(("transposed",))
    labels[2, 3] = label
    run = jax.jit(lambda operands: implementation(**operands, labels=labels, **options))
    got = run(cast(operands, jnp.float32))
    assert np.isnan(got.objective) and np.isnan(got.loss[2, 3]) and not got.correct[2, 3]
    assert np.isnan(got.loss).sum() == 1


def test_of_equally_likely_tokens_the_first_is_the_prediction(implementation):
    x = jnp.ones((3, 8), jnp.float32)
    w = jnp.zeros((8, 300), jnp.float32).at[:, jnp.array([140, 200, 290])].set(1.0)
    run = jax.jit(implementation)
    got = run(x, w, jnp.array([140, 200, 139]))
    np.testing.assert_array_equal(got.correct, [True, False, False])
    zeros = run(x, 0 * w, jnp.array([0, 1, 299]))
    np.testing.assert_array_equal(zeros.correct, [True, False, False])
    np.testing.assert_allclose(zeros.loss, np.log(300.0), rtol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits_stay_finite(implementation, sign):
    operands, labels, options = make_call(("label_smoothing", "z_loss"))
    operands = cast(operands, jnp.float32)
    operands["x"] = sign * 1e4 * jnp.abs(operands["x"])
    operands["w"] = jnp.abs(operands["w"])
    got = compiled(implementation, labels, options)(operands)
    reference = functools.partial(linear_cross_entropy, implementation="reference")
    want = compiled(reference, labels, options)(operands)
    for name in ("objective", "loss", "lse"):
        assert np.isfinite(got[name]).all()
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=2.0, err_msg=name)
    assert np.isfinite(got["dx"]).all() and np.isfinite(got["dw"]).all()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (40, 1)])
def test_any_number_of_token_axes(implementation, shape):
    operands, labels, options = make_call((), shape)
    operands, labels = cast(operands, jnp.float32), np.asarray(labels)
    got = compiled(implementation, labels, options)(operands)
    assert got["loss"].shape == got["lse"].shape == got["correct"].shape == shape
    reference = functools.partial(linear_cross_entropy, implementation="reference")
    assert_close(got, compiled(reference, labels, options)(operands))


@pytest.mark.parametrize("implementation", ["xla_one_tile", "xla_tiles_of_an_axis"], indirect=True)
def test_no_tokens_give_zeros(implementation):
    operands, labels, options = make_call((), (3, 0))
    got = compiled(implementation, labels, options)(cast(operands, jnp.float32))
    assert got["objective"] == 0 and got["loss"].shape == got["dx"].shape[:2] == (3, 0)
    assert got["dw"].shape == operands["w"].shape and not np.any(got["dw"])
