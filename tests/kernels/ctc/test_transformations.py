"""ctc_loss under JAX's transformations, what it keeps in memory, and beside optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxformer_kernels import compiling_for, ctc_loss
from tests.kernels.ctc.calls import make_call

# The environment that interprets Hopper kernels collects this file too, and lacks optax.
optax = pytest.importorskip("optax")

CALL = [jnp.asarray(x, jnp.float32 if x.ndim == 3 else int) for x in make_call(0, 4, 9, 5, 3)]


def total(run, *call):
    return jnp.sum(run(*call, zero_infinity=True))


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_vmap_is_a_loop(fast_implementation):
    gradient = jax.jit(jax.grad(functools.partial(total, fast_implementation)))
    many = [jnp.stack([x, x[::-1]]) for x in CALL]
    mapped = jax.jit(jax.vmap(jax.grad(functools.partial(total, fast_implementation))))(*many)
    assert_close(mapped[0], gradient(*CALL))
    assert_close(mapped[1], gradient(*CALL)[::-1])


def test_remat_and_scan_change_nothing(fast_implementation):
    def scanned(logits, *others):
        def body(sum_so_far, row):
            row = [x[None] for x in row]
            return sum_so_far + jax.checkpoint(functools.partial(total, fast_implementation))(
                *row
            ), None

        return jax.lax.scan(body, 0.0, (logits, *others))[0]

    want = jax.jit(jax.grad(functools.partial(total, fast_implementation)))(*CALL)
    assert_close(jax.jit(jax.grad(scanned))(*CALL), want)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_rows_is_the_whole(check_vma):
    run = functools.partial(ctc_loss, implementation="xla")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma
    )
    def sharded(*call):
        return jax.lax.psum(total(run, *call), "data")

    assert_close(
        jax.jit(jax.grad(sharded))(*CALL),
        jax.jit(jax.grad(functools.partial(total, run)))(*CALL),
    )


def test_on_other_platforms_repeated_labels_are_added_up_first():
    """So that no scatter has two addends, whose order a GPU leaves open."""
    run = functools.partial(ctc_loss, implementation="xla")
    gradient = functools.partial(total, run)
    call = [*CALL[:2], jnp.array([[1, 2, 1], [2, 2, 2], [3, 1, 4], [1, 1, 2]]), CALL[3]]
    want = jax.jit(jax.grad(gradient))(*call)
    with compiling_for("gpu"):
        assert_close(jax.jit(jax.grad(lambda *x: gradient(*x)))(*call), want)


def test_a_second_derivative_is_refused():
    once = jax.grad(functools.partial(total, functools.partial(ctc_loss, implementation="xla")))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.grad(lambda logits: jnp.sum(once(logits, *CALL[1:]) ** 2))(CALL[0])


def temporaries(B, T, V, N):
    call = (
        jax.ShapeDtypeStruct((B, T, V), jnp.float32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
        jax.ShapeDtypeStruct((B, N), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    )
    run = jax.value_and_grad(lambda *x: jnp.sum(ctc_loss(*x, implementation="xla")))
    return jax.jit(run).lower(*call).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_the_logits_and_of_frames_times_labels():
    B, T, N, V = 2, 64, 30, 500
    small, more = temporaries(B, T, V, N), temporaries(B, T, 2 * V, N)
    assert more - small <= 2 * 4 * B * T * V  # two copies of the logits, no one-hot labels
    assert temporaries(B, T, V, 2 * N) - small <= 20 * 4 * B * T * N


def optax_loss(logits, logit_lengths, labels, label_lengths):
    padding = [
        jnp.arange(size) >= lengths[:, None]
        for size, lengths in ((logits.shape[1], logit_lengths), (labels.shape[1], label_lengths))
    ]
    return optax.ctc_loss(logits, padding[0].astype(float), labels, padding[1].astype(float))


def both(logits, labels):
    """[(loss, gradient)] of ours and of optax's for one row that is used whole."""
    call = jnp.array([logits.shape[0]]), jnp.array([labels]), jnp.array([len(labels)])
    logits = jnp.asarray(logits, jnp.float32)[None]
    return [
        jax.jit(jax.value_and_grad(lambda x, f=f: f(x, *call)[0]))(logits)
        for f in (functools.partial(ctc_loss, implementation="xla"), optax_loss)
    ]


def test_where_optax_says_a_hundred_thousand_it_says_impossible():
    (loss, gradient), (other, others_gradient) = both(np.zeros((2, 4)), [1, 2, 3])
    assert loss == np.inf and not np.any(gradient)
    assert 9e4 < other < 2e5 and np.any(others_gradient)


def test_where_optax_is_not_a_number_it_ignores_a_class_that_is_ruled_out():
    logits = np.zeros((4, 4))
    logits[:, 3] = -np.inf
    (loss, gradient), (other, others_gradient) = both(logits, [1, 2])
    np.testing.assert_allclose(loss, -np.log(15 / 81), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.isnan(other) or np.isnan(others_gradient).any()


def test_where_optax_goes_below_zero_it_does_not():
    labels = np.tile([1, 2, 3], 7)
    classes = np.zeros(63, int)
    classes[1::3] = labels
    ours, theirs = zip(
        *(both(scale * np.eye(4)[classes], labels) for scale in (12.0, 15.0, 18.0, 25.0)),
        strict=True,
    )
    assert min(loss for loss, _ in ours) >= 0
    assert min(loss for loss, _ in theirs) < 0


def test_a_batch_gone_over_in_parts_is_its_rows():
    random = np.random.default_rng(3)
    rows, frames, count = 5, 170, 150  # more states than one part has; parts of unequal size
    logits = jnp.asarray(random.normal(size=(rows, frames, 9)), jnp.float32)
    labels = jnp.asarray(random.integers(1, 9, (rows, count)), jnp.int32)
    frame_counts = jnp.array([170, 40, 160, 90, 1])
    label_counts = jnp.array([90, 20, 70, 50, 1])

    def total(logits, *rest):
        losses = ctc_loss(logits, *rest, implementation="xla")
        return losses.sum(), losses

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, together), gradient = run(logits, frame_counts, labels, label_counts)
    for row in range(rows):
        part = slice(row, row + 1)
        (_, alone), its_gradient = run(
            logits[part], frame_counts[part], labels[part], label_counts[part]
        )
        np.testing.assert_allclose(together[part], alone, rtol=1e-6)
        np.testing.assert_allclose(gradient[part], its_gradient, atol=1e-6)
