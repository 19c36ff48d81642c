"""Every implementation under one fixture, blocks small enough that tiny calls have several."""

import contextlib
import functools

import pytest

from jaxformer_kernels import ctc_loss, interpreting
from jaxformer_kernels.ctc import mosaic_tpu


def _bound(name, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_FRAMES", 4)
    monkeypatch.setattr(mosaic_tpu, "_STATES", 1)
    with interpreting() if name == "mosaic_tpu" else contextlib.nullcontext():
        yield functools.partial(ctc_loss, implementation=name)


@pytest.fixture(params=["reference", "xla", "mosaic_tpu"])
def implementation(request, monkeypatch):
    yield from _bound(request.param, monkeypatch)


@pytest.fixture(params=["xla", "mosaic_tpu"])
def fast_implementation(request, monkeypatch):
    yield from _bound(request.param, monkeypatch)
