"""A plan as text."""

from collections.abc import Sequence
from typing import Any

from jaxformer.config import Config
from jaxformer.plan.build import Sizes
from jaxformer.plan.chips import GIB
from jaxformer.plan.estimate import FORMULA
from jaxformer.plan.topology import Topology

PARTS = ("parameters", "optimizer", "gradients", "activations", "batch")


def page(plan: dict[str, Any], config: Config, topology: Topology, sizes: Sizes) -> None:
    """Prints all that a plan says."""
    for label, text in _lines(plan, config, topology, sizes):
        print(f"{label + ':' if label else '':<13}{text}")


def verdict(plan: dict[str, Any]) -> str:
    """Fits or not, and by how much, in a few words."""
    if plan["outcome"] == "refused":
        return f"not compiled: {plan['why']}"
    needed, available = plan["needed"], plan["available"]
    if needed is None or available is None:
        return f"compiles; needs {_size(needed)} a device"
    spare = available - needed
    if plan["fits"]:
        return (
            f"fits: {_size(needed)} of {_size(available)} a device, {_size(spare)} "
            f"({spare / available:.0%}) to spare"
        )
    return f"does not fit: {_size(needed)} of {_size(available)} a device, {_size(-spare)} too much"


def ranking(plans: Sequence[dict[str, Any]], topology: Topology) -> None:
    """Prints a table of meshes, the best first."""
    print(f"meshes of {topology.words}, by the least time of a step that the peaks allow")
    print(f"{'':4}{'ms':>9} {'limit':8}{'MFU':>5} {'GiB':>8}  options")
    for place, plan in enumerate(plans, start=1):
        least = plan.get("bound")
        options = " ".join(plan["options"])
        if least is None or not plan["fits"]:
            print(f"{place:3d} {verdict(plan)}  {options}")
            continue
        print(
            f"{place:3d} {1e3 * least['seconds']:9.1f} {least['limit']:8}{least['mfu']:5.0%} "
            f"{plan['needed'] / GIB:8.1f}  {options}"
        )


def sharding(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Prints how each parameter is split."""
    head = ("parameter", "axes", "split", "a device")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _lines(
    plan: dict[str, Any], config: Config, topology: Topology, sizes: Sizes
) -> list[tuple[str, str]]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    rows = config.train.batch_size * config.train.accumulation
    plural = "es" * (config.train.accumulation > 1)
    lines = [
        ("topology", f"{topology.name}: {topology.words}; mesh {mesh or 'of one device'}"),
        (
            "step",
            f"{rows:,} rows in {config.train.accumulation} micro-batch{plural}, "
            f"remat {config.model.remat}, vocabulary {sizes.vocabulary:,}",
        ),
        ("verdict", verdict(plan)),
    ]
    if "memory" in plan:
        parts = ", ".join(f"{name} {_size(plan['memory'][name])}" for name in PARTS)
        lines.append(("a device", f"{parts} (from shapes; activations about)"))
    if plan["outcome"] == "ok":
        lines += _compiled(plan, topology)
    lines += _proposed(plan)
    return lines


def _compiled(plan: dict[str, Any], topology: Topology) -> list[tuple[str, str]]:
    allotted, seconds = plan["allotted"], plan["seconds"]
    lines = [
        (
            "allotted",
            ", ".join(
                f"{name} {_size(allotted[name])}"
                for name in ("arguments", "results", "temporaries", "code", "peak")
                if name in allotted
            )
            + f" (by the compiler, in {seconds['compile']:.1f} s)",
        )
    ]
    if topology.platform == "gpu" and plan["fits"] and plan["needed"] > 0.75 * plan["available"]:
        lines.append(
            ("", "JAX takes 75% of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for this step")
        )
    flops, least = plan["flops"], plan["bound"]
    if flops is not None:
        lines.append(("FLOPs", f"{flops['total']:.3g} a step ({FORMULA})"))
    if least is not None:
        chip = topology.chip
        lines += [
            (
                "least time",
                f"{1e3 * least['seconds']:.1f} ms, by {least['limit']}: "
                f"compute {1e3 * least['compute_seconds']:.1f}, "
                f"memory {1e3 * least['memory_seconds']:.1f}, "
                f"links {1e3 * least['link_seconds']:.1f}; a bound, no measurement",
            ),
            (
                "at best",
                f"MFU {least['mfu']:.1%}, {least['tokens_per_second']:,.0f} tokens/s; peaks of a "
                f"device: {(chip.flops or 0) / 1e12:.0f} TFLOP/s (bfloat16), "
                f"{(chip.bandwidth or 0) / 1e9:.0f} GB/s memory, "
                f"{(chip.links or 0) / 1e9:.0f} GB/s links",
            ),
        ]
    elif flops is not None:
        lines.append(("least time", f"no peaks are known of a {topology.chip.name}"))
    else:
        lines.append(("FLOPs", "counted for decoder and encoder_decoder models alone"))
    lines += _collectives(plan)
    kernels = ", ".join(f"{name} x {count}" for name, count in plan["kernels"].items())
    lines.append(("kernels", kernels or "none of our own: XLA's alone"))
    return lines


def _collectives(plan: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for one in plan["collectives"]:
        place = ", between hosts" if one["between_hosts"] else ""
        lines.append(
            f"{one['kind']:<19}over {one['devices']:>4}{place}: {one['count']:>6} a step, "
            f"{_size(one['sent'])} sent by a device"
        )
    if plan["unknown_loops"]:
        lines.append(f"{plan['unknown_loops']} loops do not say how often they run; counted once")
    return [
        ("collectives" if not place else "", line) for place, line in enumerate(lines or ["none"])
    ]


def _proposed(plan: dict[str, Any]) -> list[tuple[str, str]]:
    proposal = plan.get("proposal")
    if proposal is None:
        return []
    if proposal["options"] is not None:
        return [("to fit, add", f"{' '.join(proposal['options'])}   ({verdict(proposal['plan'])})")]
    tried = len(proposal["tried"])
    advice = "take more devices, a larger mesh.tensor or mesh.context, or a smaller model"
    if proposal["state"] > (plan["available"] or 0):
        state = _size(proposal["state"])
        return [("to fit", f"parameters, optimiser and gradients alone are {state}: {advice}")]
    return [("to fit", f"none of {tried} changes was enough (remat, accumulation, fsdp): {advice}")]


def _size(size: float | int | None) -> str:
    """Bytes in the unit that says most."""
    if size is None:
        return "?"
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.{2 if size < 100 * unit else 0}f} {name}"
    return f"{size / 2**10:.1f} KiB"
