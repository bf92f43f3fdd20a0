"""Many scans: one model in memory, volumes read by processes while it answers, no question asked twice.

A part of the list is as many scans as a batch has rows, wherever the run was interrupted: so answers do not depend on
that, and shards of a list merge to the file of one run.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax import __version__
from tghmoe_jax.datasets.index_files import read_lines, text_fault
from tghmoe_jax.datasets.scan_list import Listed, digest_rows, read_list, read_listed
from tghmoe_jax.datasets.workers import Progress, in_order
from tghmoe_jax.errors import Stopped, UserError
from tghmoe_jax.evaluation import DISCLAIMER
from tghmoe_jax.evaluation.answer_file import AnswerFile, merge, parts_of
from tghmoe_jax.evaluation.files import NOT_ANSWERED, split_choices
from tghmoe_jax.evaluation.outputs import csv_text, row_of
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.reader.answer import Answer
from tghmoe_jax.reader.batches import Request
from tghmoe_jax.reader.opening import load
from tghmoe_jax.reader.reader import Reader, vqa
from tghmoe_jax.samples.questions import LETTERS, Question
from tghmoe_jax.samples.tasks import COLUMNS, KINDS, TASKS
from tghmoe_jax.scans.scan import Scan
from tghmoe_jax.scans.slices import Prepared
from tghmoe_jax.training import domain as domains

BATCH, WORKERS = 8, 2
KEPT = 1024  # blind answers and groups of as many questions are kept


@dataclasses.dataclass(frozen=True)
class _Scans:
    """Several scans as a source of as many volumes."""

    scans: list[Scan]

    def slices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.scans[index].slices()

    def slice_spacing(self, index: int) -> float:
        return self.scans[index].slice_spacing()


class Asker:
    """Asks a reader about parts of a list. `task` forces the experts, `new_tokens` bounds every answer.

    UserError for a question that cannot be asked, before any scan is read.
    """

    def __init__(
        self, reader: Reader, scans: Sequence[Listed], questions: Sequence[Question], task: str | None = None,
        new_tokens: int | None = None, allow_out_of_domain: bool = False,
    ):  # fmt: skip
        self.reader, self.questions, self.task, self.new_tokens = reader, tuple(questions), task, new_tokens
        self.allow = allow_out_of_domain
        everything = {question: None for scan in scans for question in scan.questions or self.questions}
        for question in everything:
            text = None if question.kind == "report" else question.question
            asks = domains.asks_report(text, question.choices, task)
            if asks and not allow_out_of_domain:
                domains.refuse_report(reader.run.name, reader.domain, asks)
            reader.check(question, self._task(question), self._budget(question))
        self.kinds = [kind for kind in KINDS if any(question.kind == kind for question in everything)]
        self._cases = any(scan.case is not None for scan in scans)
        self._calibrated = bool(reader.run.calibration) and (
            allow_out_of_domain or not domains.synthetic(reader.domain)
        )
        self._warning = domains.warning(reader.run.name, reader.domain)
        self._kept: dict[Any, Any] = {}

    @property
    def columns(self) -> list[str]:
        """M3D's of the kinds that are asked, then the project's."""
        own = [COLUMNS[kind] for kind in self.kinds]
        first = [name for one in own for name in one.first if name in one.needed or name == "Question Type"]
        kind = ["Kind"] if len(own) > 1 else []
        ranked = ["Ranked", "Likelihoods"] if any(one.lettered for one in own) else []
        sure = ["Confidence"] if self._calibrated and any(one.confident for one in own) else []
        columns = [*first, "Volume", *["Case"] * self._cases, "Key", *kind, *ranked, *sure, "Task", "Task Predicted"]
        return list(dict.fromkeys([*columns, "Control blind", "Warnings", NOT_ANSWERED, "Disclaimer"]))

    def rows(self, first: int, scans: Sequence[Listed], found: Sequence[Scan | str]) -> list[dict[str, object]]:
        """The rows of a part of the list that begins with scan `first`: one a question, or one that says why the scan
        could not be read."""
        found = [self._fault(scan, one) or one for scan, one in zip(scans, found, strict=True)]
        source = _Scans([one for one in found if isinstance(one, Scan)])
        places = [i for i, one in enumerate(found) if isinstance(one, Scan)]
        asked = [scans[i].questions or self.questions for i in places]
        rows: list[list[dict[str, object]]] = [
            [] if isinstance(one, Scan) else [
                {"Volume": first + i, "Case": scan.case, "Key": scan.id, NOT_ANSWERED: one, "Disclaimer": DISCLAIMER}
            ]
            for i, (scan, one) in enumerate(zip(scans, found, strict=True))
        ]  # fmt: skip
        # The same question of all scans at once, as often as questions are the same: their texts have one length.
        for turn in range(max(map(len, asked), default=0)):
            of = [(k, own[turn]) for k, own in enumerate(asked) if turn < len(own)]
            for (k, question), row in zip(of, self._asked(source, of), strict=True):
                scan = scans[places[k]]
                own = {"Volume": first + places[k], "Case": scan.case, "Key": scan.id, "Kind": question.kind}
                rows[places[k]].append(row | own)
        return [row for own in rows for row in own]

    def _asked(self, source: _Scans, asked: list[tuple[int, Question]]) -> list[dict[str, object]]:
        groups = [self._groups(source.scans[k], question) for k, question in asked]
        found: dict[int, Answer] = {}
        ranked: dict[int, Answer] = {}
        for budget in sorted({self._budget(question) for _, question in asked}):
            places = [i for i, (_, question) in enumerate(asked) if self._budget(question) == budget]
            lettered = [i for i in places if asked[i][1].choices]
            requests = [Request(*asked[i], group=groups[i][0][asked[i][1]]) for i in places]
            for i in lettered:
                (k, question), bare = asked[i], asked[i][1].without_choices()
                requests.append(Request(k, bare, question.choices, groups[i][0][bare]))
            answers = self.reader.answer(source, requests, budget)
            found |= dict(zip(places, answers, strict=False))
            ranked |= dict(zip(lettered, answers[len(places) :], strict=True))
        if self._calibrated:  # an open answer is as sure as its own text is likely
            places = [i for i in found if not asked[i][1].choices and COLUMNS[asked[i][1].kind].confident]
            requests = [Request(*asked[i], (found[i].text or " ",), groups[i][0][asked[i][1]]) for i in places]
            ranked |= dict(zip(places, self.reader.answer(source, requests, 0), strict=True))
        return [
            self._row(source.scans[k], question, found[i], ranked.get(i), groups[i][1])
            for i, (k, question) in enumerate(asked)
        ]

    def _row(self, scan: Scan, question: Question, answer: Answer, ranked: Answer | None, note: str) -> dict:
        sure = self.reader.confidence(scan, question, answer.text, lambda: ranked.likelihoods, self.allow)
        lettered = ranked if question.choices else None
        prediction = Prediction.of(
            0, question, answer.text, ranked=LETTERS[int(ranked.likelihoods.argmax())] if lettered else None,
            task_predicted=answer.task if self.reader.groups > 1 else None, confidence=sure.value if sure else None,
        )  # fmt: skip
        values = lettered.option_likelihoods.values() if lettered else ()
        notes = [note, *answer.faults(question.choices, self._budget(question))]
        return row_of(prediction) | {
            "Likelihoods": "; ".join(f"{value:.6f}" for value in values),
            "Control blind": self._remembered(("blind", question), lambda: self._blind(question)),
            "Warnings": "; ".join([self._warning, *scan.warnings, *filter(None, notes)]),
        }

    def _groups(self, scan: Scan, question: Question) -> tuple[dict[Question, int | None], str]:
        """The expert groups of the question with and without its choices, and a warning; see `Reader.groups_of`."""

        def route():
            allow = self.allow or question.kind == "report"  # which was refused before
            groups, _, note = self.reader.groups_of(scan, question, self._task(question), allow)
            return groups, note

        by_text = "image" not in self.reader.model.cfg.tgh.task_input
        return self._remembered(("groups", question), route) if by_text else route()

    def _blind(self, question: Question) -> str:
        data = self.reader.run.config["data"]
        slices = np.zeros((data["slices"], data["size"], data["size"], 3), np.uint8)
        nothing = Scan(Prepared(slices, np.zeros(len(slices), bool), None, ()), ())
        requests = [Request(0, question, visible=False)]
        return self.reader.answer(nothing, requests, self._budget(question))[0].text

    def _remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = make()
        return self._kept[key]

    def _fault(self, scan: Listed, found: Scan | str) -> str:
        return self.reader.spacing_fault(found, scan.id) if isinstance(found, Scan) else found

    def _task(self, question: Question) -> str | None:
        """The task whose experts are forced; of a report its own, where there are any."""
        if question.kind == "report" and self.task is None and self.reader.groups > 1 and "report" in self.reader.tasks:
            return "report"
        return self.task

    def _budget(self, question: Question) -> int:
        report = "report" in (question.kind, self.task)
        return self.new_tokens or self.reader.run.config["eval"][TASKS["report" if report else question.task].budget]


def answer_list(
    asker: Asker, root: Path, scans: Sequence[Listed], to: Path, shard: tuple[int, int] = (1, 1), workers: int = 1,
    assume_hu: bool = False, say: Callable[[str], None] = print,
) -> tuple[int, int]:  # fmt: skip
    """Writes the answers of a shard of a list to a CSV file, or goes on where that was interrupted.

    Returns how many scans were answered in this run and how many of them could not be read. UserError where the file
    holds answers of another model, list or questions.
    """
    reader, size = asker.reader, asker.reader.batch
    parts = -(-len(scans) // size)
    own = parts_of(parts, shard)
    facts = {
        "checkpoint": reader.checkpoint, "list": _digest(digest_rows(scans)),
        "questions": _digest(repr(question).encode() for question in asker.questions),
        "options": {"task": asker.task, "new_tokens": asker.new_tokens, "assume_hu": assume_hu,
                    "allow_out_of_domain": asker.allow},
        "batch": size, "scans": len(scans), "parts": parts, "shard": f"{shard[0]}/{shard[1]}",
        "tghmoe_jax": __version__, "disclaimer": DISCLAIMER,
    }  # fmt: skip
    header = csv_text(asker.columns, [dict(zip(asker.columns, asker.columns, strict=True))])
    with AnswerFile(to, facts).opened(header) as out:
        listed = {part: scans[part * size : (part + 1) * size] for part in own}
        left = own[out.parts_done :]
        total, todo = sum(map(len, listed.values())), [(scan,) for part in left for scan in listed[part]]
        progress, bad = Progress(total, total - len(todo), 1, say), 0
        job = (root, reader.run.config["data"], reader.run.manifest.get("input_ranges"), assume_hu)
        with contextlib.closing(in_order(read_listed, job, todo, workers, max(size, 2 * workers), _died)) as read:
            for part in left:
                begun = time.monotonic()
                rows = asker.rows(part * size, listed[part], [next(read) for _ in listed[part]])
                out.append(csv_text(asker.columns, rows))
                faults = sum(NOT_ANSWERED in row for row in rows)
                progress.add(faults, time.monotonic() - begun, len(listed[part]))
                bad += faults
        progress.end()
    return len(todo), bad


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def _died(scan: Listed) -> str:
    return "the process that read it died; memory may have run out."


# ---- the command line ------------------------------------------------------------------------------------------------

OF_LISTS = ("root", "questions", "to", "shard", "workers", "batch")
OF_ONE = ("volume", "base", "image", "series", "routing", "evidence", "min_accuracy", "json")


def add_flags(add: Callable) -> None:
    """Adds the flags of lists to a parser's `add_argument`."""
    add("--list", metavar="PATH", help="ask about many scans: a .csv, a .jsonl, or a folder of scans")
    add("--root", metavar="DIR", help="with --list: the folder its paths lie in; default that of the list")
    add("--questions", metavar="FILE", help="with --list: text file, one question per line, with `Choices: A. ...`")
    add("--to", metavar="CSV", help="with --list or --merge: file of answers; the same command continues it")
    add("--shard", metavar="I/N", help="with --list: answer part I of N, counted from 1; join them with --merge")
    add("--workers", type=int, metavar="N", help="with --list: processes that read scans; default 2")
    add("--batch", type=int, metavar="N", help="with --list: scans at once; default 8")
    add("--merge", nargs="+", metavar="CSV", help="join the answers of all shards in --to")


def check_flags(args: argparse.Namespace) -> None:
    """UserError where the flags of --list and --merge do not fit together."""

    def refuse(names: Iterable[str], what: str) -> None:
        if wrong := [name for name in names if getattr(args, name) not in (None, False, [])]:
            raise UserError(f"--{wrong[0].replace('_', '-')} does not belong to {what}; leave it out.")

    if not (args.list or args.merge):
        refuse(OF_LISTS, "a single scan without --list")
        return
    what = "--list" if args.list else "--merge"
    if args.list and args.merge:
        raise UserError("--list and --merge are two commands; give one of them.")
    refuse(OF_ONE, what)
    if args.merge:
        refuse(["checkpoint", "question", "report", "choices", *(name for name in OF_LISTS if name != "to")], what)
    if not args.to or Path(args.to).suffix.lower() != ".csv" or Path(args.to).is_dir():
        raise UserError(f"--to must name the .csv file that {what} writes.")
    if not Path(args.to).parent.is_dir():
        raise UserError(f"--to {args.to} is in no folder that exists; create it first.")
    if args.list and sum((args.questions is not None, args.question is not None, args.report)) > 1:
        raise UserError("give one of --questions, --question and --report.")
    for name in ("workers", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be 1 or more.")
    shard = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", args.shard or "1/1")
    if not shard or int(shard[1]) > int(shard[2]):
        raise UserError(f"--shard {args.shard} must be I/N with I from 1 to N, as in 1/8.")
    args.shard = int(shard[1]), int(shard[2])


def run(args: argparse.Namespace) -> str:
    """Carries out --list or --merge; returns what to print."""
    to = Path(args.to)
    if args.merge:
        rows = merge([Path(name) for name in args.merge], to)
        return f"{to}: {rows} rows of {len(args.merge)} files. {DISCLAIMER}"
    root, scans = read_list(Path(args.list), Path(args.root) if args.root else None)
    questions = _questions(args)
    if without := sum(not scan.questions for scan in scans) * (not questions):
        raise UserError(f"{without} scans of --list have no question; add --questions, --question or --report.")
    if questions and all(scan.questions for scan in scans):
        raise UserError("every row of --list has its own question; leave out --questions, --question and --report.")
    reader = load(args.checkpoint or "embedded", args.batch or BATCH)
    asker = Asker(reader, scans, questions, args.task, args.new_tokens, args.allow_out_of_domain)
    try:
        answered, bad = answer_list(
            asker, root, scans, to, args.shard, args.workers or WORKERS, args.assume_hu,
            lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    except Stopped:
        print(f"{to} keeps the answers so far; the same command continues with the rest.", file=sys.stderr)
        raise
    of = "" if args.shard == (1, 1) else f" of shard {args.shard[0]}/{args.shard[1]}"
    return f"{to}: {answered} scans{of} asked about in this run, {bad} of them could not be read. {DISCLAIMER}"


def _questions(args: argparse.Namespace) -> list[Question]:
    """What is asked of every scan without a question of its own."""
    if args.report:
        return [Question("report", "report", "report", TASKS["report"].request, (), "")]
    if args.question is not None:
        return [vqa(args.question, args.choices)]
    if args.questions is None:
        return []
    path, found = Path(args.questions), []
    if not path.is_file():
        raise UserError(f"--questions {path} does not exist; name a text file with a question a line.")
    for line, text in read_lines(path):
        try:
            one = vqa(*split_choices(text.strip()))
            if fault := text_fault(one.prompt, "question"):
                raise UserError(fault)
            if one in found:
                raise UserError("the same question stands in another line; ask it once.")
            if "Choices:" in one.question:
                raise UserError("the choices are not understood; write them as Choices: A. axial B. coronal.")
        except UserError as error:
            raise UserError(f"{path.name}:{line}: {error}") from None
        found.append(one)
    if not found:
        raise UserError(f"--questions {path} is empty; write a question a line.")
    return found
