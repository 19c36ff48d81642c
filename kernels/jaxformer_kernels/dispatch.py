"""Which implementation runs, and what each refuses.

Every op keeps one table of `Implementation`s. An implementation declares the features it supports
and, beyond them, its limits on shapes, dtypes and devices. `choose` takes a name, or picks the
first of the platform's measured order that can do the call; it never drops a feature.
"""

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence

import jax

logger = logging.getLogger(__name__)
_said: set[tuple] = set()


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        run: the function itself.
        supports: names of the features it can do.
        limits: call -> what is wrong with this call's shapes, dtypes or device for this
            implementation, in words; empty when nothing is.
    """

    run: Callable
    supports: frozenset[str]
    limits: Callable[..., Sequence[str]] = lambda call: ()

    def lacks(self, features: frozenset[str], call) -> list[str]:
        """What keeps this implementation from doing `call`, in words; empty when it can."""
        return sorted(features - self.supports) + list(self.limits(call))


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

    platform = jax.default_backend()
    reasons = []
    for candidate in order.get(platform, order["default"]):
        lacks = implementations[candidate].lacks(features, call)
        if not lacks:
            _say_choice(op, platform, candidate, reasons)
            return implementations[candidate]
        reasons.append(f"{candidate} does not support {', '.join(lacks)}")
    raise NotImplementedError(f"{op}: nothing on {platform} can do this: {'; '.join(reasons)}.")


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
