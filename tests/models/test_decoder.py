"""The language model: its cache, and what a token may know of the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer_kernels
from jaxformer.nn import attention

ROWS, LENGTH, VOCABULARY = 2, 12, 12

OPTIONS = {
    "no positions": dict(position="none", activation="gelu_exact", output_softcap=3.0, scan=False),
    "learned": dict(position="learned", max_length=LENGTH + 3, embedding_scale=True),
    "sinusoidal, post": dict(
        position="sinusoidal", norm_placement="post", activation="relu", tied_embeddings=False
    ),
    "rotary, qk-norm": dict(
        position="rotary", norm="rmsnorm", activation="swiglu", kv_heads=1, qk_norm=True, bias=False
    ),
    "alibi, grouped": dict(
        position="alibi", kv_heads=2, activation="geglu", attention_softcap=2.0, output_scale=0.5
    ),
    "relative, window": dict(
        position="relative",
        relative_buckets=8,
        relative_max_distance=10,
        norm="rmsnorm",
        norm_placement="post",
        window=4,
        attention_scale=1.0,
    ),
    "rotary, window, unrolled": dict(position="rotary", window=3, head_dim=6, scan=False),
}


@pytest.fixture(params=OPTIONS, scope="module")
def model(request, make_model):
    return make_model("decoder", **OPTIONS[request.param])


def draw_tokens(seed=0):
    return np.random.default_rng(seed).integers(4, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)


def logits(model, tokens, segment_ids=None, positions=None):
    """Uncached logits; all tests share one compiled shape."""
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return np.asarray(
        model.call(model.params, tokens, segment_ids=segment_ids, positions=positions)
    )


@functools.cache
def extender(apply):
    """Feeds a cache token by token over the first half, then the rest as one chunk."""

    @jax.jit
    def run(params, tokens, start):
        cache = apply(params, LENGTH + 3, start, method="init_cache")

        def feed(cache, column):
            step_logits, cache = apply(params, column[:, None], cache, method="extend")
            return cache, step_logits[:, 0]

        half = LENGTH // 2
        cache, first = jax.lax.scan(feed, cache, tokens[:, :half].T)
        rest, cache = apply(params, tokens[:, half:], cache, method="extend")
        return jnp.concatenate([first.swapaxes(0, 1), rest], axis=1)

    return run


def test_cached_equals_uncached_token_by_token_and_in_chunks(model):
    tokens = draw_tokens()
    found = extender(model.apply)(model.params, tokens, jnp.zeros(ROWS, jnp.int32))
    np.testing.assert_allclose(found, logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_cached_equals_uncached_for_left_padded_prompts_of_unequal_length(model):
    tokens, start = draw_tokens(), np.array([0, 4], np.int32)
    padded = tokens.copy()
    padded[1, :4] = 0
    padded[1, 4:] = tokens[1, :-4]
    found = np.asarray(extender(model.apply)(model.params, padded, start))
    wanted = logits(model, tokens)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found[1, 4:], wanted[1, :-4], atol=1e-5, rtol=1e-5)


def test_a_large_cache_gives_the_same_reading_only_what_it_holds(make_model, monkeypatch):
    """What is large enough is left to `decode_attention`: here, everything."""
    model = make_model("decoder", **OPTIONS["rotary, window, unrolled"])
    tokens, start = draw_tokens(), np.array([0, 4], np.int32)
    wanted = extender(model.apply)(model.params, tokens, start)
    read = []

    def decode_attention(*args, **options):
        read.append(options["window"])
        return jaxformer_kernels.decode_attention(*args, **options)

    monkeypatch.setattr(attention, "decode_attention", decode_attention)
    monkeypatch.setattr(attention, "_LARGE_LAYER", 0)
    # Made anew: what the other has compiled keeps to its way.
    found = extender.__wrapped__(model.apply)(model.params, tokens, start)
    assert read == [(2, 0)] * 4  # two layers, for a token and for the rest as one chunk
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found[1, 4:], wanted[1, 4:], atol=1e-5, rtol=1e-5)


def test_what_stands_in_the_padding_of_a_prompt_changes_nothing(model):
    tokens, start = draw_tokens(), np.array([0, 4], np.int32)
    run = extender(model.apply)
    before = np.asarray(run(model.params, tokens, start))
    tokens[1, :4] = 4 + (tokens[1, :4] + 1) % 8
    after = np.asarray(run(model.params, tokens, start))
    np.testing.assert_array_equal(before[1, 4:], after[1, 4:])


def packed():
    """Two documents in a row, cut at 5 and at 8: tokens, segment ids, positions."""
    segment_ids, positions = np.ones((2, ROWS, LENGTH), np.int32)
    for row, cut in enumerate((5, 8)):
        segment_ids[row, cut:] = 2
        positions[row] = np.concatenate([np.arange(cut), np.arange(LENGTH - cut)])
    return draw_tokens(), segment_ids, positions


@pytest.mark.parametrize("changed", [1, 2])
def test_changing_one_document_of_a_packed_row_leaves_the_other_bitwise_alone(model, changed):
    tokens, segment_ids, positions = packed()
    before = logits(model, tokens, segment_ids, positions)
    others = np.where(segment_ids == changed, 4 + (tokens - 3) % 8, tokens)
    after = logits(model, others, segment_ids, positions)
    kept = segment_ids != changed
    np.testing.assert_array_equal(before[kept], after[kept])
    assert (before[~kept] != after[~kept]).any(-1).all()


def test_documents_packed_with_positions_from_zero_equal_each_document_alone(model):
    tokens, segment_ids, positions = packed()
    together = logits(model, tokens, segment_ids, positions)
    for segment in (1, 2):
        places = [np.flatnonzero(row == segment) for row in segment_ids]
        alone, real = np.zeros_like(tokens), np.zeros_like(tokens)
        for row, place in enumerate(places):
            alone[row, : len(place)], real[row, : len(place)] = tokens[row, place], 1
        found = logits(model, alone, real)
        for row, place in enumerate(places):
            np.testing.assert_allclose(
                together[row, place], found[row, : len(place)], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("place", [1, 6, LENGTH - 1])
def test_changing_a_token_leaves_the_logits_before_it_bitwise_alone(model, place):
    tokens = draw_tokens()
    before = logits(model, tokens)
    tokens[:, place] = 4 + (tokens[:, place] - 3) % 8
    after = logits(model, tokens)
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert (before[:, place] != after[:, place]).any(-1).all()


def test_a_row_does_not_depend_on_the_rows_beside_it(model):
    tokens = draw_tokens()
    together = logits(model, tokens)
    for row in range(ROWS):
        beside = draw_tokens(1)
        beside[row] = tokens[row]
        np.testing.assert_array_equal(together[row], logits(model, beside)[row])


def test_batched_equals_one_by_one(make_model):
    model, tokens = make_model("decoder", **OPTIONS["learned"]), draw_tokens()
    together = logits(model, tokens)
    for row in range(ROWS):
        alone = model.call(model.params, tokens[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_window_hides_all_but_the_newest_tokens(make_model):
    model = make_model("decoder", layers=1, **OPTIONS["rotary, window, unrolled"])
    tokens = draw_tokens()
    before = logits(model, tokens)
    tokens[:, 4] = 4 + (tokens[:, 4] - 3) % 8
    differs = (before != logits(model, tokens)).any(-1)
    np.testing.assert_array_equal(differs, [[4 <= place < 7 for place in range(LENGTH)]] * ROWS)


def test_cache_holds_grouped_heads_only(make_model):
    model = make_model("decoder", **OPTIONS["alibi, grouped"])
    cache = model.apply(model.params, 9, jnp.zeros(3, jnp.int32), method="init_cache")
    assert cache.keys.shape == cache.values.shape == (2, 3, 9, 2, 4)


def test_output_softcap_bounds_the_logits(make_model):
    model = make_model("decoder", **OPTIONS["no positions"])
    found = np.abs(logits(model, draw_tokens())).max()
    assert 2 < found < 3


def test_bfloat16_computing_stays_near_float32(make_model):
    wide = make_model("decoder", **OPTIONS["learned"])
    narrow = make_model("decoder", compute_dtype="bfloat16", **OPTIONS["learned"])
    tokens = draw_tokens()
    exact, found = logits(wide, tokens), logits(narrow, tokens)
    assert found.dtype == np.float32
    error = np.abs(found - exact).mean() / np.abs(exact).mean()
    assert 1e-5 < error < 0.03
