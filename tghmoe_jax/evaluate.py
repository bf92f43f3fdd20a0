"""Asks a model the test questions, with every control, and scores the answers, its own or any system's.

    python -m tghmoe_jax.evaluate run RUN [--items N] [--to DIR]     a finished run (or `embedded`) on its test set
    python -m tghmoe_jax.evaluate score PREDICTIONS [--json]         prediction files of any system
    python -m tghmoe_jax.evaluate score --pred-labels A.csv --true-labels B.csv    clinical F1 of label tables
    python -m tghmoe_jax.evaluate compare A B [--json]               two systems on the same items, paired intervals

PREDICTIONS, A and B are CSV files (see evaluation/files.py) or folders of predictions_*.csv.
Axis legend: B batch, N items, O options.
"""

import copy
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tghmoe_jax.datasets.sources import DRAWN, HARD_WORDINGS, finding_parser, make_source
from tghmoe_jax.errors import CommandParser, UserError
from tghmoe_jax.evaluation import html_report, outputs, protocols, provenance, router_tests, statistics
from tghmoe_jax.evaluation import score_files as evaluation_commands
from tghmoe_jax.models import generation
from tghmoe_jax.reader.reader import Answer, Asked, Reader, Request
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.questions import LETTERS, TYPES, ItemSource, Question, Source
from tghmoe_jax.samples.tasks import COLUMNS, KINDS, TASK_OF, TASKS, under_controls
from tghmoe_jax.sharding import arrays
from tghmoe_jax.sharding.mesh import keep_freed_memory, make_mesh
from tghmoe_jax.training import compile_cache, hosts, run_folder
from tghmoe_jax.training.loading import load_run

# ---- a run that exists ----------------------------------------------------------------------------------------------


def open_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of the config, made current. UserError where it does not fit the devices."""
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.expert, experts=config.model.tgh.experts)
    except ValueError as error:
        raise UserError(f"--config.mesh: {error}; change mesh.data, mesh.fsdp or mesh.expert.") from error
    jax.set_mesh(mesh)
    return mesh


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """mode=evaluate: scores the latest checkpoint of `config.init_from`, into workdir/eval/<step>.

    Its test set and the longest question are the run's own, unless `config.data` names others.
    """
    mesh = open_mesh(config)
    loaded = load_run(config.init_from, "--config.init_from")
    config = ConfigDict(config.to_dict() | {"data": data_of(config, loaded.config)})
    run_folder.check_config(config)
    params = arrays.place(loaded.params, jax.NamedSharding(mesh, jax.P()))
    reader = Reader(loaded.model, loaded.tokenizer, params, config.data.text_length, config.eval.batch)
    reader.checkpoint = {"name": loaded.name, "digest": loaded.digest, "step": loaded.step}
    progress = print if hosts.first() else lambda text: None
    return evaluate_all(reader, config, epath.Path(workdir) / "eval" / str(loaded.step), progress)


def data_of(config: ConfigDict, run: dict[str, Any]) -> dict[str, Any]:
    """`data` of an evaluation: the run's own (its resolved config), and what `config.data` names instead."""
    named = {key: config.data[key] for key in ("name", "root", "manifest", "text_length") if config.data[key]}
    if config.data.drop_leaks != "none":
        named["drop_leaks"] = config.data.drop_leaks
    data = config.data.to_dict() | run["data"] | named  # a run of an earlier version lacks newer keys
    if data["name"] in DRAWN and "root" not in named:
        data["root"] = "runs/data"  # the caches of another machine are of no use
    return data


# ---- the protocols ---------------------------------------------------------------------------------------------------


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
    rng = lambda i: np.random.default_rng([seed, 7, i])  # noqa: E731
    if isinstance(source, ItemSource):
        asked = [source.item(kind, i, rng(i)) for i in range(min(items, sum(source.counts(kind))))]
        return sorted(asked, key=lambda one: one[0])
    volumes = [i % len(source) for i in range(items)]
    return [(v, source.question(v, kind, rng(i), types[i % len(types)])) for i, v in enumerate(volumes)]


def usable(source: Source, asked: Asked, reader: Reader, bad: pipeline.BadItems) -> Asked:
    """What can be asked: of a data set of files, volumes may be broken and texts too long. See `pipeline.BadItems`."""
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
        long = len(prompts.encode(reader.tokenizer, question.prompt, None).tokens) > reader.text_length
        if volume in faults or long:
            fault = faults.get(volume, "a question is longer than --config.data.text_length allows.")
            skipped.append((source.key(volume), fault))
        else:
            kept.append((volume, question))
    bad.note(skipped, len(kept))
    return kept


def evaluate_all(reader: Reader, config: ConfigDict, folder: epath.Path, progress=print) -> dict[str, Any]:
    """The scores of the run's own test set, into `folder`, and beside it what the config asks for besides.

    `eval.transfer` items of the second drawing style go to `folder`/second_style, `eval.adversarial` items asked in
    each hard way to `folder`/adversarial.json.
    """
    metrics = evaluate(reader, *test_sources(config), config, folder, progress)
    if config.eval.transfer:
        progress("the second drawing style, never trained on:")
        other = ConfigDict(config.to_dict())
        other.eval["items"] = config.eval.transfer
        source = make_source(config.data, "test", config.eval.transfer, "second", "second")
        evaluate(reader, source, source, other, folder / "second_style", progress)
    if config.eval.adversarial and reader.model.cfg.tgh.groups > 1:
        ways = adversarial(reader, config, progress)
        if hosts.first():
            outputs.write_text(folder / "adversarial.json", json.dumps(ways, indent=1, allow_nan=False) + "\n")
        progress(router_tests.table(ways))
    return metrics


def evaluate(
    reader: Reader, source: Source, unseen: Source, config: ConfigDict, folder: epath.Path, progress=print
) -> dict[str, Any]:
    """Runs all protocols and the config's controls on `source` and writes predictions and metrics.json into `folder`.

    `unseen` is the same split in wordings that training never holds, for the router's second score.
    """
    e, cfg = config.eval, reader.model.cfg
    given = isinstance(source, ItemSource)
    items = e["items"] if given else min(e["items"], len(source))

    def types_of(kind: str) -> list[str | None]:
        """The question types that are asked in rotation."""
        return list(TYPES) if config.data.name == "phantom" and "Type" in COLUMNS[kind].more else [None]

    parse = finding_parser(config.data.name)
    bad = pipeline.BadItems(config.max_bad_fraction, progress)
    asked_of = {
        kind: usable(source, questions(source, kind, items, e.seed + COLUMNS[kind].order, types_of(kind)), reader, bad)
        for kind in KINDS
    }
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

    def protocol(name, asked, order=None, keep=None, rank=False, group=None, visible=True) -> list[Answer]:
        """Asks each question about its volume, or the one that `order` puts in its place where `keep` holds.

        With `rank` the options are ranked as well.
        """
        place = {volume: i for i, volume in enumerate(volumes)}
        asked = [one for one in asked if keep is None or keep[place[one[0]]]]
        if not asked:
            return []
        requests = [
            Request(
                volume if order is None else volumes[order[place[volume]]], question,
                group=-1 if group is None else group(question), visible=visible,
            )
            for volume, question in asked
        ]  # fmt: skip
        kind = asked[0][1].kind
        # A blind answer depends on the prompt alone, so each prompt is asked once.
        once = dict(enumerate(requests)) if visible else {one.question.prompt: one for one in requests}
        answers = reader.ask(source, list(once.values()), e[TASKS[TASK_OF[kind]].budget])
        if not visible:
            answered = dict(zip(once, answers, strict=True))
            answers = [answered[one.question.prompt] for one in requests]
        ranked = [None] * len(asked)
        if rank:
            ranked = rank_options(reader, source, requests)
        run[name] = [
            protocols.Prediction.of(
                volume, question, answer.text, ranked=letter, case=source.case(volume) if given else None,
                task_predicted=cfg.tasks[answer.group] if routed and group is None and visible else None,
                findings_true=source.findings(volume) if "Findings True" in COLUMNS[kind].more and parse else None,
                findings_stated=parse(answer.text) if "Findings True" in COLUMNS[kind].more and parse else None,
                key=source.key(volume) if given else "",
            )
            for (volume, question), answer, letter in zip(asked, answers, ranked, strict=True)
        ]  # fmt: skip
        progress(f"evaluated {name}: {len(asked)} items")
        return answers

    answers = []
    for kind, asked in asked_of.items():
        answers += protocol(kind, asked, rank=COLUMNS[kind].lettered)
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
            other = lambda q: (cfg.tasks.index(q.task) + 1) % len(cfg.tasks)  # noqa: E731
            protocol(f"control/wrong_group_{kind}", asked, group=other)
        if "blind" in e.controls:
            protocol(f"control/blind_{kind}", asked, visible=False)
    router = None
    if routed:
        own = [question for _, question in everything]
        other = [] if given else [  # a data set of files has one wording
            q for kind in KINDS
            for _, q in questions(unseen, kind, items, e.seed + 3, types_of(kind))
        ]  # fmt: skip
        keyword = lambda asked: [router_tests.task_by_keyword(q.question) == q.task for q in asked]  # noqa: E731
        texts = [[q.prompt for q in asked] for asked in (own, other)]
        router = {
            "task_accuracy_unseen_wording": (route(reader, unseen, other), texts[1]),
            "keyword_accuracy": (keyword(own), texts[0]),
            "keyword_accuracy_unseen_wording": (keyword(other), texts[1]),
        }
    metrics = protocols.score(run, router=router, load=load if load.size else None, seed=e.seed)
    shown = [asked[0] for asked in repeated.values() if asked and load.size]
    overlays = list(zip((volume for volume, _ in shown), reader.routings(source, shown), strict=True)) if shown else []
    if hosts.first():  # every process has asked the same questions and read the same answers
        outputs.write_predictions(folder, run)
        manifest = provenance.manifest(
            run, seed=e.seed, checkpoint=reader.checkpoint, eval=e.to_dict(),
            data={"name": config.data.name, "drop_leaks": config.data.drop_leaks},
        )  # fmt: skip
        outputs.write_text(folder / "manifest.json", json.dumps(manifest, indent=1, allow_nan=False) + "\n")
        html_report.write(
            folder / "report.html", metrics, run, source, cfg.tasks, loads if load.size else {}, sorted(cfg.tgh.layers),
            overlays,
        )  # fmt: skip
        outputs.write_metrics(folder, metrics)
    progress(outputs.table(metrics, run))
    return metrics


def rank_options(reader: Reader, source: Source, requests: Sequence[Request]) -> list[str]:
    """The letter of the likeliest option of each closed question, the options not shown."""
    letters = [""] * len(requests)
    for count in sorted({len(r.question.choices) for r in requests}):
        places = [i for i, r in enumerate(requests) if len(r.question.choices) == count]
        bare = [
            dataclasses.replace(r, question=r.question.without_choices(), options=r.question.choices)
            for r in (requests[i] for i in places)
        ]
        for i, answer in zip(places, reader.ask(source, bare, 0), strict=True):
            letters[i] = LETTERS[int(np.argmax(answer.likelihoods))]
    return letters


def route(reader: Reader, source: Source, asked: Sequence[Question]) -> list[bool]:
    """Whether the prompt alone routes each question to its task."""
    hits: list[bool] = []
    for start in range(0, len(asked), reader.batch):
        part = list(asked[start : start + reader.batch])
        padded = [Request(0, q) for q in part + [part[-1]] * (reader.batch - len(part))]
        batch = reader._collate(source, padded)
        picked = np.argmax(arrays.to_host(generation.route(reader.model, reader.variables, batch)), axis=-1)
        hits += [reader.model.cfg.tasks[g] == q.task for g, q in zip(picked, part, strict=False)]
    return hits


def adversarial(reader: Reader, config: ConfigDict, progress=print) -> dict[str, dict[str, object]]:
    """{way of asking: scores of `router_tests.score_way`}: the wordings of training, unseen ones and the hard ones."""
    e, tasks = config.eval, reader.model.cfg.tasks
    reader = copy.copy(reader)
    reader.text_length *= 2  # indications are long, and other languages fall to bytes
    ways = {}
    for way in ("seen", "unseen", *HARD_WORDINGS):
        source = make_source(config.data, "test", e.adversarial, way)
        routed: dict[str, dict[str, list]] = {"oracle": {}, "wrong": {}}
        hits = {}
        for kind, types in (("closed", TYPES), ("report", [None])):
            asked = [q for _, q in questions(source, kind, e.adversarial, e.seed + 4, types)]
            hits[kind] = route(reader, source, asked)
            if kind == "closed":
                hits["open"] = route(reader, source, [q.without_choices() for q in asked])
            for step, run in enumerate(routed.values()):
                requests = [Request(i, q, group=(tasks.index(q.task) + step) % len(tasks)) for i, q in enumerate(asked)]
                answers = reader.ask(source, requests, e.new_tokens if kind == "report" else e.answer_tokens)
                run[kind] = [
                    protocols.Prediction.of(
                        i, q, answer.text,
                        findings_true=source.findings(i) if kind == "report" else None,
                        findings_stated=finding_parser(config.data.name)(answer.text) if kind == "report" else None,
                    )
                    for i, (q, answer) in enumerate(zip(asked, answers, strict=True))
                ]  # fmt: skip
        ways[way] = router_tests.score_way(routed["oracle"], routed["wrong"], hits, e.seed)
        progress(f"asked in another way, {way}: {2 * e.adversarial} items")
    return ways


# ---- the command ----------------------------------------------------------------------------------------------------


def run_again(source: str, items: int | None, to: str | None) -> dict[str, Any]:
    """Scores a finished run as its own config says, into `to` (default runs/evaluate-<name of the run>).

    With `items` only the protocols on the run's own test set are asked.
    """
    folder = run_folder.find(source, "RUN")
    config = ConfigDict(run_folder.read_config(folder))
    if "eval" not in config or not config.data.get("slices"):
        raise UserError(f"RUN={source} saw no volumes or pictures, so there is nothing to evaluate; name another run.")
    if items is not None and items < 2:
        raise UserError(f"--items {items} is too small to shuffle volumes; give 2 or more.")
    target = epath.Path(to or f"runs/evaluate-{folder.resolve().name}")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {target} cannot be made ({error.strerror or error}); name another folder.") from error
    config.init_from = source
    config.data.update({"name": "", "root": "", "manifest": "", "text_length": 0})  # the run's own, as it has them
    config.data.drop_leaks = config.data.get("drop_leaks", "none")  # runs of earlier versions have neither
    config.data.workers = config.data.get("workers", 0)
    config.max_bad_fraction = config.get("max_bad_fraction", 0.0)
    config.mesh.update({"data": -1, "fsdp": 1, "expert": 1})
    for key in ("transfer", "adversarial"):  # runs of earlier versions have none of these
        config.eval[key] = 0 if items else config.eval.get(key, 0)
    config.eval["items"] = items or config.eval["items"]
    config.eval.controls = config.eval.get("controls", protocols.CONTROLS)
    config.eval.batch = min(config.eval.batch, config.eval["items"])  # a batch of few items is not padded to a full one
    return run(config, target)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 2 something the user can mend (one sentence on stderr)."""
    parser = CommandParser(prog="python -m tghmoe_jax.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    one = commands.add_parser("run", help="a finished run on its own test set, with every control")
    one.add_argument("run", help="folder of a run, or `embedded`")
    one.add_argument("--items", type=int, help="items of each protocol; default as the run's config says")
    one.add_argument("--to", help="folder for the scores; default runs/evaluate-<name of the run>")
    evaluation_commands.add_parsers(commands)
    try:
        args = parser.parse_args(argv)
        if args.command == "run":
            keep_freed_memory()
            compile_cache.keep()
            run_again(args.run, args.items, args.to)
        else:
            evaluation_commands.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
