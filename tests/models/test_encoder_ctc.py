"""An encoder with CTC: its frames, of tokens and of images, and what padding may change in them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.config import CTCConfig, ModelConfig
from jaxformer.models import EncoderCTC, abstract, build, model_inputs
from jaxformer.nn import count, pure, statistics, with_statistics

VOCABULARY, SOURCES, HEIGHT, UPSAMPLE = 11, 9, 9, 3
ROWS, LENGTHS = 2, (8, 5)


@functools.cache
def make(encoder, *, images, **options):
    """Compiled apply, parameters away from where they start, and running statistics."""
    config = ModelConfig(
        kind="ctc",
        layers=1,
        width=8,
        heads=2,
        max_length=40,
        scan=False,
        ctc=CTCConfig(encoder=encoder, upsample=UPSAMPLE, channels=(3, 4)),
        **options,
    )
    sources: dict[str, Any] = {"image_height": HEIGHT} if images else {"source_vocabulary": SOURCES}
    model = build(config, vocabulary=VOCABULARY, **sources)
    apply, params = pure(model)
    random = np.random.default_rng(0)
    move = lambda leaf: leaf + 0.3 * jnp.asarray(random.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    compiled = jax.jit(apply, static_argnames=("method", "training"))
    return compiled, jax.tree.map(move, params), statistics(model)


def draw(*, images, padding=0):
    """A batch whose second row has padding, and `padding` columns more of it in both."""
    random = np.random.default_rng(1)
    columns = max(LENGTHS) + padding
    real = (np.arange(columns) < np.array(LENGTHS)[:, None]).astype(np.int32)
    if images:
        source = np.zeros((ROWS, columns, HEIGHT), np.float32)
        source[:, : max(LENGTHS)] = random.uniform(size=(ROWS, max(LENGTHS), HEIGHT))
    else:
        source = np.zeros((ROWS, columns), np.int32)
        source[:, : max(LENGTHS)] = random.integers(4, SOURCES, (ROWS, max(LENGTHS)))
    return {"source": jnp.asarray(source), "source_segment_ids": jnp.asarray(real)}


KINDS = [("transformer", False), ("lstm", False), ("transformer", True), ("lstm", True)]
frames_of = pytest.mark.parametrize(("encoder", "images"), KINDS)


def run(apply, params, running, batch, **options):
    return apply(params, **batch, statistics=running, method="predictions", **options)


@frames_of
def test_predictions_have_float32_logits_and_the_lengths_of_the_rows(encoder, images):
    apply, params, running = make(encoder, images=images)
    batch = draw(images=images)
    frames = run(apply, params, running, batch)
    counts = [-(-n // 2) if images else n * UPSAMPLE for n in LENGTHS]
    assert frames.logits.shape == (ROWS, counts[0], VOCABULARY)
    assert frames.logits.dtype == jnp.float32
    np.testing.assert_array_equal(frames.lengths, counts)
    np.testing.assert_array_equal(apply(params, **batch, statistics=running), frames.logits)
    x, segment_ids = apply(params, *batch.values(), statistics=running, method="frames")
    assert x.shape == (ROWS, counts[0], 8)
    np.testing.assert_array_equal(segment_ids.sum(1), counts)


@frames_of
def test_more_padding_changes_no_real_frame(encoder, images):
    apply, params, running = make(encoder, images=images)
    alone = run(apply, params, running, draw(images=images))
    batch = draw(images=images, padding=3)
    noise = 7 if images else 5
    outside = batch["source_segment_ids"] == 0
    outside = outside[..., None] if images else outside
    batch["source"] = jnp.where(outside, noise, batch["source"]).astype(batch["source"].dtype)
    padded = run(apply, params, running, batch)
    np.testing.assert_array_equal(padded.lengths, alone.lengths)
    for row, frames in enumerate(alone.lengths):
        np.testing.assert_allclose(
            padded.logits[row, :frames], alone.logits[row, :frames], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("encoder", ["transformer", "lstm"])
def test_more_padding_changes_nothing_in_training_on_images(encoder):
    apply, params, running = make(encoder, images=True)
    (alone, new), (padded, new_padded) = (
        run(apply, params, running, draw(images=True, padding=padding), training=True)
        for padding in (0, 3)
    )
    for found, expected in zip(jax.tree.leaves(new_padded), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    for row, frames in enumerate(alone.lengths):
        np.testing.assert_allclose(
            padded.logits[row, :frames], alone.logits[row, :frames], atol=1e-5, rtol=1e-5
        )


def test_a_row_of_padding_changes_no_statistics():
    apply, params, running = make("lstm", images=True)
    batch = draw(images=True)
    wider = {name: jnp.concatenate([value, 0 * value[:1]]) for name, value in batch.items()}
    wider["source"] = wider["source"].at[-1].set(3)
    new = run(apply, params, running, batch, training=True)[1]
    found = run(apply, params, running, wider, training=True)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, new)


def test_training_takes_the_batchs_statistics_and_evaluation_the_running_ones():
    apply, params, running = make("lstm", images=True)
    batch = draw(images=True)
    evaluated = run(apply, params, running, batch)
    trained, new = run(apply, params, running, batch, training=True)
    assert np.abs(trained.logits - evaluated.logits).max() > 1e-3
    for _ in range(100):
        _, new = run(apply, params, new, batch, training=True)
    # By now the running statistics are the batch's own, up to the unbiased factor of a variance.
    np.testing.assert_allclose(
        run(apply, params, new, batch).logits, trained.logits, atol=0.05, rtol=0.05
    )
    merged = apply(with_statistics(params, new), **batch, method="predictions")
    np.testing.assert_array_equal(merged.logits, run(apply, params, new, batch).logits)


@frames_of
def test_gradients_are_finite_and_reach_every_parameter(encoder, images):
    apply, params, running = make(encoder, images=images)
    batch = draw(images=images)
    weights = np.random.default_rng(2).normal(size=(ROWS, 1, VOCABULARY))

    def loss(params):
        frames, _ = run(apply, params, running, batch, training=True)
        return (jax.nn.log_softmax(frames.logits) * weights).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


def test_copies_of_a_token_are_told_apart():
    # No positions: only the vector of the copy's number is left to differ.
    apply, params, running = make("transformer", images=False, position="none")
    logits = run(apply, params, running, draw(images=False)).logits
    by_copy = np.asarray(logits).reshape(ROWS, -1, UPSAMPLE, VOCABULARY)
    assert np.abs(by_copy[:, :, 1:] - by_copy[:, :, :1]).max() > 1e-2


def test_the_target_side_of_a_batch_is_not_read():
    apply, params, _ = make("transformer", images=False)
    batch = draw(images=False)
    whole = batch | {"inputs": jnp.full((ROWS, 4), 5), "segment_ids": jnp.ones((ROWS, 4), int)}
    whole |= {"targets": jnp.full((ROWS, 4), 5), "weights": jnp.ones((ROWS, 4))}
    found = apply(params, **model_inputs(whole), method="predictions")
    np.testing.assert_array_equal(found.logits, apply(params, **batch, method="predictions").logits)


def test_dropout_needs_a_key():
    for encoder in ("transformer", "lstm"):
        apply, params, _ = make(encoder, images=False, dropout=0.5)
        batch = draw(images=False)
        plain = apply(params, **batch)
        np.testing.assert_array_equal(plain, apply(params, **batch))
        dropped = [apply(params, **batch, key=jax.random.key(seed)) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(dropped[0], dropped[1])
        assert np.abs(dropped[0] - plain).max() > 1e-3 < np.abs(dropped[0] - dropped[2]).max()


CONFIG = ModelConfig(kind="ctc", layers=1, width=8, heads=2)


def test_abstract_model_has_the_shapes_of_the_built_one():
    kinds: list[dict[str, Any]] = [{"image_height": HEIGHT}, {"source_vocabulary": SOURCES}]
    for sources in kinds:
        model = build(CONFIG, vocabulary=VOCABULARY, **sources)
        shapes = abstract(CONFIG, vocabulary=VOCABULARY, **sources)
        assert isinstance(shapes, EncoderCTC)
        assert count(pure(shapes)[1]) == count(pure(model)[1])
        assert jax.tree.structure(statistics(shapes)) == jax.tree.structure(statistics(model))


def test_what_cannot_be_built_or_read_is_refused():
    replace = dataclasses.replace
    with pytest.raises(ValueError, match=r"'encoder_decoder' does not read images: set model.kind"):
        build(replace(CONFIG, kind="encoder_decoder"), vocabulary=9, image_height=16)
    with pytest.raises(ValueError, match="give image_height or source_vocabulary, not both"):
        build(CONFIG, vocabulary=9, source_vocabulary=5, image_height=16)
    with pytest.raises(ValueError, match="image_height=0 must be positive"):
        build(CONFIG, vocabulary=9, image_height=0)
    with pytest.raises(ValueError, match="shared_embeddings is for encoder_decoder"):
        build(replace(CONFIG, shared_embeddings=True), vocabulary=9)
    odd = replace(CONFIG, width=9, heads=3, ctc=CTCConfig(encoder="lstm"))
    with pytest.raises(ValueError, match=r"even model.width, not 9: .*bidirectional=False"):
        build(odd, vocabulary=9)
    apply, params, running = make("lstm", images=True)
    batch = draw(images=True)
    batch["source"] = batch["source"][:, :, :4]
    with pytest.raises(ValueError, match=r"images 9 pixels high, not 4: .* image_height=4"):
        run(apply, params, running, batch)
    with pytest.raises(ValueError, match="normalises with running statistics: pass"):
        apply(params, **draw(images=True))
    apply, params, _ = make("transformer", images=False)
    with pytest.raises(ValueError, match="a sequence of 42 tokens is longer than"):
        apply(params, jnp.ones((1, 14), jnp.int32))
