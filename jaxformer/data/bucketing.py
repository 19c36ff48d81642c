"""Batches of pairs, by length bucket, each one computed from its number alone."""

import dataclasses
from typing import Any

import numpy as np

from jaxformer.data.encoding import PairSplit
from jaxformer.data.lengths import assign
from jaxformer.data.plan import Batch, EpochPlans, generator, share_of
from jaxformer.data.tokenizers import EOS, PAD, SOS


class PairBatches(EpochPlans):
    """Batch n of a split of pairs, for any n, as one process sees it.

    An epoch visits every item, that is every (source, reference), exactly once. As the shapes are
    nested, what does not fill a batch of one shape rides along in the next larger one: only the
    last batch of an epoch's plan has empty rows. Batches come in shuffled order.

    A batch: `source`, `source_segment_ids` int32[B, S] (images: `source` float32[B, S, height] in
    0..1, which is 1 at ink); `inputs` (sos + target), `targets`
    (target + eos), `segment_ids` int32[B, T]; `weights` float32[B, T]. Segment ids are 1 on tokens
    and 0 on padding, which is also where ids and weights are 0. With `with_index`, `index`
    int32[B] is the item, -1 in an empty row.
    """

    def __init__(
        self,
        split: PairSplit,
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        with_index: bool = False,
    ):
        # The texts stay behind: workers, to which this is sent, need the ids alone.
        self.split = dataclasses.replace(split, examples=())
        self.batch_size, self.seed = batch_size, seed
        self.share = share_of(batch_size, process_index, process_count)
        self.with_index = with_index
        buckets = assign(*split.item_lengths, split.shapes) if len(split.targets) else np.zeros(0)
        self.members = [np.flatnonzero(buckets == k) for k in range(len(split.shapes))]
        super().__init__(sum(len(rows) for rows in self._groups(None)))

    def make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shape number of each batch of an epoch, and its items, int64[batches, B]."""
        random = generator(self.seed, epoch)
        groups = self._groups(random)
        shapes = np.concatenate([np.full(len(rows), k) for k, rows in enumerate(groups)])
        order = random.permutation(len(shapes))
        return shapes[order], np.concatenate(groups)[order]

    def _groups(self, random: np.random.Generator | None) -> list[np.ndarray]:
        groups = []
        carried = np.zeros(0, np.int64)
        for number, members in enumerate(self.members):
            shuffled = members if random is None else random.permutation(members)
            items = np.concatenate([carried, shuffled]).astype(np.int64)
            whole = len(items) // self.batch_size * self.batch_size
            carried = items[whole:]
            if number == len(self.members) - 1 and len(carried):
                empty = np.full(self.batch_size - len(carried), -1)
                items, whole = np.concatenate([items, empty]), whole + self.batch_size
            groups.append(items[:whole].reshape(-1, self.batch_size))
        return groups

    def make_batch(self, plan: tuple[np.ndarray, np.ndarray], number: int) -> Batch:
        """Batch `number` of an epoch's plan."""
        shapes, rows = plan
        source_length, target_length = self.split.shapes[shapes[number]]
        items = rows[number][self.share]
        examples = np.where(items >= 0, self.split.item_example[items], -1)
        source, source_real = self.split.sources.gather(examples, source_length)
        targets, real = self.split.targets.gather(items, target_length)
        inputs = np.full_like(targets, SOS)
        inputs[:, 1:] = targets[:, :-1]
        batch = {
            "source": source,
            "source_segment_ids": source_real.astype(np.int32),
            "inputs": np.where(real, inputs, PAD).astype(np.int32),
            "targets": targets,
            "segment_ids": real.astype(np.int32),
            "weights": real.astype(np.float32),
        }
        if self.with_index:
            batch["index"] = items.astype(np.int32)
        return batch


def is_label(targets: Any, weights: Any) -> Any:
    """Where the targets of a batch of pairs are labels: neither <eos> nor padding; bool[B, T]."""
    return (weights != 0) & (targets != EOS)
