"""Examples to begin with: a phantom of each body section, scans of a folder that the server is given, and questions
that fit the tasks of a checkpoint."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax.drawn.phantom import PLANES, draw, plan
from tghmoe_jax.drawn.phantom_anatomy import PHASES
from tghmoe_jax.drawn.phantom_lesions import SECTIONS
from tghmoe_jax.drawn.wordings import TEXTS
from tghmoe_jax.samples.tasks import TASKS
from tghmoe_jax.scans.finding import find_scans
from tghmoe_jax.scans.volume import Volume

GRID = (32, 128, 128)  # finer than in training, for the eye
FIRST_SEED = 700_000_000  # far from those of any split


def phantom(section: str) -> Volume:
    """An axial phantom of a body section with a lesion, the same at every call."""
    seeds = itertools.count(FIRST_SEED)
    chosen = next(s for s in seeds if (t := plan(s).truth).section == section and t.plane == "axial" and t.lesions)
    planned, drawn = plan(chosen, GRID), draw(chosen, GRID)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = planned.frame.steps, planned.frame.origin
    history = (f"a drawn phantom of the {section}, no patient",)
    return Volume(drawn.hu.astype(np.float32), "HU", drawn.truth.spacing_mm, "LPS", None, history, (), affine)


class Examples:
    """The examples by number: phantoms first, then the scans in `folder`, which are named by their number alone, since
    names of files may be those of patients."""

    def __init__(self, folder: str | Path | None = None):
        self._folder = folder and Path(folder)
        self._paths = find_scans(self._folder) if folder else []

    @property
    def labels(self) -> list[str]:
        phantoms = [f"Phantom: {section}" for section in SECTIONS]
        return phantoms + [f"Scan {number} of the server's folder" for number, _ in enumerate(self._paths, 1)]

    def __getitem__(self, number: int) -> Volume | Path:
        if number < len(SECTIONS):
            return phantom(SECTIONS[number])
        return self._folder / self._paths[number - len(SECTIONS)]


def suggestions(tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Questions of the kinds that a checkpoint with these tasks was trained on, some with their options."""
    found = []
    if "vqa" in tasks or not tasks:
        questions, options = TEXTS["seen"]["questions"], {"plane": PLANES, "phase": PHASES}
        for type, texts in questions.items():
            found += [
                {"question": text.format(lesion="lesion"), "choices": list(options.get(type, ()))[:4]}
                for text in texts[:2]
            ]
    if "report" in tasks:
        found.append({"question": TASKS["report"].request, "choices": []})
    return found
