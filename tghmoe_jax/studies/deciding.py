"""Small paired experiments that answer one question about the data of a config: `ablate --question` (docs/deciding.md).

Two sides differ in one thing. Both are trained with the same seeds and asked the validation split, never the test
split. What a plan of so many seeds and items can see is said before anything is trained
(`evaluation/paired_seeds.py`).
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tghmoe_jax import evaluate, train, writing
from tghmoe_jax.bases.base import tokenizer_of
from tghmoe_jax.datasets.sources import aux_names, make_source
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import comparison, files, outputs, paired_seeds, provenance, statistics, text_table
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.reader import examination
from tghmoe_jax.reader.opening import load_sharded
from tghmoe_jax.samples import pipeline
from tghmoe_jax.samples.questions import ItemSource, Source
from tghmoe_jax.samples.tasks import TASK_OF
from tghmoe_jax.studies import ablate
from tghmoe_jax.training import program, run_folder
from tghmoe_jax.training.command_line import parse
from tghmoe_jax.training.loading import load_run

USUAL = "as_configured"
# A step takes about so many times the useful products at the rate of a large one (docs/speed.md, train_step).
STEP_OVER_PRODUCTS = 5
H100_FLOPS, H100_LEAST_STEP = 0.3 * 989e12, 0.02  # a third of its peak; a step of a tiny model is bound by its launches


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training, and how it is asked. `changes` {config key: value}; `task`: of a specialist, the one task whose
    score it gives; `shows` a key of SHOWS, what is seen in place of each volume."""

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = ""
    shows: str = ""


@dataclasses.dataclass(frozen=True)
class Decision:
    """`other` gives the arms of the second side; the first is the config as it is. `sides` name both; `first`, `second`
    and `equal` are the verdicts."""

    asks: str
    sides: tuple[str, str]
    other: Callable[[ConfigDict], list[Arm]]
    first: str
    second: str
    equal: str
    from_base: bool = False  # changes what only a training from a 2D base may change


# ---- what is shown --------------------------------------------------------------------------------------------------

Slices = tuple[np.ndarray, np.ndarray]  # uint8 (D, S, S, 3) and the mask bool (D,), as of `samples.Source.slices`


def shown(source: Source, how: str, seed: int) -> Source:
    """The source with what `how`, a key of SHOWS, lets be seen in place of each volume; questions and answers stay."""
    other = copy.copy(source)
    other.slices = SHOWS[how](source, seed)
    return other


def _others(source: Source, seed: int) -> Callable[[int], Slices]:
    """Another case's volume. UserError where one case holds more than half of them."""
    if isinstance(source, ItemSource):
        order, moved = statistics.derangement_across([source.case(i) for i in range(len(source))], seed)
        if not moved.all():
            raise UserError("one case has more than half of the validation volumes, so no other can stand for it.")
    else:
        order = statistics.derangement(len(source), seed)
    return lambda index: source.slices(int(order[index]))


def _disordered(source: Source, seed: int) -> Callable[[int], Slices]:
    """The volume's own slices in random order; what is no slice stays where it is."""

    def see(index: int) -> Slices:
        levels, mask = source.slices(index)
        real, levels = np.flatnonzero(mask), levels.copy()
        levels[real] = levels[np.random.default_rng([seed, index]).permutation(real)]
        return levels, mask

    return see


SHOWS = {"others": _others, "disordered": _disordered}


# ---- the questions --------------------------------------------------------------------------------------------------


def _half(config: ConfigDict) -> list[Arm]:
    return [Arm("half_of_the_volumes", {"data.share": config.data.share / 2})]


def _random_start(config: ConfigDict) -> list[Arm]:
    if not config.base:
        raise UserError("--question base needs a base, and --config.base is empty; name the folder of a 2D model.")
    return [Arm("random_tower", {"fresh": (*config.fresh, r"vision/.+")})]


def _single_slices(config: ConfigDict) -> list[Arm]:
    m = config.model
    changes = {"model.patch_depth": 1, "model.depth_pool": m.depth_pool * m.patch_depth, "model.attn3d_layers": ()}
    if m.patch_depth == 1 and not m.attn3d_layers:
        raise UserError("--question slices: the config reads single slices already; give model.patch_depth above 1.")
    return [Arm("single_slices", changes)]


def _specialists(config: ConfigDict) -> list[Arm]:
    """One arm a task: as many steps, each with the samples of this task that a usual step has and no others."""
    mixture = pipeline.mixture_of(config.data.mixture)
    whole, arms = sum(count for _, count in mixture), []
    for task in config.model.tasks:
        own = {kind: count for kind, count in mixture if TASK_OF[kind] == task}
        if not own:
            raise UserError(f"--question tasks: data.mixture has no sample of the task {task}; give it some.")
        changes = {f"data.mixture.{kind}": own.get(kind, 0) for kind, _ in mixture}
        changes["train.batch"] = config.train.batch * sum(own.values()) // whole
        arms.append(Arm(f"only_{task}", changes, task))
    if len(arms) < 2:
        raise UserError("--question tasks needs two tasks or more, and model.tasks has one.")
    return arms


def _dense(config: ConfigDict) -> list[Arm]:
    if config.model.tgh.experts == 1:
        raise UserError("--question experts: the config has one expert; give --config.model.tgh.experts above 1.")
    return [Arm("dense", {"model.tgh.experts": 1, "model.tgh.top_k": 1, "model.tgh.groups": 1})]


QUESTIONS = {
    "volumes": Decision(
        "Are there enough volumes?", ("all volumes", "half of them"), _half,
        "There are too few volumes: with half of them the score falls. More of them will probably raise it again.",
        "Half of the volumes do better than all, which no sound set does: look for wrong labels or scans in the rest.",
        "Half of the volumes do as well as all of them. More volumes of this kind will hardly help; look elsewhere.",
    ),
    "base": Decision(
        "Does the 2D start help?", ("the 2D base", "a random vision tower"), _random_start,
        "The 2D base helps: keep it.",
        "A random tower does better: this base does not fit these scans; try another, or none.",
        "The 2D base makes no difference for the vision tower here; choose it for its decoder, or by its cost.",
        from_base=True,
    ),
    "slices": Decision(
        "Slabs in 3D, or single slices?", ("the 3D tower", "single slices, averaged"), _single_slices,
        "Read slabs in 3D: single slices, each seen alone, lose something that the answers need.",
        "Read single slices (model.patch_depth=1, model.attn3d_layers=(), model.depth_pool=...): they do better.",
        "Single slices do as well as the 3D tower; take the one that costs less.",
        from_base=True,
    ),
    "tasks": Decision(
        "Do the tasks conflict?", ("one model of all tasks", "a model for each task"), _specialists,
        "The tasks help each other: train them together.",
        "The tasks conflict: a model for each does better on as many samples. Groups of experts are made for this "
        "(configs/stage2.py); compare them with two models.",
        "The tasks neither help nor hurt each other. One model is enough, and task groups have nothing to win.",
    ),
    "experts": Decision(
        "Are experts better than one FFN?", ("experts", "one dense FFN"), _dense,
        "Experts help: keep them.",
        "One dense FFN does better, at less cost: set model.tgh.experts=1 and model.tgh.top_k=1.",
        "Experts make no difference here; one dense FFN (model.tgh.experts=1, model.tgh.top_k=1) costs less.",
        from_base=True,
    ),
    "scan": Decision(
        "Does the answer come from the scan?", ("the own scan", "another patient's scan"),
        lambda config: [Arm(USUAL, shows="others")],
        "The answers come from the scan: with another patient's they are worse.",
        "The answers are better with another patient's scan, which cannot be: look for mixed-up scans.",
        "The answers do not come from the scan: another patient's gives the same score. The words of the questions "
        "are enough, or the model has not learned to look.",
    ),
    "order": Decision(
        "Does the order of the slices matter?", ("the scan", "its slices in random order"),
        lambda config: [Arm(USUAL, shows="disordered")],
        "The answers use what lies along the depth: with the slices in random order they are worse.",
        "The answers are better in random order, which cannot be: look for stacks that are stored in a wrong order.",
        "The answers do not depend on the order of the slices, so nothing along the depth is used.",
    ),
}  # fmt: skip


# ---- what a plan costs ----------------------------------------------------------------------------------------------


def seconds_of_runs(config: ConfigDict) -> tuple[float, float]:
    """(here, on one H100): what all steps of a training take, by its FLOPs; within a factor of two or so."""
    origin = train.load_origin(config)
    tokenizer = tokenizer_of(origin.tokenizer, origin.config)
    mesh = evaluate.open_mesh(config, config.model.tgh.experts)
    spec = program.batch_spec(config, mesh)
    model = program.build_model(config, origin.config, aux_names(config.data.name), tokenizer, spec.task_shares)
    flops = train.useful_flops(program.build(config, model, spec, mesh), config)
    a = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    begun = time.perf_counter()
    for _ in range(4):
        product(a).block_until_ready()
    rate = 4 * 2 * 2048**3 / (time.perf_counter() - begun)
    steps = config.train.steps
    return steps * flops * STEP_OVER_PRODUCTS / rate, steps * max(flops / H100_FLOPS, H100_LEAST_STEP)


# ---- one experiment -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A question about the config of `file` with `flags`, and the folder of its runs, which questions share."""

    name: str
    file: str
    workdir: Path
    flags: tuple[str, ...]

    @property
    def question(self) -> Decision:
        return QUESTIONS[self.name]

    def config(self, arm: Arm, seed: int) -> ConfigDict:
        """UserError for an unknown flag, or where the config cannot be asked this question."""
        config = parse(["ablate", f"--config={self.file}", *self.flags])[0]
        config.train.seed += seed
        config.update_from_flattened_dict({"eval.every": 0, "eval.calibration": 0, "eval.controls": ()})
        config.update_from_flattened_dict(dict(arm.changes))
        return config

    def arms(self) -> tuple[Arm, list[Arm]]:
        config = self.config(Arm(USUAL), 0)
        if config.mode != "train":
            raise UserError(f"--config {self.file} does not train; name one that does, such as configs/stage1.py.")
        run_folder.check_config(config)
        if self.question.from_base and config.init_from:
            raise UserError(
                f"--question {self.name} needs a training from a 2D base, and --config.init_from={config.init_from}; "
                "use configs/stage1.py."
            )
        return Arm(USUAL), self.question.other(config)

    def folder(self, arm: Arm, seed: int) -> Path:
        return self.workdir / f"{arm.name}-seed{seed}"

    def asked(self, arm: Arm, seed: int) -> Path:
        """The folder of the answers to so many validation items."""
        items = self.config(arm, seed).eval["items"]
        return self.folder(arm, seed) / "validation" / "-".join(filter(None, [f"{items}_items", arm.shows]))

    def finished(self, arm: Arm, seed: int) -> bool:
        return (self.folder(arm, seed) / "checkpoints" / str(self.config(arm, seed).train.steps)).is_dir()

    def run(self, arm: Arm, seed: int) -> None:
        """Trains what is missing and asks the validation split; a stopped command resumes."""
        config, folder = self.config(arm, seed), self.folder(arm, seed)
        run_folder.check_workdir(config, str(folder))
        ablate.train_stage(config, folder)
        target = self.asked(arm, seed)
        if (target / "metrics.json").is_file():
            return
        loaded = load_run(str(folder), "--workdir")
        mesh = evaluate.open_mesh(config, loaded.model.cfg.tgh.experts)
        reader = load_sharded(loaded, config.data.text_length, min(config.eval.batch, config.eval["items"]), mesh)
        source = make_source(config.data, "validation", config.eval["items"], "seen")
        if not len(source):
            raise UserError(f"--config.data.root={config.data.root} has no validation volume; give some that split.")
        if arm.shows:
            source = shown(source, arm.shows, config.eval.seed)
        examination.examine(reader, source, source, config, target, lambda text: None)
        print(f"{folder.name}: asked the validation split ({target.name})", flush=True)
        jax.clear_caches()

    def items(self) -> dict[str, int]:
        """{kind: validation items that will be asked}. UserError without a validation split."""
        config = self.config(Arm(USUAL), 0)
        source = make_source(config.data, "validation", config.eval["items"], "seen")
        most, found = config.eval["items"], {}
        for kind in examination.kinds_of(source, config.model.tasks):
            found[kind] = min(most, sum(source.counts(kind))) if isinstance(source, ItemSource) else most
        if not found:
            raise UserError(f"the validation split has no item of the tasks {', '.join(config.model.tasks)}; add some.")
        return found


def plan(experiment: Experiment, seeds: int) -> str:
    """What so many seeds can see, what the smallest difference that counts would need, and what that costs."""
    question, (usual, others), items = experiment.question, experiment.arms(), experiment.items()
    arms = list({arm.name: arm for arm in (*others, usual)}.values())  # trained once, however often they are asked
    variance = paired_seeds.planned_variance(items)
    sees = paired_seeds.smallest_seen(seeds, variance)
    left = sum(not experiment.finished(arm, seed) for arm in arms for seed in range(seeds))
    costs = [seconds_of_runs(experiment.config(arm, 0)) for arm in arms]
    here, there = (sum(side) for side in zip(*costs, strict=True))
    asked = ", ".join(f"{count} {kind}" for kind, count in items.items())
    lines = [
        f"{question.asks} {_upper(question.sides[0])} against {question.sides[1]}.",
        f"{seeds} seeds and the validation split ({asked}) see a difference of {sees:.3f} or more in "
        f"{paired_seeds.POWER:.0%} of such experiments."
        if seeds > 1
        else "One seed sees no difference, however large: seeds alone differ.",
        f"They take {len(arms) * seeds} trainings, {left} of them not finished: about {_hours(here * seeds)} of this "
        f"machine (by FLOPs, within a factor of two; asking comes on top), or {_hours(there * seeds)} of one H100.",
    ]
    need = paired_seeds.enough(variance, ablate.EFFECT)
    if sees > ablate.EFFECT and need:
        more, times = need
        with_items = f" and {times} times the items" if times > 1 else ""
        lines.append(
            f"To see {ablate.EFFECT}, the smallest difference that counts, takes {more} seeds{with_items}: "
            f"{_hours(here * more)} of this machine, or {_hours(there * more)} of one H100."
        )
    return "\n".join(lines)


def _upper(words: str) -> str:
    return words[:1].upper() + words[1:]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, round(seconds / 60))} minutes"


# ---- what came out --------------------------------------------------------------------------------------------------


def pairs(experiment: Experiment, seed: int) -> dict[str, tuple[list[Prediction], list[Prediction]]]:
    """{kind: answers of both sides to the same items} of one seed."""
    usual, others = experiment.arms()
    own = files.read_run(experiment.asked(usual, seed))
    second: dict[str, list[Prediction]] = {}
    for arm in others:
        run = files.read_run(experiment.asked(arm, seed))
        second |= {kind: ones for kind, ones in run.items() if arm.task in ("", TASK_OF.get(kind))}
    kinds = [kind for kind in own if kind in second and "/" not in kind]
    return {kind: comparison.paired(own[kind], second[kind], kind) for kind in kinds}


def verdict(question: Decision, result: Mapping[str, Any]) -> str:
    """One paragraph: the scores, the difference with its interval, and what to do, by the rule of docs/ablations.md.

    result: of `paired_seeds.difference`.
    """
    seeds, gap = len(result["seeds"]), result["difference"]
    began = (
        f"{question.asks} {_upper(question.sides[0])}: {result['first']:.3f}; {question.sides[1]}: "
        f"{result['second']:.3f} ({seeds} {'seed' if seeds == 1 else 'seeds'}, {result['items']} items about "
        f"{result['units']} cases or volumes of the validation split). "
    )
    if result["ci95"] is None or seeds < ablate.LEAST_SEEDS:
        more = ablate.LEAST_SEEDS - seeds
        needs = f"{more} more {'seed' if more == 1 else 'seeds'}"
        return f"{began}The difference is {gap:+.3f}. No verdict: it needs {needs}, because seeds alone differ."
    low, high = result["ci95"]
    if low > 0 and gap >= ablate.EFFECT:
        said = question.second
    elif high < 0 and gap <= -ablate.EFFECT:
        said = question.first
    else:
        said = question.equal if -ablate.EFFECT < low and high < ablate.EFFECT else _undecided(result)
    return f"{began}The difference is {gap:+.3f} {text_table.interval((low, high), '+')}. {said}"


def by_kind(question: Decision, result: Mapping[str, Any]) -> str:
    """A table of the score of each kind."""
    rows = [["kind", "score", *question.sides, "difference", "95% interval"]]
    for kind, one in result["kinds"].items():
        numbers = [f"{one['first']:.3f}", f"{one['second']:.3f}", f"{one['difference']:+.3f}"]
        rows.append([kind, one["score"].replace("_", " "), *numbers, text_table.interval(one["ci95"], "+")])
    return "\n".join(text_table.table(rows, left=range(6)))


def _undecided(result: Mapping[str, Any]) -> str:
    need = paired_seeds.enough(result["item_variance"], ablate.EFFECT, result["seed_spread"])
    if need is None:
        return f"Undecided, and no plan of up to {paired_seeds.MOST_SEEDS} seeds would see {ablate.EFFECT} here."
    seeds, times = need
    items = f" and {times} times the items" if times > 1 else ""
    return f"Undecided: by these runs, {seeds} seeds{items} would see {ablate.EFFECT}, the smallest that counts."


def decide(experiment: Experiment, seeds: int, only_plan: bool) -> int:
    """Prints the plan, runs what is missing, and prints and keeps the verdict (<workdir>/<question>.json)."""
    print(plan(experiment, seeds), flush=True)
    if only_plan:
        return 0
    usual, others = experiment.arms()
    done = []
    for seed in range(seeds):
        for arm in (usual, *others):
            experiment.run(arm, seed)
        done.append(pairs(experiment, seed))
        result = paired_seeds.difference(done, ranked=bool(experiment.config(usual, seed).data.mixture.open))
        said = verdict(experiment.question, result)
        made = {
            "config": run_folder.flatten(experiment.config(usual, 0)), **provenance.made_by(),
            "minutes": {arm.name: ablate.minutes_of(experiment.folder(arm, seed)) for arm in (usual, *others)},
        }  # fmt: skip
        outputs.write_json(experiment.workdir / f"{experiment.name}.json", result | {"verdict": said, "made": made})
        said = f"{by_kind(experiment.question, result)}\n\n{said}"
        writing.write(experiment.workdir / f"{experiment.name}.txt", said + "\n")
    print(f"\n{said}", flush=True)
    return 0
