import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data import EOS, PAD, SOS, DataError, evaluation_batches, source_batches
from jaxformer.data.bucketing import PairBatches
from jaxformer.data.encoding import PairSplit, Ragged
from jaxformer.data.lengths import assign, choose_shapes, cover, padding_share

lengths_strategy = st.lists(
    st.tuples(st.integers(1, 100), st.integers(1, 50)), min_size=1, max_size=80
)


def arrays(pairs):
    return np.array([s for s, _ in pairs]), np.array([t for _, t in pairs])


def make_split(pairs, buckets=3):
    """Items whose tokens name them: item i is i + 10, repeated to its lengths, eos last."""
    sources, targets = arrays(pairs)
    shapes = choose_shapes(sources, targets, buckets, (100, 50))
    sides = [
        Ragged.build(
            [np.full(length - 1, number + 10) for number, length in enumerate(side)],
            2**16,
            last=EOS,
        )
        for side in (sources, targets)
    ]
    return PairSplit((), *sides, np.arange(len(pairs)), shapes)


class TestShapes:
    @settings(deadline=None)
    @given(lengths_strategy, st.integers(1, 6))
    def test_they_are_few_nested_within_the_limits_and_hold_everything(self, pairs, buckets):
        sources, targets = arrays(pairs)
        shapes = choose_shapes(sources, targets, buckets, (100, 50))
        assert 1 <= len(shapes) <= buckets
        for small, large in itertools.pairwise(shapes):
            assert small[0] <= large[0]
            assert small[1] <= large[1]
        for s, t in shapes:
            assert s == 100 or s % (8 if s > 64 else 4) == 0
            assert t == 50 or t % 4 == 0
        numbers = assign(sources, targets, shapes)
        limits = np.array(shapes)[numbers]
        assert np.all(sources <= limits[:, 0])
        assert np.all(targets <= limits[:, 1])
        assert set(numbers) == set(range(len(shapes))), "a shape without items is compiled in vain"

    @settings(deadline=None, max_examples=30)
    @given(lengths_strategy)
    def test_more_buckets_never_mean_more_padding(self, pairs):
        lengths = arrays(pairs)
        shares = [
            padding_share(*lengths, choose_shapes(*lengths, buckets, (100, 50)))
            for buckets in (1, 2, 4, 8)
        ]
        assert shares == sorted(shares, reverse=True)

    def test_both_sides_count(self):
        generator = np.random.default_rng(0)
        sources = generator.integers(8, 10, 1000)
        targets = np.where(generator.random(1000) < 0.5, 4, 40)
        shapes = choose_shapes(sources, targets, 2, (64, 64))
        assert shapes == ((12, 4), (12, 40))

    def test_a_few_long_items_do_not_widen_the_rest(self):
        lengths = np.array([8] * 1000 + [60])
        assert choose_shapes(lengths, lengths, 2, (64, 64)) == ((8, 8), (60, 60))

    def test_a_longer_split_gets_one_shape_more(self):
        lengths = np.array([8, 16])
        shapes = ((8, 8), (16, 16))
        assert cover(shapes, lengths, lengths, (64, 64)) == shapes
        assert cover(shapes, np.array([30]), np.array([4]), (64, 64)) == (*shapes, (32, 16))
        assert cover(shapes, np.zeros(0, int), np.zeros(0, int), (64, 64)) == shapes

    def test_a_shape_does_not_pass_the_limit(self):
        assert choose_shapes(np.array([49]), np.array([50]), 1, (49, 50)) == ((49, 50),)


@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 9), st.integers(0, 3))
def test_every_item_is_visited_exactly_once_an_epoch(pairs, batch_size, epoch):
    split = make_split(pairs)
    batches = PairBatches(split, batch_size, seed=1, with_index=True)
    count = batches.batches_per_epoch
    seen = Counter()
    partial = 0
    for n in range(epoch * count, (epoch + 1) * count):
        batch = batches[n]
        partial += bool((batch["index"] < 0).any())
        assert (batch["source"].shape[1], batch["targets"].shape[1]) in split.shapes
        for row, index in enumerate(batch["index"]):
            if index < 0:
                assert not any(array[row].any() for name, array in batch.items() if name != "index")
                continue
            seen[int(index)] += 1
            source_length, target_length = pairs[index]
            token = index + 10
            source = [token] * (source_length - 1) + [EOS]
            target = [token] * (target_length - 1) + [EOS]
            width = batch["targets"].shape[1] - target_length
            assert batch["source"][row][:source_length].tolist() == source
            assert not batch["source"][row][source_length:].any()
            assert batch["targets"][row].tolist() == target + [PAD] * width
            assert batch["inputs"][row].tolist() == [SOS, *target[:-1]] + [PAD] * width
            assert batch["weights"][row].tolist() == [1.0] * target_length + [0.0] * width
            assert batch["segment_ids"][row].tolist() == [1] * target_length + [0] * width
            assert batch["source_segment_ids"][row].sum() == source_length
    assert seen == Counter(range(len(pairs)))
    assert partial <= 1


def test_arrays_have_the_documented_types():
    batch = PairBatches(make_split([(3, 4)] * 5), 2, seed=0)[0]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "source": "int32",
        "source_segment_ids": "int32",
        "inputs": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "weights": "float32",
    }


def test_batches_of_all_lengths_are_mixed_and_differ_between_epochs(make_pairs):
    _, _, data = make_pairs()
    batches = PairBatches(data.splits["train"], 8, seed=0)
    shapes = [batches.make_plan(epoch)[0].tolist() for epoch in (0, 1)]
    assert sorted(shapes[0]) == sorted(shapes[1]), "each shape has a fixed number of batches"
    assert shapes[0] != shapes[1]
    assert shapes[0] != sorted(shapes[0])


def test_each_reference_is_an_item_and_the_report_gives_the_padding(make_pairs):
    _, _, data = make_pairs()
    train = data.splits["train"]
    assert len(train.targets) == sum(len(example.references) for example in train.examples)
    assert train.examples[train.item_example[-1]].references
    assert any("of the train tokens are padding" in line for line in data.report.lines())


def test_evaluation_scores_every_reference_once(make_pairs):
    config, tokenizers, data = make_pairs()
    dev = data.splits["dev"]
    found = {}
    for batch in evaluation_batches(data, config, "dev", batch_size=8):
        for row, index in enumerate(batch["index"]):
            if index >= 0:
                source = tokenizers.source.decode(batch["source"][row])
                found[int(index)] = (source, tokenizers.target.decode(batch["targets"][row]))
    expected = [(example.source, text) for example in dev.examples for text in example.references]
    assert [found[index] for index in range(len(dev.targets))] == expected


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_make_up_the_global_batch(make_pairs, processes):
    _, _, data = make_pairs()
    whole = PairBatches(data.splits["train"], 8, seed=5)
    shares = [
        PairBatches(data.splits["train"], 8, seed=5, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    for n in range(whole.batches_per_epoch + 3):
        for name, array in whole[n].items():
            assert np.array_equal(array, np.concatenate([share[n][name] for share in shares]))


def test_rows_that_do_not_divide_over_the_processes_are_refused(make_pairs):
    _, _, data = make_pairs()
    with pytest.raises(DataError, match="multiple of the number of processes"):
        PairBatches(data.splits["train"], 9, seed=0, process_index=0, process_count=2)


class TestSourceBatches:
    @settings(deadline=None)
    @given(count=st.integers(1, 20), batch_size=st.integers(1, 8))
    def test_every_source_comes_back_by_its_index(self, count, batch_size):
        tokenizers, config = self.pieces()
        sources = ["ab"[number % 2] * (1 + 7 * number % 29) for number in range(count)]
        found = {}
        for batch in source_batches(sources, tokenizers, config, batch_size=batch_size):
            assert len(batch["source"]) <= batch_size
            assert batch["source"].shape[1] in (8, 16, 32)
            for row, index in enumerate(batch["index"]):
                ids = batch["source"][row]
                real = batch["source_segment_ids"][row].astype(bool)
                if index < 0:
                    assert not ids.any()
                    assert not real.any()
                    continue
                assert ids[real][-1] == EOS
                assert not ids[~real].any()
                found[int(index)] = tokenizers.source.decode(ids)
        assert [found[number] for number in range(count)] == sources

    def pieces(self):
        from jaxformer.config import DataConfig
        from jaxformer.data import Tokenizers
        from jaxformer.data.tokenizers import CharacterTokenizer, WordTokenizer

        tokenizers = Tokenizers(CharacterTokenizer("ab"), WordTokenizer(["A"]))
        return tokenizers, DataConfig(max_source_length=50)

    def test_words_are_typed_in_any_case(self):
        tokenizers, config = self.pieces()
        (batch,) = source_batches([" Ab\n"], tokenizers, config, batch_size=8)
        assert batch["source"].tolist() == [[4, 5, EOS, 0, 0, 0, 0, 0]]

    def test_the_longest_allowed_source_fits(self):
        tokenizers, config = self.pieces()
        (batch,) = source_batches(["a" * 49], tokenizers, config, batch_size=8)
        assert batch["source"].shape == (1, 50)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (" ", "source 2 is empty"),
            ("a" * 50, "source 2 has 51 tokens.*takes 50"),
            ("\udcff", "source 2 is not valid Unicode"),
        ],
    )
    def test_a_bad_source_is_refused_by_number(self, source, message):
        tokenizers, config = self.pieces()
        with pytest.raises(DataError, match=message):
            source_batches(["a", source], tokenizers, config, batch_size=8)

    def test_no_sources_are_no_batches(self):
        tokenizers, config = self.pieces()
        assert source_batches([], tokenizers, config, batch_size=8) == []
