"""What to change so that a step fits, and which mesh is fastest: by compiling one after another."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxformer.config import Config
from jaxformer.sharding import mesh_shape

REMAT = ("none", "dots", "full")
"""Remat policies, from fast to small."""
LARGEST_TENSOR = 16


@dataclasses.dataclass(frozen=True)
class Change:
    """A configuration, and the options that lead to it from where one was."""

    options: tuple[str, ...]
    config: Config

    def __str__(self) -> str:
        return " ".join(self.options) or "as it is"


def smaller(config: Config, devices: int) -> Iterator[Change]:
    """Changes that keep the result of a step and need less memory, the cheapest first.

    Remat; then, with all of it, micro-batches half as large and twice as many; then the same with
    the parameters divided over twice as many devices (fsdp in place of data).
    """
    for policy in REMAT[1:]:
        if _place(policy) > _place(config.model.remat):
            yield changed(config, {"model.remat": policy})
    everything = {"model.remat": "full"} if _place(config.model.remat) < _place("full") else {}
    sizes = mesh_shape(config.mesh, devices)
    yield from _halved(config, everything, sizes["data"] * sizes["fsdp"])
    if sizes["data"] == 1:
        return
    while sizes["data"] % 2 == 0:
        sizes = sizes | {"data": sizes["data"] // 2, "fsdp": sizes["fsdp"] * 2}
        divided = {"mesh.data": sizes["data"], "mesh.fsdp": sizes["fsdp"]}
        yield changed(config, divided)
        if everything:
            yield changed(config, divided | everything)
    divided = {"mesh.data": 1, "mesh.fsdp": sizes["data"] * sizes["fsdp"]}
    yield from _halved(config, everything | divided, divided["mesh.fsdp"])


def meshes(config: Config, devices: int) -> Iterator[Change]:
    """Mesh shapes worth trying: tensor divides the heads, fsdp takes the rest, or part of it.

    The context axis stays as it is; data takes what is left.
    """
    model, context = config.model, mesh_shape(config.mesh, devices)["context"]
    heads = (model.heads, model.kv_heads or model.heads)
    for tensor in (2**power for power in range(LARGEST_TENSOR.bit_length())):
        left, rest = divmod(devices // context, tensor)
        if rest or any(count % tensor for count in heads):
            continue
        if config.train.batch_size % left:
            continue
        for fsdp in (left // part for part in (1, 2, 4, 8) if left % part == 0 and left // part):
            yield changed(
                config, {"mesh.data": left // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
            )


def changed(config: Config, values: dict[str, Any]) -> Change:
    """The configuration with these fields of its groups, written as options of the command line."""
    for name, value in values.items():
        group, field = name.split(".")
        part = dataclasses.replace(getattr(config, group), **{field: value})
        config = dataclasses.replace(config, **{group: part})
    options = tuple(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
    return Change(options, config)


def first(
    changes: Iterator[Change],
    attempt: Callable[[Change], dict[str, Any]],
    accept: Callable[[dict[str, Any]], bool],
    seconds: float,
) -> tuple[Change | None, list[tuple[Change, dict[str, Any]]]]:
    """The first change whose plan is accepted, and all plans that were made, within `seconds`."""
    made, end = [], time.monotonic() + seconds
    for change in changes:
        if time.monotonic() > end:
            break
        plan = attempt(change)
        made.append((change, plan))
        if accept(plan):
            return change, made
    return None, made


def _place(policy: str) -> int:
    return REMAT.index("dots" if policy == "dots_no_batch" else policy)


def _halved(config: Config, others: dict[str, Any], shares: int) -> Iterator[Change]:
    rows, parts = config.train.batch_size, config.train.accumulation
    while rows % (2 * shares) == 0:
        rows, parts = rows // 2, parts * 2
        yield changed(config, others | {"train.batch_size": rows, "train.accumulation": parts})
