"""The encoder-decoder: its cache, and what a token may know of source and target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import ModelConfig
from jaxformer.models import abstract

ROWS, SOURCE, TARGET, VOCABULARY = 2, 7, 6, 12

OPTIONS = {
    "rotary": dict(position="rotary", kv_heads=2, qk_norm=True, encoder_layers=1),
    "sinusoidal, post, shared": dict(
        position="sinusoidal",
        norm_placement="post",
        activation="relu",
        embedding_scale=True,
        shared_embeddings=True,
        scan=False,
    ),
    "relative": dict(
        position="relative",
        norm="rmsnorm",
        bias=False,
        relative_buckets=8,
        relative_max_distance=10,
        attention_scale=1.0,
        shared_embeddings=True,
    ),
    "alibi, window, untied": dict(
        position="alibi", window=3, activation="swiglu", tied_embeddings=False, scan=False
    ),
    "learned, softcap": dict(
        position="learned", max_length=8, attention_softcap=2.0, kv_heads=1, output_softcap=4.0
    ),
}


@pytest.fixture(params=OPTIONS, scope="module")
def model(request, make_model):
    return make_model("encoder_decoder", **OPTIONS[request.param])


def draw():
    """Source, its segment ids (row 1 has two tokens of padding), target inputs."""
    random = np.random.default_rng(0)
    source = random.integers(4, VOCABULARY, (ROWS, SOURCE)).astype(np.int32)
    real = np.ones_like(source)
    real[1, 5:] = 0
    return source, real, random.integers(4, VOCABULARY, (ROWS, TARGET)).astype(np.int32)


def logits(model, source, real, inputs):
    return np.asarray(model.call(model.params, source, inputs, source_segment_ids=real))


@functools.cache
def extender(apply):
    """Feeds a cache token by token over the first half, then the rest as one chunk."""

    @jax.jit
    def run(params, source, real, inputs):
        cache = apply(params, source, real, TARGET + 2, method="init_cache")

        def feed(cache, column):
            step_logits, cache = apply(params, column[:, None], cache, method="extend")
            return cache, step_logits[:, 0]

        half = TARGET // 2
        cache, first = jax.lax.scan(feed, cache, inputs[:, :half].T)
        rest, cache = apply(params, inputs[:, half:], cache, method="extend")
        return jnp.concatenate([first.swapaxes(0, 1), rest], axis=1)

    return run


def test_cached_equals_uncached_token_by_token_and_in_chunks(model):
    source, real, inputs = draw()
    found = extender(model.apply)(model.params, source, real, inputs)
    np.testing.assert_allclose(found, logits(model, source, real, inputs), atol=1e-5, rtol=1e-5)


def test_what_stands_in_the_padding_of_a_source_changes_nothing(model):
    source, real, inputs = draw()
    before = logits(model, source, real, inputs)
    cached = np.asarray(extender(model.apply)(model.params, source, real, inputs))
    source[real == 0] = 4 + (source[real == 0] - 3) % 8
    np.testing.assert_array_equal(before, logits(model, source, real, inputs))
    np.testing.assert_array_equal(cached, extender(model.apply)(model.params, source, real, inputs))
    source[1, 0] = 4 + (source[1, 0] - 3) % 8
    assert (before[1] != logits(model, source, real, inputs)[1]).any(-1).all()


def test_a_padded_source_equals_the_source_alone(make_model):
    model, (source, real, inputs) = make_model("encoder_decoder", **OPTIONS["rotary"]), draw()
    padded = logits(model, source, real, inputs)
    alone = model.call(model.params, source[1:, :5], inputs[1:])
    np.testing.assert_allclose(padded[1], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [1, TARGET - 1])
def test_changing_a_target_token_leaves_the_logits_before_it_bitwise_alone(model, place):
    source, real, inputs = draw()
    before = logits(model, source, real, inputs)
    inputs[:, place] = 4 + (inputs[:, place] - 3) % 8
    after = logits(model, source, real, inputs)
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert (before[:, place] != after[:, place]).any(-1).all()


def test_every_target_place_sees_the_whole_source(make_model):
    model, (source, real, inputs) = make_model("encoder_decoder", **OPTIONS["relative"]), draw()
    before = logits(model, source, real, inputs)
    source[0, -1] = 4 + (source[0, -1] - 3) % 8
    after = logits(model, source, real, inputs)
    assert (before[0] != after[0]).any(-1).all()
    np.testing.assert_array_equal(before[1], after[1])


def test_changing_one_pair_of_a_packed_row_leaves_the_other_bitwise_alone(make_model):
    model, (source, _, inputs) = make_model("encoder_decoder", **OPTIONS["rotary"]), draw()
    sources = np.array([[1, 1, 1, 2, 2, 2, 2]] * ROWS, np.int32)
    targets = np.array([[1, 1, 1, 1, 2, 2]] * ROWS, np.int32)

    def run(source, inputs):
        return np.asarray(
            model.call(
                model.params, source, inputs, source_segment_ids=sources, segment_ids=targets
            )
        )

    before = run(source, inputs)
    after = run(
        np.where(sources == 1, 4 + (source - 3) % 8, source),
        np.where(targets == 1, 4 + (inputs - 3) % 8, inputs),
    )
    np.testing.assert_array_equal(before[targets == 2], after[targets == 2])
    assert (before[targets == 1] != after[targets == 1]).any(-1).all()


def test_cross_attention_weights_sum_to_one_and_are_zero_on_padding(model):
    source, real, inputs = draw()
    find = jax.jit(functools.partial(model.apply, method="cross_attention_weights"))
    weights = np.asarray(find(model.params, source, inputs, source_segment_ids=real))
    assert weights.shape == (model.config.layers, ROWS, TARGET, model.config.heads, SOURCE)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[:, 1, ..., 5:] == 0).all()
    assert (weights[:, 0] > 0).all() and (weights[:, 1, ..., :5] > 0).all()


def test_cross_attention_keys_are_computed_once_and_for_every_layer(make_model):
    model = make_model("encoder_decoder", **OPTIONS["rotary"])
    source, real, _ = draw()
    cache = jax.jit(lambda *arrays: model.apply(*arrays, 9, method="init_cache"))(
        model.params, source, real
    )
    assert cache.cross_keys.shape == cache.cross_values.shape == (2, ROWS, SOURCE, 2, 4)


def test_encoder_tells_before_from_after_and_decoder_spends_all_buckets_on_before(make_model):
    model, (source, _, inputs) = make_model("encoder_decoder", **OPTIONS["relative"]), draw()

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.square(model.apply(params, jnp.asarray(source), jnp.asarray(inputs))).sum()

    found = gradient(model.params)
    used = {
        side: set(np.flatnonzero(np.abs(found[side]["relative_bias"]["table"]).max(-1)))
        for side in ("encoder", "decoder")
    }
    # 8 buckets: distances -6..6 in two halves (of which "after" has no 0), and 0..5 in one.
    assert used == {"encoder": {0, 1, 2, 3, 5, 6, 7}, "decoder": {0, 1, 2, 3, 4}}


def test_shared_embeddings_of_unequal_vocabularies_are_refused():

    with pytest.raises(ValueError, match=r"data\.shared_vocabulary"):
        abstract(ModelConfig(shared_embeddings=True), vocabulary=5, source_vocabulary=6)
