"""The one way to ask a model: about volumes of a data set in batches, about one scan, or about a picture of a 2D base.

Axis legend: B batch, O options.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tghmoe_jax.bases import pictures
from tghmoe_jax.bases.family import Views
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import closed
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.models import generation
from tghmoe_jax.models.config import Decoder
from tghmoe_jax.models.mllm import MLLM, EncodedVolume
from tghmoe_jax.reader import evidence
from tghmoe_jax.reader.answer import Answer, Confidence, no_load
from tghmoe_jax.reader.routing import expert_load, probabilities, routing_of
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.questions import LETTERS, Question, Source
from tghmoe_jax.samples.tasks import COLUMNS, TASKS
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.scans.scan import Scan, read_scan, reading_of
from tghmoe_jax.sharding import arrays
from tghmoe_jax.training import domain as domains
from tghmoe_jax.training import memory
from tghmoe_jax.training.loading import LoadedRun
from tghmoe_jax.training.step import variables

Asked = list[tuple[int, Question]]  # volumes and what is asked about them

BUCKET = 128  # the decoder's text is padded to multiples of it; each length is a compiled program
PICTURE_BUCKET = 32  # the same for questions about pictures
PICTURE_TOKENS, MOST_PICTURE_TOKENS = 256, 4096  # of an answer about a picture: unless asked otherwise, and at most


@dataclasses.dataclass(frozen=True)
class Request:
    """One question about volume `volume` of a source.

    With `options` these are ranked and nothing is generated. `group` forces an expert group (None: the router's).
    Where it is not `visible`, the tower is not run and the decoder sees no visual token. `routing` asks for the expert
    of each patch, `evidence` for what of the volume the generated answer rests on.
    """

    volume: int
    question: Question
    options: tuple[str, ...] = ()
    group: int | None = None
    visible: bool = True
    routing: bool = False
    evidence: bool = False


@dataclasses.dataclass(frozen=True)
class PictureViews:
    """A picture of a 2D base, as a source of one volume whose slices are its views."""

    views: np.ndarray
    crops: tuple[int, int] | None

    def slices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Views float32 (V, S, S, 3) in 0..1 and a mask bool (V,) of ones."""
        return self.views, np.ones(len(self.views), bool)


class Reader:
    """A model with its tokeniser, ready to answer in batches of `batch` rows.

    `text_length`: tokens of the longest text; 0 for a 2D base, whose texts have no common length. `run` is what was
    read from disk, which single scans need; `views_of` is how a 2D base cuts a picture, and `volume_views` how it is
    shown the slices and mask of a volume (reader/slice_protocol.py); `name` stands in for a run's.
    """

    def __init__(
        self, model: MLLM, tokenizer: Tokenizer, params: dict, text_length: int, batch: int = 1,
        run: LoadedRun | None = None, views_of: Views | None = None, volume_views: Callable | None = None,
        name: str = "",
    ):  # fmt: skip
        self.model = generation.inference(model)
        self.tasks, self.groups = model.cfg.tasks, model.cfg.tgh.groups
        self.tokenizer, self.variables = tokenizer, variables(params)
        self.text_length, self.run, self.name = text_length, run, name
        self.views_of, self.volume_views = views_of, volume_views
        self._seen: tuple[Source, list, EncodedVolume] | None = None  # see `_tower`
        self._programs: set[str] = set()
        mesh = jax.sharding.get_abstract_mesh()
        self.batch = batch + (-batch % (1 if mesh.empty else mesh.size))

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """What was read, for a manifest of scores; None while training."""
        if self.run is None:
            return {"name": self.name} if self.name else None
        return {"name": self.run.name, "digest": self.run.digest, "step": self.run.step}

    # ---- many requests ---------------------------------------------------------------------------------------------

    def answer(self, source: Source, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        """Answers in order. Requests with options are ranked, the others generate up to `new_tokens` tokens.

        Blind requests, forced groups and numbers of options are never mixed in a batch. Long questions are asked
        together, after the others, so that short ones are not padded to their length.
        """

        def kind(request: Request) -> tuple:
            tokens = len(prompts.encode(self.tokenizer, request.question.prompt, None).tokens)
            return request.visible, request.group is not None, len(request.options), -(-tokens // BUCKET)

        kinds = [kind(request) for request in requests]
        answers: dict[int, Answer] = {}
        for one in sorted(set(kinds)):
            places = [i for i, own in enumerate(kinds) if own == one]  # as given: volume by volume
            for part in self._batches(places):
                for place, found in zip(
                    part, self._answer_batch(source, [requests[i] for i in part], new_tokens), strict=True
                ):
                    answers.setdefault(place, found)  # rows that fill up the batch repeat its last place
        return [answers[i] for i in range(len(requests))]

    def route(self, source: Source, asked: Asked) -> np.ndarray:
        """The task router's probabilities float64 (len(asked), tasks) for each question about its volume."""
        found = []
        for part in self._batches(list(range(len(asked)))):
            batch = self._collate(source, [Request(*asked[i]) for i in part])
            found.append(probabilities(generation.route(self.model, self.variables, batch)))
        return np.concatenate(found)[: len(asked)] if found else np.zeros((0, len(self.tasks)))

    def routings(self, source: Source, asked: Asked) -> list[RoutingMap]:
        """How each question about its volume is routed, in order."""
        found = []
        for part in self._batches(list(range(len(asked)))):
            batch = self._collate(source, [Request(*asked[i]) for i in part])
            encoded = self._call("encode", generation.encode, batch, None)
            found += [routing_of(encoded, row, self.model.cfg, source.slices(asked[i][0])[1])
                      for row, i in enumerate(part)]  # fmt: skip
        return found[: len(asked)]

    def _batches(self, places: list[int]) -> Iterable[list[int]]:
        """`places` in batches of one size, the last one filled up with its last place."""
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            yield part + [part[-1]] * (self.batch - len(part))

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def _answer_batch(self, source: Source, requests: list[Request], new_tokens: int) -> list[Answer]:
        """Of requests of one kind (see `answer`), as many as a batch has rows."""
        first = requests[0]
        if self.views_of:
            visual, mask = self._encode_picture(source, requests)
            beside = [{} for _ in requests]
        else:
            visual, mask, beside = self._encode(source, requests)
        if first.options:
            columns = []
            for o in range(len(first.options)):
                scored = self._text(requests, [r.options[o] for r in requests], visual.shape[1])
                columns.append(self._call("rank", generation.answer_likelihood, scored, visual, mask))
            likelihoods = np.stack([arrays.to_host(column) for column in columns], axis=1)
            return [
                Answer(options=r.options, likelihoods=row, **more)
                for r, row, more in zip(requests, likelihoods, beside, strict=True)
            ]
        text = self._text(requests, [None] * len(requests), visual.shape[1] + new_tokens)
        ids = arrays.to_host(self._generate(text, visual, mask, new_tokens))
        rows = [[int(i) for i in row if i >= 0] for row in ids]
        texts = [self.tokenizer.decode(row).strip() for row in rows]
        for i, request in enumerate(requests):
            if request.evidence:
                beside[i]["falls"] = self._falls(source, request, texts[i], visual[i][None], mask[i][None], new_tokens)
        return [
            Answer(text=text, cut=len(row) == new_tokens, **more)
            for text, row, more in zip(texts, rows, beside, strict=True)
        ]

    def _falls(self, source: Source, request: Request, text: str, visual, mask, new_tokens: int) -> evidence.Falls:
        """What the answer `text` to one request rests on, from its visual tokens (1, L, W) and their mask (1, L)."""
        self.watch("evidence")
        cfg, question = self.model.cfg, request.question

        def length(tokens: int, others: int) -> int:
            return padded_length(cfg.decoder, tokens, others, self.text_length)

        score = evidence.scorer(self.model, self.variables, self.tokenizer, question, text, mask, new_tokens, length)
        slices = len(source.slices(request.volume)[1])
        return evidence.measure(score, cfg, slices, visual, mask, question.choices, text)

    def _generate(self, text: dict, visual: jax.Array, mask: jax.Array, new_tokens: int) -> jax.Array:
        stops = tuple(sorted(self.tokenizer.stop_ids))
        return self._call("decode", generation.generate, text, visual, mask, new_tokens, stops)

    def watch(self, step: str) -> None:
        """Called before each step, `encode`, `decode`, `rank` or `evidence`; who shows progress replaces it, and ends
        an answer by raising."""

    def forget(self) -> None:
        """Lets go of the last scan and its visual tokens, which are kept for the next question about it."""
        self._seen = None

    def _call(self, step: str, function, *arguments):
        """function(model, variables, *arguments). The memory that a new program needs is looked at before it runs."""
        self.watch(step)
        shapes = jax.tree.map(lambda leaf: getattr(leaf, "shape", leaf), arguments)
        if (program := f"{step} {shapes}") not in self._programs:
            self._programs.add(program)
            alone = jax.sharding.get_mesh().empty  # `predict`, whose user has other flags
            memory.fitting("answer" if alone else step, function, self.model, self.variables, *arguments)
        return function(self.model, self.variables, *arguments)

    def _encode(self, source: Source, requests: list[Request]) -> tuple[jax.Array, jax.Array, list[dict[str, Any]]]:
        """Visual tokens, their mask, and what an Answer holds of the routing of each row."""
        batch = self._collate(source, requests)
        if not requests[0].visible:
            visual, mask = generation.blank(self.model, self.variables, batch)
            return visual, mask, [{"load": no_load()} for _ in requests]
        forced = requests[0].group is not None
        group = self._put(np.array([r.group for r in requests], np.int32)) if forced else None
        encoded = self._tower(source, requests, batch, group)
        used, load = arrays.to_host(encoded.group), expert_load(encoded, self.groups)
        rows = []
        for i, request in enumerate(requests):
            task = self.tasks[int(used[i])] if self.groups > 1 else request.question.task
            rows.append({"group": int(used[i]), "task": task, "load": load[i]})
            if request.routing:
                slice_mask = source.slices(request.volume)[1]
                rows[-1]["routing"] = routing_of(encoded, i, self.model.cfg, slice_mask)
        if encoded.task_logits is not None:
            for row, shares in zip(rows, probabilities(encoded.task_logits), strict=True):
                row["task_probabilities"] = self._named(shares)
        return encoded.tokens, encoded.mask, rows

    def _tower(self, source: Source, requests: list[Request], batch: dict, group: jax.Array | None) -> EncodedVolume:
        """The encoded batch: that of the call before where it saw the same volumes with the same groups, in a tower
        that reads nothing else of a prompt."""
        tgh = self.model.cfg.tgh
        by_prompt = group is None and self.groups > 1
        if by_prompt or (tgh.layers and tgh.experts > 1 and tgh.token_input != "image"):
            return self._call("encode", generation.encode, batch, group)
        seen = [(request.volume, request.group) for request in requests]
        if self._seen is None or self._seen[0] is not source or self._seen[1] != seen:
            self._seen = None  # room for the next
            self._seen = source, seen, self._call("encode", generation.encode, batch, group)
        elif self._seen[2].task_logits is not None:
            logits = generation.route(self.model, self.variables, batch)
            return self._seen[2]._replace(task_logits=logits)
        return self._seen[2]

    def _encode_picture(self, source: PictureViews | Source, requests: list[Request]) -> tuple[jax.Array, jax.Array]:
        """Visual tokens of the views of a picture or a volume and their mask, in a row for each request about it."""
        slices, crops = [source.slices(r.volume) for r in requests], None
        if isinstance(source, PictureViews):
            crops = source.crops
        else:
            slices = [self.volume_views(*one) for one in slices]
        views, mask = (np.stack(parts) for parts in zip(*slices, strict=True))
        batch = self._put({"slices": views, "slice_mask": mask})
        visual, mask = self._call("encode", generation.encode_picture, batch, crops)
        return visual, mask & self._put(np.array([r.visible for r in requests]))[:, None]

    def _collate(self, source: Source, requests: list[Request]) -> dict[str, Any]:
        """What tower and router see: volumes, and prompts of the whole text length, so that they have one program."""
        rows = [(r.volume, r.question.prompt, None, r.question.task) for r in requests]
        batch = pipeline.collate(source, rows, self.tokenizer, self.text_length, self.tasks)
        batch["image_visible"] = np.array([r.visible for r in requests])
        return self._put(batch)

    def _text(self, requests: list[Request], targets: list[str | None], others: int) -> dict[str, Any]:
        """The text that the decoder reads, next to `others` positions of visual and new tokens."""
        encoded = [prompts.encode(self.tokenizer, r.question.prompt, t) for r, t in zip(requests, targets, strict=True)]
        longest = max(len(e.tokens) for e in encoded)
        length = padded_length(self.model.cfg.decoder, longest, others, self.text_length)
        return self._put(prompts.batch(encoded, length, self.tokenizer.pad_id))

    def _put(self, tree):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            return tree
        return arrays.place(tree, jax.NamedSharding(mesh, jax.P(mesh.axis_names)))

    def _named(self, shares: np.ndarray) -> dict[str, float]:
        return {task: float(share) for task, share in zip(self.tasks, shares, strict=True)}

    # ---- one scan, one picture ---------------------------------------------------------------------------------------

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
            why = f"{self.run.name} has seen {domains.seen(self.domain)} (--allow-out-of-domain lifts this)"
        elif not scan.in_range:
            why = "the scan lies outside the ranges of the training data, as the warnings say"
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


def padded_length(decoder: Decoder, tokens: int, others: int, text_length: int) -> int:
    """Columns for a text of `tokens` tokens and `others` further positions: whole buckets, so that texts of similar
    length share a compiled program.

    Padding never changes the RoPE regime: a run's is that of its whole text length; that of a picture, whose texts have
    no common length (`text_length` 0), follows its own, and padding never passes the last position.
    """
    if text_length:
        length = -(-tokens // BUCKET) * BUCKET
        if text_length + others > decoder.original_positions:
            length = max(length, decoder.original_positions + 1 - others)
        return min(length, text_length)
    within = tokens + others <= decoder.original_positions
    most = decoder.original_positions if within else decoder.max_positions
    return min(-(-tokens // PICTURE_BUCKET) * PICTURE_BUCKET, most - others)
