"""What all batch sources share: one plan an epoch, any batch of it by number."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from jaxformer.data.corpus import DataError

Batch = dict[str, np.ndarray]

PLANS_KEPT = 2


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Random numbers that depend on the seed and on what they are for, and on nothing else."""
    return np.random.default_rng([seed % 2**64, *stream])


def share_of(batch_size: int, process_index: int, process_count: int) -> slice:
    """A process's own rows of the global batch. Raises DataError if they do not divide evenly."""
    if batch_size % process_count:
        raise DataError(
            f"a batch of {batch_size} rows does not divide over {process_count} processes. "
            "Fix: make the batch size a multiple of the number of processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} of process_count={process_count}")
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


class EpochPlans(ABC):
    """Batch n as a function of n: the plan of epoch n // per_epoch, then its n % per_epoch-th.

    `source[n]` is a dictionary of arrays. Plans are kept for the last few epochs asked for, which
    spares time and changes nothing.
    """

    def __init__(self, batches_per_epoch: int):
        if not batches_per_epoch:
            raise DataError("there is nothing to make batches of: the split is empty")
        self.batches_per_epoch = batches_per_epoch
        self._plans: dict[int, Any] = {}

    @abstractmethod
    def make_plan(self, epoch: int) -> Any:
        """What an epoch's batches hold, from (seed, epoch)."""

    @abstractmethod
    def make_batch(self, plan: Any, number: int) -> Batch:
        """One batch of a plan."""

    def __len__(self) -> int:
        # Training ends by its number of steps, not by the data; len() takes no infinity.
        return 2**62

    def __getitem__(self, n: int) -> Batch:
        epoch, number = divmod(int(n), self.batches_per_epoch)
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self.make_plan(epoch)
            # A new dictionary, as other threads may be reading the old one.
            newest = dict(list(self._plans.items())[-(PLANS_KEPT - 1) :])
            self._plans = newest | {epoch: plan}
        return self.make_batch(plan, number)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": {}}
