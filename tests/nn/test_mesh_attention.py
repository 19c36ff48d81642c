"""Attention and dropout where a mesh divides rows, heads and tokens, by the compiler or by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxformer import sharding
from jaxformer.config import MeshConfig
from jaxformer.nn import dropout
from jaxformer.nn.mesh_attention import attend
from jaxformer.nn.position import token_places
from jaxformer_kernels import Dropout, Mask, attention, zigzag

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

B, T, H = 8, 16, 8


@functools.cache
def mesh(**axes):
    return sharding.make_mesh(MeshConfig(**{"data": 1} | axes), jax.devices())


@functools.cache
def heads(N=4, K=2):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))


def on(mesh, function, *arrays):
    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(function)(*arrays))


def test_every_operand_of_the_call_is_divided_and_the_result_is_that_of_one_device():
    random = np.random.default_rng(1)
    ids = jnp.asarray(random.integers(0, 3, (B, T)), jnp.int32)
    masks = {
        "shared ids": Mask(causal=True, q_segment_ids=ids[:1], kv_segment_ids=ids[:1]),
        "array": Mask(array=jnp.asarray(random.random((B, 4, T, T)) < 0.7)),
        "range": Mask(kv_start=jnp.arange(B) % 3, kv_end=T - 1),
    }
    bias = jnp.asarray(random.normal(size=(1, 4, T, T)), jnp.float32)
    for name, mask in masks.items():
        wanted = attention(*heads(), mask=mask, bias=bias, softcap=5.0)
        found = on(
            mesh(data=2, fsdp=2, tensor=2),
            lambda q, k, v, bias, mask: attend(q, k, v, mask=mask, bias=bias, softcap=5.0),
            *heads(),
            bias,
            mask,
        )
        np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=name)


def test_rows_that_the_mesh_does_not_divide_and_few_heads_of_keys_are_whole():
    q, k, v = (x[:3] for x in heads(8, 2))
    found = on(mesh(data=2, tensor=4), lambda *x: attend(*x, mask=Mask(causal=True)), q, k, v)
    np.testing.assert_allclose(found, attention(q, k, v, mask=Mask(causal=True)), atol=2e-6)


def test_a_cache_is_whole_where_tokens_are_divided():
    q, k, v = heads()
    mask = Mask(causal=True, q_offset=jnp.int32(9), kv_start=jnp.zeros(B, jnp.int32))
    found = on(mesh(data=2, context=4), lambda q, k, v: attend(q, k, v, mask=mask), q[:, :1], k, v)
    np.testing.assert_allclose(found, attention(q[:, :1], k, v, mask=mask), atol=2e-6)


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({"tensor": 8}, {}, "set mesh.tensor to a divisor of both"),
        ({"context": 2}, {"bias": jnp.zeros((1, 1, T, T))}, "set model.position to 'rotary'"),
        (
            {"context": 2},
            {"dropout": Dropout(0.1, jax.random.key(0))},
            "set model.attention_dropout to 0",
        ),
        ({"context": 3}, {}, "mesh.context=3 does not divide 16 queries and 16 keys"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_fix(axes, options, message):
    with jax.set_mesh(mesh(**axes)), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: attend(*x, mask=Mask(), **options), *heads())


def test_attention_dropout_draws_for_each_device_alike_by_the_compiler_and_by_hand():
    key = jax.random.key(0)

    def run(q, k, v, key):
        return attend(q, k, v, mask=Mask(), dropout=Dropout(0.5, key))

    ones = jnp.ones((B, T, 1, H))  # all rows alike, but for what is dropped
    compiled = on(mesh(data=8), run, ones, ones, ones, key)
    rows = (P("data"), P("data"), P("data"), P())
    for check in (True, False):
        by_hand = jax.shard_map(
            run, mesh=mesh(data=8), in_specs=rows, out_specs=P("data"), check_vma=check
        )
        np.testing.assert_array_equal(jax.jit(by_hand)(ones, ones, ones, key), compiled)
    assert len({row.tobytes() for row in compiled}) == B


@pytest.mark.parametrize("axes", ["B T D", "T B D"])
def test_dropout_draws_the_same_by_the_compiler_and_by_hand(axes):
    x, key = jnp.ones((8, 16, 32)), jax.random.key(0)

    def run(x, key):
        return dropout(x, 0.5, key, axes=axes)

    wanted = np.asarray(jax.jit(run)(x, key))
    both = mesh(data=2, fsdp=2, context=2)
    split = P(*(("data", "fsdp") if axis == "B" else "context" for axis in axes.split()[:2]))
    np.testing.assert_array_equal(on(both, run, x, key), wanted)
    by_hand = jax.shard_map(run, mesh=both, in_specs=(split, P()), out_specs=split)
    np.testing.assert_array_equal(jax.jit(by_hand)(x, key), wanted)
    if axes == "B T D":
        mapped = jax.pmap(run, axis_name="data", in_axes=(0, None))(x[:, None], key)
        np.testing.assert_array_equal(mapped[:, 0], wanted)


def test_dropout_is_computed_where_the_array_lies():
    def run(x, key):
        return sharding.constrain(dropout(sharding.constrain(x, "B T D"), 0.5, key), "B T D")

    with jax.set_mesh(mesh(data=4, context=2)):
        text = jax.jit(run).lower(jnp.ones((8, 16, 32)), jax.random.key(0)).compile().as_text()
    assert "u32[2,8,32]" in text
    for whole in ("u32[4096]", "u32[8,16,32]"):
        assert whole not in text


def test_places_of_tokens_are_those_of_the_order_in_which_they_arrive():
    order = np.broadcast_to(zigzag(4, T), (B, T))
    with jax.set_mesh(mesh(data=2, context=4)):
        np.testing.assert_array_equal(token_places(B, T, causal=True), order)
        np.testing.assert_array_equal(token_places(B, T, causal=False)[0], np.arange(T))
        for causal, wanted in ((True, order), (False, np.broadcast_to(np.arange(T), (B, T)))):
            by_hand = jax.shard_map(
                lambda causal=causal: token_places(B // 2, T // 4, causal=causal) + 0,
                in_specs=(),
                out_specs=P("data", "context"),
                check_vma=False,
            )
            np.testing.assert_array_equal(jax.jit(by_hand)(), wanted)
