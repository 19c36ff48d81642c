"""`jaxformer plan`: from a command line to a report."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import arg

from jaxformer import presets
from jaxformer.config import Config, ConfigError
from jaxformer.plan import report, search
from jaxformer.plan.build import Sizes, least_memory, sharding_table, sizes_of
from jaxformer.plan.chips import GIB
from jaxformer.plan.compile import Request, ask
from jaxformer.plan.estimate import bound, step_flops
from jaxformer.plan.hlo import Collective
from jaxformer.plan.topology import Topology, parse_topology
from jaxformer.sharding import mesh_shape
from jaxformer.training.memory import Memory

Parse = Callable[[Sequence[str]], Config]


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What is planned for, and how long compilers may take."""

    topology: str
    """v5p:4x4x4 or v5p-128, v5e-256, v6e:8x8, tpu7x:4x4x4, v4:2x2x1, h100:8, cpu:8."""
    vocabulary: int | None = None
    """Tokens of the (target) vocabulary. Default: the most that the tokenizer allows."""
    source_vocabulary: int | None = None
    """pairs: tokens of the source vocabulary. Default: likewise."""
    effort: Literal["low", "full"] = "low"
    """How hard the compiler tries: low is about four times quicker, full what training does."""
    timeout: float = 300.0
    """Seconds that one compilation may take."""
    budget: float = 900.0
    """Seconds for all compilations of --sweep, or of the search for what fits."""
    hbm_gib: float | None = None
    """Memory of a device, in place of the chip's."""
    propose: bool = True
    """If it does not fit, look for what does."""
    sweep: bool = False
    """Try mesh shapes and rank them by the bound on a step's time."""
    print_sharding: bool = False
    """Print how each parameter is split, and compile nothing."""
    json_output: Annotated[bool, arg(name="json")] = False
    """Print one JSON object."""


@dataclasses.dataclass(frozen=True)
class Planner:
    """What all plans of one command share."""

    options: PlanOptions
    topology: Topology
    sizes: Sizes

    @property
    def available(self) -> float | None:
        """Bytes that a program may have on a device; None: not known."""
        given = self.options.hbm_gib
        return self.topology.chip.memory if given is None else given * GIB

    def plan(self, config: Config) -> dict[str, Any]:
        """Compiles the step of a configuration: the answer with what follows from it.

        Beside the worker's answer there are `mesh`, `fits` (None: nothing is known of the memory),
        `needed` and `available` bytes, and, where it compiled, `flops` and the `bound`.
        """
        request = Request(
            config, self.sizes, self.topology, self.options.effort, self.options.timeout
        )
        answer = ask(request)
        available = answer.pop("available", self.available)
        # A TPU's compiler refuses what has no room: what it compiles fits, and needs its peak.
        gate = self.topology.platform == "tpu"
        needed = answer.pop("needed", answer.get("allotted", {}).get("peak" if gate else "total"))
        fits = None if available is None or needed is None else needed <= available
        if answer["outcome"] == "too_large":
            fits = False
        elif gate and answer["outcome"] == "ok" and self.options.hbm_gib is None:
            fits = True
        plan = {
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "mesh": mesh_shape(config.mesh, self.topology.devices),
            "fits": fits,
            "needed": needed,
            "available": available,
            **answer,
        }
        return plan | self._times(config, answer) if answer["outcome"] == "ok" else plan

    def _times(self, config: Config, answer: dict[str, Any]) -> dict[str, Any]:
        flops = step_flops(config, self.sizes.vocabulary)
        chip, devices = self.topology.chip, self.topology.devices
        collectives = [Collective(**one) for one in answer["collectives"]]
        memory = Memory(**answer["memory"])
        least = bound(config, chip, devices, flops, memory, answer["gathered"], collectives)
        found: dict[str, Any] = {"flops": None, "bound": None}
        if flops is not None:
            found["flops"] = dataclasses.asdict(flops) | {"total": flops.total}
        if least is not None and chip.flops is not None:
            found["bound"] = dataclasses.asdict(least) | {
                "seconds": least.seconds,
                "limit": least.limit,
                "mfu": least.mfu(chip.flops),
                "tokens_per_second": _tokens(config) / least.seconds,
            }
        return found

    def hopeful(self, changes: Iterator[search.Change]) -> Iterator[search.Change]:
        """Those changes with which the state alone would fit."""
        for change in changes:
            least = least_memory(change.config, self.sizes, self.topology.devices)
            if self.available is None or least < self.available:
                yield change


def run(arguments: Sequence[str], parse: Parse) -> None:
    """The verb: `PRESET --topology NAME [options of the plan and of the configuration]`.

    `parse` makes a configuration of a preset and the options that are not the plan's. Raises
    JaxformerError on what cannot be planned.
    """
    options, rest = _options(arguments)
    topology = parse_topology(options.topology)
    config = parse(rest)
    _require_all(config, topology)
    sizes = sizes_of(config, options.vocabulary, options.source_vocabulary)
    if options.print_sharding:
        report.sharding(sharding_table(config, sizes, topology.devices))
        return
    planner = Planner(options, topology, sizes)
    say = Console(stderr=True, soft_wrap=True)
    if options.sweep:
        ranked = sweep(planner, config, say)
        print(json.dumps(ranked)) if options.json_output else report.ranking(ranked, topology)
        return
    with say.status(f"compiling for {topology.words}"):
        plan = planner.plan(config)
    if plan["fits"] is False and options.propose:
        plan["proposal"] = propose(planner, config, say)
    if options.json_output:
        print(json.dumps(plan))
    else:
        report.page(plan, config, topology, sizes)


def propose(planner: Planner, config: Config, say: Console) -> dict[str, Any]:
    """The first change that fits, as `options` (None: there is none), and all that were `tried`.

    `state` is the least that parameters, optimiser and gradients alone take with any change.
    """
    devices = planner.topology.devices
    changes = planner.hopeful(search.smaller(config, devices))

    def attempt(change: search.Change) -> dict[str, Any]:
        with say.status(f"it does not fit; trying {change}"):
            plan = planner.plan(change.config)
        say.print(f"{report.verdict(plan)}: {change}", highlight=False, markup=False)
        return plan

    found, tried = search.first(
        changes, attempt, lambda plan: plan["fits"] is True, planner.options.budget
    )
    return {
        "options": None if found is None else list(found.options),
        "plan": None if found is None else tried[-1][1],
        "tried": [{"options": list(change.options), "fits": p["fits"]} for change, p in tried],
        "state": min(
            least_memory(each, planner.sizes, devices)
            for each in (config, *(change.config for change in search.smaller(config, devices)))
        ),
    }


def sweep(planner: Planner, config: Config, say: Console) -> list[dict[str, Any]]:
    """Plans of many mesh shapes, those that fit first and among them the fastest."""
    every = list(search.meshes(config, planner.topology.devices))
    changes = list(planner.hopeful(iter(every)))
    say.print(
        f"{len(changes)} meshes to compile; with {len(every) - len(changes)} more the state alone "
        "would not fit",
        highlight=False,
    )

    def attempt(change: search.Change) -> dict[str, Any]:
        with say.status(f"compiling {change}"):
            plan = planner.plan(change.config)
        say.print(f"{report.verdict(plan)}: {change}", highlight=False, markup=False)
        return plan

    _, made = search.first(iter(changes), attempt, lambda plan: False, planner.options.budget)
    if len(made) < len(changes):
        say.print(
            f"the budget is spent; {len(changes) - len(made)} were not tried: raise --budget",
            highlight=False,
        )
    plans = [plan | {"options": list(change.options)} for change, plan in made]
    return sorted(plans, key=_rank)


def _rank(plan: dict[str, Any]) -> tuple[bool, float, float]:
    least = plan.get("bound")
    if least is None:
        return (plan["fits"] is not True, float("inf"), plan["needed"] or float("inf"))
    terms = [least[f"{name}_seconds"] for name in ("compute", "memory", "link")]
    # Where the same bound holds for several, what it hides decides.
    return (plan["fits"] is not True, max(terms), sum(terms))


def _options(arguments: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    return tyro.cli(
        PlanOptions,
        prog="jaxformer plan PRESET",
        description="Compiles the training step for hardware that need not be there, and says what "
        "it takes. Every option of `train.py PRESET` may follow: --mesh.fsdp 8, --model.remat full."
        f" Presets: {', '.join(presets.names())}.",
        args=list(arguments),
        return_unknown_args=True,
    )


def _require_all(config: Config, topology: Topology) -> None:
    """Raises where a mesh does not take all devices of a machine."""
    sizes = mesh_shape(config.mesh, topology.devices)
    if prod(sizes.values()) != topology.devices:
        raise ConfigError(
            f"the mesh takes {prod(sizes.values())} of the {topology.devices} devices of "
            f"{topology.name}: leave --mesh.data at -1, or choose a smaller topology"
        )


def _tokens(config: Config) -> int:
    """Places for tokens, of the target side, in a step's batch."""
    data, train = config.data, config.train
    length = data.length if data.kind == "text" else data.max_target_length
    return train.batch_size * train.accumulation * length
