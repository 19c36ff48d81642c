"""The hybrid: one encoding for CTC and decoder, its cache, and what padding may change."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import CTCConfig, ModelConfig
from jaxformer.models import build
from jaxformer.models.output import HybridPredictions
from jaxformer.nn import pure, statistics, with_statistics

VOCABULARY, SOURCES, HEIGHT, UPSAMPLE, TARGET = 11, 9, 8, 2, 5
LENGTHS = (7, 4)
CONFIG = ModelConfig(
    kind="hybrid",
    layers=2,
    encoder_layers=1,
    width=8,
    heads=2,
    max_length=24,
    scan=False,
    ctc=CTCConfig(encoder="transformer", upsample=UPSAMPLE, channels=(3, 4), weight=0.2),
)
KINDS = [("transformer", False), ("lstm", True)]
kinds = pytest.mark.parametrize(("encoder", "images"), KINDS)


@functools.cache
def make(encoder, images):
    """Compiled apply, and variables away from where they start."""
    config = dataclasses.replace(CONFIG, ctc=dataclasses.replace(CONFIG.ctc, encoder=encoder))
    sources: dict[str, Any] = {"image_height": HEIGHT} if images else {"source_vocabulary": SOURCES}
    model = build(config, vocabulary=VOCABULARY, **sources)
    apply, params = pure(model)
    random = np.random.default_rng(0)
    move = lambda leaf: leaf + 0.3 * jnp.asarray(random.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    compiled = jax.jit(apply, static_argnames=("method", "training", "length", "last"))
    return compiled, with_statistics(jax.tree.map(move, params), statistics(model))


def draw(images, padding=0):
    """Source, its segment ids (row 1 has padding), and target inputs."""
    random = np.random.default_rng(1)
    columns = max(LENGTHS) + padding
    real = (np.arange(columns) < np.array(LENGTHS)[:, None]).astype(np.int32)
    shape = (2, max(LENGTHS))
    source = (
        random.uniform(size=(*shape, HEIGHT)).astype(np.float32)
        if images
        else random.integers(4, SOURCES, shape).astype(np.int32)
    )
    # What stands in the padding is not zeros: nothing may read it.
    widths = [(0, 0), (0, padding)] + [(0, 0)] * (source.ndim - 2)
    source = np.pad(source, widths, constant_values=4)
    inputs = random.integers(4, VOCABULARY, (2, TARGET)).astype(np.int32)
    return jnp.asarray(source), jnp.asarray(real), jnp.asarray(inputs)


@kinds
def test_predictions_hold_both_readings_and_their_weight(encoder, images):
    apply, variables = make(encoder, images)
    source, real, inputs = draw(images)
    found = apply(variables, source, inputs, source_segment_ids=real, method="predictions")
    assert isinstance(found, HybridPredictions) and found.weight == 0.2
    frames = [-(-n // 2) if images else n * UPSAMPLE for n in LENGTHS]
    assert found.frames.logits.shape == (2, frames[0], VOCABULARY)
    assert found.frames.logits.dtype == jnp.float32
    np.testing.assert_array_equal(found.frames.lengths, frames)
    logits = apply(variables, source, inputs, source_segment_ids=real)
    assert logits.shape == (2, TARGET, VOCABULARY)
    np.testing.assert_allclose(found.factors.logits(), logits, atol=1e-6)
    encoded = apply(variables, source, source_segment_ids=real, method="encode")
    np.testing.assert_array_equal(encoded, apply(variables, source, real, method="frames")[0])


@kinds
def test_decoding_step_by_step_equals_teacher_forcing(encoder, images):
    apply, variables = make(encoder, images)
    source, real, inputs = draw(images)
    whole = apply(variables, source, inputs, source_segment_ids=real, method="predictions")
    cache, frames = apply(variables, source, real, length=TARGET, method="init_joint")
    np.testing.assert_array_equal(frames.lengths, whole.frames.lengths)
    np.testing.assert_allclose(frames.logits, whole.frames.logits, atol=1e-5)
    alone = apply(variables, source, real, length=TARGET, method="init_cache")
    for found, leaf in zip(jax.tree.leaves(alone), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(found, leaf, atol=1e-6)
    expected = whole.factors.logits()
    for place in range(TARGET):
        tokens = inputs[:, place : place + 1]
        logits, cache = apply(variables, tokens, cache, method="extend")
        np.testing.assert_allclose(logits[:, 0], expected[:, place], atol=1e-5, rtol=1e-5)


def test_a_cache_of_reordered_rows_goes_on_as_they_would():
    apply, variables = make("transformer", False)
    source, real, inputs = draw(False)
    cache = apply(variables, source, real, length=TARGET, method="init_cache")
    rows = jnp.array([1, 0, 1])
    taken, _ = apply(variables, inputs[rows, :1], cache.take(rows), method="extend")
    logits, _ = apply(variables, inputs[:, :1], cache, method="extend")
    np.testing.assert_allclose(taken, logits[rows], atol=1e-6)


@kinds
def test_more_padding_changes_neither_reading(encoder, images):
    apply, variables = make(encoder, images)
    predict = functools.partial(apply, variables, method="predictions")
    (source, real, inputs), (wider, real_wider, _) = draw(images), draw(images, padding=3)
    alone = predict(source, inputs, source_segment_ids=real)
    padded = predict(wider, inputs, source_segment_ids=real_wider)
    np.testing.assert_array_equal(padded.frames.lengths, alone.frames.lengths)
    np.testing.assert_allclose(
        padded.factors.logits(), alone.factors.logits(), atol=1e-5, rtol=1e-5
    )
    for row, frames in enumerate(alone.frames.lengths):
        np.testing.assert_allclose(
            padded.frames.logits[row, :frames],
            alone.frames.logits[row, :frames],
            atol=1e-5,
            rtol=1e-5,
        )


def test_attention_to_a_token_is_that_to_its_frames_and_none_is_on_padding():
    apply, variables = make("transformer", False)
    source, real, inputs = draw(False)
    weights = apply(
        variables, source, inputs, source_segment_ids=real, method="cross_attention_weights"
    )
    assert weights.shape == (2, 2, TARGET, 2, max(LENGTHS))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not np.any(weights[:, 1, :, :, LENGTHS[1] :])


def test_attention_to_an_image_is_by_frame():
    apply, variables = make("lstm", True)
    source, real, inputs = draw(True)
    weights = apply(
        variables, source, inputs, source_segment_ids=real, method="cross_attention_weights"
    )
    assert weights.shape == (2, 2, TARGET, 2, 4)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not np.any(weights[:, 1, :, :, 2:])


def test_packed_targets_attend_to_the_frames_of_their_own_segment():
    apply, variables = make("transformer", False)
    source, _, inputs = draw(False)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2]] * 2)
    targets = jnp.array([[1, 1, 2, 2, 2]] * 2)
    found = {"source_segment_ids": segments, "segment_ids": targets}
    before = apply(variables, source, inputs, **found)
    for segment, column, own in ((1, 0, slice(0, 2)), (2, 6, slice(2, 5))):
        changed = source.at[:, column].set(4 + (source[:, column] - 3) % 4)
        difference = np.abs(apply(variables, changed, inputs, **found) - before)
        assert difference[:, own].max() > 1e-4, segment
        difference[:, own] = 0
        assert difference.max() < 1e-6, segment
