"""The input pipeline: endless training batches through Grain, single passes for evaluation.

Batch n depends on (seed, n) alone, so the state of training's data is the number n.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxformer.config import DataConfig
from jaxformer.data.bucketing import PairBatches
from jaxformer.data.corpus import DataError
from jaxformer.data.encoding import Data, Ragged, TextData
from jaxformer.data.packing import TextBatches
from jaxformer.data.plan import Batch, EpochPlans
from jaxformer.data.pronunciation import normalise_word
from jaxformer.data.tokenizers import EOS, Tokenizers

READ_AHEAD = 8
EVALUATION_SEED = 0
SMALLEST_SOURCE = 8


class BatchIterator(Iterator[Batch]):
    """Endless batches, prepared ahead by Grain in threads or processes.

    `get_state()` is `{"next_index": n}`, n the number of the batch that `next` will return, for
    any number of threads and processes; `set_state` goes there. `close` ends the workers.
    """

    def __init__(self, source: EpochPlans, workers: int = 0):
        self.source = source
        self._workers = workers
        self._next_index = 0
        self._batches: grain.DatasetIterator | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every item is seen once."""
        return self.source.batches_per_epoch

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The place in the data, as JSON values."""
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, Any]) -> None:
        """Makes `next` return the batch that it would have when `get_state` was called."""
        self.close()
        self._next_index = int(state["next_index"])

    def close(self) -> None:
        """Stops threads and processes; `next` starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> grain.DatasetIterator:
        # Grain's own state counts per worker, which would tie a checkpoint to the number of
        # workers; as element n is batch n, starting late is all that restoring takes.
        batches = grain.MapDataset.source(_From(self.source, self._next_index))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
        dataset = batches.to_iter_dataset(options)
        if self._workers:
            _mark_flags_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=READ_AHEAD
                )
            )
        return iter(dataset)


class _From:
    """A source of batches that begins at batch `start`."""

    def __init__(self, source: EpochPlans, start: int):
        self.source, self.start = source, start

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, index: int) -> Batch:
        return self.source[self.start + index]


def _mark_flags_as_parsed() -> None:
    # Grain's worker processes read absl flags, which fails in a program that has none to parse.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class OnePass(Sequence[Batch]):
    """The batches of one epoch, in a fixed order."""

    def __init__(self, source: EpochPlans):
        self.source = source

    def __len__(self) -> int:
        return self.source.batches_per_epoch

    def __getitem__(self, n):  # type: ignore[override]
        if isinstance(n, slice):
            return [self[number] for number in range(*n.indices(len(self)))]
        if not -len(self) <= n < len(self):
            raise IndexError(n)
        return self.source[n % len(self)]


def training_batches(
    data: Data,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Endless batches of the train split: `TextBatches` or `PairBatches`, which say what is in one.

    `batch_size` counts the rows of the global batch (for gradient accumulation, those of all its
    micro-batches: the rows of a batch have one shape and can be divided); a process gets its own
    contiguous rows of it. Raises DataError if the rows do not divide over the processes.
    """
    source = _source(
        data, config, "train", batch_size, seed, process_index, process_count, training=True
    )
    return BatchIterator(source, config.workers)


def evaluation_batches(
    data: Data,
    config: DataConfig,
    split: str,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> OnePass:
    """One pass over a split, as a sequence of batches with an additional `index` int32[B].

    The order is fixed but mixed, so that the first batches are a fair sample of the split; `index`
    is the item (pairs: one a (source, reference), see `PairSplit.item_example`) or row (text), -1
    in an empty row, whose weights are 0. Raises DataError if the split is empty.
    """
    return OnePass(
        _source(
            data,
            config,
            split,
            batch_size,
            EVALUATION_SEED,
            process_index,
            process_count,
            training=False,
        )
    )


def _source(
    data: Data,
    config: DataConfig,
    split: str,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    *,
    training: bool,
) -> EpochPlans:
    place = {"process_index": process_index, "process_count": process_count}
    if isinstance(data, TextData):
        return TextBatches(
            data.splits[split], config.length, batch_size, seed, training=training, **place
        )
    return PairBatches(data.splits[split], batch_size, seed, with_index=not training, **place)


def source_batches(
    sources: Sequence[str], tokenizers: Tokenizers, config: DataConfig, *, batch_size: int
) -> list[Batch]:
    """Batches of sources alone, to decode: any text, seen in training or not.

    Each has `source`, `source_segment_ids` int32[B, S] and `index` int32[B], the place in
    `sources`, -1 in an empty row. Sources of like length go together. So that few shapes are
    compiled, S is a power of two (or the longest allowed), and B is `batch_size`, or the power of
    two that holds all sources if there are fewer. Raises DataError on an empty source and on one
    longer than the model takes.
    """
    if tokenizers.source is None:
        raise ValueError("a language model has no sources to decode")
    limit = config.max_source_length
    sequences = []
    for number, text in enumerate(sources, start=1):
        normal = normalise_word(text) if config.kind == "pronunciation" else text.strip()
        if not normal:
            raise DataError(f"source {number} is empty. Fix: remove the line")
        try:
            sequence = tokenizers.source.encode_array(normal)
        except UnicodeEncodeError:
            fix = "Fix: read the sources as UTF-8"
            raise DataError(f"source {number} is not valid Unicode: {text[:40]!r}. {fix}") from None
        if len(sequence) + 1 > limit:
            raise DataError(
                f"source {number} has {len(sequence) + 1} tokens, <eos> included; the model takes "
                f"{limit}. Fix: shorten {text[:40]!r}"
            )
        sequences.append(sequence)
    if not sequences:
        return []
    ragged = Ragged.build(sequences, len(tokenizers.source), last=EOS)
    rows = min(batch_size, _power_of_two(len(sequences)))
    order = np.argsort(ragged.lengths, kind="stable")
    order = np.concatenate([order, np.full(-len(order) % rows, -1)])
    batches = []
    for index in order.reshape(-1, rows):
        longest = int(ragged.lengths[index[index >= 0]].max())
        width = min(max(_power_of_two(longest), SMALLEST_SOURCE), limit)
        source, real = ragged.gather(index, width)
        batches.append(
            {
                "source": source,
                "source_segment_ids": real.astype(np.int32),
                "index": index.astype(np.int32),
            }
        )
    return batches


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
