"""Block sizes of the Hopper attention kernels: found ones, and a heuristic behind them.

What bounds them are the 227 KiB of shared memory a block of the grid may take and the 240 registers
a thread of a computing warpgroup gets. Both are estimated before anything is launched.
"""

import dataclasses

from jaxformer_kernels import _compat, tuning

ROWS = 64  # of one warpgroup: the M of a wgmma
SHARED_BYTES = 232_448 - 4096  # less barriers and what the compiler keeps for reductions
REGISTERS = 210  # less addresses and counters


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel.

    Attributes:
        columns: of a tile: keys in the forward and dQ kernels, queries in the dK/dV kernel.
        stages: tiles of each streamed operand in flight.
        groups: computing warpgroups, of 64 rows each.
        apart: dQ: the two products of a tile one after the other. dK/dV: two kernels, of 5
            products together, for one of 4. For where registers are short.
    """

    columns: int
    stages: int
    groups: int = 2
    apart: bool = False


def shared_bytes(kernel: str, blocks: Blocks, H: int, Hv: int, itemsize: int = 2) -> int:
    """Shared memory that a launch of the kernel takes.

    Args:
        kernel: "forward", "dq" or "dkv".
        blocks: its sizes.
        H, Hv: head dims, multiples of 64.
        itemsize: of q's dtype, in bytes.
    """
    own, streamed = blocks.groups * ROWS, blocks.stages * blocks.columns
    if kernel == "forward":
        # The output leaves by the way of the queries where it fits.
        return (own * (H if Hv == H else H + Hv) + streamed * (H + Hv)) * itemsize + own * 4
    numbers = 2 * streamed * 4 if kernel == "dkv" else 0
    return (own + streamed) * (H + Hv) * itemsize + numbers


def registers(kernel: str, blocks: Blocks, H: int, Hv: int) -> int:
    """Registers a thread needs for accumulators, logits and their 16-bit copies.

    A float32 tile of 64 rows takes half as many registers a thread as it has columns.
    """
    tile = blocks.columns // 2
    if kernel == "forward":
        return Hv // 2 + tile + tile // 2
    if kernel == "dq":
        return H // 2 + 2 * tile + (0 if blocks.apart else tile // 2)
    kept = max(H, Hv) if blocks.apart else H + Hv
    return kept // 2 + 2 * tile + tile // 2


def fits(kernel: str, blocks: Blocks, H: int, Hv: int) -> bool:
    """Whether both estimates stay within the limits."""
    return (
        shared_bytes(kernel, blocks, H, Hv) <= SHARED_BYTES
        and registers(kernel, blocks, H, Hv) <= REGISTERS
    )


def choose(kernel: str, H: int, Hv: int) -> Blocks:
    """Blocks of a kernel for these head dims: those of `tuning`, or else the heuristic's."""
    found = tuning.lookup("attention", _compat.gpu_kind(), kernel, f"{H},{Hv}")
    return heuristic(kernel, H, Hv) if found is None else Blocks(**found)


def heuristic(kernel: str, H: int, Hv: int) -> Blocks:
    """The largest blocks that fit: products in one go, then wide tiles, then two stages."""
    for apart in (False, True):
        for columns in (128, 64):
            for groups, stages in ((2, 2), (1, 2), (2, 1), (1, 1)):
                blocks = Blocks(columns, stages, groups, apart)
                allowed = groups == 2 if kernel == "forward" else True
                if allowed and fits(kernel, blocks, H, Hv):
                    return blocks
    raise ValueError(f"no {kernel} blocks fit head dims {H} and {Hv}")
