"""w split over a mesh: vocabulary over one axis, D over another, tokens over both of theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxformer_kernels import compiling_for, interpreting, linear_cross_entropy
from jaxformer_kernels.linear_cross_entropy import mosaic_tpu, xla
from jaxformer_kernels.linear_cross_entropy.call import Options

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

B, T, D, V = 4, 6, 16, 24
OPTIONS = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2}


@functools.cache
def mesh():
    devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
    return Mesh(devices, ("rows", "width", "vocabulary"), axis_types=(AxisType.Auto,) * 3)


@functools.cache
def operands(transposed, ties=False):
    """x, w, labels, weights; with `ties`, small whole numbers, so that logits are often equal."""
    random = np.random.default_rng(0)
    x, w = random.normal(size=(B, T, D)), random.normal(size=(D, V))
    if ties:
        x, w = np.eye(D)[random.integers(0, D, (B, T))], random.integers(0, 2, (D, V))
    # The likeliest of all, or the likeliest of the second part alone.
    logits = x @ w
    of_part = V // 2 + logits[..., V // 2 :].argmax(-1)
    labels = np.where(random.random((B, T)) < 0.5, logits.argmax(-1), of_part)
    labels[0, 0] = V  # unknown, and of weight 0
    weights = random.random((B, T))
    weights[0, 0] = 0
    w = w.T if transposed else w
    arrays = (jnp.asarray(it, jnp.float32) for it in (x, w, weights))
    x, w, weights = arrays
    return x, w, jnp.asarray(labels, jnp.int32), weights


def split_call(transposed, implementation="xla"):
    tokens = PartitionSpec(("rows", "width"))
    of_w = ("vocabulary", "width") if transposed else ("width", "vocabulary")

    def run(x, w, labels, weights):
        found = linear_cross_entropy(
            x,
            w,
            labels,
            weights=weights,
            transposed=transposed,
            vocabulary_axis="vocabulary",
            width_axis="width",
            implementation=implementation,
            **OPTIONS,
        )
        return (jax.lax.psum(found.objective, ("rows", "width")), *found[1:])

    return jax.shard_map(
        run,
        mesh=mesh(),
        in_specs=(tokens, PartitionSpec(*of_w), tokens, tokens),
        out_specs=(PartitionSpec(), tokens, tokens, tokens),
    )


def whole(x, w, labels, weights, transposed):
    return tuple(
        linear_cross_entropy(x, w, labels, weights=weights, transposed=transposed, **OPTIONS)
    )


@pytest.mark.parametrize("ties", [False, True])
def test_every_output_is_that_of_the_whole(ties):
    arrays = operands(False, ties)
    found, wanted = jax.jit(split_call(False))(*arrays), whole(*arrays, False)
    for a, b in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)
    np.testing.assert_array_equal(found[3], wanted[3])
    assert 0 < found[3].sum() < B * T


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_whole(transposed):
    x, w, labels, weights = operands(transposed)
    split = split_call(transposed)

    def mixed(run, x, w, weights):
        objective, loss, lse, _ = run(x, w, labels, weights)
        real = labels < V
        return objective + jnp.sum(jnp.sin(lse)) + jnp.sum(loss, where=real) / 3

    def alone(run, x, w, weights):
        return run(x, w, labels, weights)[0]

    for value in (alone, mixed):
        found = jax.jit(jax.grad(functools.partial(value, split), (0, 1, 2)))(x, w, weights)
        plain = functools.partial(whole, transposed=transposed)
        wanted = jax.jit(jax.grad(functools.partial(value, plain), (0, 1, 2)))(x, w, weights)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_the_tpu_kernel_finds_of_a_part_what_is_merged():
    # Each part by itself: jax 0.10's interpreter of kernels does not run where axes are split.
    x, w, labels, _ = operands(True, ties=True)
    options = Options(3.0, 0.1, 0.0, True, vocabulary_axis="vocabulary")
    for part in range(2):
        local = labels - part * V // 2
        local = jnp.where((local >= 0) & (local < V // 2), local, -1)
        arrays = x, w[part * V // 2 :][: V // 2], local
        with interpreting():
            found = mosaic_tpu.statistics(options, *arrays)
        wanted = xla.statistics(options, *arrays)
        own = local >= 0
        for row, (a, b) in enumerate(zip(found, wanted, strict=True)):
            real = own if row in (1, 3) else True  # label's logit, and whether it is the largest
            np.testing.assert_allclose(jnp.where(real, a, 0), jnp.where(real, b, 0), rtol=2e-6)


def test_a_tpu_still_runs_its_kernel():
    with compiling_for("tpu"):
        lowered = jax.jit(split_call(True, None)).trace(*operands(True))
        text = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


def test_a_w_that_is_not_split_is_refused():
    x, w, labels, _ = operands(False)
    with pytest.raises(ValueError, match="name the axis in w's in_specs"):
        linear_cross_entropy(x, w, labels, vocabulary_axis="vocabulary")


def test_the_reference_names_an_implementation_that_can():
    with pytest.raises(NotImplementedError, match="use implementation='xla'"):
        jax.eval_shape(split_call(False, "reference"), *operands(False))
