"""Every implementation, and each regime of those that have several, under one fixture."""

import contextlib
import functools

import pytest

from jaxformer_kernels import attention, interpreting
from jaxformer_kernels.attention import mosaic_tpu_tiles, xla, xla_long, xla_short

# Small enough that the suite's tiny shapes have several blocks, the last of them ragged.
REGIMES = {
    "reference": ("reference", {}),
    "xla_one_pass": ("xla", {(xla_short, "_MIN_ROWS"): 128}),
    "xla_grouped_rows": (
        "xla",
        {
            (xla_short, "_MIN_ROWS"): 3,
            (xla_short, "_MANY_ROWS"): 3,
            (xla_short, "_WORTHWHILE"): 2.0,
        },
    ),
    "xla_blocked": (
        "xla",
        {
            (xla, "_SHORT_LOGITS"): 0,
            (xla, "_FEW_ROWS"): 0,
            (xla_long, "ROWS"): 5,
            (xla_long, "COLUMNS"): 5,
        },
    ),
    "mosaic_tpu": (
        "mosaic_tpu",
        {
            (mosaic_tpu_tiles, "LANES"): 2,
            # Of float32 half as many.
            (mosaic_tpu_tiles, "ROWS"): 8,
            (mosaic_tpu_tiles, "COLUMNS"): 8,
            (mosaic_tpu_tiles, "CHUNK"): 4,
            (mosaic_tpu_tiles, "SHARED_ROWS"): 8,
        },
    ),
}


@contextlib.contextmanager
def regime(name, monkeypatch):
    """`attention` bound to one implementation in one regime; kernels run in their interpreter."""
    implementation, settings = REGIMES[name]
    for (module, attribute), value in settings.items():
        monkeypatch.setattr(module, attribute, value)
    with interpreting() if implementation == "mosaic_tpu" else contextlib.nullcontext():
        yield functools.partial(attention, implementation=implementation)


@pytest.fixture(params=REGIMES)
def implementation(request, monkeypatch):
    """`attention` bound to one implementation in one regime."""
    with regime(request.param, monkeypatch) as bound:
        yield bound


@pytest.fixture(params=[name for name in REGIMES if name != "reference"])
def fast_implementation(request, monkeypatch):
    """The same without the reference."""
    with regime(request.param, monkeypatch) as bound:
        yield bound
