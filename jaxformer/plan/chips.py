"""Peaks of each kind of chip, from its vendor's pages. All figures are of one device of jax."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one device can do at best."""

    name: str
    flops: float | None = None
    """Peak of bfloat16 products a second, dense; None: not known."""
    memory: float | None = None
    """Bytes that a program may have; None: not known."""
    bandwidth: float | None = None
    """Bytes a second between memory and chip."""
    links: float | None = None
    """Bytes a second that go out to the chips next to it, all links together, one way."""
    network: float | None = None
    """Bytes a second that go out to another host where `links` do not reach it; None: they do."""
    dimensions: int = 0
    """Of the torus that a TPU's chips form."""
    cores: int = 1
    """That a name such as v5p-128 counts a chip."""
    devices: int = 1
    """Of jax a chip."""


# Peak and bandwidths: cloud.google.com/tpu/docs/<version>, tables "Key specifications", read in
# November 2026. Links there are "bidirectional ICI bandwidth per chip", of which one way is half;
# those of v4 are its six of 50 GB/s (Jouppi et al., 2023, table 4). Memory is what the compiler
# says is available ("exceeds available HBM (95.73G)", libtpu 0.0.50), a little less than the chip
# has. A tpu7x chip is two devices: each has half of everything.
_TPUS = (
    Chip("v4", 275e12, 30.75 * GIB, 1200e9, 300e9, dimensions=3, cores=2),
    Chip("v5e", 197e12, 15.75 * GIB, 819e9, 200e9, dimensions=2),
    Chip("v5p", 459e12, 95.73 * GIB, 2765e9, 600e9, dimensions=3, cores=2),
    Chip("v6e", 918e12, 31.24 * GIB, 1638e9, 400e9, dimensions=2),
    Chip(
        "tpu7x", 2307e12 / 2, 94.74 * GIB, 7380e9 / 2, 600e9 / 2, dimensions=3, cores=2, devices=2
    ),
)
TPUS = {chip.name: chip for chip in _TPUS}

# nvidia.com/en-us/data-center/h100, column H100 SXM: 1,979 TFLOP/s of bfloat16 with sparsity, half
# of it dense; 3.35 TB/s; NVLink 900 GB/s, both ways together. Memory: what the driver reports.
# Network: one 400 Gb/s port a GPU, as in a DGX H100 (its user guide, "ConnectX-7").
H100 = Chip("h100", 989.4e12, 84_942_979_072.0, 3350e9, 450e9, network=50e9)
GPUS_A_HOST = 8

CPU = Chip("cpu")
