"""Batches as a pure function of (seed, step), read through grain so that a checkpoint resumes at the very next one.

A batch is [A, R] = [microbatches, rows]: the rows of a microbatch are spread over the data axis of the mesh, and every
run of `len(pattern)` rows holds the same kinds of samples, so each device sees a fixed number of samples of each task.

Axis legend: A microbatch, R row, D slice, S pixel, T token, L auxiliary label.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from tghmoe_jax.data import binding, prompts
from tghmoe_jax.data.samples import Question, Source
from tghmoe_jax.data.tokenizer import Tokenizer
from tghmoe_jax.errors import UserError

TASK_OF = {"report": "report", "open": "vqa", "closed": "vqa", "binding": "vqa"}  # kinds of a mixture
_RNG_QUESTION, _RNG_ORDER = 1, 2  # streams of the run's seed


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Shape and mixture of a batch. `mixture` counts kinds within one pattern of rows."""

    rows: int  # of the whole batch, over all microbatches and processes
    microbatches: int
    devices: int  # along the data axis of the mesh
    text_length: int
    mixture: tuple[tuple[str, int], ...]
    tasks: tuple[str, ...]

    def __post_init__(self):
        share = self.microbatches * self.devices * len(self.pattern)
        if not self.pattern:
            raise UserError("--config.data.mixture gives no kind of sample a count above 0; give one.")
        if self.rows % share:
            raise UserError(
                f"--config.train.batch={self.rows} must be a multiple of {share} = train.accumulate "
                f"({self.microbatches}) x data devices ({self.devices}) x the {len(self.pattern)} rows of data.mixture."
            )

    @property
    def pattern(self) -> tuple[str, ...]:
        """Kinds of consecutive rows; the mixture is reduced to lowest terms."""
        counts = [count for _, count in self.mixture if count]
        unit = math.gcd(*counts) if counts else 1
        return tuple(kind for kind, count in self.mixture for _ in range(count // unit))

    @property
    def columns(self) -> int:
        """Rows of a microbatch."""
        return self.rows // self.microbatches

    @property
    def task_shares(self) -> tuple[float, ...]:
        """Each task's part of the rows of every device."""
        tasks = [TASK_OF[kind] for kind in self.pattern]
        return tuple(tasks.count(task) / len(tasks) for task in self.tasks)


def collate(
    source: Source, rows: Sequence[tuple[int, str, str | None, str]], tokenizer: Tokenizer, text_length: int,
    tasks: Sequence[str],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Arrays [R, ...] for rows of (volume index, prompt, target or None, task): the batch keys the model reads.

    slices u8 (R, D, S, S, 3), slice_mask bool (R, D), slice_spacing f32 (R,), tokens i32 and token_mask, question_mask,
    loss_mask bool (R, T), task i32 (R,), image_visible bool (R,). UserError for text over text_length.
    """
    volumes = {index: source.slices(index) for index in {row[0] for row in rows}}
    encoded = [prompts.encode(tokenizer, prompt, target) for _, prompt, target, _ in rows]
    return {
        "slices": np.stack([volumes[row[0]][0] for row in rows]),
        "slice_mask": np.stack([volumes[row[0]][1] for row in rows]),
        "slice_spacing": np.array([source.slice_spacing(row[0]) for row in rows], np.float32),
        **prompts.batch(encoded, text_length, tokenizer.pad_id),
        "task": np.array([tasks.index(row[3]) for row in rows], np.int32),
        "image_visible": np.ones(len(rows), bool),
    }


@dataclasses.dataclass(frozen=True)
class TrainBatches(grain.transforms.Map):
    """step -> batch [A, R_local, ...] of this process's columns.

    With a `cell` (voxels of a visual token) it holds the auxiliary labels too: aux f32 (L,) and aux_cells bool
    (V, R, C, L) of each row, as the source gives them.
    """

    source: Source
    tokenizer: Tokenizer
    spec: BatchSpec
    seed: int
    columns: Sequence[int]  # of each microbatch's rows, those of this process
    cell: tuple[int, int, int] | None = None

    def map(self, step: int) -> dict[str, np.ndarray]:
        rows = [(index, q.prompt, q.target, q.task) for index, q in self.rows(int(step))]
        flat = collate(self.source, rows, self.tokenizer, self.spec.text_length, self.spec.tasks)
        if self.cell:
            flat["aux"] = np.stack([self.source.aux(row[0]) for row in rows])
            flat["aux_cells"] = np.stack([self.source.aux_cells(row[0], self.cell) for row in rows])
        micro = self.spec.microbatches
        return {key: value.reshape(micro, len(rows) // micro, *value.shape[1:]) for key, value in flat.items()}

    def rows(self, step: int) -> list[tuple[int, Question]]:
        """(volume, question) of this process's samples of a step, microbatch by microbatch."""
        spec, rows = self.spec, []
        for micro in range(spec.microbatches):
            for column in self.columns:
                slot = micro * spec.columns + column
                index = self._volume(step * spec.rows + slot)
                rng = np.random.default_rng([self.seed, _RNG_QUESTION, step, slot])
                kind = spec.pattern[column % len(spec.pattern)]
                asked = binding.ask(rng) if kind == "binding" else self.source.question(index, kind, rng)
                rows.append((index, asked))
        return rows

    def _volume(self, number: int) -> int:
        """Volume of the run's `number`-th sample: every epoch visits each volume once, in its own order."""
        epoch, place = divmod(number, len(self.source))
        return int(_permutation(self.seed, epoch, len(self.source))[place])


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _permutations:
        while len(_permutations) > 3:  # a batch touches at most two epochs
            _permutations.pop(next(iter(_permutations)))
        _permutations[key] = np.random.default_rng([seed, _RNG_ORDER, epoch]).permutation(count)
    return _permutations[key]


def train_iterator(
    source: Source, tokenizer: Tokenizer, spec: BatchSpec, seed: int, steps: int,
    columns: Sequence[int] | None = None, threads: int = 1, cell: tuple[int, int, int] | None = None,
) -> grain.DatasetIterator:  # fmt: skip
    """Grain iterator over the batches of steps 0..steps-1; its state is saved with the training state.

    `columns`: the rows of each microbatch that this process takes; None for all.
    """
    columns = range(spec.columns) if columns is None else columns
    data = grain.MapDataset.range(steps).map(TrainBatches(source, tokenizer, spec, seed, tuple(columns), cell))
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)))


def check_text(source: Source, tokenizer: Tokenizer, spec: BatchSpec, seed: int, samples: int = 64) -> None:
    """UserError where the first `samples` of a run are longer than `text_length`, before a run leaves files."""
    for step in range(-(-samples // spec.rows)):
        one = TrainBatches(source, tokenizer, spec, seed, range(spec.columns))
        prompts.batch(
            [prompts.encode(tokenizer, q.prompt, q.target) for _, q in one.rows(step)], spec.text_length, 0
        )  # fmt: skip


def mixture_of(config: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The config's `data.mixture` in a fixed order. UserError for an unknown kind or a negative count."""
    for kind, count in config.items():
        if kind not in TASK_OF or int(count) < 0:
            raise UserError(
                f"--config.data.mixture.{kind}={count} must be one of {', '.join(TASK_OF)} with a count >= 0."
            )
    return tuple((kind, int(config[kind])) for kind in TASK_OF if config.get(kind, 0))
