"""Dtypes are those of the platform that is compiled for, whatever this process runs on."""

import jax.numpy as jnp
import pytest

from jaxformer.nn.precision import activation_dtype
from jaxformer_kernels import compiling_for


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_activations_are_narrow_on_accelerators_alone(platform, dtype):
    with compiling_for(platform):
        assert activation_dtype("bfloat16") == jnp.dtype(dtype)
