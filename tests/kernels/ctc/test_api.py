"""What a call checks, says and chooses."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxformer_kernels import compiling_for, ctc_loss, interpreting
from jaxformer_kernels.ctc import api
from jaxformer_kernels.ctc.call import FEATURES

CALL = {
    "logits": jnp.zeros((2, 5, 4)),
    "logit_lengths": jnp.array([5, 4]),
    "labels": jnp.ones((2, 3), int),
    "label_lengths": jnp.array([1, 2]),
}


@pytest.mark.parametrize(
    ("change", "error", "fix"),
    [
        ({"logits": CALL["labels"]}, TypeError, r"logits\.astype\(jnp\.float32\)"),
        ({"logits": CALL["logits"][0]}, ValueError, r"must be \[B, T, V\].*logits\[None\]"),
        ({"logits": CALL["logits"][..., :0]}, ValueError, "B and V not 0"),
        ({"labels": CALL["logits"][0]}, TypeError, "labels must be integer.*not one-hot"),
        ({"labels": CALL["labels"][:1]}, ValueError, r"labels must be \[B, N\] with B = 2"),
        ({"logit_lengths": jnp.ones(2)}, TypeError, "logit_lengths must be integer.*no mask"),
        ({"label_lengths": CALL["labels"]}, ValueError, r"label_lengths must be \[2\]"),
        ({"blank": jnp.int32(0)}, TypeError, "blank must be a Python int"),
        ({"blank": 4}, ValueError, "one of the 4 classes, 0 to 3, got 4"),
        ({"blank": -1}, ValueError, "got -1"),
        ({"zero_infinity": 1}, TypeError, "zero_infinity must be True or False, got int"),
        ({"implementation": "xal"}, ValueError, "did you mean 'xla'"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_fix(change, error, fix):
    with pytest.raises(error, match=fix):
        ctc_loss(**CALL | change)


def test_every_declared_feature_is_a_known_one():
    for implementation in api.IMPLEMENTATIONS.values():
        assert implementation.supports <= FEATURES


def test_a_tpu_kernel_off_a_tpu_says_how_to_run_it_all_the_same():
    with pytest.raises(NotImplementedError, match=r"the cpu platform.*interpreting"):
        ctc_loss(**CALL, implementation="mosaic_tpu")
    with interpreting():
        ctc_loss(**CALL, implementation="mosaic_tpu")


@pytest.mark.parametrize(
    ("change", "lack"),
    [
        ({"logits": jnp.zeros((2, 5, 4), jnp.float16)}, "float16"),
        ({"labels": jnp.ones((2, 4000), int)}, "4000 labels a row"),
    ],
)
def test_what_the_tpu_kernel_cannot_do_it_refuses_and_xla_does(change, lack):
    named = functools.partial(ctc_loss, implementation="mosaic_tpu")
    with interpreting(), pytest.raises(NotImplementedError, match=rf"{lack}.*'xla'"):
        jax.eval_shape(lambda call: named(**call), CALL | change)
    with compiling_for("tpu"):
        jax.eval_shape(lambda call: ctc_loss(**call), CALL | change)


def test_float64_is_for_the_implementations_in_plain_xla():
    with jax.enable_x64(True):
        call = CALL | {"logits": jnp.zeros((2, 5, 4), jnp.float64)}
        for name in ("xla", "reference"):
            assert ctc_loss(**call, implementation=name).dtype == jnp.float64
        with interpreting(), pytest.raises(NotImplementedError, match="float64"):
            ctc_loss(**call, implementation="mosaic_tpu")
