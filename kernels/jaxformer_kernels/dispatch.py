"""Which implementation runs, and what each refuses.

Every op keeps one table of `Implementation`s. An implementation declares the features it supports
and, beyond them, its limits on shapes, dtypes and devices. `choose` takes a name, or picks the
first of the platform's measured order that can do the call; it never drops a feature.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

logger = logging.getLogger(__name__)
_said: set[tuple] = set()
_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)
_interpreter: contextvars.ContextVar[Any] = contextvars.ContextVar("interpreter", default=None)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        run: the function itself.
        supports: names of the features it can do.
        limits: call -> what is wrong with this call's shapes, dtypes or device for this
            implementation, in words; empty when nothing is.
        gradients: for `attention` alone, the backward pass of a part of the keys, as
            `attention.part` calls it; None where there is but the derivative of `run`.
    """

    run: Callable
    supports: frozenset[str]
    limits: Callable[..., Sequence[str]] = lambda call: ()
    gradients: Callable | None = None

    def lacks(self, features: frozenset[str], call) -> list[str]:
        """What keeps this implementation from doing `call`, in words; empty when it can."""
        return sorted(features - self.supports) + list(self.limits(call))


@contextlib.contextmanager
def compiling_for(target: str):
    """Choose implementations, inside this context, as on `target`: "cpu", "gpu" or "tpu".

    For ahead-of-time compilation on a machine without the device. A function that `jax.jit` has
    already traced keeps the choice it was traced with.
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def interpreting(parameters: Any = True):
    """Run Pallas kernels, inside this context, in their interpreter: slow, but on any machine.

    A function that `jax.jit` has already traced keeps what it was traced with.

    Args:
        parameters: True, or `pltpu.InterpretParams(...)` or `plgpu.InterpretGPUParams(...)` for
            the interpreters that simulate memory and detect races.
    """
    token = _interpreter.set(parameters)
    try:
        yield
    finally:
        _interpreter.reset(token)


def platform() -> str:
    """The platform that calls are compiled for: `compiling_for`'s, or else this process's."""
    return _target.get() or jax.default_backend()


def interpreter() -> Any:
    """What `interpreting` was given; None outside it."""
    return _interpreter.get()


def choose(
    op: str,
    implementations: Mapping[str, Implementation],
    order: Mapping[str, Sequence[str]],
    name: str | None,
    features: frozenset[str],
    call=None,
) -> Implementation:
    """The implementation of `op` that runs a call which needs `features`.

    Args:
        op: the op's name, for messages.
        implementations: all there are, by name.
        order: platform -> names, fastest first by measurement; "default" for other platforms.
        name: the implementation asked for; None picks by `order`.
        features: what the call needs.
        call: passed on to `Implementation.limits`.

    Raises:
        ValueError: no implementation has that name.
        NotImplementedError: the named one (or, for None, every one in the order) lacks something.
    """
    if name is not None:
        if name not in implementations:
            raise ValueError(_unknown_name(op, name, implementations))
        lacks = implementations[name].lacks(features, call)
        if lacks:
            able = [other for other, it in implementations.items() if not it.lacks(features, call)]
            fix = f"use implementation={' or '.join(map(repr, able))}" if able else "none can"
            raise NotImplementedError(
                f"{op}: implementation={name!r} does not support {', '.join(lacks)}; {fix}."
            )
        return implementations[name]

    on = platform()
    reasons = []
    for candidate in order.get(on, order["default"]):
        lacks = implementations[candidate].lacks(features, call)
        if not lacks:
            _say_choice(op, on, candidate, reasons)
            return implementations[candidate]
        reasons.append(f"{candidate} does not support {', '.join(lacks)}")
    raise NotImplementedError(f"{op}: nothing on {on} can do this: {'; '.join(reasons)}.")


def picked(op: str) -> list[str]:
    """The implementations of `op` that `choose` has picked by platform so far, sorted."""
    return sorted({candidate for said, _, candidate, *_ in _said if said == op})


def _unknown_name(op, name, implementations):
    near = difflib.get_close_matches(str(name), implementations, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{op}: unknown implementation {name!r}; {hint}"
        f"Available: {', '.join(implementations)}, or None to let the platform decide."
    )


def _say_choice(op, platform, candidate, reasons):
    message = (op, platform, candidate, *reasons)
    if message in _said:
        return
    _said.add(message)
    if reasons:
        logger.warning(
            "%s: falling back to %r on %s: %s.", op, candidate, platform, "; ".join(reasons)
        )
    else:
        logger.info("%s: picked %r on %s.", op, candidate, platform)
