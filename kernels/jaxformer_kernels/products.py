"""Matrix products of every head of every row, laid out as the platform computes them fastest."""

import re

import jax.numpy as jnp

from jaxformer_kernels import dispatch


def by_heads(matrices, a, b, dtype):
    """Products of matrices, the last two axes of a and b [B, K, ...], accumulated in `dtype`.

    `matrices` names those axes as einsum does: "rh,sh->rs".
    """
    left, right, out = re.split(",|->", matrices)
    batch, operands = "bk", (a, b)
    if dispatch.platform() == "cpu":
        # XLA on CPU converts bfloat16 to float32 for an operand that is a transposed array, and is
        # two to five times as slow; for a reshaped one it does not.
        count = a.shape[0] * a.shape[1]
        batch, operands = "g", (x.reshape(count, *x.shape[2:]) for x in (a, b))
    equation = f"{batch}{left},{batch}{right}->{batch}{out}"
    product = jnp.einsum(equation, *operands, preferred_element_type=dtype)
    return product.reshape(*a.shape[:2], *product.shape[-2:])
