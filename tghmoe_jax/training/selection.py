"""The best checkpoint of a run by a validation score: it is kept beside the latest and used in place of it.

`best.json` of a run folder: {"score", "best": step or null, "value", "validated": step, "worse": how many validations
in a row were not better than the best}.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tghmoe_jax import untrusted, writing

FILE = "best.json"
LOSS = "loss"  # the one score of which less is better
_STEP = range(1 << 31)
_KIND = {"score": str, "best": (_STEP, None), "value": (float, None), "validated": _STEP, "worse": _STEP}


class Selection:
    """What validations of a run found. `best`: the step of the best one, None before the first; `validated`: that of
    the last one, 0 for none."""

    def __init__(
        self, workdir: epath.PathLike, score: str, patience: int, record: Mapping[str, Any], kept: Sequence[int]
    ):
        """`record` as `read` gives it; `kept`: the steps of the checkpoints that are there."""
        self._file, self._score, self._patience = epath.Path(workdir) / FILE, score, patience
        self.validated: int = min(record.get("validated", 0), max(kept, default=0))  # later ones come again
        # Another score has another best, and so has a run whose best checkpoint is gone.
        same = record.get("score") == score and record.get("best") in kept
        self.best: int | None = record.get("best") if same else None
        self._value: float = record["value"] if self.best is not None else -math.inf
        self._worse: int = record.get("worse", 0) if same else 0

    @property
    def exhausted(self) -> bool:
        """Whether `eval.patience` validations in a row were not better."""
        return 0 < self._patience <= self._worse

    def note(self, step: int, metrics: Mapping[str, Any], write: bool = True) -> bool:
        """Takes the metrics of a validation in; whether it is the best. A score that is null never is."""
        value = metrics.get(self._score)
        value = -math.inf if value is None else -value if self._score == LOSS else value
        self.validated, better = step, value > self._value
        self._worse = 0 if better else self._worse + 1
        if better:
            self.best, self._value = step, float(value)
        if write:
            record = {"score": self._score, "best": self.best, "value": None if self.best is None else self._value}
            writing.write(self._file, json.dumps(record | {"validated": step, "worse": self._worse}, indent=1) + "\n")
        return better


def read(run: epath.PathLike) -> dict[str, Any]:
    """The record of a run folder; empty where it has none. UserError where it is damaged."""
    file = epath.Path(run) / FILE
    return (
        untrusted.read_json(file, _KIND, remedy="delete it, and the newest checkpoint counts") if file.is_file() else {}
    )
