import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data import EOS, SOS, evaluation_batches, training_batches
from jaxformer.data.encoding import Ragged, Stream
from jaxformer.data.packing import TextBatches


def make_stream(sizes):
    """Documents whose tokens name document and place: 1000 x document + place + 10."""
    documents = [1000 * number + np.arange(size) + 10 for number, size in enumerate(sizes)]
    names = tuple(map(str, range(len(sizes))))
    return Stream(Ragged.build(documents, 2**16, first=SOS), names, sum(sizes))


def epoch_of(batches, epoch):
    count = batches.batches_per_epoch
    return [batches[epoch * count + number] for number in range(count)]


def predictions(batch):
    """(input, target) of every weighted place."""
    real = batch["weights"] > 0
    return list(zip(batch["inputs"][real].tolist(), batch["targets"][real].tolist(), strict=True))


sizes_strategy = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(deadline=None)
@given(sizes_strategy, st.integers(1, 40), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_every_token_is_a_target_once_an_epoch_and_none_crosses_documents(
    sizes, length, batch_size, epoch, training
):
    stream = make_stream(sizes)
    batches = TextBatches(stream, length, batch_size, seed=7, training=training)
    seen = [pair for batch in epoch_of(batches, epoch) for pair in predictions(batch)]
    expected = []
    for number, size in enumerate(sizes):
        tokens = [1000 * number + place + 10 for place in range(size)]
        expected += zip([SOS, *tokens], [*tokens, EOS], strict=True)
    assert sorted(seen) == sorted(expected)


@settings(deadline=None)
@given(sizes_strategy, st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_segments_and_positions_describe_the_pieces_of_documents(sizes, length, batch_size, epoch):
    batches = TextBatches(make_stream(sizes), length, batch_size, seed=3)
    for batch in epoch_of(batches, epoch):
        assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
            "inputs": ("int32", (batch_size, length)),
            "targets": ("int32", (batch_size, length)),
            "weights": ("float32", (batch_size, length)),
            "segment_ids": ("int32", (batch_size, length)),
            "positions": ("int32", (batch_size, length)),
        }
        assert np.array_equal(batch["weights"] > 0, batch["segment_ids"] > 0)
        for row in range(batch_size):
            segments, inputs = batch["segment_ids"][row], batch["inputs"][row]
            for array in batch.values():
                assert not array[row][segments == 0].any()
            real = segments[segments > 0]
            assert np.array_equal(np.unique(real), np.arange(1, len(set(real)) + 1))
            assert np.array_equal(real, np.sort(real))
            for segment in set(real):
                piece = segments == segment
                assert batch["positions"][row][piece].tolist() == list(range(piece.sum()))
                tokens = inputs[piece]
                assert SOS not in tokens[1:]
                body = tokens[1:] if tokens[0] == SOS else tokens
                assert len(set(body // 1000)) <= 1
                assert np.all(np.diff(body) == 1)
                assert EOS not in batch["targets"][row][piece][:-1]


def test_only_the_last_row_of_an_epoch_is_padded():
    batches = TextBatches(make_stream([50, 7, 200, 31]), 16, 4, seed=0)
    filled = np.concatenate([batch["weights"].sum(1) for batch in epoch_of(batches, 1)])
    total = 50 + 7 + 200 + 31 + 4
    assert sorted(filled)[::-1][: total // 16] == [16] * (total // 16)
    assert filled.sum() == total
    assert (filled > 0).sum() == -(-total // 16)


def test_cuts_and_order_change_with_the_epoch_and_the_seed():
    stream = make_stream([500])
    plans = [
        TextBatches(stream, 16, 4, seed=seed).make_plan(epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({offset for _, _, offset, _ in plans}) == 3
    assert len({rows.tobytes() for _, _, _, rows in plans}) == 3
    assert TextBatches(stream, 16, 4, seed=0).make_plan(1)[2] == plans[1][2]


def test_evaluation_starts_at_the_first_token_and_can_be_put_back_in_order(make_text):
    config, _, data = make_text()
    batches = evaluation_batches(data, config, "train", batch_size=4)
    rows = {}
    for batch in batches:
        for row, index in enumerate(batch["index"]):
            if index >= 0:
                assert index not in rows
                rows[index] = batch["inputs"][row]
            else:
                assert not batch["weights"][row].any()
    tokens = np.concatenate([rows[index] for index in sorted(rows)])
    stream = data.splits["train"].documents.tokens
    assert np.array_equal(tokens[: len(stream)], stream)
    assert not tokens[len(stream) :].any()


def test_evaluation_has_the_same_order_every_time(make_text):
    config, _, data = make_text()
    first, second = (
        [
            batch["index"].tolist()
            for batch in evaluation_batches(data, config, "train", batch_size=4)
        ]
        for _ in range(2)
    )
    assert first == second
    assert first != sorted(first), "the first batches would be no sample of the split"


def test_text_decodes_to_what_was_read(make_text):
    config, tokenizers, data = make_text(sizes=(40,), length=64)
    with training_batches(data, config, batch_size=1, seed=0) as batches:
        batch = next(batches)
    shifted = np.sort(batch["targets"][0])
    assert shifted.tolist() == sorted([0] * 23 + [EOS] + tokenizers.target.encode(read(config)))


def read(config):
    with open(config.files[0], encoding="utf-8") as file:
        return file.read()


def test_small_vocabularies_take_two_bytes_a_token_and_large_ones_four():
    assert Ragged.build([np.arange(3)], 2**16).tokens.dtype == np.uint16
    assert Ragged.build([np.arange(3)], 2**16 + 1).tokens.dtype == np.int32


def test_bytes_of_a_split_are_those_of_its_texts(make_text):
    _, _, data = make_text(sizes=(3, 4))
    assert data.splits["train"].bytes == 7


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_make_up_the_global_batch(processes):
    stream = make_stream([50, 7, 200, 31])
    whole = TextBatches(stream, 16, 8, seed=5)
    shares = [
        TextBatches(stream, 16, 8, seed=5, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    for n in (0, 1, whole.batches_per_epoch, 7 * whole.batches_per_epoch + 1):
        for name, array in whole[n].items():
            assert np.array_equal(array, np.concatenate([share[n][name] for share in shares]))
