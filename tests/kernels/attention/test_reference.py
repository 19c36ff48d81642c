"""The reference against loops over numbers, and its gradients against differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from jaxformer_kernels import Dropout, Mask, attention
from jaxformer_kernels.attention.dropout import keep

B, T, S, N, K, H, HV = 2, 3, 5, 4, 2, 3, 2


def operands():
    rng = np.random.RandomState(0)
    shapes = {
        "q": (B, T, N, H),
        "k": (B, S, K, H),
        "v": (B, S, K, HV),
        "bias": (B, 1, T, S),
        "sinks": (N,),
    }
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def by_loops(q, k, v, bias, sinks, visible, kept, rate, softcap, scale):
    out, lse = np.zeros((B, T, N, HV)), np.zeros((B, N, T))
    for b in range(B):
        for n in range(N):
            for t in range(T):
                weights, denominator = {}, math.exp(sinks[n])
                for s in range(S):
                    if not visible[b, n, t, s]:
                        continue
                    x = scale * sum(q[b, t, n, h] * k[b, s, n // (N // K), h] for h in range(H))
                    x = softcap * math.tanh(x / softcap) + bias[b, 0, t, s]
                    weights[s] = math.exp(x)
                    denominator += weights[s]
                if not weights:
                    lse[b, n, t] = -math.inf
                    continue
                lse[b, n, t] = math.log(denominator)
                for s, weight in weights.items():
                    if kept[b, n, t, s]:
                        share = weight / denominator / (1 - rate)
                        out[b, t, n] += share * v[b, s, n // (N // K)]
    return out, lse


def test_reference_is_what_loops_over_numbers_give():
    visible = np.random.RandomState(1).rand(B, N, T, S) < 0.6
    visible[1, 2, 0] = False
    dropout = Dropout(0.25, jax.random.key(3))
    index = np.ix_(range(B), range(N), range(T), range(S))
    kept = np.asarray(keep(dropout.seed(), dropout.rate, *index))
    assert 0 < kept.mean() < 1
    want = by_loops(**operands(), visible=visible, kept=kept, rate=0.25, softcap=2.0, scale=0.7)
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
        with jax.enable_x64(True):
            got = attention(
                **{name: jnp.asarray(x, dtype) for name, x in operands().items()},
                mask=Mask(array=jnp.asarray(visible)),
                softcap=2.0,
                scale=0.7,
                dropout=dropout,
                return_lse=True,
                implementation="reference",
            )
        for x, y in zip(got, want, strict=True):
            assert x.dtype == dtype
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_gradients_of_the_reference_are_its_differences():
    def run(operands):
        out, lse = attention(
            **operands,
            mask=Mask(causal=True, q_offset=2, kv_start=1),
            softcap=2.0,
            dropout=Dropout(0.25, jax.random.key(3)),
            return_lse=True,
            implementation="reference",
        )
        return out, lse

    with jax.enable_x64(True):
        operands_64 = {name: jnp.asarray(x) for name, x in operands().items()}
        check_grads(run, (operands_64,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_default_scale_is_one_over_the_root_of_the_head_dim():
    x = {name: jnp.asarray(a, jnp.float32) for name, a in operands().items()}
    implicit = attention(**x, implementation="reference")
    explicit = attention(**x, scale=H**-0.5, implementation="reference")
    np.testing.assert_array_equal(implicit, explicit)
