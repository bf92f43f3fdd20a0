"""Watches the steps of a run: those that are not finite are counted and written down, and too many in a row end it.

The step itself has refused their update (training/step.py). `bad_steps.jsonl` has one line for each:
{"step", "why", "loss", "grad_norm", "parameters": [leaf path], "items": [{"volume", "task", "question"}]}.
"""

import collections
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tghmoe_jax import writing
from tghmoe_jax.errors import Diverged, UserError
from tghmoe_jax.training.reporting import plain, read_metrics

FILE = "bad_steps.jsonl"
_MOST = 1000  # records; later ones are counted alone
_SHOWN = 5  # parameters and volumes that a message names
_RECENT = 100  # losses that a spike is compared with
_FEWEST = 20
_SPIKE = 20.0  # robust standard deviations above the median


class Guard:
    """`limit`: steps in a row that may be bad. `leaves`: paths of what trains. `items(step)`: what its batch held.

    Records of steps after `start_step`, which a killed run left, are dropped. Every process counts, the one with
    `enabled` writes.
    """

    def __init__(
        self, workdir: epath.PathLike, limit: int, leaves: Sequence[str], items: Callable[[int], list[dict]],
        say: Callable[[str], None], start_step: int = 0, enabled: bool = True,
    ):  # fmt: skip
        self._file, self._limit, self._leaves, self._items = epath.Path(workdir) / FILE, limit, sorted(leaves), items
        self._say, self._enabled = say, enabled
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self.in_a_row = 0
        self._records = [one for one in read_metrics(self._file) if one["step"] <= start_step] if enabled else []
        if enabled and self._file.exists():
            self._write()

    def note(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Takes the scalars of a finished step. Diverged where it is the last that was allowed."""
        loss = float(scalars["loss"])
        if not scalars["bad"]:
            self.in_a_row = 0
            bound = self._bound()
            if loss > bound:
                self._record(step, scalars, "spike", [])
                self._say(f"the loss of step {step}, {loss:.4g}, is far above those before; {FILE} has its items")
            self._recent.append(loss)
            return
        self.in_a_row += 1
        leaves = [path for path, bad in zip(self._leaves, scalars["bad_leaves"], strict=True) if bad]
        why = "the loss" if not np.isfinite(loss) else "the gradient" if leaves else "the norm of the gradient"
        items = self._record(step, scalars, why, leaves)
        self._say(f"step {step} changed nothing: {why} is not finite; {FILE} has its items")
        if self.in_a_row >= self._limit:
            volumes = list(dict.fromkeys(item["volume"] for item in items))
            raise Diverged(
                f"{self.in_a_row} steps in a row up to step {step} had no finite loss and gradient, in "
                f"{_some(leaves) or 'no parameter alone'}, with the volumes {_some(volumes)}; nothing was saved since: "
                f"see {self._file}, and correct the data or lower --config.optimizer.rate."
            )

    def _bound(self) -> float:
        """The loss above which a step is a spike, by the median and the median deviation of the last ones."""
        if len(self._recent) < _FEWEST:
            return np.inf
        middle = statistics.median(self._recent)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self._recent)
        return middle + _SPIKE * max(spread, 0.01 * abs(middle))

    def _record(self, step: int, scalars: Mapping[str, Any], why: str, leaves: list[str]) -> list[dict]:
        if not self._enabled:
            return []
        items = self._items(step)
        if len(self._records) < _MOST:
            values = plain({key: scalars[key] for key in ("loss", "grad_norm")})
            self._records.append({"step": step, "why": why, **values, "parameters": leaves, "items": items})
            self._write()
        return items

    def _write(self) -> None:
        writing.write(self._file, "".join(json.dumps(one) + "\n" for one in self._records))


def refuse_not_finite(params: Mapping[str, jax.Array], origin: str) -> None:
    """UserError that names the parameters of a run's beginning, from `origin`, which are NaN or infinite."""
    finite = jax.jit(lambda leaves: {path: jnp.all(jnp.isfinite(leaf)) for path, leaf in leaves.items()})(params)
    if wrong := [path for path, good in jax.device_get(finite).items() if not good]:
        raise UserError(f"{origin} gives NaN or infinite parameters ({_some(wrong)}); start from another model.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
