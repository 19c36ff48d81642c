"""cuDNN is called as JAX calls it, for what it certainly does, and refused for everything else.

There is no GPU here: what it computes is not tested, only what it is asked to.
"""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxformer_kernels import Dropout, Mask, _compat, attention, compiling_for


@pytest.fixture(autouse=True)
def a_gpu_with_cudnn(monkeypatch):
    """As on a machine that has both, as far as lowering goes."""
    monkeypatch.setattr(_compat, "cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    with compiling_for("gpu"):
        yield


def arrays(T=16, S=16, N=4, K=2, H=64, Hv=None, dtype=jnp.bfloat16):
    shapes = (2, T, N, H), (2, S, K, H), (2, S, K, Hv or H)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def lowered(*operands, **options):
    """(custom calls, cuDNN settings of each) that the loss and its gradients lower to for CUDA."""

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, implementation="cudnn", **options) ** 2)

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*operands)
    text = gradients.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\S+?)\(", text)
    configs = re.findall(r'backend_config = "((?:[^"\\]|\\.)*)"', text)
    settings = [config.replace("\\22", '"').replace('\\"', '"') for config in configs]
    return calls, [json.loads(x)["cudnn_fmha_backend_config"] for x in settings if "fmha" in x]


@pytest.mark.parametrize(
    ("mask", "mask_type", "window"),
    [
        (Mask(), "NO_MASK", 0),
        (Mask(causal=True), "CAUSAL", 0),
        (Mask(causal=True, window=(3, 0)), "CAUSAL", 4),
        (Mask(causal=True, window=(3, None)), "CAUSAL", 4),
        (Mask(window=(3, 0)), "CAUSAL", 4),
        (Mask(window=(None, 0)), "CAUSAL", 0),
        (Mask(causal=True, window=(15, 0)), "CAUSAL", 0),
        (Mask(window=(None, None)), "NO_MASK", 0),
    ],
)
def test_cudnn_is_asked_for_what_the_mask_means(mask, mask_type, window):
    calls, settings = lowered(*arrays(), mask=mask, scale=0.5)
    assert calls == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for setting in settings:
        assert setting["mask_type"] == mask_type
        assert setting["sliding_window_length"] == window
        assert setting["fmha_scale"] == 0.5
        assert setting["dropout_rate"] == 0


def test_without_a_mask_queries_and_keys_may_differ_in_number():
    calls, _ = lowered(*arrays(T=6, S=12, H=128, dtype=jnp.float16))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("shapes", "options", "lacking"),
    [
        ({"dtype": jnp.float32}, {}, "float32"),
        ({"H": 60}, {}, "head dim 60"),
        ({"H": 256}, {}, "head dim 256"),
        ({"Hv": 32}, {}, "value_head_dim"),
        ({"T": 1}, {}, "an odd length"),
        ({"S": 9}, {}, "an odd length"),
        ({"T": 8}, {"mask": Mask(causal=True)}, "8 queries and 16 keys"),
        ({}, {"mask": Mask(causal=True, q_offset=2)}, "q_offset"),
        ({}, {"mask": Mask(causal=True, q_offset=jnp.array(0))}, "traced_q_offset"),
        ({}, {"mask": Mask(window=(3, 3))}, "not causal"),
        ({}, {"mask": Mask(window=(3, None))}, "not causal"),
        ({}, {"mask": Mask(kv_end=9)}, "kv_range"),
        ({}, {"mask": Mask(array=jnp.ones((16, 16), bool))}, "mask_array"),
        (
            {},
            {
                "mask": Mask(
                    q_segment_ids=jnp.ones((2, 16), int), kv_segment_ids=jnp.ones((2, 16), int)
                )
            },
            "segments",
        ),
        ({}, {"bias": jnp.zeros((1, 1, 16, 16))}, "bias"),
        ({}, {"sinks": jnp.zeros(4)}, "sinks"),
        ({}, {"softcap": 30.0}, "softcap"),
        ({}, {"dropout": Dropout(0.1, jax.random.key(0))}, "dropout"),
        ({}, {"return_lse": True}, "lse"),
    ],
)
def test_what_is_not_certain_is_refused(shapes, options, lacking):
    with pytest.raises(NotImplementedError, match=rf"(?s)'cudnn' does not support.*{lacking}"):
        jax.eval_shape(
            lambda *operands: attention(*operands, implementation="cudnn", **options),
            *arrays(**shapes),
        )


def test_it_is_refused_off_the_gpu_and_without_the_library(monkeypatch):
    def call():
        jax.eval_shape(lambda *x: attention(*x, implementation="cudnn"), *arrays())

    with compiling_for("tpu"), pytest.raises(NotImplementedError, match="tpu platform"):
        call()
    monkeypatch.setattr(_compat, "cudnn_version", lambda: None)
    with pytest.raises(NotImplementedError, match="without cuDNN"):
        call()
