"""Whether the slices of one series are one acquisition, or several whose slices would interleave.

A series is one pass along the patient. Two phases that a program exported under one UID, shifted by half a step, look
like one even stack of half the step; their tags tell them apart.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from tghmoe_jax.scans.dicom_files import ACQUISITION
from tghmoe_jax.scans.volume import MIN_SLICES

_NAMES = {
    "AcquisitionNumber": "acquisition number",
    "TemporalPositionIdentifier": "temporal position",
    "AcquisitionDateTime": "time",
    "AcquisitionTime": "time",
    "ConvolutionKernel": "kernel",
    "KVP": "tube voltage",
    "SliceThickness": "slice thickness",
    "InstanceNumber": "instance number",
}


def split(along: np.ndarray, labels: Sequence[Mapping[str, str]]) -> tuple[list[list[int]], str]:
    """Indices of the slices of each acquisition, in the order of their labels, and what tells them apart.

    `along` (N,) are positions in mm along the normal; `labels` are the values of the tags `ACQUISITION` of each slice.
    One list where the slices are one acquisition, as far as they say.
    """
    for keyword in ACQUISITION:
        values = [label.get(keyword, "") for label in labels]
        if len(set(values)) < 2:
            continue
        parts = _passes(along, values)
        if len(parts) > 1 and all(_is_stack(along[part], np.ptp(along)) for part in parts):
            # Numbers of instances are often in no order; those of one acquisition follow one another.
            if keyword != "InstanceNumber" or all(_follow([values[i] for i in part]) for part in parts):
                return parts, _NAMES[keyword]
    return [list(range(len(along)))], ""


def doubts(along: np.ndarray, labels: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Warnings of a series that could not be split but may be more than one acquisition."""
    order = np.argsort(along, kind="stable")
    for keyword in ACQUISITION[:2]:
        values = [label.get(keyword, "") for label in labels]
        changes = sum(values[i] != values[j] for i, j in zip(order, order[1:], strict=False))
        if changes >= len(set(values)):  # a value that comes again
            return (f"slices: the {_NAMES[keyword]} alternates along the stack; check that it is one acquisition",)
    counts = set(Counter(label.get("InstanceNumber", "") for label in labels).values())
    if len(counts) == 1 and 1 < counts.pop() <= len(along) // MIN_SLICES:
        return ("slices: every instance number occurs more than once; check that it is one acquisition",)
    numbers = np.array([_key(labels[i].get("InstanceNumber", ""))[0] for i in order])
    lags = [lag for lag in (1, 2, 3, 4) if lag < len(numbers)]
    follow = [float(np.mean(np.abs(numbers[lag:] - numbers[:-lag]) == 1)) for lag in lags]
    if follow and follow[0] < 0.3 and max(follow) > 0.6:
        return ("slices: instance numbers follow one another across slices; check that it is one acquisition",)
    return ()


def _passes(along: np.ndarray, values: Sequence[str]) -> list[list[int]]:
    """Slices by rising label; a label whose slices lie among those that came before begins another pass."""
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    parts: list[list[int]] = []
    for value in sorted(groups, key=_key):
        group = groups[value]
        low, high = along[group].min(), along[group].max()
        if parts and (high < along[parts[-1]].min() or low > along[parts[-1]].max()):
            parts[-1] = parts[-1] + group
        else:
            parts.append(group)
    return parts


def _key(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return 0.0, value


def _is_stack(along: np.ndarray, whole: float) -> bool:
    """Whether slices are a stack of their own along at least half of the whole."""
    return len(along) >= MIN_SLICES and np.ptp(along) > 0.5 * whole


def _follow(values: Sequence[str]) -> bool:
    numbers = sorted(_key(value)[0] for value in values)
    return numbers[-1] - numbers[0] == len(numbers) - 1
