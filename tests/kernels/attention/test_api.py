"""What a call refuses, and which implementation it gets."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer_kernels import Dropout, Mask, attention, dispatch
from jaxformer_kernels.attention import api
from jaxformer_kernels.attention.call import FEATURES

Q, K = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))


@pytest.mark.parametrize(
    ("change", "error", "fix"),
    [
        ({"q": Q[0]}, ValueError, r"q must be \[B, T, N, H\].*q\[None\]"),
        ({"k": K.astype(jnp.bfloat16)}, TypeError, r"k\.astype\(q\.dtype\)"),
        ({"q": jnp.ones((2, 3, 4, 8), int)}, TypeError, r"q\.astype\(jnp\.float32\)"),
        ({"k": K[:1]}, ValueError, "one batch size"),
        ({"v": K[:, :4]}, ValueError, r"agree in \[S, K\]"),
        ({"k": K[..., :4]}, ValueError, "one head dim, got 8 and 4"),
        ({"q": Q[:, :, :3]}, ValueError, "multiple of the 2 key-value heads"),
        ({"k": K[:, :0], "v": K[:, :0]}, ValueError, "no keys"),
        ({"bias": jnp.zeros((4, 3, 5))}, ValueError, r"bias\[None, :, None, :\]"),
        ({"bias": jnp.zeros((2, 4, 3, 4))}, ValueError, r"\[2, 4, 3, 5\]"),
        ({"bias": jnp.ones((1, 1, 3, 5), bool)}, TypeError, r"Mask\(array=...\)"),
        ({"sinks": jnp.zeros(2)}, ValueError, r"\[N\] = \[4\]"),
        ({"mask": jnp.ones((3, 5), bool)}, TypeError, r"Mask\(array=...\)"),
        ({"mask": Mask(kv_end=jnp.zeros(3, int))}, ValueError, r"kv_end.*\[2\]"),
        ({"softcap": jnp.float32(30)}, TypeError, "softcap must be a Python float"),
        ({"softcap": 0.0}, ValueError, "None means no cap"),
        ({"scale": jnp.float32(1)}, TypeError, "multiply q by it"),
        ({"dropout": 0.1}, TypeError, r"Dropout\(rate, key\)"),
        ({"implementation": "xal"}, ValueError, "did you mean 'xla'"),
        ({"implementation": "?"}, ValueError, "Available: xla, "),
    ],
)
def test_a_wrong_argument_is_refused_with_the_fix(change, error, fix):
    arguments = {"q": Q, "k": K, "v": K, **change}
    with pytest.raises(error, match=fix):
        attention(**arguments)


def test_output_has_the_dtype_of_q_and_lse_is_wide():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        for name in api.IMPLEMENTATIONS:
            x = (Q.astype(dtype), K.astype(dtype), K.astype(dtype))
            try:
                out, lse = attention(*x, return_lse=True, implementation=name)
            except NotImplementedError:
                assert name not in ("xla", "reference")
                continue
            assert (out.shape, out.dtype) == ((2, 3, 4, 8), dtype)
            assert (lse.shape, lse.dtype) == ((2, 4, 3), jnp.float32)


def test_every_declared_feature_is_a_known_one():
    for implementation in api.IMPLEMENTATIONS.values():
        assert implementation.supports <= FEATURES


TABLE = {
    "fast": dispatch.Implementation(
        run=lambda: "fast",
        supports=frozenset({"causal"}),
        limits=lambda call: ["head dim 300 (at most 256)"] if call == 300 else [],
    ),
    "general": dispatch.Implementation(
        run=lambda: "general", supports=frozenset({"causal", "sinks", "bias"})
    ),
}
ORDER = {"default": ("fast", "general")}


class TestDispatch:
    def choose(self, name, features, call=64, op="op"):
        features = frozenset(features)
        return dispatch.choose(op, TABLE, ORDER, name, features, call).run()

    def test_the_first_that_can_is_picked(self):
        assert self.choose(None, {"causal"}) == "fast"
        assert self.choose(None, {"causal", "sinks"}) == "general"
        assert self.choose(None, {"causal"}, call=300) == "general"

    def test_a_named_one_that_cannot_says_what_it_lacks_and_who_can(self):
        with pytest.raises(
            NotImplementedError,
            match=r"'fast' does not support bias, sinks; use "
            "implementation='general'",
        ):
            self.choose("fast", {"causal", "sinks", "bias"})
        with pytest.raises(NotImplementedError, match="head dim 300"):
            self.choose("fast", {"causal"}, call=300)
        with pytest.raises(NotImplementedError, match="dropout; none can"):
            self.choose("general", {"dropout"})

    def test_nothing_is_dropped_where_nobody_can(self):
        with pytest.raises(NotImplementedError, match="fast does not support dropout; general"):
            self.choose(None, {"dropout"})

    def test_the_choice_and_the_fallback_are_said_once(self, caplog):
        with caplog.at_level(logging.INFO, logger="jaxformer_kernels"):
            for _ in range(2):
                self.choose(None, {"causal"}, op="said once")
                self.choose(None, {"sinks"}, op="said once")
        levels = [record.levelname for record in caplog.records]
        assert levels == ["INFO", "WARNING"]
        assert "picked 'fast'" in caplog.messages[0]
        assert "falling back to 'general'" in caplog.messages[1]
        assert "fast does not support sinks" in caplog.messages[1]


def test_dropout_of_nothing_needs_no_support_for_dropout():
    with_none = attention(Q, K, K, dropout=Dropout(0.0, jax.random.key(0)))
    np.testing.assert_array_equal(with_none, attention(Q, K, K))
