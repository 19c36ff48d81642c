"""Lines of digits: whose images are in them, where they stand, and the batches made of them."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image as png

from jaxformer import config as configuration
from jaxformer.config import Config, ConfigError, DataConfig, ModelConfig, check
from jaxformer.data import (
    DataError,
    Tokenizers,
    build_tokenizers,
    encode_corpus,
    evaluation_batches,
    image_height,
    load_corpus,
    pair_batches,
    read_image,
    source_batches,
    training_batches,
    write_image,
)
from jaxformer.data.digits import draw, resampling, split_digits, string_lines
from jaxformer.data.images import HEIGHT, resize

datasets = pytest.importorskip("sklearn.datasets")

CONFIG = DataConfig(
    kind="digits",
    lines=200,
    digits_per_line=(1, 6),
    max_source_length=160,
    max_target_length=8,
    dev_fraction=0.2,
    test_fraction=0.2,
    buckets=2,
)


@pytest.fixture(scope="module")
def digits():
    found = datasets.load_digits()
    return found.images / 16, found.target


@pytest.fixture(scope="module")
def data():
    corpus = load_corpus(CONFIG)
    return encode_corpus(corpus, build_tokenizers(corpus, CONFIG), CONFIG)


@pytest.fixture
def tokenizers():
    return build_tokenizers(load_corpus(dataclasses.replace(CONFIG, lines=20)), CONFIG)


def stands_at(line, digit):
    return np.array_equal(line[: len(digit), : digit.shape[1]], digit)


def repeats(text):
    names = text.split()
    return sum(a == b for a, b in itertools.pairwise(names))


# ------------------------------------------------------------------ splits


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_every_digit_image_is_in_one_split(digits, split):
    images, labels = digits
    owners = split_digits(labels, dataclasses.replace(CONFIG, split=split))
    together = np.concatenate(list(owners.values()))
    assert sorted(together) == list(range(len(labels)))
    shares = [len(owners[name]) / len(labels) for name in ("train", "dev", "test")]
    np.testing.assert_allclose(shares, [0.6, 0.2, 0.2], atol=0.01)
    # Nor do two splits hold images that are equal pixel by pixel.
    bytes_of = {name: {images[n].tobytes() for n in own} for name, own in owners.items()}
    assert not bytes_of["train"] & (bytes_of["test"] | bytes_of["dev"])
    assert not bytes_of["dev"] & bytes_of["test"]


def test_splits_by_hash_hold_every_class_alike_and_depend_on_the_seed(digits):
    _, labels = digits
    owners = split_digits(labels, CONFIG)
    for digit in range(10):
        share = np.mean(labels[owners["test"]] == digit)
        assert share == pytest.approx(np.mean(labels == digit), abs=0.01)
    other = split_digits(labels, dataclasses.replace(CONFIG, seed=1))
    assert set(other["test"]) != set(owners["test"])


def test_split_by_tail_keeps_the_end_of_the_file_for_the_test(digits):
    _, labels = digits
    owners = split_digits(labels, dataclasses.replace(CONFIG, split="tail"))
    assert owners["train"].max() < owners["dev"].min()
    assert owners["dev"].max() < owners["test"].min()


# ------------------------------------------------------------------ lines


def test_digits_cut_from_a_line_are_those_that_its_label_names(digits):
    """Every run of inked columns is found, pixel by pixel, among the digits of its own split."""
    images, labels = digits
    own = np.arange(300, 600)
    drawings = draw(images)
    random = np.random.default_rng(0)
    for line, members in string_lines(random, 30, own, labels, drawings, (1, 6)):
        assert set(members) <= set(own)
        place = 0
        for member in members:
            place += int(np.flatnonzero(line[place:].any(1))[0])
            fitting = [
                len(digit)
                for digit in (drawing.digit(int(member)) for drawing in drawings)
                for top in range(HEIGHT - digit.shape[1] + 1)
                if stands_at(line[place:, top:], digit)
            ]
            # A smaller digit may fit into a larger one.
            place += max(fitting)
        assert not line[place:].any()


def test_a_digit_at_the_size_of_the_file_is_the_files(digits):
    images, _ = digits
    rows, columns = resampling(8, 8, 1.0, 0.0)
    np.testing.assert_allclose(np.einsum("yr,yxc,rc->yx", rows, columns, images[3]), images[3])
    np.testing.assert_allclose(resize(images[:3], 8, 8), images[:3])


def test_digits_are_drawn_in_every_height_width_and_slant(digits):
    """Of a bar in the middle: as high as asked, as wide, and with the top leaning to the right."""
    bar = np.zeros((1, 8, 8))
    bar[:, :, 3:5] = 1
    seen = set()
    for drawing in draw(bar):
        picture = drawing.digit(0).T / 255.0
        assert picture.any(0).all() and picture.any(1).all()
        centres = (picture * np.arange(picture.shape[1])).sum(1) / picture.sum(1)
        slant = round((centres[0] - centres[-1]) / (len(picture) - 1), 1)
        width = 4 * picture.sum() / len(picture) ** 2
        nearest = min((0.85, 1.0, 1.15), key=lambda wanted: abs(width - wanted))
        assert width == pytest.approx(nearest, abs=0.07)
        seen.add((len(picture), nearest, slant))
    assert seen == set(itertools.product(range(9, HEIGHT + 1), (0.85, 1.0, 1.15), (-0.2, 0.0, 0.2)))


def test_shrinking_keeps_the_mean_of_a_picture():
    picture = np.random.default_rng(0).random((48, 96))
    smaller = resize(picture, 16, 32)
    assert smaller.mean() == pytest.approx(picture.mean(), rel=0.01)


def test_lines_use_all_heights_places_and_lengths_and_repeat_digits(data):
    split = data.splits["train"]
    texts = [example.references[0] for example in split.examples]
    assert {len(text.split()) for text in texts} == set(range(1, 7))
    assert 0.2 < np.mean([repeats(text) > 0 for text in texts]) < 0.9
    tops = {int(np.flatnonzero(split.sources[n].any(0))[0]) for n in range(len(texts))}
    assert len(tops) > 3


def test_every_line_has_a_frame_for_each_label_and_repeat_at_half_its_width(data):
    for split in data.splits.values():
        for number, example in enumerate(split.examples):
            text = example.references[0]
            assert len(split.sources[number]) // 2 >= len(text.split()) + repeats(text)


def test_data_follow_from_their_seed_alone(data):
    def fingerprint(**options):
        config = dataclasses.replace(CONFIG, **options)
        corpus = load_corpus(config)
        return encode_corpus(corpus, build_tokenizers(corpus, config), config).fingerprint()

    assert fingerprint() == data.fingerprint()
    assert fingerprint(seed=1) != data.fingerprint()
    assert fingerprint(split="tail") != data.fingerprint()


def test_report_counts_images_lines_and_columns(data):
    lines = data.report.lines()
    assert lines[0].startswith("train: 1,079 digit images, 120 lines, ")
    assert "columns of pixels" in lines[0] and lines[-1].startswith("batch shapes")


# ------------------------------------------------------------------ batches


def test_batches_hold_the_lines_padded_and_their_labels(data):
    seen = 0
    split = data.splits["test"]
    for batch in evaluation_batches(data, CONFIG, "test", batch_size=16):
        columns = batch["source"].shape[1]
        assert batch["source"].dtype == np.float32
        assert batch["source"].shape == (16, columns, HEIGHT)
        assert batch["source_segment_ids"].shape == (16, columns)
        for row, item in enumerate(batch["index"]):
            real = batch["source_segment_ids"][row]
            assert not batch["source"][row][real == 0].any()
            if item < 0:
                assert not real.any() and not batch["weights"][row].any()
                continue
            seen += 1
            image = split.sources[int(item)]
            assert real.sum() == len(image) and real[: len(image)].all()
            np.testing.assert_array_equal(np.rint(batch["source"][row, : len(image)] * 255), image)
            digits = [int(name) for name in split.examples[item].references[0].split()]
            # <pad>, <sos>, <eos> and <unk> come before 0; <eos> ends the labels, no image.
            wanted = [digit + 4 for digit in digits] + [2]
            assert batch["targets"][row][: len(wanted)].tolist() == wanted
    assert seen == len(split.examples)


def test_pixels_use_the_whole_range_and_no_more(data):
    batch = next(training_batches(data, CONFIG, batch_size=32, seed=0))
    assert batch["source"].min() == 0 and batch["source"].max() == 1
    assert len(np.unique(batch["source"])) > 50


def test_batches_resume_bitwise_and_each_process_has_its_rows(data):
    batches = training_batches(data, CONFIG, batch_size=8, seed=3)
    for _ in range(20):
        next(batches)
    state = batches.get_state()
    wanted = [next(batches) for _ in range(3)]
    again = training_batches(data, CONFIG, batch_size=8, seed=3)
    again.set_state(state)
    second = training_batches(data, CONFIG, batch_size=8, seed=3, process_index=1, process_count=2)
    second.set_state(state)
    for batch in wanted:
        other, part = next(again), next(second)
        for name, values in batch.items():
            np.testing.assert_array_equal(values, other[name])
            np.testing.assert_array_equal(values[4:], part[name])


def test_given_images_are_batched_as_the_splits_are(data, tokenizers):
    split = data.splits["test"]
    images = [split.source(number) for number in (5, 0, 9)]
    found = {}
    for batch in source_batches(images, tokenizers, CONFIG, batch_size=2):
        assert batch["source"].dtype == np.float32
        for row, index in enumerate(batch["index"]):
            if index >= 0:
                real = batch["source_segment_ids"][row].sum()
                found[int(index)] = batch["source"][row, :real]
    for number, image in enumerate(images):
        np.testing.assert_array_equal(found[number], (image / np.float32(255)))


# ------------------------------------------------------------------ tokenizers, sizes


def test_tokenizers_name_the_ten_digits_and_come_back_from_disk(tokenizers, tmp_path):
    assert tokenizers.source is None
    assert tokenizers.target.encode("0 9 9") == [4, 13, 13]
    tokenizers.save(tmp_path)
    assert Tokenizers.load(tmp_path) == tokenizers
    assert image_height(CONFIG) == HEIGHT
    assert image_height(DataConfig()) is None


# ------------------------------------------------------------------ pictures


def test_a_written_line_is_read_as_it_was(data, tmp_path):
    image = data.splits["test"].source(0)
    write_image(tmp_path / "line.png", image)
    read = read_image(tmp_path / "line.png")
    # The darkest of a line is stretched to the full range, which it nearly has.
    np.testing.assert_allclose(read.astype(int), image.astype(int), atol=2)
    assert read.dtype == np.uint8


def test_size_polarity_colour_and_transparency_of_a_picture_do_not_matter(tmp_path):
    ink = np.zeros((32, 80))
    ink[8:24, 20:30] = ink[8:24, 50:60] = 1
    pictures = {
        "dark.png": 1 - ink,
        "light.png": ink,
        "grey.png": 0.8 - 0.5 * ink,
        "large.png": np.kron(1 - ink, np.ones((4, 4))),
        "red.png": np.stack([np.ones_like(ink), 1 - ink, 1 - ink], -1),
        "clear.png": np.stack([np.zeros_like(ink)] * 3 + [ink], -1),
    }
    images = {}
    for name, picture in pictures.items():
        if picture.ndim == 2:
            png.imsave(tmp_path / name, picture, cmap="gray", vmin=0, vmax=1)
        else:
            png.imsave(tmp_path / name, picture)
        images[name] = read_image(tmp_path / name).astype(int)
    for name, image in images.items():
        assert image.shape == (40, HEIGHT), name
        np.testing.assert_allclose(image, images["dark.png"], atol=4, err_msg=name)
    assert images["dark.png"][12, 8] == 255 and images["dark.png"][0, 0] == 0


def test_what_is_no_picture_of_a_line_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("3 1 4")
    with pytest.raises(DataError, match=r"text\.png is not a picture .*save it as PNG"):
        read_image(tmp_path / "text.png")
    png.imsave(tmp_path / "cut.png", np.eye(20), cmap="gray")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(DataError, match="is not a picture"):
        read_image(tmp_path / "cut.png")
    png.imsave(tmp_path / "blank.png", np.ones((16, 40)), cmap="gray", vmin=0, vmax=1)
    with pytest.raises(DataError, match=r"blank\.png is blank"):
        read_image(tmp_path / "blank.png")


# ------------------------------------------------------------------ refusals


def test_sources_that_do_not_fit_are_refused(tokenizers):
    image = np.zeros((10, HEIGHT), np.uint8)
    with pytest.raises(DataError, match=r"source 2 is 161 pixels wide .* the model takes 1 to 160"):
        source_batches([image, np.zeros((161, HEIGHT), np.uint8)], tokenizers, CONFIG, batch_size=2)
    with pytest.raises(DataError, match=r"source 2 is text. Fix: give images"):
        source_batches([image, "3 1"], tokenizers, CONFIG, batch_size=2)
    with pytest.raises(ValueError, match=r"an image is uint8\[columns, 16\]"):
        source_batches([image[:, :8]], tokenizers, CONFIG, batch_size=2)
    with pytest.raises(DataError, match="sources of this run are images"):
        pair_batches(["3\t3"], tokenizers, CONFIG, batch_size=2)
    assert source_batches([], tokenizers, CONFIG, batch_size=2) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_source_length=100), r"data.max_source_length=100 has no room for lines of 6"),
        (dict(max_target_length=6), "data.max_target_length=6 has no room .* at least 7"),
        (dict(lines=2), "the dev split is empty"),
    ],
)
def test_data_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        load_corpus(dataclasses.replace(CONFIG, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lines=0), "data.lines must be positive"),
        (dict(digits_per_line=(0, 4)), "data.digits_per_line"),
        (dict(digits_per_line=(5, 4)), "data.digits_per_line"),
        (dict(seed=-1), "data.seed"),
        (dict(files=("a.png",)), "data.files"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    config = Config(data=CONFIG, model=ModelConfig(kind="ctc", max_length=160))
    assert check(config) is config
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(config, data=dataclasses.replace(CONFIG, **options)))


def test_options_come_back_from_disk(tmp_path):
    config = Config(data=CONFIG, model=ModelConfig(kind="ctc", max_length=160))
    configuration.save(config, tmp_path / "config.json")
    assert configuration.load(tmp_path / "config.json") == config


def test_without_scikit_learn_the_fix_is_named():
    program = (
        "import sys; sys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None\n"
        "from jaxformer.config import DataConfig\n"
        "from jaxformer.data.digits import load_digits_lines\n"
        "try:\n"
        "    load_digits_lines(DataConfig(kind='digits', max_source_length=256))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (
        found.stdout.startswith("DataError") and "pip install 'scikit-learn>=1.5'" in found.stdout
    )
