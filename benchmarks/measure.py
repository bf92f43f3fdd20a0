"""How the cases of `benchmarks.run` measure: alternating runs, equal outputs, and what the machine can do.

A case is a module of `benchmarks.cases` with `run(small, runs) -> list[Row]`.
"""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    ours, peer: seconds of each run (peer empty: there is none). bound: what the ratio of their medians must not exceed,
    None where nothing is asked for; `value` takes the ratio's place where what is bounded is no ratio of times. work:
    (FLOPs, bytes of memory) of each part of a run, one after another, by which its limit on this machine is computed.
    notes: what else was seen.
    """

    name: str
    ours: Sequence[float] = ()
    peer: Sequence[float] = ()
    bound: float | None = None
    value: float | None = None
    work: Sequence[tuple[float, float]] = ()
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The keys of `--json`: medians in seconds, every run, the ratio, whether the bound is reached."""
        middle = lambda times: statistics.median(times) if times else None  # noqa: E731
        ours, peer = middle(self.ours), middle(self.peer)
        ratio = self.value if self.value is not None else ours / peer if peer else None
        return {
            "name": self.name, "ours": ours, "peer": peer, "ratio": ratio, "bound": self.bound,
            "reached": None if self.bound is None or ratio is None else ratio <= self.bound,
            "runs": {"ours": list(self.ours), "peer": list(self.peer)}, "work": list(self.work), "notes": self.notes,
        }  # fmt: skip


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, which returns when its work is done."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def alternate(
    ours: Callable[[], Any], peer: Callable[[], Any], runs: int, warm_up: bool = True
) -> tuple[list[float], list[float]]:
    """Seconds of `runs` runs of each, in turn, each first as often as the other; before them one unmeasured of each."""
    both, times = (ours, peer), ([], [])
    for one in both if warm_up else ():
        one()
    for turn in range(runs):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            times[which].append(seconds(both[which]))
    return times


def better(ways: dict[str, Callable[[], Any]]) -> tuple[str, Callable[[], Any], dict[str, Any]]:
    """The fastest way of a peer: its name, the function, and what each took once warm, or why it does not work.

    `first` are seconds of the first call, in which torch.compile compiles.
    """
    found: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            found[name] = {"first": round(seconds(way), 4), "then": round(min(seconds(way), seconds(way)), 4)}
        except Exception as error:  # a compiler raises anything
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    working = {name: took["then"] for name, took in found.items() if isinstance(took, dict)}
    if not working:
        raise SystemExit(f"error: no way of the peer works: {found}")
    best = min(working, key=working.get)
    return best, ways[best], found


def must_agree(what: str, ours, peer, tolerance: float, typical: bool = False) -> float:
    """The largest (`typical`: root mean square) distance between two outputs over the spread of the peer's.

    SystemExit where it exceeds the tolerance, or there is none.
    """
    ours, peer = np.asarray(ours, np.float64), np.asarray(peer, np.float64)
    if ours.shape != peer.shape:
        raise SystemExit(f"error: {what}: outputs of shape {ours.shape} and {peer.shape} cannot be compared.")
    off = np.abs(ours - peer)
    spread = peer.std() if peer.size > 1 else abs(peer.item())
    distance = float((np.sqrt(np.mean(off**2)) if typical else off.max()) / max(spread, 1e-12))
    if not distance <= tolerance:  # NaN is no agreement
        raise SystemExit(f"error: {what}: the outputs differ by {distance:.2g} of their spread, over {tolerance:.2g}.")
    return distance


# ---- the machine -----------------------------------------------------------------------------------------------------


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def prepare_torch(small: bool = False):
    """torch with a thread for each core; small work, in which they would only wait for each other, has one."""
    import torch

    torch.set_num_threads(1 if small else cores())
    torch.manual_seed(0)
    return torch


def rates(small: bool) -> dict[str, float]:
    """Peak fp32 matmul rates (FLOP/s) of torch, JAX and the better; bytes/s read from memory. The best of several."""
    import jax

    torch = prepare_torch(small)
    size, mebibytes = (256, 8) if small else (3072, 768)
    square = torch.randn(size, size)
    flops = 2 * size**3
    product, other = jax.jit(lambda x: x @ x), jax.device_put(square.numpy())
    long = torch.randn(mebibytes << 18)
    tall = long.view(-1, 1024)
    vector = torch.randn(1024)
    ways = {
        "matmul_torch": (flops, lambda: square @ square),
        "matmul_jax": (flops, lambda: jax.block_until_ready(product(other))),
        "read": (long.nbytes, lambda: (long.sum(), None)),
        "read_matvec": (long.nbytes, lambda: tall @ vector),
    }
    with torch.inference_mode():
        found = {name: work / min(seconds(way) for _ in range(4)) for name, (work, way) in ways.items()}
    both = {key: found[key] for key in ("matmul_torch", "matmul_jax")}
    return both | {"matmul": max(both.values()), "bandwidth": max(found["read"], found["read_matvec"])}


def busy(over: float = 2.0) -> float:
    """The share of all cores' time that was spent on anything, by the machine's own clock, in the next seconds."""

    def ticks() -> tuple[int, int]:
        numbers = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]  # all; idle and waiting for a disk

    (all_before, idle_before), _, (all_after, idle_after) = ticks(), time.sleep(over), ticks()
    return 1 - (idle_after - idle_before) / max(1, all_after - all_before)


def machine() -> dict[str, Any]:
    """What was measured on: processor, cores, how busy they were, memory, versions, the commit."""
    found = {}
    for file, key, name in (("/proc/cpuinfo", "model name", "processor"), ("/proc/meminfo", "MemTotal", "memory")):
        if Path(file).is_file():
            lines = Path(file).read_text().splitlines()
            found[name] = next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cores": cores(), "busy_before": round(busy(), 3), **found, "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}, "commit": git.stdout.strip(),
    }  # fmt: skip


def peak_memory() -> int:
    """The highest resident memory of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("error: the system reports no peak of memory (VmHWM).")


def fill(page: Path, marks: tuple[str, str], text: str) -> None:
    """Writes `text` between the two marks of a page, which begins as nothing but the marks."""
    before, _, rest = (page.read_text() if page.is_file() else "".join(marks)).partition(marks[0])
    page.write_text(before + marks[0] + text + marks[1] + rest.partition(marks[1])[2])
