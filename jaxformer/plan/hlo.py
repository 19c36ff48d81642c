"""Reading a compiled program: what it sends between devices, and which kernels are in it."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
# Of the computations that an instruction names, those that run as often as it does.
_CALLS = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_PALLAS = ("tpu_custom_call", "mosaic_gpu")


@dataclass(frozen=True)
class Collective:
    """All collectives of a program of one kind that span equally many devices."""

    kind: str
    devices: int
    """How many exchange with each other."""
    count: int
    """How often it runs a step."""
    sent: float
    """Bytes that a device sends a step, by the ring algorithm or directly."""
    between_hosts: bool = False


@dataclass(frozen=True)
class Program:
    """What is read of a compiled program."""

    collectives: tuple[Collective, ...]
    kernels: dict[str, int]
    """Pallas kernels and those of vendors' libraries: name -> calls a step."""
    unknown_loops: int
    """Loops with a collective in them, of which the program does not say how often they run;
    counted as once."""


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str
    """Operands and attributes."""


def read_program(text: str, devices_a_host: int | None = None) -> Program:
    """The collectives and kernels of the text of a compiled program (`compiled.as_text()`).

    What stands in a loop counts as often as the loop runs, and every branch of a condition as if
    it were taken.
    """
    computations, entry = _computations(text)
    times, endless = _times(computations, entry)
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    found: dict[tuple[str, int, bool], list[float]] = {}
    kernels: Counter[str] = Counter()
    for name, count in times.items():
        for instruction in computations[name]:
            kernel = _kernel(instruction)
            if kernel:
                kernels[kernel] += count
            kind = _kind(instruction, name)
            if kind is None:
                continue
            group, between = _group(instruction.rest, devices, devices_a_host)
            total = found.setdefault((kind, group, between), [0, 0.0])
            total[0] += count
            total[1] += count * _sent(kind, _result(instruction), group)
    return Program(
        collectives=tuple(
            Collective(kind, group, int(count), sent, between)
            for (kind, group, between), (count, sent) in sorted(
                found.items(), key=lambda item: -item[1][1]
            )
            if group > 1
        ),
        kernels=dict(sorted(kernels.items())),
        unknown_loops=sum(_exchanges(computations, body) for body in endless),
    )


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of all of a tuple's, as HLO writes them: `(f32[2,3]{1,0}, s8[4])`."""
    total = 0
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
        total += _bits(kind) * prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    return total // 8


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    digits = re.match(r"[a-z]+(\d+)", kind)
    return int(digits[1]) if digits else 0


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Every computation's instructions by its name, and the name where the program starts."""
    computations: dict[str, list[_Instruction]] = {}
    entry, here = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if start and " -> " in line:
                here = computations.setdefault(start[2], [])
                entry = start[2] if start[1] else entry
            elif line.startswith("}"):
                here = None
        elif here is not None and (instruction := _instruction(line)):
            here.append(instruction)
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    named = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not named:
        return None
    rest = line[named.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    called = re.match(r" ?([a-z][\w\-]*)\(", rest[end:])
    if end < 0 or not called:
        return None
    return _Instruction(named[1], rest[:end], called[1], rest[end + called.end() :])


def _closing(text: str) -> int:
    """The place after the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return -1


def _times(
    computations: dict[str, list[_Instruction]], entry: str
) -> tuple[dict[str, int], list[str]]:
    """How often each computation runs, and the bodies of the loops that do not say."""
    times: Counter[str] = Counter()
    unknown = []
    pending = [(entry, 1)]
    while pending:
        name, count = pending.pop()
        times[name] += count
        for instruction in computations.get(name, ()):
            for called, trips in _called(instruction, computations):
                if trips is None:
                    unknown.append(called)
                pending.append((called, count * (trips or 1)))
    return {name: count for name, count in times.items() if name in computations}, unknown


def _exchanges(computations: dict[str, list[_Instruction]], start: str) -> bool:
    """Whether there is a collective in a computation or in what it calls."""
    return any(
        _kind(instruction, name)
        for name in _times(computations, start)[0]
        for instruction in computations[name]
    )


def _called(
    instruction: _Instruction, computations: dict[str, list[_Instruction]]
) -> Iterator[tuple[str, int | None]]:
    """The computations that an instruction runs, and how often; None: it does not say."""
    if instruction.opcode == "while":
        body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
        if body:
            yield body[1], _trips(instruction, computations)
    elif not instruction.opcode.endswith(("-done", "-update")):
        for name in _CALLS.findall(instruction.rest):
            yield name, 1
        for names in _BRANCHES.findall(instruction.rest):
            for name in re.findall(r"[\w.\-]+", names):
                yield name, 1


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """How often a loop runs: as the compiler notes, or a counter compared with a constant.

    jax's loops count from 0 by 1; XLA starts a loop that it rolled differently elsewhere, and such
    a loop has a note.
    """
    noted = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    instructions = computations.get(condition[1], []) if condition else []
    if not instructions:
        return None
    values = {
        instruction.name: int(number[1])
        for instruction in instructions
        if instruction.opcode == "constant" and (number := re.match(r"(\d+)\)", instruction.rest))
    }
    root = instructions[-1]
    below = root.opcode == "compare" and "direction=LT" in root.rest
    limits = [values[name] for name in re.findall(r"%([\w.\-]+)", root.rest) if name in values]
    if below or (root.opcode == "fusion" and len(values) == 1):
        return limits[0] if len(limits) == 1 else None
    return None


def _kind(instruction: _Instruction, computation: str) -> str | None:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in COLLECTIVES:
        return None
    # A TPU sums and keeps a share in one fusion, which is written as an all-reduce and a slice.
    if opcode == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return opcode


def _result(instruction: _Instruction) -> int:
    """Bytes that a collective leaves on a device."""
    parts = _parts(instruction.shape)
    # All others that start and end are of operand, result, and what the hardware waits on.
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return shape_bytes(parts[min(1, len(parts) - 1)])
    return shape_bytes(instruction.shape)


def _parts(shape: str) -> list[str]:
    """The elements of a tuple; the shape itself where it is none."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for place, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(shape[start:place].strip())
            start = place + 1
    return parts


def _sent(kind: str, result: int, group: int) -> float:
    """Bytes that a device sends in a collective which leaves `result` bytes on it."""
    others = (group - 1) / group
    return {
        "all-gather": result * others,
        "reduce-scatter": float(result * (group - 1)),
        "all-reduce": 2 * result * others,
        "all-to-all": result * others,
    }.get(kind, float(result))


def _group(rest: str, devices: int, devices_a_host: int | None) -> tuple[int, bool]:
    """How many devices exchange, and whether they are of more than one host."""
    members = _members(rest, devices)
    hosts = {int(member) // devices_a_host for member in members} if devices_a_host else {0}
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
    if not pairs:
        return len(members), len(hosts) > 1
    hops = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    crossing = devices_a_host is not None and any(
        source // devices_a_host != target // devices_a_host for source, target in hops
    )
    moves = any(source != target for source, target in hops)
    return _cycle(hops) if moves else 1, crossing


def _cycle(hops: list[tuple[int, int]]) -> int:
    """How many devices a ring of permutes joins."""
    following = dict(hops)
    start = hops[0][0]
    seen, here = {start}, following.get(start)
    while here is not None and here not in seen:
        seen.add(here)
        here = following.get(here)
    return max(len(seen), 2)


def _members(rest: str, devices: int) -> np.ndarray:
    """The devices of the first group of a collective, in any of the ways that HLO writes groups."""
    everyone = np.arange(devices)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        return _of_mesh(match[1], match[2])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, sizes, order = (_numbers(part) for part in match.groups(default=""))
        ids = np.arange(prod(sizes)).reshape(sizes)
        return ids.transpose(order or range(ids.ndim)).reshape(groups)[0]
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return np.array(_numbers(match[1]))
    return everyone


def _of_mesh(sizes: str, axes: str) -> np.ndarray:
    """`'data'=2,'fsdp'=8` and `'fsdp':(2)4`: the group along axes, or parts of axes, of a mesh."""
    names, shape, wanted = [], [], []
    parts = dict(re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", axes))
    for name, size in re.findall(r"'([^']+)'=(\d+)", sizes):
        pieces = [int(size)]
        if parts.get(name):
            before, part = map(int, re.findall(r"\d+", parts[name]))
            pieces = [before, part, int(size) // (before * part)]
        names += [name] * len(pieces)
        shape += pieces
        wanted += [name in parts] if len(pieces) == 1 else [False, True, False]
    ids = np.arange(prod(shape)).reshape(shape)
    return ids[tuple(slice(None) if chosen else 0 for chosen in wanted)].reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _kernel(instruction: _Instruction) -> str | None:
    """The name of a kernel that was not made by the compiler."""
    if instruction.opcode != "custom-call":
        return None
    target = re.search(r'custom_call_target="([^"]+)"', instruction.rest)
    if target is None:
        return None
    if target[1].startswith(_PALLAS):
        named = re.search(r'op_name="[^"]*?([\w\-]+)"', instruction.rest)
        name = instruction.name if target[1] == "tpu_custom_call" or not named else named[1]
        return re.sub(
            r"^(transpose_|jvp_|checkpoint_|rematted_computation_)+|_*(\.\d+)*$", "", name
        )
    return target[1] if target[1].startswith("__cu") else None
