"""The regimes of the `xla` implementation, and what XLA makes of them on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import Mask, attention, compiling_for
from jaxformer_kernels.attention import xla, xla_long, xla_short


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
@pytest.mark.parametrize("T", [40, 256, 2048], ids=["one_group", "groups", "blocks"])
def test_no_product_of_bfloat16_is_computed_in_float32(T, heads):
    found = products(T, heads)
    assert len(found) >= 5
    assert set(found) == {("bf16", "bf16")}


@pytest.mark.parametrize(
    ("T", "rows"),
    [(40, [40]), (64, [32, 32]), (128, [64, 64]), (256, [128, 128]), (512, [128] * 4)],
)
def test_short_causal_calls_are_cut_into_two_groups_of_queries_and_long_ones_into_four(T, rows):
    groups = xla_short._groups(T, T, Mask(causal=True))
    assert [size for (_, size), _ in groups] == rows
    assert xla_short._groups(T, T, Mask()) == [((0, T), (0, T))]


@pytest.mark.parametrize(
    ("target", "heads", "T", "dtype", "sizes"),
    [
        ("cpu", 8, 2048, jnp.float32, (512, 512)),
        ("cpu", 8, 2048, jnp.bfloat16, (512, 512)),
        ("cpu", 8, 1024, jnp.bfloat16, (512, 256)),
        ("cpu", 9, 2048, jnp.float32, (512, 256)),
        ("cpu", 9, 2048, jnp.bfloat16, (256, 256)),
        ("gpu", 1, 2048, jnp.float32, (256, 256)),
    ],
)
def test_blocks_are_large_on_a_cpu_while_their_logits_are_few(target, heads, T, dtype, sizes):
    q = jax.ShapeDtypeStruct((1, heads, 1, T, 8), dtype)
    with compiling_for(target):
        assert xla_long._sizes(q, jax.ShapeDtypeStruct((1, heads, T, 8), dtype)) == sizes


@pytest.mark.parametrize(("T", "S"), [(600, 513), (1030, 1030), (512, 1537)])
def test_blocks_are_as_equal_as_the_lengths_allow(T, S):
    q, k = jnp.zeros((1, 1, 1, T, 8)), jnp.zeros((1, 1, S, 8))
    with compiling_for("gpu"):
        sizes = xla_long._sizes(q, k)
    for length, size in zip((T, S), sizes, strict=True):
        blocks = -(-length // size)
        assert size <= 256
        assert blocks == -(-length // 256)
        assert blocks * size - length < blocks


@pytest.mark.parametrize(
    ("target", "heads", "T", "short"),
    [
        ("cpu", 64, 512, True),
        ("cpu", 4, 1024, True),
        ("cpu", 5, 1024, False),
        ("cpu", 1, 4096, False),
        ("gpu", 1, 1024, False),
    ],
)
def test_one_pass_is_for_short_rows_and_on_a_cpu_for_few_heads_of_longer_ones(
    target, heads, T, short
):
    with compiling_for(target):
        assert xla._is_short(1, heads, T, T) == short


def test_blocks_of_full_size_give_what_the_reference_gives():
    T, rng = 2100, np.random.RandomState(0)
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((1, T, 2, 8)), jnp.float32) for _ in range(4)
    )

    def outcome(implementation):
        def loss(*operands):
            out = attention(*operands, mask=Mask(causal=True), implementation=implementation)
            return jnp.sum(out * weights)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for got, want in zip(
        jax.tree.leaves(outcome("xla")), jax.tree.leaves(outcome("reference")), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
