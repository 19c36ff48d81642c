"""The input pipeline: endless training batches made ahead, single passes for evaluation.

Batch n depends on (seed, n) alone, so the state of training's data is the number n.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxformer.config import DataConfig
from jaxformer.data.bucketing import PairBatches
from jaxformer.data.encoding import Data, TextData
from jaxformer.data.packing import TextBatches
from jaxformer.data.plan import Batch, EpochPlans

READ_AHEAD = 8
EVALUATION_SEED = 0


class BatchIterator(Iterator[Batch]):
    """Endless batches, prepared ahead in a thread, or by Grain in `workers` processes.

    `get_state()` is `{"next_index": n}`, n the number of the batch that `next` will return, for
    any number of processes; `set_state` goes there. `close` ends the workers.
    """

    def __init__(self, source: EpochPlans, workers: int = 0):
        self.source = source
        self._workers = workers
        self._next_index = 0
        self._batches: Any = None

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

    def _start(self) -> Any:
        if not self._workers:
            return _InThread(self.source, self._next_index)
        import grain  # and Orbax with it, which take most of a second before the first step

        # Grain's own state counts per worker, which would tie a checkpoint to the number of
        # workers; as element n is batch n, starting late is all that restoring takes.
        batches = grain.MapDataset.source(_From(self.source, self._next_index))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
        _mark_flags_as_parsed()
        processes = grain.MultiprocessingOptions(
            num_workers=self._workers, per_worker_buffer_size=READ_AHEAD
        )
        return iter(batches.to_iter_dataset(options).mp_prefetch(processes))


class _InThread:
    """Batches `start`, `start` + 1, ... of a source, made ahead by one thread of this process.

    Grain's own threads give the same at twice the cost.
    """

    def __init__(self, source: EpochPlans, start: int):
        self.source = source
        self.numbers = itertools.count(start)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.ready: deque[Future[Batch]] = deque()
        for _ in range(READ_AHEAD):
            self._order()

    def __next__(self) -> Batch:
        batch = self.ready.popleft().result()
        self._order()
        return batch

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _order(self) -> None:
        self.ready.append(self.thread.submit(self.source.__getitem__, next(self.numbers)))


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
