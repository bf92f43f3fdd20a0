"""What a run reports while it trains: `metrics.jsonl`, TensorBoard files, the progress line, the first printed page.

Everything here may read clocks and files. Fields that a clock decides stand apart from those that the seed decides,
so that two runs can be compared record by record (`deterministic`).
"""

import collections
import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from etils import epath

import tghmoe_jax
from tghmoe_jax import untrusted, writing
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import provenance, text_table

TIMED = ("rate", "timing")  # the fields of a record that differ between two runs of one seed
_WINDOW = 50  # steps whose median duration gives the rate; a median passes over compilation and evaluation
_REMOTE_SECONDS = 60.0


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `metrics.jsonl` without the fields a clock decides."""
    return {key: value for key, value in record.items() if key not in TIMED}


def plain(value: Any) -> Any:
    """A JSON value with every bit of `value`: narrow floats widen exactly; JSON has no NaN and infinity: text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "shape"):
        value = np.asarray(value)
        value = (value if value.dtype.isbuiltin else value.astype(np.float32)).tolist()  # bfloat16 is no builtin
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    # A record counts only with its newline; what follows the last newline was cut short.
    try:
        records = [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds a line that is not JSON; copy it again, or delete it.") from error
    untrusted.expect(records, [{"step": int}], path, "copy it again, or delete it")
    return records


def clock_text(seconds: float) -> str:
    """`h:mm:ss` or `m:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class RunLog:
    """The log of one training run.

    `start_step` is the last step that the restored checkpoint holds: later records of a killed run are dropped, so
    that the file keeps exactly one line a step. Only the first process of a multi-process run passes `enabled`;
    for the others every call does nothing. `workdir` may be a URL; an object store cannot append, so the file is
    then written whole about once a minute. `flops_per_step`: useful ones of all devices (tools/flops.py). `peak`: the
    FLOP/s that all of them can do; 0 where it is not known, and then no MFU is stated.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        total_steps: int,
        *,
        start_step: int = 0,
        samples_per_step: int = 1,
        flops_per_step: float = 0.0,
        peak: float = 0.0,
        enabled: bool = True,
        tensorboard: bool = True,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        clock=time.perf_counter,
    ):
        self.enabled = enabled
        if not enabled:
            return
        self.total_steps, self.samples_per_step = total_steps, samples_per_step
        self._flops, self._peak = flops_per_step, peak
        self._stream, self._every, self._clock = stream or sys.stderr, every_seconds, clock
        self._live = self._stream.isatty()
        self._last = self._begun = clock()
        self._printed: float | None = None
        self._open_line = False
        self._durations: collections.deque[float] = collections.deque(maxlen=_WINDOW)

        self.path = epath.Path(workdir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_until(start_step)
        self._step = start_step
        self._remote = "://" in str(workdir)
        self._lines = self.path.read_text() if self._remote and self.path.exists() else ""
        self._sent = self._begun
        self._file = None if self._remote else open(self.path, "a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import, and not every caller wants it

            # purge_step hides what a killed run wrote after its last checkpoint.
            self._board = SummaryWriter(str(workdir), purge_step=start_step + 1 if start_step else None)

    def _keep_until(self, step: int) -> None:
        """Drops records after `step`, repeated ones and a half-written last line, all or nothing."""
        if not self.path.exists():
            return
        kept = {record["step"]: record for record in read_metrics(self.path) if record["step"] <= step}
        writing.write(self.path, "".join(json.dumps(kept[number]) + "\n" for number in sorted(kept)))

    def record(self, step: int, values: Mapping[str, Any], ended: float | None = None) -> None:
        """Records one finished step (steps count from 1, each once): its deterministic `values`, scalars or arrays.

        `ended`: what the clock said when the step ended, by default now.
        """
        if not self.enabled:
            return
        if step <= self._step:
            raise ValueError(f"step {step} is recorded after step {self._step}")
        if {"step", *TIMED} & set(values):
            raise ValueError(f"the names step, {', '.join(TIMED)} belong to the log itself")
        values = plain(values)
        now = self._clock() if ended is None else ended
        duration, self._last, self._step = now - self._last, now, step
        if self._printed is not None:  # the first step compiles, so its duration predicts nothing
            self._durations.append(duration)
        pace = statistics.median(self._durations or [duration])
        rate = 1 / pace if pace > 0 else 0.0
        remaining = (self.total_steps - step) * pace
        timing = {
            "samples_per_second": round(rate * self.samples_per_step, 4),
            "step_seconds": round(duration, 6),
            "elapsed_seconds": round(now - self._begun, 3),
        }
        if self._flops:
            timing["tflops_per_second"] = round(rate * self._flops / 1e12, 6)
        if self._flops and self._peak:
            timing["mfu"] = round(rate * self._flops / self._peak, 4)
        self._write({"step": step, **values, "rate": round(rate, 6), "timing": timing}, now)
        self.scalars(step, {**values, "rate": rate, **{f"timing/{key}": value for key, value in timing.items()}})
        self._progress(step, values.get("loss"), rate, remaining, now)

    def _write(self, record: Mapping[str, Any], now: float) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
            return
        self._lines += line
        if now - self._sent >= _REMOTE_SECONDS:
            self._send(now)

    def _send(self, now: float) -> None:
        self.path.write_text(self._lines)
        self._sent = now

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends the single numbers among `values`, e.g. an evaluation's scores, to TensorBoard alone."""
        if not self.enabled or self._board is None:
            return
        for key, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._board.add_scalar(key, value, step)

    def _progress(self, step: int, loss: Any, rate: float, remaining: float, now: float) -> None:
        last = step >= self.total_steps
        due = self._printed is None or last or now - self._printed >= (0.2 if self._live else self._every)
        if not due:
            return
        self._printed = now
        shown = f"{loss:.4f}" if isinstance(loss, float) else f"{loss}"
        left = f"took {clock_text(now - self._begun)}" if last else f"ETA {clock_text(remaining)}"
        speed = f"{rate:.2f} steps/s" if rate >= 1 or not rate else f"{1 / rate:.2f} s/step"
        if self._peak:
            speed += f"  MFU {rate * self._flops / self._peak:.1%}"
        if not self._durations and not last:
            speed, left = f"{clock_text(now - self._begun)} with compiling", "ETA after the next"
        text = f"step {step}/{self.total_steps}  loss {shown}  {speed}  {left}"
        if self._live:  # the only escape sequence of the project, around the shield against those of others
            getattr(self._stream, "stream", self._stream).write(f"\r\x1b[2K{text}")
        else:
            self._stream.write(f"{text}\n")
        self._open_line = self._live
        if last:
            self._end_line()
        self._stream.flush()

    def _end_line(self) -> None:
        if self._open_line:
            self._stream.write("\n")
            self._open_line = False

    def say(self, text: str) -> None:
        """Prints a message on lines of its own, below the progress line."""
        if self.enabled:
            self._end_line()
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def flush(self) -> None:
        """Writes everything recorded so far to disk (call it before a checkpoint is written)."""
        if not self.enabled:
            return
        if self._remote:
            self._send(self._clock())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Ends the progress line and closes the files; a second call does nothing."""
        if not self.enabled:
            return
        self.flush()
        self._end_line()
        if self._file:
            self._file.close()
        if self._board is not None:
            self._board.close()
        self.enabled = False

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One leaf: its path, its shape, `trained`, `frozen` or `new` (trained from fresh values), and its sharding."""

    path: str
    shape: tuple[int, ...]
    status: str
    sharding: str = ""

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _ranges(numbers: Iterable[int]) -> str:
    """`0-2,5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def parameter_table(rows: Iterable[ParameterRow]) -> str:
    """Every leaf once, equal leaves of numbered blocks in one line, counts in millions to the last parameter.

    Below it the totals of each status and of all.
    """
    rows = list(rows)
    lines: dict[tuple, list[ParameterRow]] = {}
    for row in rows:
        lines.setdefault((re.sub(r"block_\d+", "block_*", row.path), row.shape, row.status, row.sharding), []).append(
            row
        )
    cells = [("parameter", "shape", "count (M)", "status", "sharding")]
    for (path, shape, status, sharding), own in lines.items():
        if "block_*" in path:
            numbers = [int(re.search(r"block_(\d+)", row.path)[1]) for row in own]
            path = path.replace("block_*", f"block_{{{_ranges(numbers)}}}")
        size = " x ".join(map(str, shape)) or "scalar"
        size = f"{len(own)} of {size}" if len(own) > 1 else size
        cells.append((path, size, f"{sum(row.count for row in own) / 1e6:,.6f}", status, sharding))
    totals = collections.Counter()
    for row in rows:
        totals[row.status] += row.count
    ordered = [status for status in ("trained", "new", "frozen") if status in totals]
    ordered += [status for status in totals if status not in ordered]
    sums = [(status, f"{totals[status] / 1e6:,.6f} M") for status in ordered]
    sums.append(("total", f"{sum(totals.values()) / 1e6:,.6f} M"))
    return "\n".join([*text_table.table(cells, left=(0, 1, 3, 4)), "", *text_table.table(sums, left=(0,))])


def manifest(
    *,
    seeds: Mapping[str, int],
    data: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    devices: Sequence[Any] = (),
) -> dict[str, Any]:
    """The contents of `manifest.json`: all that is needed to say what ran, and nothing that names a person or host.

    `data`: the data set's name, version and hashes; `base`: the same of the model started from; `devices`: jax
    devices, of which kind and number are kept.
    """
    kinds = collections.Counter(f"{device.platform}:{device.device_kind}" for device in devices)
    packages = sorted(
        {name.lower(): dist.version for dist in importlib.metadata.distributions() if (name := dist.name)}.items()
    )
    return {
        "tghmoe_jax": tghmoe_jax.__version__,
        "git": provenance.checkout(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": dict(packages),
        "seeds": dict(seeds),
        "data": dict(data),
        "base": None if base is None else dict(base),
        "devices": dict(kinds),
        "processes": len({device.process_index for device in devices}),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
