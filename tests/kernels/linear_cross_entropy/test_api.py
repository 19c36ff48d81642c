"""What a call checks, says and chooses."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer_kernels import compiling_for, interpreting, linear_cross_entropy
from jaxformer_kernels.linear_cross_entropy import api
from jaxformer_kernels.linear_cross_entropy.call import FEATURES

X, W = jnp.zeros((2, 3, 8)), jnp.zeros((8, 11))
LABELS, WEIGHTS = jnp.zeros((2, 3), int), jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("change", "error", "fix"),
    [
        ({"x": LABELS}, TypeError, r"x must be floating.*x\.astype\(jnp\.float32\)"),
        ({"w": W.astype(int)}, TypeError, r"w\.astype\(jnp\.float32\)"),
        ({"x": jnp.float32(0)}, ValueError, r"x must be \[\.\.\., D\]"),
        ({"w": W[0]}, ValueError, r"w must be \[D, V\] with D = 8"),
        ({"w": W.T}, ValueError, "pass transposed=True"),
        ({"transposed": True}, ValueError, r"\[V, D\].*pass transposed=False"),
        ({"w": W[:, :0]}, ValueError, "w must not be empty"),
        ({"labels": WEIGHTS}, TypeError, "not one-hot rows or probabilities"),
        ({"labels": LABELS[0]}, ValueError, r"labels must be \[2, 3\].*got \[3\]"),
        ({"labels": LABELS.T}, ValueError, r"labels must be \[2, 3\]"),
        ({"weights": WEIGHTS > 0}, TypeError, r"weights\.astype\(jnp\.float32\)"),
        ({"weights": WEIGHTS[0]}, ValueError, r"broadcast_to\(weights, labels\.shape\)"),
        ({"softcap": jnp.float32(30)}, TypeError, "softcap must be a Python float"),
        ({"softcap": 0.0}, ValueError, "None means no cap"),
        ({"label_smoothing": 1.0}, ValueError, "at least 0 and below 1"),
        ({"label_smoothing": jnp.float32(0.1)}, TypeError, "label_smoothing must be a Python"),
        ({"z_loss": -1.0}, ValueError, "z_loss must not be negative"),
        ({"z_loss": "1"}, TypeError, "z_loss must be a Python float, got str"),
        ({"implementation": "xal"}, ValueError, "did you mean 'xla'"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_fix(change, error, fix):
    arguments = {"x": X, "w": W, "labels": LABELS, "weights": WEIGHTS, **change}
    with pytest.raises(error, match=fix):
        linear_cross_entropy(**arguments)


def test_every_declared_feature_is_a_known_one():
    for implementation in api.IMPLEMENTATIONS.values():
        assert implementation.supports <= FEATURES


def test_a_tpu_kernel_off_a_tpu_says_how_to_run_it_all_the_same():
    with pytest.raises(NotImplementedError, match=r"the cpu platform.*interpreting"):
        linear_cross_entropy(X, W, LABELS, implementation="mosaic_tpu")
    with interpreting():
        linear_cross_entropy(X, W, LABELS, implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("change", "lack"),
    [
        ({"x": X.astype(jnp.float16)}, "float16"),
        ({"x": X[:0], "labels": LABELS[:0]}, "no tokens"),
        ({"x": jnp.zeros((2, 3, 100_001)), "w": jnp.zeros((100_001, 11))}, "D of 100001"),
    ],
)
def test_what_the_tpu_kernel_cannot_do_it_refuses_and_xla_does(change, lack):
    arguments = {"x": X, "w": W, "labels": LABELS, **change}
    call = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    with interpreting(), pytest.raises(NotImplementedError, match=rf"{lack}.*'xla'"):
        jax.eval_shape(lambda a: linear_cross_entropy(**a, implementation="mosaic_tpu"), call)
    with compiling_for("tpu"):
        jax.eval_shape(lambda a: linear_cross_entropy(**a), call)


def test_float64_is_for_the_implementations_in_plain_xla():
    with jax.enable_x64(True):
        operands = X.astype(jnp.float64), W.astype(jnp.float64), LABELS
        for name in ("xla", "reference"):
            found = linear_cross_entropy(*operands, implementation=name)
            assert found.objective.dtype == found.loss.dtype == found.lse.dtype == jnp.float64
        with interpreting(), pytest.raises(NotImplementedError, match="float64"):
            linear_cross_entropy(*operands, implementation="mosaic_tpu")
