"""One scan, one question, one answer.

    python -m tghmoe_jax.predict --volume scan.nii.gz --question "Which plane is this?"
    python -m tghmoe_jax.predict --checkpoint runs/stage2 --volume dicom_folder --report --json --routing routing.png
    python -m tghmoe_jax.predict --base HF_DIR --image picture.png --question "What is shown?"    a 2D base, unadapted

In Python: `tghmoe_jax.load("runs/stage2").ask("scan.nii.gz", "Which plane is this?")`. Where no checkpoint is named,
the reader embedded in the package answers, and says so.

Exit codes: 0 done, 2 something the user can mend (one sentence on stderr; --debug adds the traceback). Answers, JSON
and pictures name no patient and no file. Axis legend: M MoE layers, E experts, T tokens.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the C++ logs of XLA would drown the answer

import jax
import jax.numpy as jnp
import numpy as np

from tghmoe_jax.errors import CommandParser, UserError
from tghmoe_jax.evaluation import DISCLAIMER, routing_plot
from tghmoe_jax.evaluation.routing_plot import Routing
from tghmoe_jax.models import generation
from tghmoe_jax.reader import base_model
from tghmoe_jax.reader.reader import routing_of
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.questions import LETTERS, Question
from tghmoe_jax.scans.scan import Scan, read_scan
from tghmoe_jax.training import compile_cache
from tghmoe_jax.training.loading import LoadedRun, load_run
from tghmoe_jax.training.step import variables

PICTURE_TOKENS = 256  # length limit of an answer about a picture
REPORT_REQUEST = "Write a report for this CT."
# Data sets that are drawn: what a checkpoint has seen of them tells little about a scan of a patient.
SYNTHETIC = {"phantom": "drawn phantoms", "scenes": "drawn 2D pictures"}


# ---- the answer -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says about one scan, and what a reader must know beside it.

    task: the expert group used; task_probabilities {task: float} of the router, None with one group. option_likelihoods
    {option: float in 0..1}, the geometric mean over its tokens of each option's probability with the options not shown,
    None without choices. blind_text: the same question without the volume. expert_load {layer: shares of the experts}.
    seconds: reading and answering, compilation included; tokens_per_second: generation alone, after compilation.
    """

    text: str
    task: str
    task_probabilities: dict[str, float] | None
    option_likelihoods: dict[str, float] | None
    blind_text: str
    warnings: tuple[str, ...]
    checkpoint: dict[str, str]
    seconds: float
    tokens_per_second: float
    disclaimer: str = DISCLAIMER
    routing: Routing | None = dataclasses.field(default=None, repr=False)
    scan: Scan | None = dataclasses.field(default=None, repr=False)

    @property
    def expert_load(self) -> dict[int, list[float]]:
        """{layer: share of each expert of the group used}."""
        pairs = zip(self.routing.layers, self.routing.load, strict=True) if self.routing else ()
        return {layer: [round(float(share), 4) for share in load] for layer, load in pairs}

    def to_json(self) -> dict[str, Any]:
        """The keys of `predict --json`."""
        names = ("text", "task", "task_probabilities", "option_likelihoods", "blind_text", "expert_load", "warnings",
                 "disclaimer", "checkpoint", "seconds", "tokens_per_second")  # fmt: skip
        record = {name: getattr(self, name) for name in names} | {"warnings": list(self.warnings)}
        if self.option_likelihoods is None:
            del record["option_likelihoods"]
        return record

    def __str__(self) -> str:
        """A few lines for a terminal: the answer, what stands against it, where it comes from."""
        lines = [self.text or "(no text)", ""]
        if self.option_likelihoods:
            ranked = sorted(self.option_likelihoods.items(), key=lambda item: -item[1])
            lines.append("options     " + ", ".join(f"{option} {value:.3f}" for option, value in ranked))
        shares = self.task_probabilities or {}
        routed = f" (router: {', '.join(f'{task} {share:.2f}' for task, share in shares.items())})" if shares else ""
        lines.append(f"task        {self.task}{routed}")
        loads = (f"layer {layer}: {' '.join(f'{x:.2f}' for x in load)}" for layer, load in self.expert_load.items())
        lines.append("experts     " + ("; ".join(loads) or "none"))
        lines.append(f"no volume   {self.blind_text or '(no text)'}")
        lines += [f"warning     {text}" for text in self.warnings]
        lines.append(
            f"checkpoint  {self.checkpoint['name']} {self.checkpoint['digest']}, {self.seconds:.1f} s, "
            f"{self.tokens_per_second:.0f} tokens/s"
        )
        return printable("\n".join([*lines, "", self.disclaimer]))

    def draw_routing(self, path: str | Path) -> None:
        """Writes the picture of `routing` as PNG. UserError where no layer has several experts."""
        if not self.routing.layers:
            raise UserError(f"--routing has nothing to show: {self.checkpoint['name']} has no experts; leave it out.")
        name = f"{self.checkpoint['name']} {self.checkpoint['digest']}"
        routing_plot.draw(path, self.routing, *self.scan.slices(), name)


def printable(text: str) -> str:
    """Text for a terminal: generated bytes may form its commands."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


class Predictor:
    """A run ready to answer about scans, one at a time. Every call reads its scan anew; only the Answer holds it."""

    def __init__(self, run: LoadedRun):
        self.run = run
        self.model = generation.inference(run.model)
        self.tasks = run.model.cfg.tasks
        self.groups = run.model.cfg.tgh.groups
        self.domain = run.manifest.get("domain") or run.config["data"]["name"]
        self._variables = jax.device_put(variables(run.params))

    def ask(
        self, path: str | Path, question: str, choices: Sequence[str] = (), *, task: str | None = None,
        series: int | None = None, new_tokens: int | None = None, allow_out_of_domain: bool = False,
    ) -> Answer:  # fmt: skip
        """Answers a question about the scan at `path`; `choices` (2 to 4) are shown with it, and ranked without.

        `task` forces an expert group; `series` chooses in a DICOM folder. UserError names what to mend.
        """
        question, choices = " ".join(question.split()), tuple(choice.strip() for choice in choices)
        if not question:
            raise UserError("--question is empty; ask something.")
        if choices and (not 2 <= len(choices) <= len(LETTERS) or not all(choices) or len(set(choices)) < len(choices)):
            raise UserError(f"--choices needs 2 to {len(LETTERS)} different options, as in --choices 'axial|coronal'.")
        if task == "report" and not allow_out_of_domain:
            self._refuse_report("--task report")
        asked = Question("vqa", "closed" if choices else "open", "", question, choices, "")
        return self._answer(path, asked, task, series, new_tokens, allow_out_of_domain)

    def report(
        self, path: str | Path, *, series: int | None = None, new_tokens: int | None = None,
        allow_out_of_domain: bool = False,
    ) -> Answer:  # fmt: skip
        """Writes a report of the scan at `path`. UserError where the checkpoint has seen no scan of a patient.

        `allow_out_of_domain` lifts that refusal.
        """
        if not allow_out_of_domain:
            self._refuse_report("--report")
        asked = Question("report", "report", "", REPORT_REQUEST, (), "")
        task = "report" if self.groups > 1 and "report" in self.tasks else None
        return self._answer(path, asked, task, series, new_tokens, True)

    def _refuse_report(self, flag: str) -> None:
        if self.domain in SYNTHETIC:
            raise UserError(
                f"{flag} is refused because the checkpoint {self.run.name} has seen {SYNTHETIC[self.domain]} and "
                "no scan of a patient "
                f"(domain {self.domain}); ask single questions, or add --allow-out-of-domain."
            )

    def _answer(self, path, asked: Question, task, series, new_tokens, allow_out_of_domain) -> Answer:
        begun = time.perf_counter()
        budget = self.run.config["eval"]
        # A report may be asked for in words of one's own, by --task report.
        new_tokens = new_tokens or budget["new_tokens" if "report" in (asked.kind, task) else "answer_tokens"]
        self._check_request(asked, task, new_tokens)
        scan = self.read(path, series)
        notes = [*self._domain_warning(), *scan.warnings]

        batch = self.batch(scan, asked.prompt)
        group, shares = self._route(batch, task, allow_out_of_domain, notes)
        encoded = generation.encode(self.model, self._variables, batch, np.array([group], np.int32))
        # The blind answer comes first: it compiles the generation that the second one is timed by.
        blind, _, _ = self._generate(batch, *generation.blank(self.model, self._variables, batch), new_tokens)
        text, count, seconds = self._generate(batch, encoded.tokens, encoded.mask, new_tokens)
        routing = routing_of(encoded, 0, self.model.cfg, scan.prepared.slice_mask)
        return Answer(
            text=text, task=self.tasks[group] if self.groups > 1 else asked.task, task_probabilities=shares,
            option_likelihoods=self._rank(scan, asked, task, allow_out_of_domain), blind_text=blind,
            warnings=tuple(notes), checkpoint={"name": self.run.name, "digest": self.run.digest},
            seconds=round(time.perf_counter() - begun, 2), tokens_per_second=round(count / max(seconds, 1e-9), 1),
            routing=dataclasses.replace(routing, probabilities=shares), scan=scan,
        )  # fmt: skip

    def read(self, path: str | Path, series: int | None = None) -> Scan:
        """The scan as the run's config prepares it. UserError as `data.scan.read_scan` raises it."""
        scan = read_scan(path, self.run.config["data"], self.run.manifest.get("input_ranges"), series)
        rope = self.model.cfg.volume.depth_rope
        if scan.prepared.spacing_mm is None and rope.enabled and rope.unit == "mm":
            raise UserError(f"{path} states no spacing, which {self.run.name} needs: name a NIfTI or DICOM scan.")
        return scan

    def batch(self, scan: Scan, prompt: str, target: str | None = None) -> dict[str, np.ndarray]:
        """The model's input, a batch of one: the keys of `pipeline.collate`."""
        row = (0, prompt, target, self.tasks[0])
        return pipeline.collate(scan, [row], self.run.tokenizer, self.run.config["data"]["text_length"], self.tasks)

    def _check_request(self, asked: Question, task: str | None, new_tokens: int) -> None:
        """UserError for what cannot be asked, before the scan is read."""
        if task is not None and self.groups == 1:
            raise UserError(f"--task {task} chooses nothing: {self.run.name} has one group of experts; leave it out.")
        if task is not None and task not in self.tasks:
            raise UserError(f"--task {task} is unknown to {self.run.name}; use one of {', '.join(self.tasks)}.")
        length = self.run.config["data"]["text_length"]
        sizes = [len(prompts.encode(self.run.tokenizer, asked.prompt, None).tokens)]
        bare = asked.without_choices().prompt
        sizes += [len(prompts.encode(self.run.tokenizer, bare, option).tokens) for option in asked.choices]
        if max(sizes) > length:
            what = "--question with --choices" if asked.choices else "--question"
            raise UserError(f"{what} takes {max(sizes)} tokens where {self.run.name} reads {length}; shorten the text.")
        cfg = self.model.cfg
        room = cfg.decoder.max_positions - length - cfg.visual_tokens(self.run.config["data"]["slices"])
        if not 1 <= new_tokens <= room:
            raise UserError(f"--new-tokens {new_tokens} must lie between 1 and {room}, the room in {self.run.name}.")

    def _domain_warning(self) -> list[str]:
        if self.domain in SYNTHETIC:
            embedded = self.run.name == "embedded"
            who = "the reader embedded in the package (no --checkpoint was named)" if embedded else "the checkpoint"
            return [
                f"domain {self.domain}: {who} has seen {SYNTHETIC[self.domain]} and no scan of a patient; "
                "its answer on a real scan shows that the path works, not what the scan holds"
            ]
        return [f"domain {self.domain}: the checkpoint was trained on this data and may fail on scans of other origin"]

    def _route(
        self, batch: dict, task: str | None, allow_out_of_domain: bool, notes: list[str]
    ) -> tuple[int, dict[str, float] | None]:
        """The expert group of a prompt and the router's probabilities. What is not followed is added to `notes`."""
        if self.groups == 1:
            return 0, None
        logits = np.asarray(generation.route(self.model, self._variables, batch), np.float64)[0]
        values = np.exp(logits - logits.max())
        values /= values.sum()
        shares = {name: round(float(value), 4) for name, value in zip(self.tasks, values, strict=True)}
        group = int(np.argmax(values)) if task is None else self.tasks.index(task)
        others = [i for i, name in enumerate(self.tasks) if name != "report"]
        if self.tasks[group] == "report" and self.domain in SYNTHETIC and not allow_out_of_domain and others:
            # A report on a patient's scan is not given by the way of a question either.
            group = max(others, key=lambda i: values[i])
            notes.append(
                f"task: the router sends the question to report ({shares['report']:.2f}), which is refused on real "
                f"scans in this domain, so the {self.tasks[group]} experts answer (--allow-out-of-domain lifts this)"
            )
        return group, shares

    def _generate(self, batch: dict, visual: jax.Array, mask: jax.Array, new_tokens: int) -> tuple[str, int, float]:
        """Text, number of tokens decoded (the stop token included), seconds."""
        tokenizer, begun = self.run.tokenizer, time.perf_counter()
        ids = generation.generate(
            self.model, self._variables, batch, visual, mask, new_tokens, tuple(sorted(tokenizer.stop_ids))
        )
        ids = [int(i) for i in np.asarray(ids)[0] if i >= 0]
        return tokenizer.decode(ids).strip(), min(len(ids) + 1, new_tokens), time.perf_counter() - begun

    def _rank(self, scan: Scan, asked: Question, task: str | None, allow_out_of_domain: bool) -> dict | None:
        """Likelihood of each option, the options not shown and routed by the question alone, as `ranked` scores it."""
        if not asked.choices:
            return None
        bare = asked.without_choices().prompt
        batch = self.batch(scan, bare)
        group, _ = self._route(batch, task, allow_out_of_domain, [])
        encoded = generation.encode(self.model, self._variables, batch, np.array([group], np.int32))
        score = lambda option: generation.answer_likelihood(  # noqa: E731
            self.model, self._variables, self.batch(scan, bare, option), encoded.tokens, encoded.mask
        )
        return {option: round(float(jnp.exp(score(option)[0])), 6) for option in asked.choices}


def load(run: str | Path = "embedded") -> Predictor:
    """A finished run as a Predictor; without a name the embedded reader. UserError where `run` is none."""
    return Predictor(load_run(run, "--checkpoint"))


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked as far as it can be without the run or the scan."""
    parser = CommandParser(
        prog="python -m tghmoe_jax.predict", allow_abbrev=False, description="Ask a trained run about one CT scan.",
        epilog=DISCLAIMER,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="RUN",
        help="folder of a finished run, as runs/stage2; default the "
        "embedded reader, which was trained on drawn phantoms",
    )
    add("--volume", metavar="PATH", help="NIfTI file, DICOM folder or file, or .npy volume")
    add("--base", metavar="DIR", help="ask a 2D base model about --image instead, to check a port; `embedded` is one")
    add("--image", metavar="FILE", help="picture for --base")
    add("--question", metavar="TEXT", help="what to ask")
    add("--choices", action="append", default=[], metavar="A|B|C|D", help="2 to 4 options, or one per flag")
    add("--report", action="store_true", help="write a report instead of answering a question")
    add("--task", metavar="TASK", help="force the experts of a task, report or vqa, instead of the router's choice")
    add("--routing", metavar="PNG", help="picture of the expert load and of the winning expert of each patch")
    add("--json", action="store_true", help="print one JSON object")
    add("--series", type=int, metavar="N", help="which series of a DICOM folder, counting from 1")
    add("--new-tokens", type=int, metavar="N", help="length limit of the answer; default as in the run's evaluation")
    add("--allow-out-of-domain", action="store_true", help="let a checkpoint of drawn data report on a real scan")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.base or args.image:
        rest = {
            "--checkpoint": args.checkpoint, "--volume": args.volume, "--report": args.report,
            "--choices": args.choices, "--task": args.task, "--routing": args.routing, "--series": args.series,
        }  # fmt: skip
        if not (args.base and args.image and args.question):
            raise UserError("--base DIR, --image FILE and --question TEXT belong together; give all three.")
        if wrong := [flag for flag, value in rest.items() if value]:
            raise UserError(f"{wrong[0]} belongs to --volume; leave it out with --base and --image.")
    elif not args.volume:
        raise UserError("--volume is missing; name a scan, or a picture with --image and --base.")
    if args.report == (args.question is not None):
        raise UserError("give either --question TEXT or --report.")
    args.choices = [option for part in args.choices for option in part.split("|")]
    if args.report and args.choices:
        raise UserError("--choices belongs to --question; leave it out with --report.")
    if args.report and args.task not in (None, "report"):
        raise UserError(f"--task {args.task} contradicts --report; leave one of them out.")
    if args.new_tokens is not None and args.new_tokens < 1:
        raise UserError(f"--new-tokens {args.new_tokens} must be 1 or more.")
    if args.series is not None and args.series < 1:
        raise UserError(f"--series {args.series} must be 1 or more; series count from 1.")
    if args.routing is not None:
        picture = Path(args.routing)
        if picture.suffix.lower() != ".png" or picture.is_dir():
            raise UserError(f"--routing {args.routing} must name a .png file.")
        if not picture.parent.is_dir() or not os.access(picture.parent, os.W_OK):
            raise UserError(f"--routing {args.routing} lies in no folder that can be written to; make that first.")
    return args


def run(args: argparse.Namespace) -> str:
    """Answers what the command line asks; returns what to print."""
    begun = time.perf_counter()
    if args.base:
        text = base_model.load(args.base).ask(args.image, args.question, args.new_tokens or PICTURE_TOKENS)
        seconds = round(time.perf_counter() - begun, 2)
        record = {"text": text, "base": str(args.base), "disclaimer": DISCLAIMER, "seconds": seconds}
        return json.dumps(record, indent=1) if args.json else printable(f"{text or '(no text)'}\n\n{DISCLAIMER}")
    reader = load(args.checkpoint or "embedded")
    options = {
        "series": args.series, "new_tokens": args.new_tokens, "allow_out_of_domain": args.allow_out_of_domain,
    }  # fmt: skip
    if args.report:
        answer = reader.report(args.volume, **options)
    else:
        answer = reader.ask(args.volume, args.question, args.choices, task=args.task, **options)
    if args.routing:
        answer.draw_routing(args.routing)
    answer = dataclasses.replace(answer, seconds=round(time.perf_counter() - begun, 2))
    return json.dumps(answer.to_json(), indent=1, allow_nan=False) if args.json else str(answer)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        compile_cache.keep()
        print(run(args))
    except UserError as error:
        if "--debug" in argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
