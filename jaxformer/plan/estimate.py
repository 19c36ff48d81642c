"""How fast a step could be at best: three bounds from peaks, of which the largest holds."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxformer.config import Config
from jaxformer.plan.chips import Chip
from jaxformer.plan.hlo import Collective
from jaxformer.training.flops import Flops, training_flops
from jaxformer.training.memory import Memory

FORMULA = (
    "6 x matrix elements x tokens, and 12 x heads x head dim for each query and key that meet, a "
    "layer"
)


@dataclass(frozen=True)
class Bound:
    """The least time of a step, and what it comes from. Seconds; bytes and FLOPs of one device."""

    flops: float
    """That the model needs, 6 a parameter and token."""
    recomputed: float
    """That remat adds."""
    moved: float
    """Bytes between memory and chip."""
    sent: float
    """Bytes to other devices, those to other hosts included."""
    sent_between_hosts: float
    compute_seconds: float
    memory_seconds: float
    link_seconds: float

    @property
    def seconds(self) -> float:
        """Were all three to overlap without a gap, the longest remains."""
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

    @property
    def limit(self) -> str:
        """What takes longest."""
        terms = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "links": self.link_seconds,
        }
        return max(terms, key=lambda name: terms[name])

    def mfu(self, peak: float) -> float:
        """The share of the peak that the model's own FLOPs can reach."""
        return self.flops / peak / self.seconds


def step_flops(config: Config, vocabulary: int) -> Flops | None:
    """Of a whole step on all devices; None for models that nobody counts."""
    data = config.data
    text = data.kind == "text"
    try:
        return training_flops(
            config.model,
            vocabulary=vocabulary,
            batch=config.train.batch_size * config.train.accumulation,
            length=data.length if text else data.max_target_length,
            source_length=None if text else data.max_source_length,
        )
    except NotImplementedError:
        return None


def recomputed_flops(config: Config, flops: Flops) -> float:
    """What the backward pass computes again: of a forward pass, which is a third of the whole.

    remat=full: every layer. dots, dots_no_batch: attention, whose kernel is no plain product.
    """
    if config.model.remat == "none":
        return 0.0
    layers = flops.layers if config.model.remat == "full" else 0.0
    return (layers + flops.attention) / 3


def bound(
    config: Config,
    chip: Chip,
    devices: int,
    flops: Flops | None,
    memory: Memory,
    gathered: int,
    collectives: Sequence[Collective],
) -> Bound | None:
    """The roofline of a step; None where FLOPs or peaks are not known.

    `gathered` are the bytes of the parameters that one device multiplies by, in the dtype it
    multiplies in. Memory moves, at least: the state, read and written; gradients, written and read;
    for each micro-batch these parameters, forward and backward (remat=full: forward twice), and the
    activations, written and read.
    """
    if flops is None or chip.flops is None or chip.bandwidth is None or chip.links is None:
        return None
    recomputed = recomputed_flops(config, flops)
    passes = (3 if config.model.remat == "full" else 2) * config.train.accumulation
    moved = 2.0 * (memory.parameters + memory.optimizer + memory.gradients)
    moved += passes * gathered + 2 * memory.activations * config.train.accumulation
    sent = sum((one.sent for one in collectives if not one.between_hosts), start=0.0)
    abroad = sum((one.sent for one in collectives if one.between_hosts), start=0.0)
    return Bound(
        flops=flops.total / devices,
        recomputed=recomputed / devices,
        moved=moved,
        sent=sent + abroad,
        sent_between_hosts=abroad,
        compute_seconds=(flops.total + recomputed) / devices / chip.flops,
        memory_seconds=moved / chip.bandwidth,
        link_seconds=sent / chip.links + abroad / (chip.network or chip.links),
    )
