"""The collectives of a compiled program, read from its HLO text: how often each runs in one step and what it moves.

A computation that a loop calls counts as often as the loop runs: by the trip count that XLA notes, else by the number
its condition compares with. TPU programs spread an asynchronous collective over several fusions: the one that starts it
counts.
"""

import collections
import dataclasses
import graphlib
import math
import re
from collections.abc import Sequence

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All of one kind in one step: times run, bytes one chip holds of their larger side, bytes one chip sends.

    What is sent counts a ring over the `group` chips that take part: (n - 1) / n of the larger side, twice for an
    all-reduce.
    """

    kind: str
    count: int = 0
    bytes: int = 0
    sent: int = 0


def collectives(hlo: str) -> dict[str, Collective]:
    """{kind: Collective} of one run of the program of `compiled.as_text()`; kinds that do not occur are left out."""
    bodies, entry = _computations(hlo)
    times = _times(bodies, entry)
    totals: dict[str, list[int]] = {}
    for name, lines in bodies.items():
        if name.startswith("async_collective_fusion") or any('"AsyncCollectiveDone"' in line for line in lines):
            continue
        for line in lines:
            match = _INSTRUCTION.match(line)
            kind = match and match[3].removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            group = len((_groups(line) or [(0, 1)])[0])
            size = _larger_side(match[2], kind, match[3].endswith("-start"))
            if kind == "reduce-scatter" and not match[3].endswith("-start"):
                size *= group
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a TPU's fusion with the slice after it
                kind = "reduce-scatter"
            share = 1.0 if kind == "collective-permute" else (group - 1) / group
            sent = round(size * share * (2 if kind == "all-reduce" else 1))
            total = totals.setdefault(kind, [0, 0, 0])
            for i, amount in enumerate((1, size, sent)):
                total[i] += amount * times[name]
    return {kind: Collective(kind, *totals[kind]) for kind in KINDS if kind in totals}


def _larger_side(types: str, kind: str, start: bool) -> int:
    """Bytes of the operands or the results of one instruction, whichever are more.

    The type of an asynchronous start names operands beside results, as (a, c) or ((a, b), (c, d)); of an all-reduce it
    does not.
    """
    sides = types[1:].partition("), ")[::2] if types.startswith("((") else [types]
    sizes = [[_size(*shape) for shape in _SHAPE.findall(side)] for side in sides]
    apart = start and len(sides) == 1 and kind != "all-reduce"
    return max(sizes[0]) if apart else max(map(sum, sizes))


def replica_groups(hlo: str, kinds: Sequence[str] = KINDS) -> set[tuple[int, ...]]:
    """The sets of devices that take part together in the program's collectives of these kinds."""
    found: set[tuple[int, ...]] = set()
    for line in hlo.splitlines():
        match = _INSTRUCTION.match(line)
        if match and match[3].removesuffix("-start") in kinds:
            found |= {tuple(group) for group in _groups(line)}
    return found


def _groups(line: str) -> list[list[int]]:
    """The groups of one instruction: `replica_groups={{0,1},{2,3}}`, `[4,2]<=[8]` or `mesh['a'=2,'b'=4] .. {'b'}`."""
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", line
    ):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        devices = _devices(found[2] or ",".join(map(str, sizes.values())), found[3]).reshape(list(sizes.values()))
        over = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", found[4])]
        rest = [i for i in range(len(sizes)) if i not in over]
        return devices.transpose(rest + over).reshape(-1, math.prod(devices.shape[i] for i in over)).tolist()
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _devices(found[3], found[4]).reshape(int(found[1]), int(found[2])).tolist()
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
    return []


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def _devices(sizes: str, order: str | None) -> np.ndarray:
    """The numbers of all devices in an array of these sizes, its axes in this order (None: as they are)."""
    shape = _numbers(sizes)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(order) or range(len(shape)))


def _size(dtype: str, dimensions: str) -> int:
    width = _BYTES.get(dtype) or max(1, int(re.search(r"\d+", dtype)[0]) // 8 if re.search(r"\d", dtype) else 1)
    return width * math.prod(int(d) for d in dimensions.split(",") if d)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """{name: lines} of every computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            current = bodies.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif line.rstrip() == "}":  # the configuration of a kernel may span lines that begin with a brace
            current = None
        elif current is not None:
            current.append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> collections.Counter:
    """How often each computation runs: the sum over its callers, times the trips of a loop."""
    calls = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            trips = _trips(line, bodies)
            for found in _CALLED.finditer(line):
                calls[name] += [(callee, trips) for callee in re.findall(r"[\w.-]+", found[1]) if callee in bodies]
    times: collections.Counter = collections.Counter({entry: 1})
    called_first = graphlib.TopologicalSorter({name: [callee for callee, _ in made] for name, made in calls.items()})
    for name in reversed([*called_first.static_order()]):  # callers before what they call
        for callee, trips in calls[name]:
            times[callee] += times[name] * trips
    return times


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs at most; 1 for any other instruction."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(found[1])
    condition = re.search(r"\bwhile\(.*condition=%?([\w.-]+)", line)
    numbers = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[condition[1]])) if condition else []
    return max(map(int, numbers), default=1)
