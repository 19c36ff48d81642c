import dataclasses
import itertools
import json

import numpy as np
import pytest

from jaxformer.data import DataError, evaluation_batches, training_batches


@pytest.fixture(params=["text", "pairs"])
def prepared(request, make_text, make_pairs):
    """(config, data) of each kind."""
    config, _, data = (make_text if request.param == "text" else make_pairs)()
    return config, data


def start(prepared, seed=0, **options):
    config, data = prepared
    return training_batches(data, config, batch_size=4, seed=seed, **options)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]), name


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_batch_n_is_the_same_whatever_was_read_before(prepared):
    with start(prepared) as batches:
        count = 2 * batches.batches_per_epoch + 2
        read = take(batches, count)
    for n in reversed(range(count)):
        assert_equal(start(prepared).source[n], read[n])
    source = start(prepared).source
    for n in np.random.default_rng(0).permutation(count).tolist():
        assert_equal(source[n], read[n])


def test_restoring_gives_exactly_the_next_batch(prepared):
    with start(prepared) as batches:
        take(batches, 5)
        state = json.loads(json.dumps(batches.get_state()))
        expected = take(batches, 3)
    with start(prepared) as fresh:
        fresh.set_state(state)
        assert fresh.get_state() == state
        for batch, other in zip(take(fresh, 3), expected, strict=True):
            assert_equal(batch, other)
        fresh.set_state(state)
        assert_equal(next(fresh), expected[0])


def test_the_state_counts_what_was_taken_not_what_was_prepared(prepared):
    with start(prepared) as batches:
        assert batches.get_state() == {"next_index": 0}
        take(batches, 3)
        assert batches.get_state() == {"next_index": 3}


def test_a_closed_iterator_goes_on_where_it_was(prepared):
    with start(prepared) as batches:
        expected = take(batches, 4)
    batches = start(prepared)
    take(batches, 3)
    batches.close()
    assert_equal(next(batches), expected[3])
    batches.close()


def test_the_seed_changes_the_order(prepared):
    with start(prepared, seed=0) as first, start(prepared, seed=1) as second:
        assert any(
            a["inputs"].shape != b["inputs"].shape or not np.array_equal(a["inputs"], b["inputs"])
            for a, b in zip(take(first, 5), take(second, 5), strict=True)
        )


def test_a_negative_seed_is_a_seed(prepared):
    with start(prepared, seed=-1) as batches:
        next(batches)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_all_processes_make_up_the_global_batch(prepared, processes):
    with start(prepared) as batches:
        whole = take(batches, 6)
    shares = []
    for index in range(processes):
        with start(prepared, process_index=index, process_count=processes) as batches:
            shares.append(take(batches, 6))
    for n, batch in enumerate(whole):
        together = {name: np.concatenate([share[n][name] for share in shares]) for name in batch}
        assert_equal(batch, together)


def test_worker_processes_give_the_same_batches_and_exchange_states_with_threads(make_pairs):
    config, _, data = make_pairs()
    with start((config, data)) as batches:
        expected = take(batches, 8)
    with start((dataclasses.replace(config, workers=2), data)) as batches:
        for batch, other in zip(take(batches, 5), expected, strict=False):
            assert_equal(batch, other)
        state = batches.get_state()
    with start((config, data)) as batches:
        batches.set_state(state)
        assert_equal(next(batches), expected[5])
        state = batches.get_state()
    with start((dataclasses.replace(config, workers=1), data)) as batches:
        batches.set_state(state)
        assert_equal(next(batches), expected[6])


def test_one_pass_is_a_sequence(prepared):
    config, data = prepared
    batches = evaluation_batches(data, config, "train", batch_size=4)
    assert len(list(batches)) == len(batches)
    assert_equal(batches[-1], list(batches)[-1])
    assert len(batches[:2]) == 2
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_the_shares_of_an_evaluation_make_up_the_whole(prepared):
    config, data = prepared
    whole = evaluation_batches(data, config, "train", batch_size=4)
    shares = [
        evaluation_batches(
            data, config, "train", batch_size=4, process_index=index, process_count=2
        )
        for index in range(2)
    ]
    for n, batch in enumerate(whole):
        assert_equal(batch, {k: np.concatenate([s[n][k] for s in shares]) for k in batch})


def test_an_empty_split_cannot_be_evaluated(make_text):
    config, _, data = make_text()
    with pytest.raises(DataError, match="split is empty"):
        evaluation_batches(data, config, "test", batch_size=4)
