"""The tasks: kinds of questions, and what data, prompts, evaluation and configs need to know of each.

A further task is one `Task` and one call of `register`, before configs and data are read.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of one kind's prediction file: M3D's `first`, in its order and spelling, then this project's `more`.

    `truth` and `output` name the columns of the true and the given answer. `order` is the kind's place in tables; it
    is added to `eval.seed` too, so that the questions of a kind stay the same whatever other tasks exist.
    """

    first: tuple[str, ...]
    more: tuple[str, ...] = ()
    truth: str = "Answer"
    output: str = "Pred"
    lettered: bool = False  # the column `Answer Choice` is needed
    confident: bool = False  # answers are right or wrong, and get a calibrated confidence
    order: int = 9

    @property
    def needed(self) -> frozenset[str]:
        """What a file of another system must hold to be read as this kind."""
        return frozenset({"Question", self.truth, self.output, *(("Answer Choice",) if self.lettered else ())})


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: a name, which is its expert group's, and its kinds of samples, which a mixture counts. Items of files
    are of the first kind, or of a lettered one where they have choices.

    `budget` is the key of `config.eval` that bounds an answer's tokens. `request` is what a volume is asked where an
    item brings no question of its own. `columns` {kind: Columns} are the kinds that an evaluation asks; `scores`
    {key of metrics.json: its name under a control} are those that controls repeat.
    """

    name: str
    kinds: tuple[str, ...]
    budget: str = "answer_tokens"
    request: str = ""
    columns: Mapping[str, Columns] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, str] = dataclasses.field(default_factory=dict)


TASKS: dict[str, Task] = {}
TASK_OF: dict[str, str] = {}  # task of each kind of a mixture; the order fixes the streams of a run's items
COLUMNS: dict[str, Columns] = {}
KINDS: list[str] = []  # that an evaluation asks, in the order of its tables


def register(task: Task) -> None:
    """Adds a task. ValueError if a task or kind of that name exists."""
    if task.name in TASKS or set(task.kinds) & TASK_OF.keys():
        raise ValueError(f"a task or kind of {task.name} is registered already")
    TASKS[task.name] = task
    TASK_OF.update(dict.fromkeys(task.kinds, task.name))
    COLUMNS.update(task.columns)
    KINDS[:] = sorted(COLUMNS, key=lambda kind: COLUMNS[kind].order)


def kind_of(task: str, choices: bool) -> str:
    """The kind of a task's items in files: the lettered one of those with choices, where it has one, else the first."""
    kinds = TASKS[task].kinds
    lettered = (kind for kind in kinds if kind in COLUMNS and COLUMNS[kind].lettered)
    return next(lettered, kinds[0]) if choices else kinds[0]


def kinds_of_items() -> list[str]:
    """The kinds that items in files can have, task by task."""
    return list(dict.fromkeys(kind_of(task, choices) for task in TASKS for choices in (False, True)))


def under_controls() -> set[str]:
    """The kinds that are asked again under each control: those of the tasks' `scores`."""
    return {score.split("/")[0] for task in TASKS.values() for score in task.scores}


_OVERLAP = ("bleu", "rouge1", "meteor", "bert_f1")
_MORE_OVERLAP = ("bleu2", "bleu3", "bleu4", "rougeL", "cider")

register(
    Task(
        "report",
        ("report",),
        budget="new_tokens",
        request="Write a report for this CT.",
        columns={
            "report": Columns(
                ("Question", "Ground Truth", "pred", *_OVERLAP),
                (*_MORE_OVERLAP, "Findings True", "Findings Stated"),
                truth="Ground Truth",
                output="pred",
                order=2,
            )
        },
        scores={"report/finding_f1": "finding_f1", "report/bleu1": "report_bleu1"},
    )
)
register(
    Task(
        "vqa",
        ("open", "closed", "binding"),
        columns={
            "closed": Columns(
                ("Question Type", "Question", "Answer", "Answer Choice", "Pred", "Correct"),
                ("Type", "Strict", "Ranked", "Confidence"),
                lettered=True,
                confident=True,
                order=0,
            ),
            "open": Columns(
                ("Question Type", "Question", "Answer", "Pred", *_OVERLAP),
                ("Type", *_MORE_OVERLAP, "Confidence"),
                confident=True,
                order=1,
            ),
        },
        scores={"closed/accuracy": "closed_accuracy", "closed/accuracy_strict": "closed_accuracy_strict"},
    )
)
