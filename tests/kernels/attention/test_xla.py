"""What XLA makes of the `xla` implementation on a CPU."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxformer_kernels import Mask, attention


def products(T: int, heads: tuple[int, int]) -> list[tuple[str, str]]:
    """The dtypes of both operands of every product of attention and its gradients in bfloat16."""
    N, K = heads
    q = jnp.zeros((2, T, N, 16), jnp.bfloat16)
    k = v = jnp.zeros((2, T, K, 16), jnp.bfloat16)

    def run(q, k, v):
        out, back = jax.vjp(
            lambda *x: attention(*x, mask=Mask(causal=True), implementation="xla"), q, k, v
        )
        return back(out)

    compiled = jax.jit(run).lower(q, k, v).compile().as_text()
    found = []
    for computation in compiled.split("\n\n"):
        dtypes = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", computation))
        found += [
            (dtypes[left], dtypes[right])
            for left, right in re.findall(r" dot\(%([\w.\-]+), %([\w.\-]+)\)", computation)
        ]
    return found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the CPU's compiler")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["full", "grouped"])
@pytest.mark.parametrize("T", [96, 256, 768], ids=["one_group", "groups", "blocks"])
def test_no_product_of_bfloat16_is_computed_in_float32(T, heads):
    found = products(T, heads)
    assert len(found) >= 5
    assert set(found) == {("bf16", "bf16")}
