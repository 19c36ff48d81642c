"""Every implementation, and each regime of those that have several, under one fixture."""

import contextlib
import functools

import pytest

from jaxformer_kernels import interpreting, linear_cross_entropy
from jaxformer_kernels.linear_cross_entropy import mosaic_tpu, xla

_TILES = {(xla, "LOGITS"): 1}
_BLOCKS = {(mosaic_tpu, "ROWS"): 32, (mosaic_tpu, "COLUMNS"): 128}

# Small enough that the suite's tiny shapes have several tiles or blocks, the last of them ragged.
REGIMES = {
    "reference": ("reference", {}),
    "xla_one_tile": ("xla", {}),
    "xla_tiles_of_an_axis": ("xla", {**_TILES, (xla, "CPU_TOKENS"): 9}),
    "xla_tiles_of_all_axes": ("xla", {**_TILES, (xla, "CPU_TOKENS"): 2}),
    "mosaic_tpu_blocks": ("mosaic_tpu", {**_BLOCKS, (mosaic_tpu, "PART"): 128}),
    "mosaic_tpu_parts_of_D": ("mosaic_tpu", {**_BLOCKS, (mosaic_tpu, "_BYTES"): 640_000}),
}


def _bound(regime, monkeypatch):
    """`linear_cross_entropy` with one implementation in one regime, while the generator lives."""
    name, settings = REGIMES[regime]
    for (module, attribute), value in settings.items():
        monkeypatch.setattr(module, attribute, value)
    with interpreting() if name == "mosaic_tpu" else contextlib.nullcontext():
        yield functools.partial(linear_cross_entropy, implementation=name)


@pytest.fixture(params=REGIMES)
def implementation(request, monkeypatch):
    yield from _bound(request.param, monkeypatch)


@pytest.fixture(params=[name for name in REGIMES if name != "reference"])
def fast_implementation(request, monkeypatch):
    yield from _bound(request.param, monkeypatch)
