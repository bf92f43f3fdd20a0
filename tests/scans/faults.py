"""What a drawn scan is while faults are put into it (see `differential`)."""

import dataclasses
from pathlib import Path

import numpy as np

FAULTS: dict[str, dict[str, tuple[str, object]]] = {"dicom": {}, "nifti": {}}


class Inapplicable(Exception):
    """A fault that another fault leaves no room for."""


def fault(family, kind):
    def add(function):
        FAULTS[family][function.__name__] = (kind, function)
        return function

    return add


@dataclasses.dataclass
class Case:
    """One scan: what was drawn, canonical (D, H, W) in HU, and the files that the faults change."""

    rng: np.random.Generator
    folder: Path
    hu: np.ndarray
    spacing: tuple[float, float, float]
    axes: np.ndarray
    origin: np.ndarray
    path: Path | None = None
    slices: list = dataclasses.field(default_factory=list)
    files: list = dataclasses.field(default_factory=list)  # changes of the written files, in order
    header: dict = dataclasses.field(default_factory=dict)  # NIfTI: fields, and what the writer is told

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def middle(self):
        return int(self.rng.integers(2, len(self.slices) - 2))
