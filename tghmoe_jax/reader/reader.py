"""The one way to ask a model about one scan, or about a picture of a 2D base; `batches` asks about many volumes."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tghmoe_jax.bases import pictures
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import closed
from tghmoe_jax.reader import evidence
from tghmoe_jax.reader.answer import Answer, Confidence
from tghmoe_jax.reader.batches import BatchReader, PictureViews, Request
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.questions import LETTERS, Question
from tghmoe_jax.samples.tasks import COLUMNS, TASKS
from tghmoe_jax.scans.scan import Scan, read_scan, reading_of
from tghmoe_jax.training import domain as domains

PICTURE_TOKENS, MOST_PICTURE_TOKENS = 256, 4096  # of an answer about a picture: unless asked otherwise, and at most
_OUTSIDE = "the scan lies outside the ranges of the training data, as the warnings say"


class Reader(BatchReader):
    """Asks about one scan or picture with all that a user is told beside the answer: see `Answer`."""

    def ask(
        self, path: str | Path | Scan, question: str, choices: Sequence[str] = (), *, task: str | None = None,
        series: int | None = None, assume_hu: bool = False, new_tokens: int | None = None,
        allow_out_of_domain: bool = False, min_accuracy: float | None = None, evidence: bool = False,
    ) -> Answer:  # fmt: skip
        """Answers a question about the scan at `path`, or one that `read` gave (of a 2D base: a picture).

        `choices` (2 to 4) are shown with it, and ranked without.

        `task` forces an expert group; `series` chooses in a DICOM folder; `assume_hu` reads values that do not look
        like HU. `min_accuracy` 0 to 1: `Answer.confidence.enough` says whether validation answers of this confidence
        were right that often. `evidence` finds what of the scan the answer rests on. UserError names what to change.
        """
        asked = vqa(question, choices)
        if self.views_of:
            if task is not None or series is not None or assume_hu or evidence:
                flags = "--task, --series, --assume-hu and --evidence"
                raise UserError(f"{flags} belong to --volume; leave them out for a picture.")
            return self._ask_picture(path, asked, new_tokens or PICTURE_TOKENS)
        if min_accuracy is not None and not 0 < min_accuracy < 1:
            raise UserError(f"--min-accuracy {min_accuracy} must lie between 0 and 1, as 0.9.")
        if (asks := domains.asks_report(asked.question, asked.choices, task)) and not allow_out_of_domain:
            domains.refuse_report(self.run.name, self.domain, asks)
        return self._ask_scan(
            path, asked, task, (series, assume_hu, evidence), new_tokens, allow_out_of_domain, min_accuracy
        )

    def report(
        self, path: str | Path | Scan, *, series: int | None = None, assume_hu: bool = False,
        new_tokens: int | None = None, allow_out_of_domain: bool = False, evidence: bool = False,
    ) -> Answer:  # fmt: skip
        """Writes a report of the scan at `path`. UserError where the checkpoint has seen no scan of a patient.

        `allow_out_of_domain` lifts that refusal.
        """
        if self.views_of:
            raise UserError("--report belongs to --volume; ask a 2D base a question about its picture.")
        if not allow_out_of_domain:
            domains.refuse_report(self.run.name, self.domain, "--report")
        task = "report" if self.groups > 1 and "report" in self.tasks else None
        asked = Question("report", "report", "", TASKS["report"].request, (), "")
        reading = series, assume_hu, evidence
        return self._ask_scan(path, asked, task, reading, new_tokens, allow_out_of_domain=True)

    def read(
        self, path: str | Path, series: int | None = None, assume_hu: bool = False, keep: bool = False
    ) -> Scan:  # fmt: skip
        """The scan as the run's config prepares it, for one or several calls of `ask` and `report`; `keep` for such
        with `evidence`.

        UserError as `scans.scan.read_scan` raises it.
        """
        scan = read_scan(path, *self.reading(), series, assume_hu, keep)
        if fault := self.spacing_fault(scan, str(path)):
            raise UserError(fault)
        return scan

    def spacing_fault(self, scan: Scan, name: str) -> str:
        """Why a scan without spacing cannot be asked about; empty where it can."""
        rope = self.model.cfg.volume.depth_rope
        needed = scan.prepared.spacing_mm is None and rope.enabled and rope.unit == "mm"
        return f"{name} states no spacing, which {self.run.name} needs: name a NIfTI or DICOM scan." if needed else ""

    def reading(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What `scans.scan.scan_of` needs of the run beside a volume."""
        return self.run.config["data"], self.run.manifest.get("input_ranges")

    def _scan(self, path: str | Path | Scan, series: int | None, assume_hu: bool, keep: bool) -> Scan:
        """What `path` names, or the scan itself where this reader, or another of the same input, has read it."""
        if not isinstance(path, Scan):
            return self.read(path, series, assume_hu, keep)
        if keep and path.volume is None:
            raise UserError("evidence needs the scan itself; read it with read(path, keep=True).")
        if series is not None or assume_hu:
            raise UserError("series and assume_hu belong to reading; give them to read() in place of ask().")
        if path.read_for != reading_of(*self.reading()):
            raise UserError(
                f"the scan was read for another input than that of {self.run.name}; read it with its read()."
            )
        return path

    def _ask_scan(
        self, path, asked: Question, task, reading, new_tokens, allow_out_of_domain, min_accuracy=None
    ) -> Answer:
        """The answer, the blind one and, with choices, their likelihoods, as three requests about one volume."""
        begun, budget = time.perf_counter(), self.run.config["eval"]
        # --task report asks for a report in the user's own words.
        new_tokens = new_tokens or budget["new_tokens" if "report" in (asked.kind, task) else "answer_tokens"]
        self.check(asked, task, new_tokens)
        scan = self._scan(path, *reading)
        bare = asked.without_choices()
        routed, shares, note = self.groups_of(scan, asked, task, allow_out_of_domain)
        notes = [domains.warning(self.run.name, self.domain), *scan.warnings, *filter(None, [note])]
        shown = Request(0, asked, group=routed[asked], routing=True, evidence=reading[2])
        requests = [Request(0, asked, visible=False), shown]
        if asked.choices:
            requests.append(Request(0, bare, asked.choices, routed[bare]))
        blind, answer, *ranked = self.answer(scan, requests, new_tokens)
        if ranked:
            answer = dataclasses.replace(answer, options=asked.choices, likelihoods=ranked[0].likelihoods)
        notes += answer.faults(asked.choices, new_tokens)

        def likelihoods() -> np.ndarray:
            said = Request(0, asked, (answer.text or " ",), routed[asked])
            return answer.likelihoods if asked.choices else self.answer(scan, [said], 0)[0].likelihoods

        sure = self.confidence(scan, asked, answer.text, likelihoods, allow_out_of_domain, min_accuracy)
        return dataclasses.replace(
            answer, confidence=sure, blind_text=blind.text, task_probabilities=shares, warnings=tuple(notes), scan=scan,
            checkpoint={"name": self.run.name, "digest": self.run.digest},
            routing=dataclasses.replace(answer.routing, probabilities=shares),
            evidence=None if answer.falls is None else evidence.locate(answer.falls, self.model.cfg, scan),
            seconds=round(time.perf_counter() - begun, 2),
        )  # fmt: skip

    def confidence(
        self, scan: Scan, asked: Question, text: str, likelihoods: Callable[[], np.ndarray], allow_out_of_domain: bool,
        accuracy: float | None = None,
    ) -> Confidence | None:  # fmt: skip
        """Of the answer `text` to a question, by the log-likelihoods of its choices or of the text itself.

        None for reports, and where nothing is stored and no accuracy was asked for.
        """
        if not COLUMNS[asked.kind].confident or (not self.run.calibration and accuracy is None):
            return None
        calibration, why = self.run.calibration.get(asked.kind), ""
        if calibration is None:
            why = f"{self.run.name} has too few validation answers to {asked.kind} questions"
        elif domains.synthetic(self.domain) and not allow_out_of_domain:
            why = f"{self.run.name} has seen {domains.seen(self.domain)}"
            # The flag lifts this reason only, so it is named only where no other reason is left.
            why += " (--allow-out-of-domain lifts this)" if scan.in_range else f", and {_OUTSIDE}"
        elif not scan.in_range:
            why = _OUTSIDE
        if why:
            return Confidence(why=why, min_accuracy=accuracy)
        value = float(calibration.confidence(likelihoods(), closed.named_option(text, asked.choices)))
        least = None if accuracy is None else calibration.threshold(accuracy)
        return Confidence(value, *calibration.validated(value), min_accuracy=accuracy, least=least)

    def groups_of(
        self, scan: Scan, asked: Question, task: str | None, allow_out_of_domain: bool
    ) -> tuple[dict[Question, int | None], dict[str, float] | None, str]:
        """The expert groups of a question about a scan, as it is and without its choices, the router's probabilities
        for it, and a warning where the router is not followed. None without groups."""
        groups, shares, note = dict.fromkeys((asked, asked.without_choices())), None, ""
        if self.groups > 1:
            rows = self.route(scan, [(0, one) for one in groups])
            allowed = [self._allowed_group(row, task, allow_out_of_domain) for row in rows]
            groups = dict(zip(groups, (group for group, _ in allowed), strict=True))
            shares, note = self._named(rows[0]), allowed[0][1]
        return groups, shares, note

    def _ask_picture(self, path: str | Path, asked: Question, new_tokens: int) -> Answer:
        """Greedy answer of a 2D base to a question about a picture file. UserError where it cannot be read."""
        begun, cfg = time.perf_counter(), self.model.cfg
        views, crops = self.views_of(pictures.read_picture(path), cfg.tower.image_size)
        tokens = len(prompts.encode(self.tokenizer, asked.prompt, None).tokens)
        visual = cfg.picture_tokens(crops)
        room = min(MOST_PICTURE_TOKENS, cfg.decoder.max_positions - tokens - visual)
        _check_room(new_tokens, room, f"beside {visual} visual tokens")
        requests = [Request(0, asked)]
        if asked.choices:
            requests.append(Request(0, asked.without_choices(), asked.choices))
        answer, *ranked = self.answer(PictureViews(views, crops), requests, new_tokens)
        if ranked:
            answer = dataclasses.replace(answer, options=asked.choices, likelihoods=ranked[0].likelihoods)
        notes = tuple(answer.faults(asked.choices, new_tokens))
        return dataclasses.replace(answer, warnings=notes, seconds=round(time.perf_counter() - begun, 2))

    def _allowed_group(self, shares: np.ndarray, task: str | None, allow_out_of_domain: bool) -> tuple[int, str]:
        """The expert group of a prompt with these probabilities, and a warning where the router is not followed."""
        group = int(np.argmax(shares)) if task is None else self.tasks.index(task)
        others = [i for i, name in enumerate(self.tasks) if name != "report"]
        if self.tasks[group] != "report" or not domains.synthetic(self.domain) or allow_out_of_domain or not others:
            return group, ""
        # A question must not get around the refusal of reports on patients' scans.
        group = max(others, key=lambda i: shares[i])
        return group, (
            f"task: the router sends the question to report ({shares[self.tasks.index('report')]:.2f}), which is "
            f"refused on real scans in this domain, so the {self.tasks[group]} experts answer "
            "(--allow-out-of-domain lifts this)"
        )

    @property
    def domain(self) -> str:
        """The data that the run was trained on."""
        return domains.of(self.run.manifest, self.run.config, self.run.step)

    def check(self, asked: Question, task: str | None, new_tokens: int) -> None:
        """UserError for what cannot be asked, before the scan is read."""
        name, cfg = self.run.name, self.model.cfg
        if task is not None and self.groups == 1:
            raise UserError(f"--task {task} has no effect: {name} has one group of experts; leave it out.")
        if task is not None and task not in self.tasks:
            raise UserError(f"--task {task} is unknown to {name}; use one of {', '.join(self.tasks)}.")
        sizes = [len(prompts.encode(self.tokenizer, asked.prompt, None).tokens)]
        bare = asked.without_choices().prompt
        sizes += [len(prompts.encode(self.tokenizer, bare, option).tokens) for option in asked.choices]
        if max(sizes) > self.text_length:
            what = "--question with --choices" if asked.choices else "--question"
            raise UserError(
                f"{what} takes {max(sizes)} tokens where {name} reads {self.text_length}; shorten the text."
            )
        slices = self.run.config["data"]["slices"]
        room = cfg.decoder.max_positions - self.text_length - cfg.image_positions(slices)
        _check_room(new_tokens, room, f"in {name}")


def vqa(question: str, choices: Sequence[str] = ()) -> Question:
    """A question without a known answer. UserError where it is empty, or the choices are not 2 to 4 different texts."""
    question, choices = " ".join(question.split()), tuple(choice.strip() for choice in choices)
    if not question:
        raise UserError("--question is empty; ask something.")
    if choices and (not 2 <= len(choices) <= len(LETTERS) or not all(choices) or len(set(choices)) < len(choices)):
        raise UserError(f"--choices needs 2 to {len(LETTERS)} different options, as in --choices 'axial|coronal'.")
    return Question("vqa", "closed" if choices else "open", "question", question, choices, "")


def _check_room(new_tokens: int, room: int, where: str) -> None:
    if not 1 <= new_tokens <= room:
        raise UserError(f"--new-tokens {new_tokens} must lie between 1 and {room}, the room {where}.")
