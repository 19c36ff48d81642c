"""Batches of text: documents packed into rows, each batch computed from its number alone."""

import numpy as np

from jaxformer.data.encoding import Stream
from jaxformer.data.plan import Batch, EpochPlans, generator, share_of
from jaxformer.data.tokenizers import EOS, PAD


class TextBatches(EpochPlans):
    """Batch n of a split of text, for any n, as one process sees it.

    The documents of an epoch, in shuffled order, stand end to end, each as sos + text for input
    and text + eos for target: the first token is predicted from sos, eos is learnt as the end, and
    no target lies in another document. The cuts into rows of T tokens begin at another offset each
    epoch, and rows come in shuffled order. Every token is a target exactly once an epoch; only the
    last row has padding.

    A batch: `inputs`, `targets`, `segment_ids`, `positions` int32[B, T], `weights` float32[B, T].
    Segment ids number the pieces of documents in a row from 1, 0 is padding; positions count from
    0 in each piece; weights are 1 on tokens and 0 on padding, where all else is 0 too. When not
    training, documents keep their order, rows are cut from the first token on, and `index`
    int32[B] is the row, -1 for an empty one.
    """

    def __init__(
        self,
        stream: Stream,
        length: int,
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        training: bool = True,
    ):
        self.documents, self.length, self.batch_size = stream.documents, length, batch_size
        self.seed, self.training = seed, training
        self.share = share_of(batch_size, process_index, process_count)
        self.rows = -(-len(self.documents.tokens) // length)
        super().__init__(-(-self.rows // batch_size))

    def make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
        """Document order, their starts in that order, the cuts' offset, rows int64[batches, B]."""
        random = generator(self.seed, epoch)
        order = np.arange(len(self.documents))
        offset = 0
        if self.training:
            order = random.permutation(order)
            offset = int(random.integers(self.length))
        ends = np.cumsum(self.documents.lengths[order])
        rows = np.full(self.batches_per_epoch * self.batch_size, -1)
        rows[: self.rows] = random.permutation(self.rows)
        starts = np.concatenate([[0], ends[:-1]])
        return order, starts, offset, rows.reshape(-1, self.batch_size)

    def make_batch(
        self, plan: tuple[np.ndarray, np.ndarray, int, np.ndarray], number: int
    ) -> Batch:
        """Batch `number` of an epoch's plan."""
        order, starts, offset, all_rows = plan
        rows = all_rows[number][self.share]
        total = len(self.documents.tokens)
        # One column more than a row: the targets are the inputs of the next place. The stream is
        # a ring, so that a cut that does not begin at its start loses nothing.
        columns = rows[:, None] * self.length + np.arange(self.length + 1)
        real = (rows[:, None] >= 0) & (columns < total)[:, :-1]
        places = (columns + offset) % total
        document = np.searchsorted(starts, places, side="right") - 1
        within = places - starts[document]
        tokens = self.documents.tokens[self.documents.offsets[order[document]] + within]
        begins = within == 0
        targets = np.where(begins[:, 1:], EOS, tokens[:, 1:])
        piece_begins = begins[:, :-1].copy()
        piece_begins[:, 0] = True
        column = np.arange(self.length)
        positions = column - np.maximum.accumulate(np.where(piece_begins, column, 0), axis=1)
        batch = {
            "inputs": np.where(real, tokens[:, :-1], PAD).astype(np.int32),
            "targets": np.where(real, targets, PAD).astype(np.int32),
            "weights": real.astype(np.float32),
            "segment_ids": np.where(real, piece_begins.cumsum(axis=1), 0).astype(np.int32),
            "positions": np.where(real, positions, 0).astype(np.int32),
        }
        if not self.training:
            batch["index"] = rows.astype(np.int32)
        return batch
