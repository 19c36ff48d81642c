"""What context_attention refuses, and the fix it names."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxformer_kernels import Mask, context_attention
from jaxformer_kernels.context_attention.all_to_all import check_heads
from tests.kernels.context_attention.calls import OURS, ring_mesh

CAUSAL = Mask(causal=True)


def trace(T=8, S=8, N=4, K=2, C=2, mask=CAUSAL, **options):
    """Trace a call on C devices, without running it."""

    @functools.partial(jax.shard_map, mesh=ring_mesh(C), in_specs=(OURS,) * 3, out_specs=OURS)
    def call(q, k, v):
        return context_attention(q, k, v, axis_name="context", mask=mask, **options)

    shapes = [(1, T, N, 8), (1, S, K, 8), (1, S, K, 8)]
    return jax.eval_shape(call, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


@pytest.mark.parametrize(
    ("options", "error", "fix"),
    [
        ({"method": "rings"}, ValueError, "did you mean 'ring'"),
        ({"order": "zig-zag"}, ValueError, "did you mean 'zigzag'"),
        ({"bias": jnp.zeros((1, 1, 1, 1))}, NotImplementedError, "context axis is 1"),
        ({"dropout": 0.1}, NotImplementedError, "dropout=None"),
        ({"mask": Mask(array=jnp.ones((8, 8), bool))}, NotImplementedError, "segment ids"),
        ({"mask": Mask(kv_end=3)}, NotImplementedError, "segment id of its own"),
        ({"mask": Mask(causal=True, q_offset=1)}, NotImplementedError, "decode_attention"),
        ({"S": 16}, ValueError, "pad the shorter"),
        ({"T": 6, "S": 6}, ValueError, "order='contiguous'"),
        ({"K": 3}, ValueError, "multiple of the 3"),
        ({"softcap": -1.0}, ValueError, "None means no cap"),
        ({"N": 3, "K": 3, "method": "all_to_all"}, ValueError, "use method='ring'"),
        ({"implementation": "xlb"}, ValueError, "did you mean 'xla'"),
        (
            {
                "mask": Mask(
                    q_segment_ids=jnp.zeros((1, 8), int), kv_segment_ids=jnp.zeros((1, 8), int)
                )
            },
            ValueError,
            r"must be \[1, 4\]",
        ),
    ],
)
def test_a_call_that_cannot_be_done_names_the_fix(options, error, fix):
    with pytest.raises(error, match=fix):
        trace(**options)


@pytest.mark.parametrize(
    ("N", "K", "C", "possible"),
    [
        (8, 8, 4, True),
        (8, 2, 4, True),
        (8, 1, 8, True),
        (12, 6, 4, False),
        (6, 2, 4, False),
        (4, 4, 8, False),
    ],
)
def test_which_heads_all_to_all_can_deal_out(N, K, C, possible):
    if possible:
        check_heads(N, K, C)
    else:
        with pytest.raises(ValueError, match="a context axis that divides"):
            check_heads(N, K, C)


def test_without_position_any_lengths_will_do():
    assert trace(T=6, S=10, mask=Mask()).shape == (1, 6, 4, 8)
    assert trace(T=6, S=10, mask=Mask(), method="all_to_all").shape == (1, 6, 4, 8)


@pytest.mark.parametrize("method", ["ring", "all_to_all"])
def test_operands_may_be_the_same_on_every_device(method):
    """As constants made inside are, of which `check_vma` knows it."""

    @functools.partial(jax.shard_map, mesh=ring_mesh(4), in_specs=(), out_specs=OURS)
    def call():
        x = jnp.ones((1, 4, 4, 8))
        return context_attention(x, x, x, axis_name="context", mask=CAUSAL, method=method)

    assert jax.eval_shape(call).shape == (1, 16, 4, 8)
