"""Batches as a pure function of (seed, step), read through grain so that a run resumes with the next batch.

A batch is [A, R] = [microbatches, rows]: the rows of a microbatch are spread over the devices of the mesh, and every
run of `len(pattern)` rows holds the same kinds of samples, so each device sees a fixed number of samples of each task.

Axis legend: A microbatch, R row, D slice, S pixel, T token, L auxiliary label.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from tghmoe_jax.errors import UserError
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.augment import Augment
from tghmoe_jax.samples.questions import ItemSource, Question, Source
from tghmoe_jax.samples.tasks import TASK_OF
from tghmoe_jax.samples.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

_RNG_QUESTION, _RNG_ORDER, _RNG_ITEMS, _RNG_AUGMENT = 1, 2, 3, 4  # streams of the run's seed
MOST_IN_A_ROW = 100  # items that may be unusable one after another
FEWEST_SEEN = 100  # a share of fewer items says little


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Shape and mixture of a batch. `mixture` counts kinds within one pattern of rows."""

    rows: int  # of the whole batch, over all microbatches and processes
    microbatches: int
    devices: int  # of the mesh: rows lie over all of its axes
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
                f"({self.microbatches}) x devices ({self.devices}) x the {len(self.pattern)} rows of data.mixture."
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
    tasks: Sequence[str], volumes: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Arrays [R, ...] for rows of (volume index, prompt, target or None, task): the batch keys the model reads.

    slices u8 (R, D, S, S, 3), slice_mask bool (R, D), slice_spacing f32 (R,), tokens i32 and token_mask, question_mask,
    loss_mask bool (R, T), task i32 (R,), image_visible bool (R,). UserError for text over text_length. `volumes` are
    the slices and masks, where they are read already.
    """
    volumes = volumes or {index: source.slices(index) for index in {row[0] for row in rows}}
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
class TrainBatches:
    """step -> batch [A, R_local, ...] of this process's columns.

    With a `cell` (voxels of a visual token) it holds the auxiliary labels too: aux f32 (L,) and aux_cells bool
    (V, R, C, L) of each row, as the source gives them. Of an `ItemSource` it holds `skipped` as well: a list of
    (name of the volume, reason) of the items that could not be used, each replaced by the next one of its kind.
    """

    source: Source
    tokenizer: Tokenizer
    spec: BatchSpec
    seed: int
    columns: Sequence[int]  # of each microbatch's rows, those of this process
    cell: tuple[int, int, int] | None = None
    augment: Augment = Augment()

    def map(self, step: int) -> dict[str, np.ndarray]:
        step, volumes, skipped = int(step), {}, []
        asked = self.used(step, volumes, skipped)
        rows = [(index, q.prompt, q.target, q.task) for index, q in asked]
        flat = collate(self.source, rows, self.tokenizer, self.spec.text_length, self.spec.tasks, volumes)
        if self.augment != Augment():
            for row, (slot, (_, question)) in enumerate(zip(self._slots(), asked, strict=True)):
                rng = np.random.default_rng([self.seed, _RNG_AUGMENT, step, slot])
                self.augment(flat["slices"][row], flat["slice_mask"][row], question, rng)
        if self.cell:
            flat["aux"] = np.stack([self.source.aux(row[0]) for row in rows])
            cells = np.stack([self.source.aux_cells(row[0], self.cell) for row in rows])
            flat["aux_cells"] = np.ones_like(cells) if self.augment.shift else cells  # a shifted picture has others
        micro = self.spec.microbatches
        batch = {key: value.reshape(micro, len(rows) // micro, *value.shape[1:]) for key, value in flat.items()}
        return batch | ({"skipped": skipped} if isinstance(self.source, ItemSource) else {})

    def used(self, step: int, volumes: dict, skipped: list) -> list[tuple[int, Question]]:
        """`rows` with what cannot be used replaced: `volumes` and `skipped` take what was read and left out for it."""
        if not isinstance(self.source, ItemSource):
            return self.rows(step)
        return [self._usable(step, slot, volumes, skipped) for slot in self._slots()]

    def rows(self, step: int) -> list[tuple[int, Question]]:
        """(volume, question) of this process's samples of a step, microbatch by microbatch."""
        return [self._asked(step, slot) for slot in self._slots()]

    def _slots(self) -> list[int]:
        """This process's places in a batch."""
        return [m * self.spec.columns + column for m in range(self.spec.microbatches) for column in self.columns]

    def _asked(self, step: int, slot: int, further: int = 0) -> tuple[int, Question]:
        """(volume, question) of a slot, or of the item that comes `further` later in the order of its kind."""
        rng = np.random.default_rng([self.seed, _RNG_QUESTION, step, slot])
        kind = self.spec.pattern[slot % len(self.spec.pattern)]
        if isinstance(self.source, ItemSource) and kind not in self.source.made_up:
            return self.source.item(kind, self._item(kind, self._number(step, slot) + further), rng)
        index = self._volume(step * self.spec.rows + slot + further)
        return index, self.source.question(index, kind, rng)

    def _number(self, step: int, slot: int) -> int:
        """How many samples of the slot's kind stand before it in the run."""
        pattern = self.spec.pattern
        turn, place = divmod(step * self.spec.rows + slot, len(pattern))
        return turn * pattern.count(pattern[place]) + pattern[:place].count(pattern[place])

    def _volume(self, number: int) -> int:
        """Volume of the run's `number`-th sample: every epoch visits each volume once, in its own order."""
        epoch, place = divmod(number, len(self.source))
        return int(_permutation((self.seed, _RNG_ORDER, epoch), len(self.source))[place])

    def _item(self, kind: str, number: int) -> int:
        """Item of the run's `number`-th sample of a kind: every epoch visits each item of a data set once.

        With weights the samples of a kind go round the data sets, each as often as its weight says.
        """
        counts, weights = self.source.counts(kind), self.source.weights
        start = 0
        if weights:
            unit = math.gcd(*weights)
            shares = [weight // unit if count else 0 for weight, count in zip(weights, counts, strict=True)]
            turns = [part for part, share in enumerate(shares) for _ in range(share)]
            turn, place = divmod(number, len(turns))
            chosen = turns[place]
            number = turn * turns.count(chosen) + turns[:place].count(chosen)
            start, counts = sum(counts[:chosen]), counts[chosen : chosen + 1]
        epoch, place = divmod(number, sum(counts))
        stream = (self.seed, _RNG_ITEMS, tuple(TASK_OF).index(kind), start, epoch)
        return start + int(_permutation(stream, sum(counts))[place])

    def _usable(self, step: int, slot: int, volumes: dict, skipped: list) -> tuple[int, Question]:
        """The slot's item, or the next of its kind whose volume can be read and whose text is not too long."""
        for further in range(MOST_IN_A_ROW):
            index, question = self._asked(step, slot, further)
            length = len(prompts.encode(self.tokenizer, question.prompt, question.target).tokens)
            try:
                if length > self.spec.text_length:
                    raise UserError(f"{length} text tokens are more than --config.data.text_length allows.")
                if index not in volumes:
                    volumes[index] = self.source.slices(index)
            except UserError as error:
                skipped.append((self.source.key(index), str(error)))
                continue
            return index, question
        raise UserError(
            f"{MOST_IN_A_ROW} items in a row cannot be used, the last because: {skipped[-1][1]} Correct the data set."
        )


@functools.lru_cache(maxsize=16)  # of each kind and data set, a batch touches at most two epochs
def _permutation(stream: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(stream).permutation(count)


def train_iterator(
    source: Source, tokenizer: Tokenizer, spec: BatchSpec, seed: int, steps: int,
    columns: Sequence[int] | None = None, cell: tuple[int, int, int] | None = None, workers: int = 0,
    augment: Augment = Augment(),  # noqa: B008
) -> "grain.DatasetIterator":  # fmt: skip
    """Grain iterator over the batches of steps 0..steps-1; its state is saved with the training state.

    `columns`: the rows of each microbatch that this process takes; None for all. `workers` further processes make the
    batches, in the same order. UserError where the mixture asks for a kind that an `ItemSource` does not
    hold.
    """
    if isinstance(source, ItemSource):
        for kind in dict.fromkeys(spec.pattern):
            if kind not in source.made_up and not sum(source.counts(kind)):
                raise UserError(
                    f"--config.data.mixture.{kind} is above 0 and the training set holds no {kind} item; set it to 0."
                )
    import grain  # takes a second, and a model that is only asked needs none of it

    columns = tuple(range(spec.columns) if columns is None else columns)
    batches = TrainBatches(source, tokenizer, spec, seed, columns, cell, augment)
    data = grain.MapDataset.range(steps).map(batches.map)
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags of its own when it starts workers
    return iter(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else data)


class BadItems:
    """Names each unusable volume once, counts, and ends the run past a share of `bound` of the items seen.

    Counted is what this process reads, since it started.
    """

    def __init__(self, bound: float, say: Callable[[str], None]):
        self.bound, self.say, self.bad, self.seen = bound, say, 0, 0
        self.named: set[str] = set()

    def note(self, skipped: Sequence[tuple[str, str]], rows: int) -> None:
        """`skipped` as a batch holds it, and the batch's `rows`. UserError past the bound."""
        for name, reason in skipped:
            if name not in self.named:
                self.named.add(name)
                self.say(f"skipped {name}: {reason}")
        self.bad += len(skipped)
        self.seen += rows + len(skipped)
        if self.bad > self.bound * max(self.seen, FEWEST_SEEN):
            raise UserError(
                f"{self.bad} of {self.seen} items cannot be used, the last because: {skipped[-1][1].rstrip('.')}; "
                f"correct the data, or allow a larger share than --config.max_bad_fraction={self.bound}."
            )


def check_text(source: Source, tokenizer: Tokenizer, spec: BatchSpec, seed: int, bad: float = 0.0) -> None:
    """UserError where more than the share `bad` of a run's first samples (64 or more) exceed `text_length`.

    It comes before a run leaves files.
    """
    one = TrainBatches(source, tokenizer, spec, seed, range(spec.columns))
    asked = [q for step in range(-(-64 // spec.rows)) for _, q in one.rows(step)]
    encoded = sorted((prompts.encode(tokenizer, q.prompt, q.target) for q in asked), key=lambda e: len(e.tokens))
    prompts.batch(encoded[: len(encoded) - int(bad * len(encoded))], spec.text_length, 0)


def mixture_of(config: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The config's `data.mixture` in a fixed order. UserError for an unknown kind or a negative count."""
    for kind, count in config.items():
        if kind not in TASK_OF or int(count) < 0:
            raise UserError(
                f"--config.data.mixture.{kind}={count} must be one of {', '.join(TASK_OF)} with a count >= 0."
            )
    return tuple((kind, int(config[kind])) for kind in TASK_OF if config.get(kind, 0))
