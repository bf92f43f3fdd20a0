"""Canonical parameter names and their scanned view, stated once.

Canonical names are those of model-spec 2.6 (`vision/block_3/...`). Runs of equal layers are executed by one `nn.scan`,
whose parameters are stacked: `scan_S_R_P/block_B/leaf` holds, along its leading axis, the leaves of blocks
B, B + P, ..., B + (R - 1) P, where the segment starts at block S and repeats a pattern of P layers R times. Rules,
checkpoints and export speak canonical names; everything that needs them goes through this module.
"""

import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

_SCANNED = re.compile(r"^(.*?)scan_(\d+)_(\d+)_(\d+)/block_(\d+)/(.*)$")


def segments(specs: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Splits layer specs into (start, repeats, period); repeats > 1 is a repeated pattern, (i, 1, 1) a single block."""
    result, start = [], 0
    while start < len(specs):
        best = (start, 1, 1)
        for period in (1, 2, 3):
            repeats = 1
            while specs[start + repeats * period : start + (repeats + 1) * period] == specs[start : start + period]:
                repeats += 1
            if repeats > 1 and repeats * period > best[1] * best[2]:
                best = (start, repeats, period)
        result.append(best)
        start += best[1] * best[2]
    return result


def scan_name(start: int, repeats: int, period: int) -> str:
    return f"scan_{start}_{repeats}_{period}"


def canonical_names(path: str) -> list[str]:
    """Canonical names that the leaf at `path` holds: one, or one per repeat for a stacked leaf (in stacking order)."""
    match = _SCANNED.match(path)
    if not match:
        return [path]
    head, _, repeats, period, block, tail = match.groups()
    return [f"{head}block_{int(block) + r * int(period)}/{tail}" for r in range(int(repeats))]


def is_stacked(path: str) -> bool:
    return _SCANNED.match(path) is not None


def to_canonical(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{leaf path: array} -> {canonical name: array}; stacked leaves are split along their leading axis (views)."""
    result = {}
    for path, value in flat.items():
        names = canonical_names(path)
        result.update({names[0]: value} if not is_stacked(path) else dict(zip(names, value, strict=True)))
    return result


def from_canonical(paths: Sequence[str], canonical: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse for the leaf paths of one model; KeyError names a missing canonical leaf."""
    return {
        path: np.stack([np.asarray(canonical[n]) for n in canonical_names(path)])
        if is_stacked(path)
        else np.asarray(canonical[path])
        for path in paths
    }


def canonical_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{leaf path: shape} -> {canonical name: shape}."""
    return {
        name: tuple(shape[1:]) if is_stacked(path) else tuple(shape)
        for path, shape in shapes.items()
        for name in canonical_names(path)
    }


def matches(pattern: str, path: str) -> bool:
    """Whether a rule's regex matches the leaf at `path`, by full match on canonical names.

    ValueError where a rule would split a scanned run, since a stacked leaf is one array.
    """
    hits = {re.fullmatch(pattern, name) is not None for name in canonical_names(path)}
    if len(hits) > 1:
        raise ValueError(f"the rule {pattern!r} matches only some layers of {path}; name all of them or none")
    return hits.pop()
