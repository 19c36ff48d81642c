"""Which dtype an operand, an activation and a sum have."""

import jax.numpy as jnp

from jaxformer_kernels import dispatch


def activation_dtype(compute_dtype: str) -> jnp.dtype:
    """The dtype between matrix products.

    CPUs multiply bfloat16 matrices in hardware but emulate every other bfloat16 operation, so there
    only operands are narrowed; accelerators keep activations in the compute dtype too.
    """
    return jnp.dtype("float32" if dispatch.platform() == "cpu" else compute_dtype)
