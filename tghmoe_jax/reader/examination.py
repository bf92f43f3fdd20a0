"""The examination of a model: the questions of a test split, the same under every control, and the scores.

Axis legend: N items.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tghmoe_jax import writing
from tghmoe_jax.datasets.sources import finding_parser, make_source
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import (
    DISCLAIMER,
    closed,
    html_report,
    outputs,
    protocols,
    provenance,
    router_tests,
    statistics,
    verdict,
)
from tghmoe_jax.evaluation.calibration import Calibration
from tghmoe_jax.reader import confidence
from tghmoe_jax.reader.answer import Answer
from tghmoe_jax.reader.batches import Asked, Request
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.questions import LETTERS, ItemSource, Question, Source
from tghmoe_jax.samples.tasks import COLUMNS, KINDS, TASK_OF, TASKS, under_controls
from tghmoe_jax.scans.slices import window_names
from tghmoe_jax.training import hosts


def test_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The test split in the wordings of training, and in wordings that training never holds (of files: the same)."""
    seen = make_source(config.data, "test", config.eval["items"], "seen")
    if isinstance(seen, ItemSource):
        return seen, seen
    return seen, make_source(config.data, "test", config.eval["items"], "unseen")


def questions(source: Source, kind: str, items: int, seed: int, types: Sequence[str | None]) -> Asked:
    """The fixed test questions of a kind.

    Of a source that draws its questions, item i asks about volume i, its type in rotation; a data set of files asks
    its own first `items`, volume by volume, so that each volume is read once.
    """

    def rng(i: int) -> np.random.Generator:
        return np.random.default_rng([seed, 7, i])

    if isinstance(source, ItemSource):
        asked = [source.item(kind, i, rng(i)) for i in range(min(items, sum(source.counts(kind))))]
        return sorted(asked, key=lambda one: one[0])
    volumes = [i % len(source) for i in range(items)]
    types = types or [None]
    return [(v, source.question(v, kind, rng(i), types[i % len(types)])) for i, v in enumerate(volumes)]


def kinds_of(source: Source, tasks: Sequence[str]) -> list[str]:
    """The kinds whose task the model has and that the source holds (a drawn source names them as `kinds`)."""
    known = [kind for kind in KINDS if TASK_OF[kind] in tasks]
    if isinstance(source, ItemSource):
        return [kind for kind in known if sum(source.counts(kind))]
    return [kind for kind in known if kind in getattr(source, "kinds", KINDS)]


def usable(source: Source, asked: Asked, reader: Reader, bad: pipeline.BadItems) -> Asked:
    """What can be asked: volumes of files may be broken, and texts too long. See `pipeline.BadItems`."""
    if not isinstance(source, ItemSource):
        return asked
    faults: dict[int, str] = {}
    for volume in dict.fromkeys(volume for volume, _ in asked):
        try:
            source.slices(volume)
        except UserError as error:
            faults[volume] = str(error)
    kept, skipped = [], []
    for volume, question in asked:
        tokens = len(prompts.encode(reader.tokenizer, question.prompt, None).tokens)
        long = 0 < reader.text_length < tokens  # the texts of a 2D base have no common length
        if volume in faults or long:
            fault = faults.get(volume, "a question is longer than --config.data.text_length allows.")
            skipped.append((source.key(volume), fault))
        else:
            kept.append((volume, question))
    bad.note(skipped, len(kept))
    return kept


def types_of(source: Source, kind: str) -> list[str]:
    """The question types that are asked in rotation, where a drawn source names such as `types`; else it draws them."""
    return list(getattr(source, "types", ())) if "Type" in COLUMNS[kind].more else []


def calibrate(reader: Reader, config: ConfigDict, progress=print) -> dict[str, Calibration]:
    """{kind: what the confidence of its answers means}, from `eval.calibration` questions each of the validation split.

    A kind with too few of them is left out.
    """
    number = config.eval.get("calibration", 0)  # the config of an older run lacks it
    try:
        source = make_source(config.data, "validation", number, "seen") if number else None
    except UserError as error:
        progress(f"confidence is not calibrated: {error}")
        source = None
    if source is None or not len(source):
        return {}
    bad, found = pipeline.BadItems(config.max_bad_fraction, progress), {}
    for kind in (kind for kind in kinds_of(source, reader.tasks) if COLUMNS[kind].confident):
        seed = config.eval.seed + COLUMNS[kind].order
        asked = usable(source, questions(source, kind, number, seed, types_of(source, kind)), reader, bad)
        requests = [Request(*one) for one in asked]
        texts = [one.text for one in reader.answer(source, requests, config.eval[TASKS[TASK_OF[kind]].budget])]
        values = confidence.likelihoods(reader, source, requests, texts)
        if fitted := confidence.fit(kind, [question for _, question in asked], texts, values):
            found[kind] = fitted
        progress(f"calibrated {kind}: {len(asked)} validation items")
    return found


def examine(
    reader: Reader, source: Source, unseen: Source, config: ConfigDict, folder: epath.Path, progress=print,
    calibrated: Mapping[str, Calibration] | None = None, name: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Runs all protocols and the config's controls on `source`, writes predictions, scores and a page into `folder`,
    and tells the verdict.

    `unseen` is the same split in wordings that training never holds, for the router's second score; `calibrated` what
    `calibrate` found for each kind; `name` the run that is examined, for the command to run next.
    """
    calibrated = calibrated or {}
    e, cfg = config.eval, reader.model.cfg
    given = isinstance(source, ItemSource)
    if left_out := getattr(source, "left_out", ""):
        progress(left_out)
    items = e["items"] if given else min(e["items"], len(source))

    parse = finding_parser(config.data.name)
    bad, kinds = pipeline.BadItems(config.max_bad_fraction, progress), kinds_of(source, cfg.tasks)
    asked_of, fewer = {}, []
    for kind in kinds:
        asked = questions(source, kind, items, e.seed + COLUMNS[kind].order, types_of(source, kind))
        fewer.append(given and len(asked) < items)  # a set of files has no more
        asked_of[kind] = usable(source, asked, reader, bad)
    everything = [one for asked in asked_of.values() for one in asked]
    volumes = sorted({volume for volume, _ in everything})
    if given:  # another volume of the same patient would be no control
        shuffled, foreign = statistics.derangement_across([source.case(volume) for volume in volumes], e.seed)
    else:
        shuffled, foreign = statistics.derangement(len(volumes), e.seed), None
    groups = [source.group(i) for i in volumes]
    sectioned, moved = statistics.derangement_within(groups, e.seed)
    routed = cfg.tgh.groups > 1
    run: dict[str, list[protocols.Prediction]] = {}

    def protocol(name, asked, order=None, keep=None, group=None, visible=True) -> list[Answer]:
        """Asks each question about its volume, or the one that `order` puts in its place where `keep` holds.

        Where it is not a control, options are ranked, and answers get a confidence, as well.
        """
        place = {volume: i for i, volume in enumerate(volumes)}
        asked = [one for one in asked if keep is None or keep[place[one[0]]]]
        if not asked:
            return []
        requests = [
            Request(
                volume if order is None else volumes[order[place[volume]]], question,
                group=None if group is None else group(question), visible=visible,
            )
            for volume, question in asked
        ]  # fmt: skip
        kind = asked[0][1].kind
        # A blind answer depends on the prompt alone, so each prompt is asked once.
        once = dict(enumerate(requests)) if visible else {one.question.prompt: one for one in requests}
        answers = reader.answer(source, list(once.values()), e[TASKS[TASK_OF[kind]].budget])
        if not visible:
            answered = dict(zip(once, answers, strict=True))
            answers = [answered[one.question.prompt] for one in requests]
        ranked, sure = [None] * len(asked), [None] * len(asked)
        if name == kind and (COLUMNS[kind].lettered or kind in calibrated):
            texts = [answer.text for answer in answers]
            found = confidence.likelihoods(reader, source, requests, texts)
            if COLUMNS[kind].lettered:
                ranked = [LETTERS[choice] for choice in np.argmax(found, axis=-1)]
            if kind in calibrated:
                named = [closed.named_option(text, q.choices) for (_, q), text in zip(asked, texts, strict=True)]
                sure = [float(value) for value in calibrated[kind].confidence(found, named)]
        run[name] = [
            protocols.Prediction.of(
                volume, question, answer.text, ranked=letter, confidence=share,
                case=source.case(volume) if given else None,
                task_predicted=cfg.tasks[answer.group] if routed and group is None and visible else None,
                findings_true=source.findings(volume) if "Findings True" in COLUMNS[kind].more and parse else None,
                findings_stated=parse(answer.text) if "Findings True" in COLUMNS[kind].more and parse else None,
                key=source.key(volume) if given else "",
            )
            for (volume, question), answer, letter, share in zip(asked, answers, ranked, sure, strict=True)
        ]  # fmt: skip
        progress(f"evaluated {name}: {len(asked)} items")
        return answers

    def wrong_group(question: Question) -> int:
        return (cfg.tasks.index(question.task) + 1) % len(cfg.tasks)

    answers = []
    for kind, asked in asked_of.items():
        answers += protocol(kind, asked)
    asked_tasks = [question.task for _, question in everything]
    loads = {
        task: sum(answer.load for answer, own in zip(answers, asked_tasks, strict=True) if own == task)
        for task in dict.fromkeys(asked_tasks)
    }
    load = sum(loads.values())
    repeated = {kind: asked for kind, asked in asked_of.items() if kind in under_controls()}
    for kind, asked in repeated.items():
        if "shuffled" in e.controls:
            protocol(f"control/shuffled_{kind}", asked, shuffled, keep=foreign)
        if any(groups) and "section_shuffled" in e.controls:
            protocol(f"control/section_shuffled_{kind}", asked, sectioned, keep=moved)
        if routed and "wrong_group" in e.controls:
            protocol(f"control/wrong_group_{kind}", asked, group=wrong_group)
        if "blind" in e.controls:
            protocol(f"control/blind_{kind}", asked, visible=False)
    router = None
    if routed:
        other = [] if given else [  # a data set of files has one wording
            one for kind in kinds for one in questions(unseen, kind, items, e.seed + 3, types_of(unseen, kind))
        ]  # fmt: skip
        own_prompts, other_prompts = ([question.prompt for _, question in asked] for asked in (everything, other))
        router = {
            "task_accuracy_unseen_wording": (routed_right(reader, unseen, other), other_prompts),
            "keyword_accuracy": (keyword_right(everything), own_prompts),
            "keyword_accuracy_unseen_wording": (keyword_right(other), other_prompts),
        }
    metrics = protocols.score(run, router=router, load=load if load.size else None)
    if hasattr(source, "lesions_mm"):
        metrics[verdict.LESIONS] = source.lesions_mm
    meaning = verdict.verdicts(metrics, run)
    said = verdict.lines(meaning, metrics)
    shown = [asked[0] for asked in repeated.values() if asked and load.size]
    overlays = list(zip((volume for volume, _ in shown), reader.routings(source, shown), strict=True)) if shown else []
    if hosts.first():  # every process has asked the same questions and read the same answers
        outputs.write_predictions(folder, run)
        manifest = provenance.manifest(
            run, checkpoint=reader.checkpoint, eval=e.to_dict(),
            data={"name": config.data.name, "drop_leaks": config.data.drop_leaks},
        )  # fmt: skip
        outputs.write_json(folder / "manifest.json", manifest)
        windows = () if config.data.name == "scenes" else window_names(config.data.channels)
        data_set = f"{config.data.name}, {getattr(source, 'split', 'test')}, {len(volumes)} volumes"
        html_report.write(
            folder / "report.html", metrics, run, source, cfg.tasks, loads if load.size else {}, sorted(cfg.tgh.layers),
            overlays, verdicts=meaning, windows=windows,
            facts={"checkpoint": checkpoint_text(reader, folder), "data set": data_set, **provenance.made_by()},
        )  # fmt: skip
        writing.write(folder / "scores.txt", "\n".join([*said, "", outputs.table(metrics, run)]) + "\n")
        outputs.write_json(folder / "metrics.json", metrics)
    said.append(f"report   {folder / 'report.html'}; every score: {folder / 'scores.txt'}")
    if name:
        # A reader that was loaded from a run may have been given other data than the run's own.
        stage1 = bool(cfg.tgh.layers) and not routed
        following = verdict.next_step(meaning, name, stage1, all(fewer), own=reader.run is None)
        said.append(f"next     {following}")
    progress("\n".join([*said, DISCLAIMER]))
    return metrics


def checkpoint_text(reader: Reader, folder: epath.Path) -> str:
    """What answered: its name, digest and step; while it trains, the run and the step that `folder` is named by."""
    if reader.checkpoint is None:
        return f"{folder.parent.parent.name}, step {folder.name}"
    return ", ".join(f"{key} {value}".removeprefix("name ") for key, value in reader.checkpoint.items())


def true_loss(reader: Reader, source: Source, config: ConfigDict) -> float:
    """Mean over the questions that an examination asks: the negative log-likelihood a token of the true answer."""
    bad, found = pipeline.BadItems(config.max_bad_fraction, lambda text: None), []
    items = config.eval["items"] if isinstance(source, ItemSource) else min(config.eval["items"], len(source))
    for kind in kinds_of(source, reader.tasks):
        seed = config.eval.seed + COLUMNS[kind].order
        asked = usable(source, questions(source, kind, items, seed, types_of(source, kind)), reader, bad)
        requests = [Request(volume, question, (question.target,)) for volume, question in asked]
        found += [-float(answer.likelihoods[0]) for answer in reader.answer(source, requests, 0)]
    return float(np.mean(found))


def routed_right(reader: Reader, source: Source, asked: Asked) -> list[bool]:
    """Whether the router sends each question about its volume to its task."""
    picked = np.argmax(reader.route(source, asked), axis=-1)
    return [reader.tasks[group] == question.task for group, (_, question) in zip(picked, asked, strict=True)]


def keyword_right(asked: Asked) -> list[bool]:
    """Whether the keyword rule finds the task of each question."""
    return [router_tests.task_by_keyword(question.question) == question.task for _, question in asked]
