"""Every implementation against enumeration, PyTorch and float64; the edges; never below zero."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxformer_kernels import ctc_loss
from jaxformer_kernels.ctc.shapes import SHAPES
from tests.kernels.ctc.calls import exact, make_call, outcome, plain, reference

GOLDEN = Path(__file__).parents[2] / "fixtures" / "torch_ctc.npz"


@functools.cache
def program(run, options):
    """`outcome` of `run`, an implementation's name or a function, compiled once for all tests."""
    if isinstance(run, str):
        run = functools.partial(ctc_loss, implementation=run)
    return jax.jit(lambda *arrays: outcome(run, *arrays, **dict(options)))


def found(run, logits, *others, dtype=jnp.float32, **options):
    """`outcome` of `run` for logits of this dtype."""
    if isinstance(run, functools.partial):
        run = run.keywords["implementation"]
    others = [jnp.asarray(x, jnp.int32) for x in others]
    return program(run, tuple(options.items()))(jnp.asarray(logits, dtype), *others)


def assert_outcome(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got[1], want[1], rtol=tolerance, atol=24 * tolerance)


@pytest.mark.parametrize("blank", [0, 2])
def test_losses_and_gradients_are_those_of_every_path_written_out(implementation, blank):
    call = make_call(0, 24, 6, 4, 3, blank)
    want = exact(reference, *call, blank=blank)
    assert 4 < np.isfinite(want[0]).sum() < 24
    assert_outcome(found(implementation, *call, blank=blank), want)


@pytest.mark.parametrize("blank", [0, 3])
def test_losses_and_gradients_are_those_of_pytorch(fast_implementation, blank):
    with np.load(GOLDEN) as golden:
        call = [golden[x] for x in ("logits", "logit_lengths", f"labels_{blank}", "label_lengths")]
        losses, gradient = found(fast_implementation, *call, blank=blank)
        weights = np.arange(1, 7)[:, None, None]
        np.testing.assert_allclose(losses, golden[f"loss_{blank}"], rtol=1e-5)
        np.testing.assert_allclose(gradient / weights, golden[f"gradient_{blank}"], atol=1e-5)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(1, 2), min_size=3, max_size=3), min_size=4, max_size=4),
    st.sampled_from((0.1, 3.0, 30.0)),
    st.booleans(),
)
def test_any_lengths_and_repeats(seed, lengths, labels, scale, zero_infinity):
    logits = scale * np.random.RandomState(seed).standard_normal((4, 5, 3))
    frames, count = zip(*lengths, strict=True)
    call = logits, frames, labels, count
    got, want = (found(name, *call, zero_infinity=zero_infinity) for name in ("xla", "reference"))
    assert_outcome(got, want, 2e-5)
    assert (np.asarray(got[0]) >= 0).all()
    possible = np.isfinite(got[0]) & (np.asarray(want[0]) > 0)
    np.testing.assert_allclose(np.asarray(got[1])[possible].sum(-1), 0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_thousands_of_frames_lose_nothing(fast_implementation, monkeypatch, scale):
    from jaxformer_kernels.ctc import mosaic_tpu

    monkeypatch.setattr(mosaic_tpu, "_FRAMES", 64)
    logits, _, labels, _ = make_call(3, 3, 2000, 12, 90, scale=scale)
    call = logits, np.array([2000, 1999, 1201]), labels, np.array([90, 1, 77])
    want = exact(plain, *call)
    got = found(fast_implementation, *call)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], atol=3e-5)


def test_float64_keeps_its_digits():
    call = make_call(4, 5, 60, 9, 12)
    run = functools.partial(ctc_loss, implementation="xla", zero_infinity=True)
    want_losses, want_gradient = exact(plain, *call)
    losses, gradient = exact(run, *call)
    possible = losses > 0
    assert losses.dtype == np.float64 and possible.sum() > 2
    np.testing.assert_allclose(losses[possible], want_losses[possible], rtol=1e-13)
    np.testing.assert_allclose(gradient[possible], want_gradient[possible], atol=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(fast_implementation, name):
    shape = SHAPES[name].scaled(4, 24, 9, 5)
    logits, _, labels, _ = make_call(5, shape.B, shape.T, shape.V, shape.N)
    logits = jnp.asarray(logits, jnp.bfloat16)
    others = np.full(shape.B, shape.T), labels, np.arange(shape.B) % (shape.N + 1)
    want = found(plain, logits, *others)
    usual = found(plain, logits, *others, dtype=jnp.bfloat16)
    got = found(fast_implementation, logits, *others, dtype=jnp.bfloat16)
    assert got[0].dtype == jnp.float32 and got[1].dtype == jnp.bfloat16
    for mine, other, exactly in zip(got, usual, want, strict=True):
        error, allowed = (np.abs(np.asarray(x, np.float32) - exactly).max() for x in (mine, other))
        assert error <= 2 * allowed + 1e-6


def test_a_rerun_is_bitwise_equal(fast_implementation):
    first, second = (found(fast_implementation, *make_call(6, 8, 30, 9, 6)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


LOGITS, _, LABELS, _ = make_call(7, 2, 6, 4, 3)
FRAMES, COUNT = np.array([6, 4]), np.array([2, 1])


@pytest.mark.parametrize("garbage", [-1, 0, 99, 2**31 - 1])
def test_labels_after_their_length_may_be_anything(implementation, garbage):
    padded = np.where(np.arange(3) < COUNT[:, None], LABELS, garbage)
    want = found(implementation, LOGITS, FRAMES, LABELS, COUNT)
    for got, expected in zip(
        found(implementation, LOGITS, FRAMES, padded, COUNT), want, strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("garbage", [1e30, -np.inf, np.inf, np.nan])
def test_frames_after_their_length_may_be_anything_and_have_no_gradient(implementation, garbage):
    changed = np.where((np.arange(6) < FRAMES[:, None])[..., None], LOGITS, garbage)
    want = found(implementation, LOGITS, FRAMES, LABELS, COUNT)
    got = found(implementation, changed, FRAMES, LABELS, COUNT)
    for mine, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, expected)
    assert not np.any(got[1][1, 4:]) and np.all(got[1][0] != 0)


def test_without_labels_every_frame_is_blank(implementation):
    want = -jax.nn.log_softmax(LOGITS.astype(np.float32))[..., 0].sum(1)
    for labels in (LABELS, LABELS[:, :0]):
        got = found(implementation, LOGITS, np.array([6, 6]), labels, np.array([0, 0]))
        np.testing.assert_allclose(got[0], want, rtol=1e-6)


def test_without_frames_only_no_labels_are_possible_and_certain(implementation):
    for logits in (LOGITS, LOGITS[:, :0]):
        got = found(implementation, logits, np.array([0, 0]), LABELS, np.array([0, 1]))
        np.testing.assert_array_equal(got[0], [0.0, np.inf])
        assert got[1].shape == logits.shape and not np.any(got[1])


def impossible():
    """(call, which rows no path spells): too few frames, a repeat too many, a class ruled out."""
    logits, *_ = make_call(8, 5, 5, 4, 4)
    logits[3, :, 2] = -np.inf
    labels = np.array([[1, 2, 3, 1], [1, 1, 1, 2], [1, 1, 2, 3], [1, 2, 3, 1], [3, 2, 1, 3]])
    call = logits, np.array([3, 5, 5, 5, 4]), labels, np.array([4, 4, 4, 3, 4])
    return call, np.array([True, True, False, True, False])


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_impossible_labels_have_no_gradient(implementation, zero_infinity):
    call, ruled_out = impossible()
    losses, gradient = found(implementation, *call, zero_infinity=zero_infinity)
    np.testing.assert_array_equal(losses[ruled_out], 0 if zero_infinity else np.inf)
    assert np.isfinite(losses[~ruled_out]).all() and np.isfinite(gradient).all()
    assert not np.any(gradient[ruled_out]) and np.all(np.any(gradient[~ruled_out], axis=(1, 2)))


def test_the_gradient_of_an_infinite_sum_is_finite(fast_implementation):
    call, ruled_out = impossible()
    total = jax.jit(jax.grad(lambda logits: fast_implementation(logits, *call[1:]).sum()))
    gradient = total(jnp.asarray(call[0], jnp.float32))
    assert np.isfinite(gradient).all() and not np.any(gradient[ruled_out])


def test_a_class_ruled_out_changes_nothing_for_the_others(implementation):
    """-inf is the limit of ever smaller logits."""
    ruled_out, small = LOGITS.copy(), LOGITS.copy()
    ruled_out[..., 3], small[..., 3] = -np.inf, -200.0
    ruled_out[0, 0], small[0, 0] = [-np.inf, 0, -np.inf, 0], [-200, 0, -200, 0]
    labels = np.array([[1, 2, 3], [2, 1, 0]])
    got = found(implementation, ruled_out, FRAMES, labels, COUNT)
    want = exact(reference, small, FRAMES, labels, COUNT)
    assert_outcome(got, want, 1e-6)
    assert not np.any(got[1][1, :, 3])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_logit_breaks_its_row_alone(implementation, broken):
    logits = LOGITS.copy()
    logits[1, 2, 3] = broken
    losses, _ = found(implementation, logits, FRAMES, LABELS, COUNT)
    whole, _ = found(implementation, LOGITS, FRAMES, LABELS, COUNT)
    assert np.isnan(losses[1]) and losses[0] == whole[0]


def test_a_frame_without_any_class_is_impossible(implementation):
    logits = LOGITS.copy()
    logits[1, 2] = -np.inf
    losses, gradient = found(implementation, logits, FRAMES, LABELS, COUNT)
    assert losses[1] == np.inf and np.isfinite(losses[0])
    assert np.isfinite(gradient).all() and not np.any(gradient[1])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logit_lengths", -1),
        ("logit_lengths", 7),
        ("label_lengths", -1),
        ("label_lengths", 4),
        ("labels", 0),
        ("labels", 4),
        ("labels", -1),
    ],
)
def test_a_length_or_label_that_cannot_be_makes_the_loss_not_a_number(implementation, name, wrong):
    call = {"logit_lengths": FRAMES, "labels": LABELS, "label_lengths": COUNT}
    changed = call[name].copy()
    changed[(1,) + (0,) * (changed.ndim - 1)] = wrong
    losses, _ = found(implementation, LOGITS, *(call | {name: changed}).values())
    assert np.isnan(losses[1]) and np.isfinite(losses[0])


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_a_certainty_costs_nothing_and_never_less(fast_implementation, scale):
    """Logits that say the labels, ever more surely."""
    rng = np.random.RandomState(9)
    labels = rng.randint(1, 9, (16, 20))
    classes = np.zeros((16, 60), int)
    classes[:, 1::3] = labels
    logits = scale * rng.uniform(0.5, 1, (16, 60, 1)) * np.eye(9)[classes]
    losses, gradient = found(fast_implementation, logits, np.full(16, 60), labels, np.full(16, 20))
    assert (np.asarray(losses) >= 0).all() and not np.signbit(losses).any()
    want, _ = exact(plain, logits, np.full(16, 60), labels, np.full(16, 20))
    np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-5)
    assert np.isfinite(gradient).all()


def test_logits_far_beyond_float_probabilities_stay_right(fast_implementation):
    """Labels that the model all but rules out, a thousand nats each."""
    logits = np.zeros((1, 8, 4))
    logits[..., 1:3] = -1000.0
    labels = np.array([[1, 2, 1]])
    got = found(fast_implementation, logits, np.array([8]), labels, np.array([3]))
    assert_outcome(got, exact(plain, logits, np.array([8]), labels, np.array([3])))
    masked = np.where(logits < 0, -1e9, logits)
    losses, gradient = found(fast_implementation, masked, np.array([8]), labels, np.array([3]))
    np.testing.assert_allclose(losses, 3e9, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_neighbours_a_hundred_orders_of_magnitude_apart_do_not_drown_each_other(
    fast_implementation,
):
    """A repeated label, whose only way is through a blank that is all but impossible."""
    logits = np.zeros((1, 5, 3))
    logits[0, :, 0] = -300.0
    labels = np.array([[1, 1]])
    got = found(fast_implementation, logits, np.array([5]), labels, np.array([2]))
    assert_outcome(got, exact(plain, logits, np.array([5]), labels, np.array([2])))
