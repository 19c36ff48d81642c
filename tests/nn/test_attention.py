"""The attention module, held to the formula in numpy, head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import ModelConfig
from jaxformer.nn import Attention, pure
from jaxformer_kernels import Mask

WIDTH, HEADS, HEAD = 16, 4, 6


def rms(x, scale, epsilon):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * scale


def turn(x, base):
    """Rotary positions 0, 1, 2, ... of x [B, T, N, H]."""
    half = x.shape[-1] // 2
    places = np.arange(x.shape[1])[None, :, None, None]
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * places * base ** (-np.arange(half) / half)
    )
    return np.concatenate([turned.real, turned.imag], -1)


def by_hand(config, params, x, source, *, rotate):
    """Causal attention in float64, one head at a time."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def project(name, inputs):
        layer = wide[name]
        return np.einsum("btd,dnh->btnh", inputs, layer["kernel"]) + layer.get("bias", 0)

    queries, keys, values = project("query", x), project("key", source), project("value", source)
    if config.qk_norm:
        queries = rms(queries, wide["query_norm"]["scale"], config.norm_epsilon)
        keys = rms(keys, wide["key_norm"]["scale"], config.norm_epsilon)
    if rotate:
        queries, keys = turn(queries, config.rotary_base), turn(keys, config.rotary_base)
    scale = config.attention_scale or HEAD**-0.5
    group = HEADS // keys.shape[2]
    mixed = np.zeros_like(queries)
    for batch in range(x.shape[0]):
        for head in range(HEADS):
            key, value = keys[batch, :, head // group], values[batch, :, head // group]
            scores = scale * queries[batch, :, head] @ key.T
            if config.attention_softcap:
                scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
            scores[np.triu_indices_from(scores, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[batch, :, head] = weights / weights.sum(-1, keepdims=True) @ value
    out = wide["out"]
    return np.einsum("btnh,nhd->btd", mixed, out["kernel"]) + out.get("bias", 0)


OPTIONS = {
    "every head its keys": {},
    "grouped heads": dict(kv_heads=2),
    "one key head": dict(kv_heads=1, bias=False),
    "qk-norm": dict(qk_norm=True, kv_heads=2),
    "softcap": dict(attention_softcap=0.5),
    "scale": dict(attention_scale=1.0),
    "rotary": dict(position="rotary", rotary_base=100.0, kv_heads=2),
    "everything": dict(position="rotary", qk_norm=True, attention_softcap=0.7, kv_heads=1),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_module_equals_attention_computed_head_by_head(name):
    options = {"position": "none"} | OPTIONS[name]
    config = ModelConfig(width=WIDTH, heads=HEADS, head_dim=HEAD, **options)
    module = nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0)))
    apply, shapes = pure(module)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    rotate = config.position == "rotary"

    @jax.jit
    def run(params, x):
        places = jnp.arange(7)[None].repeat(2, 0) if rotate else None
        queries, keys_values = apply(params, x, places, method="queries_keys_values")
        return apply(params, queries, keys_values, mask=Mask(causal=True))

    x = 0.3 * random.normal(size=(2, 7, WIDTH)).astype(np.float32)
    kv_heads = config.kv_heads or HEADS
    assert params["key"]["kernel"].shape == (WIDTH, kv_heads, HEAD)
    wanted = by_hand(config, params, x.astype(np.float64), x.astype(np.float64), rotate=rotate)
    np.testing.assert_allclose(run(params, x), wanted, rtol=1e-4, atol=1e-4)


def test_attention_dropout_acts_with_a_key_and_keeps_the_expectation():
    config = ModelConfig(width=8, heads=2, position="none", attention_dropout=0.5, bias=False)
    apply, params = pure(Attention(config, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (1, 6, 8))

    @jax.jit
    def run(key):
        queries, keys_values = apply(params, x, method="queries_keys_values")
        return apply(params, queries, keys_values, mask=Mask(), key=key)

    plain = run(None)
    many = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(2), 3000))
    assert np.abs(many[0] - plain).max() > 1e-3
    assert np.abs(many[0] - many[1]).max() > 1e-3
    deviation = many.std(0) / np.sqrt(len(many))
    assert (np.abs(many.mean(0) - plain) < 5 * deviation).all()


@pytest.mark.parametrize("options", [{}, dict(kv_heads=1, qk_norm=True, attention_softcap=0.7)])
def test_weights_sum_to_one_are_zero_on_padding_and_reproduce_the_output(options):
    config = ModelConfig(width=WIDTH, heads=HEADS, position="none", bias=True, **options)
    module = Attention(config, rngs=nnx.Rngs(0))
    apply, params = pure(module)
    x, source = (jax.random.normal(jax.random.key(n), (2, 5 + n, WIDTH)) for n in range(2))
    real = jnp.array([[1] * 6, [1] * 4 + [0] * 2])
    mask = Mask(q_segment_ids=jnp.ones((2, 5), jnp.int32), kv_segment_ids=real)
    keys, values = apply(params, source, method="keys_values")
    queries = apply(params, x, method="queries")
    weights = apply(params, queries, keys, mask=mask, method="weights")
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (np.asarray(weights)[1, :, :, 4:] == 0).all()
    assert (np.asarray(weights)[0] > 0).all()
    values = jnp.repeat(values, HEADS // values.shape[2], axis=2)
    mixed = jnp.einsum("btns,bsnh->btnh", weights, values)
    out = params["out"]
    output = jnp.einsum("btnh,nhd->btd", mixed, out["kernel"]) + out["bias"]
    found = apply(params, queries, apply(params, source, method="keys_values"), mask=mask)
    np.testing.assert_allclose(found, output, atol=1e-5)
