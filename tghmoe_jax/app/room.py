"""The functions behind the page, without the web: open a scan, ask about it, keep the answers."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tghmoe_jax.app import views
from tghmoe_jax.app.examples import Examples, suggestions
from tghmoe_jax.app.jobs import Job, Worker
from tghmoe_jax.app.sessions import MOST_ANSWERS, Session, Sessions
from tghmoe_jax.app.uploads import Choice, check_length, choices_of, plainly
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import DISCLAIMER, evidence_plot, routing_plot
from tghmoe_jax.reader.answer import LIKELIHOODS, Answer
from tghmoe_jax.reader.reader import Reader, vqa
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.scan import scan_of
from tghmoe_jax.scans.volume import Volume, most_voxels

STEPS = {"encode": "the scan goes through the tower", "decode": "the answer is written", "rank": "options are ranked",
         "evidence": "evidence is looked for"}  # fmt: skip
PHANTOM = "a drawn phantom"
STORED = 8  # uploads of the largest size that the disk holds at once


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of a server. bytes of one upload, voxels of one scan, memory in bytes of all scans, waiting jobs, jobs and
    uploads of one session in a minute."""

    bytes: int = 2**30
    voxels: int = 2**28
    memory: int = 4 * 2**30
    waiting: int = 40
    minute: int = 60


class Room:
    """Readers, examples, sessions and the workers that they share. `folder` is the server's private one."""

    def __init__(
        self, readers: Sequence[Reader], folder: Path, limits: Limits = Limits(), examples: Examples | None = None,
        allow_out_of_domain: bool = False,
    ):  # fmt: skip
        self.readers, self.limits, self.folder = list(readers), limits, folder
        self.examples, self._allow = examples or Examples(), allow_out_of_domain
        self.opener = Worker(limits.waiting, self._worded)
        self.worker = Worker(limits.waiting, self._worded, self._forget)
        self.sessions = Sessions(folder, limits.memory, ended=self.worker.tidy_soon)
        self._lock, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()

    def facts(self) -> dict[str, Any]:
        """What a new page is told."""
        tasks = tuple(dict.fromkeys(task for reader in self.readers for task in reader.tasks))
        return {
            "checkpoints": [f"{one.checkpoint['name']} {one.checkpoint['digest']}" for one in self.readers],
            "examples": self.examples.labels, "suggestions": suggestions(tasks), "disclaimer": DISCLAIMER,
            "limits": {"bytes": self.limits.bytes, "voxels": self.limits.voxels},
            "captions": {"evidence": evidence_plot.CAPTION, "experts": routing_plot.CAPTION,
                         "likelihoods": LIKELIHOODS},
        }  # fmt: skip

    def close_scan(self, session: Session) -> None:
        """Forgets a session's scan and empties its folder; what is in work about it is cancelled."""
        if session.job:
            session.job.cancel()
        session.close_scan()
        self.worker.tidy_soon()

    def _forget(self) -> None:
        """Readers let go of the scan that they were asked about last."""
        for reader in self.readers:
            reader.forget()

    def _sweep(self) -> None:
        while not self._over.wait(60.0):
            self.sessions.sweep()

    def check_room(self, length: int) -> None:
        """UserError where an upload is too large, or the files of all pages would take too much of the disk with it."""
        check_length(length, self.limits.bytes)
        stored = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(OSError):  # it was removed just now
                    stored += os.stat(os.path.join(folder, name)).st_size
        if stored + length > STORED * self.limits.bytes:
            raise UserError("the server holds too many files of others; send yours in a few minutes.")

    def _worded(self, error: Exception) -> str:
        return plainly(error, self.folder)

    def submit(self, session: Session, what: str, work: Callable[[Job], Any], undo: Callable = lambda: None) -> Job:
        """Puts an `open` or `ask` job of a session into its queue. UserError where it has one, or the queue is full."""
        with self._lock:
            check_idle(session)
            worker = self.opener if what == "open" else self.worker
            session.job = worker.submit(Job(work, what, session.number, undo))
            return session.job

    # ---- opening -----------------------------------------------------------------------------------------------------

    def open_upload(self, session: Session) -> Job:
        """Finds the scans in the session's folder, and reads the one if there is one."""

        def work(job: Job) -> dict[str, Any]:
            job.at("the files are looked through")
            choices = choices_of(session.folder, 2 * self.limits.bytes)
            if len(choices) > 1:
                session.choices = choices
                return {"choices": [choice.label for choice in choices]}
            return self._read(session, choices[0], job)

        return self.submit(session, "open", work, session.close_scan)

    def open_choice(self, session: Session, number: int) -> Job:
        """Reads one of the scans that were listed."""
        if not 0 <= number < len(session.choices):
            raise UserError("that scan is not among those of the files; send them again.")
        choice = session.choices[number]
        return self.submit(session, "open", lambda job: self._read(session, choice, job), session.forget_scan)

    def open_example(self, session: Session, number: int) -> Job:
        if not 0 <= number < len(self.examples.labels):
            raise UserError("there is no such example; choose another.")

        def work(job: Job) -> dict[str, Any]:
            session.close_scan()
            session.assume_hu = False
            found = self.examples[number]
            if isinstance(found, Volume):
                return self._keep(session, found, PHANTOM)
            try:
                return self._read(session, Choice(found, None, "of the server's folder"), job)
            except UserError as error:
                raise UserError(plainly(error, found)) from None

        return self.submit(session, "open", work, session.close_scan)

    def _read(self, session: Session, choice: Choice, job: Job) -> dict[str, Any]:
        """Reads a scan; files of which nothing else can be chosen are removed at once."""
        job.at("the scan is read")
        bound = most_voxels.set(self.limits.voxels)
        try:
            volume = read_volume(choice.path, choice.series, session.assume_hu)
        finally:
            most_voxels.reset(bound)
        job.at("the scan is resampled")
        kept = session.choices
        if not kept:
            session.close_scan()
        return self._keep(session, volume, choice.label)

    def _keep(self, session: Session, volume: Volume, kind: str) -> dict[str, Any]:
        scans = {}
        for number, reader in enumerate(self.readers):
            scans[number] = scan_of(volume, *reader.reading(), keep=True)
            if fault := reader.spacing_fault(scans[number], "the scan"):
                raise UserError(fault)
        self.sessions.keep(session, volume, scans, kind)
        return {"scan": self.geometry(session)}

    def geometry(self, session: Session) -> dict[str, Any]:
        channels = self.readers[0].run.config["data"]["channels"]
        return views.geometry(session.volume, session.scans[0], channels) | {"kind": session.kind}

    # ---- asking ------------------------------------------------------------------------------------------------------

    def ask(self, session: Session, asked: dict[str, Any]) -> Job:
        """`asked`: question, choices, report, evidence, checkpoint, min_accuracy. UserError for what cannot be asked,
        before it waits."""
        number, reader = asked["checkpoint"], self._reader(asked["checkpoint"])
        if session.volume is None:
            raise UserError("no scan is open; open one first.")
        if not asked["report"]:
            question = vqa(asked["question"], asked["choices"])
            reader.check(question, None, 1)
        scan, drawn = session.scans[number], session.kind == PHANTOM  # as what a checkpoint of drawn data has seen

        def work(job: Job) -> dict[str, Any]:
            reader.watch = lambda step: job.at(STEPS[step])
            common = {"evidence": asked["evidence"], "allow_out_of_domain": self._allow or drawn}
            try:
                if asked["report"]:
                    answer = reader.report(scan, **common)
                else:
                    wanted = asked["min_accuracy"]
                    answer = reader.ask(scan, asked["question"], asked["choices"], min_accuracy=wanted, **common)
            finally:
                del reader.watch
            session.counted += 1
            picture = None if answer.evidence is None else views.picture_of(answer.evidence)
            record = {"number": session.counted} | _record(asked, answer)
            session.answers = [*session.answers, (record, picture)][-MOST_ANSWERS:]
            return {"answer": record}

        return self.submit(session, "ask", work)

    def _reader(self, number: int) -> Reader:
        if not 0 <= number < len(self.readers):
            raise UserError("there is no such checkpoint; choose another.")
        return self.readers[number]

    def warm_up(self) -> None:
        """Asks about a phantom in several ways while nobody waits, so that programs are compiled before users ask."""
        planes = ("axial", "coronal", "sagittal", "oblique")

        def ask(reader: Reader, choices: Sequence[str], evidence: bool) -> None:
            scan = scan_of(self.examples[0], *reader.reading(), keep=True)
            if not reader.spacing_fault(scan, ""):
                reader.ask(scan, "Which plane is this?", choices, evidence=evidence)

        for reader in self.readers:
            for way in ((planes, False), (planes, True), ((), True)):
                self.worker.spare(Job(lambda job, one=(reader, *way): ask(*one), "warm-up", 0))

    def close(self) -> bool:
        """Ends all sessions, and the workers if their present jobs soon end; whether one goes on."""
        self._over.set()
        self.sessions.end_all()
        return any([worker.close(1.0) for worker in (self.opener, self.worker)])


def check_idle(session: Session) -> None:
    """UserError where a page has something in work."""
    if session.busy:
        raise UserError("this page has a request in work; wait for it or cancel it.")


def _record(asked: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """What the page and the kept files are told of an answer. No name of a patient or a file is in it, but what the
    user wrote into the question."""
    sure = answer.confidence is None or answer.confidence.enough
    record = answer.to_json() | {
        "question": "" if asked["report"] else asked["question"], "choices": list(asked["choices"]),
        "report": asked["report"], "refusal": "" if sure else answer.confidence.refusal(),
        "sure": str(answer.confidence) if answer.confidence else "",
    }  # fmt: skip
    scan = answer.scan
    if answer.evidence is not None:
        record["parts"] = views.evidence_parts(answer.evidence)
    if answer.routing:
        record["experts"] = views.expert_parts(answer.routing, scan, scan.volume)
    return record
