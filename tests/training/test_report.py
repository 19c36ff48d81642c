"""What a run says of itself before it starts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import nn
from jaxformer.config import Config, CTCConfig, DataConfig, ModelConfig
from jaxformer.data import build_tokenizers, encode_corpus, load_corpus
from jaxformer.models import build
from jaxformer.models.frames import frame_lengths
from jaxformer.training import report

FITS = ["ab\tA B C D E F", "abc\tA A A A", "a\tA B C"]
FITS_NOT = ["ab\tA B C D E F G", "abc\tA A A A A"]  # too many labels; too many with the repeats


def encoded(folder, lines, upsample):
    """(configuration, data) of a file of pairs; <eos> is a token of a source too."""
    # Each eight times under a name of its own, so that every split has some.
    lines = [f"{letter}{line[1:]}" for line in lines for letter in "abcdefgh"]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    data = DataConfig(
        kind="pairs",
        files=(str(folder / "pairs.tsv"),),
        tokenizer="character",
        dev_fraction=0.2,
        test_fraction=0.2,
    )
    model = ModelConfig(kind="ctc", ctc=CTCConfig(upsample=upsample))
    corpus = load_corpus(data)
    return Config(data=data, model=model), encode_corpus(
        corpus, build_tokenizers(corpus, data), data
    )


def test_targets_that_just_fit_into_the_frames_are_counted_as_fitting(tmp_path):
    config, data = encoded(tmp_path, FITS, upsample=2)
    assert report.alignment(config, data).startswith("every one of 24 targets fits")


def test_targets_that_need_a_frame_more_are_counted_and_the_fix_is_named(tmp_path):
    config, data = encoded(tmp_path, FITS + FITS_NOT, upsample=2)
    said = report.alignment(config, data)
    assert said.startswith("16 of 40 targets have more labels") and "model.ctc.upsample" in said
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, ctc=CTCConfig(upsample=4))
    )
    assert report.alignment(config, data).startswith("every one of 40")


@pytest.mark.parametrize("images", [False, True])
def test_frames_are_as_many_as_the_model_makes(images):
    config = ModelConfig(kind="ctc", layers=1, width=8, heads=2, ctc=CTCConfig("lstm", 3, (2, 2)))
    sizes = {"image_height": 6} if images else {"source_vocabulary": 5}
    model = build(config, vocabulary=5, **sizes)
    apply, params = nn.pure(model)
    lengths = np.array([1, 2, 5, 6])
    real = jnp.asarray(np.arange(6) < lengths[:, None], jnp.int32)
    source = jnp.ones((4, 6, 6), jnp.float32) if images else jnp.ones((4, 6), jnp.int32)
    variables = nn.with_statistics(params, nn.statistics(model))
    found = apply(variables, source, source_segment_ids=real, method="predictions").lengths
    np.testing.assert_array_equal(found, frame_lengths(config, lengths, images=images))
