"""Compares the memory that a compiled program needs with that of its device or this machine, before it runs."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from tghmoe_jax.errors import UserError
from tghmoe_jax.tools.chips import GIB

_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_GROUP_FILES = {  # by the controllers of a line of _OWN_GROUPS: version 2, and 1
    "": ("", "memory.max", "memory.current"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def peak(memory) -> int:
    """Bytes that one device needs while a program runs, of its `memory_analysis()`."""
    return (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip


def too_big(message: str) -> float | None:
    """Bytes that a compiler says a program needs, or None where its error is another."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message) or re.search(
        r"total memory required[^(]*\(([\d.]+)([KMGT])\)", message
    )
    return float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1) if found else None


def remedy(step: str) -> str:
    if step == "train":
        return (
            "raise train.accumulate or mesh.fsdp, set model.remat=full, lower train.batch, or take "
            "model.attn3d_kind=window for many slices"
        )
    if step == "answer":
        return "lower --new-tokens, or take a machine with more memory"
    return "lower eval.batch or eval.new_tokens, or spread the weights with mesh.fsdp"


def does_not_fit(step: str, needed: float, there: float, each: str = "a chip") -> str:
    return (
        f"the {step} step needs {gib(needed)} GiB {each} and {gib(there)} are there, {gib(needed - there)} too few; "
        f"{remedy(step)}."
    )


def fitting(step: str, function, *arguments, warn: Callable[[str], None] | None = None) -> jax.stages.Compiled:
    """A jitted function compiled for these arguments, which exist already, if it can run.

    UserError where it needs more than there is at all; one line to `warn` (default: the error stream) where it needs
    more than is free.
    """
    lowered = function.lower(*arguments)
    room = _of_device() or _of_host()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (needed := too_big(str(error))):
            raise
        raise UserError(does_not_fit(step, needed, room[0] if room else 0)) from error
    memory = compiled.memory_analysis()
    if memory is None or room is None:
        return compiled
    total, free, programs, each = room
    needed, more = (programs * size for size in (peak(memory), peak(memory) - memory.argument_size_in_bytes))
    if needed > total:
        raise UserError(does_not_fit(step, needed, total, each))
    if more > free:
        (warn or _warn)(
            f"warning: the {step} step needs {gib(more)} GiB {each} beside what it is given and {gib(free)} are free; "
            f"if it is ended for lack of memory, {remedy(step)}."
        )
    return compiled


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


Room = tuple[float, float, int, str]  # bytes there, bytes free, programs that share them, and of what they are


def _of_device() -> Room | None:
    """None where the device counts no memory of its own, as a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"], stats["bytes_limit"] - stats.get("bytes_in_use", 0), 1, "a device"


def _of_host() -> Room | None:
    """This machine's, swap included, or what its control group may have; None where neither can be read."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        sizes = {name.rstrip(":"): int(number) * 1024 for name, number, *_ in lines}
        total, free = sizes["MemTotal"] + sizes["SwapTotal"], sizes["MemAvailable"] + sizes["SwapFree"]
    except (OSError, LookupError, ValueError):
        return None
    for limit, used in _of_groups():
        total, free = min(total, limit), min(free, limit - used)
    return total, free, jax.local_device_count(), "of this machine's memory"


def _of_groups() -> list[tuple[int, int]]:
    """(limit, use without what the kernel can drop) in bytes of the control groups around this process."""
    found = []
    try:
        lines = [line.split(":", 2)[1:] for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return []
    for controllers, own in lines:
        if controllers not in _GROUP_FILES:
            continue
        below, *files = _GROUP_FILES[controllers]
        group = _GROUPS / below / own.lstrip("/")
        for folder in (one for one in (group, *group.parents) if one.is_relative_to(_GROUPS / below)):
            try:  # in a container the group's own path may lie above what is seen
                limit, used = (int((folder / file).read_text()) for file in files)
                kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append((limit, used - int(kept["inactive_file"])))
            except (OSError, LookupError, ValueError):  # no such group, or `max`
                continue
    return found
