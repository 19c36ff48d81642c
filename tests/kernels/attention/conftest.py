"""Every implementation, and each regime of those that have several, under one fixture."""

import functools

import pytest

from jaxformer_kernels import attention
from jaxformer_kernels.attention import xla, xla_long, xla_short

# Small enough that the suite's tiny shapes have several blocks, the last of them ragged.
REGIMES = {
    "reference": ("reference", {}),
    "xla_one_pass": ("xla", {(xla_short, "_MIN_ROWS"): 128}),
    "xla_grouped_rows": ("xla", {(xla_short, "_MIN_ROWS"): 3, (xla_short, "_WORTHWHILE"): 2.0}),
    "xla_blocked": (
        "xla",
        {
            (xla, "_SHORT_LOGITS"): 0,
            (xla, "_FEW_ROWS"): 0,
            (xla_long, "ROWS"): 4,
            (xla_long, "COLUMNS"): 5,
        },
    ),
}


@pytest.fixture(params=REGIMES)
def implementation(request, monkeypatch):
    """`attention` bound to one implementation in one regime."""
    name, settings = REGIMES[request.param]
    for (module, attribute), value in settings.items():
        monkeypatch.setattr(module, attribute, value)
    return functools.partial(attention, implementation=name)


@pytest.fixture(params=[name for name in REGIMES if name != "reference"])
def fast_implementation(request, monkeypatch):
    """The same without the reference."""
    name, settings = REGIMES[request.param]
    for (module, attribute), value in settings.items():
        monkeypatch.setattr(module, attribute, value)
    return functools.partial(attention, implementation=name)
