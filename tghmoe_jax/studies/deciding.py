"""Small paired experiments that answer one question about the data of a config: `ablate --question` (docs/deciding.md).

Two sides differ in one thing. Both are trained with the same seeds and asked the validation split, never the test
split. What a plan of so many seeds and items can see is said before anything is trained.
Axis legend: S seeds, N items, R resamples.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from ml_collections import ConfigDict

from tghmoe_jax import evaluate, train, writing
from tghmoe_jax.bases.base import tokenizer_of
from tghmoe_jax.datasets.sources import aux_names, make_source
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import comparison, files, outputs, statistics
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.reader import examination
from tghmoe_jax.reader.opening import load_sharded
from tghmoe_jax.samples import pipeline
from tghmoe_jax.samples.questions import ItemSource
from tghmoe_jax.samples.tasks import TASK_OF
from tghmoe_jax.studies import ablate
from tghmoe_jax.training import program, run_folder
from tghmoe_jax.training.command_line import parse
from tghmoe_jax.training.loading import load_run

POWER = 0.8  # chance that a difference of the size a plan can see is found
# Until a question's own runs say more (docs/ablations.md): how a difference of scores varies from seed to seed, and the
# variance of one item's difference, which is the share of items that the two sides answer differently.
SEED_SPREAD, ITEM_VARIANCE = 0.02, 0.3
MOST_SEEDS = 50
SHUFFLED = "shuffled"
USUAL = "as_configured"
# A step takes about so many times the useful products at the rate of a large one (docs/speed.md, train_step).
STEP_OVER_PRODUCTS = 5
H100_FLOPS, H100_LEAST_STEP = 0.3 * 989e12, 0.02  # a third of its peak; a step of a tiny model is bound by its launches


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training. `changes` {config key: value}; `task`: of a specialist, the one task whose score it gives."""

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """`other` gives the arms of the second side; the first is the config as it is. `control`: the second side is the
    first one's run, asked under this control. `sides` name both; `first`, `second`, `equal` are the verdicts."""

    asks: str
    sides: tuple[str, str]
    other: Callable[[ConfigDict], list[Arm]]
    first: str
    second: str
    equal: str
    control: str = ""
    from_base: bool = False  # changes what only a training from a 2D base may change


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
    "volumes": Question(
        "Are there enough volumes?", ("all volumes", "half of them"), _half,
        "There are too few volumes: with half of them the score falls. More of them will probably raise it again.",
        "Half of the volumes do better than all, which no sound set does: look for wrong labels or scans in the rest.",
        "Half of the volumes do as well as all of them. More volumes of this kind will hardly help; look elsewhere.",
    ),
    "base": Question(
        "Does the 2D start help?", ("the 2D base", "a random vision tower"), _random_start,
        "The 2D base helps: keep it.",
        "A random tower does better: this base does not fit these scans; try another, or none.",
        "The 2D base makes no difference for the vision tower here; choose it for its decoder, or by its cost.",
        from_base=True,
    ),
    "slices": Question(
        "Slabs in 3D, or single slices?", ("the 3D tower", "single slices, averaged"), _single_slices,
        "Read slabs in 3D: single slices, each seen alone, lose something that the answers need.",
        "Read single slices (model.patch_depth=1, model.attn3d_layers=(), model.depth_pool=...): they do better.",
        "Single slices do as well as the 3D tower; take the one that costs less.",
        from_base=True,
    ),
    "tasks": Question(
        "Do the tasks conflict?", ("one model of all tasks", "a model for each task"), _specialists,
        "The tasks help each other: train them together.",
        "The tasks conflict: a model for each does better on as many samples. Groups of experts are made for this "
        "(configs/stage2.py); compare them with two models.",
        "The tasks neither help nor hurt each other. One model is enough, and task groups have nothing to win.",
    ),
    "experts": Question(
        "Are experts better than one FFN?", ("experts", "one dense FFN"), _dense,
        "Experts help: keep them.",
        "One dense FFN does better, at less cost: set model.tgh.experts=1 and model.tgh.top_k=1.",
        "Experts make no difference here; one dense FFN (model.tgh.experts=1, model.tgh.top_k=1) costs less.",
        from_base=True,
    ),
    "scan": Question(
        "Does the answer come from the scan?", ("the own scan", "another patient's scan"), lambda config: [],
        "The answers come from the scan: with another patient's they are worse.",
        "The answers are better with another patient's scan, which cannot be: look for mixed-up scans.",
        "The answers do not come from the scan: another patient's gives the same score. The words of the questions "
        "are enough, or the model has not learned to look.",
        control=SHUFFLED,
    ),
}  # fmt: skip


# ---- what a plan can see --------------------------------------------------------------------------------------------


def smallest_seen(seeds: int, item_variance: float, seed_spread: float = SEED_SPREAD) -> float:
    """The difference of scores that is found in `POWER` of such experiments, by a two-sided t test at 5 %.

    item_variance: of the mean difference, from the choice of items alone; seed_spread: the standard deviation of the
    difference from seed to seed. Infinite for fewer than two seeds.
    """
    if seeds < 2:
        return math.inf
    t = scipy.stats.t
    both = t.ppf(0.975, seeds - 1) + t.ppf(POWER, seeds - 1)
    return float(both * math.sqrt(seed_spread**2 / seeds + item_variance))


def planned_variance(items: Mapping[str, int], item_variance: float = ITEM_VARIANCE) -> float:
    """Of the mean over kinds of the mean difference of so many items each."""
    return sum(item_variance / count for count in items.values()) / len(items) ** 2


def enough(variance: float, spread: float = SEED_SPREAD, least: int = ablate.LEAST_SEEDS) -> tuple[int, float] | None:
    """The fewest seeds that see `ablate.EFFECT`, and by how much the items must be multiplied for it; None without.

    More seeds come before more items, up to eight; items may then grow up to a thousandfold.
    """
    for times in (1, 2, 3, 5, 10, 20, 50, 100, 1000):
        most = 8 if times < 1000 else MOST_SEEDS
        for seeds in range(least, most + 1):
            if smallest_seen(seeds, variance / times, spread) <= ablate.EFFECT:
                return seeds, times
    return None


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
    def question(self) -> Question:
        return QUESTIONS[self.name]

    def config(self, arm: Arm, seed: int) -> ConfigDict:
        """UserError for an unknown flag, or where the config cannot be asked this question."""
        config = parse(["ablate", f"--config={self.file}", *self.flags])[0]
        config.train.seed += seed
        config.update_from_flattened_dict({"eval.every": 0, "eval.calibration": 0, "eval.controls": (SHUFFLED,)})
        config.update_from_flattened_dict(dict(arm.changes))
        return config

    def arms(self) -> tuple[Arm, list[Arm]]:
        config = self.config(Arm(USUAL), 0)
        if config.mode != "train":
            raise UserError(f"--config {self.file} does not train; name one that does, such as configs/stage1.py.")
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
        return self.folder(arm, seed) / "validation" / f"{items}_items"

    def run(self, arm: Arm, seed: int) -> None:
        """Trains what is missing and asks the validation split; a stopped command resumes."""
        config, folder = self.config(arm, seed), self.folder(arm, seed)
        run_folder.check_config(config)
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
        examination.examine(reader, source, source, config, target, lambda text: None)
        print(f"{folder.name}: asked the validation split", flush=True)
        jax.clear_caches()

    def items(self) -> dict[str, int]:
        """{kind: validation items that will be asked}. UserError without a validation split."""
        config = self.config(Arm(USUAL), 0)
        source = make_source(config.data, "validation", config.eval["items"], "seen")
        most, found = config.eval["items"], {}
        for kind in examination.kinds_of(source, config.model.tasks):
            found[kind] = min(most, sum(source.counts(kind))) if isinstance(source, ItemSource) else most
        return found


def plan(experiment: Experiment, seeds: int) -> str:
    """What so many seeds can see, what the smallest difference that counts would need, and what that costs."""
    usual, others = experiment.arms()
    items = experiment.items()
    variance = planned_variance(items)
    runs = [(usual, seed) for seed in range(seeds)] + [(arm, seed) for arm in others for seed in range(seeds)]
    left = [one for one in runs if not (experiment.asked(*one) / "metrics.json").is_file()]
    here, there = (sum(parts) for parts in zip(*map(seconds_of_runs, _configs(experiment, (usual, *others))),
                                               strict=True))  # fmt: skip
    asked = ", ".join(f"{count} {kind}" for kind, count in items.items())
    lines = [
        f"{experiment.question.asks} {experiment.question.sides[0].capitalize()} against "
        f"{experiment.question.sides[1]}.",
        f"{seeds} seeds and the validation split ({asked}) see a difference of {smallest_seen(seeds, variance):.3f} or "
        f"more in {POWER:.0%} of such experiments: {len(runs)} trainings, {len(left)} of them not finished, about "
        f"{_hours(here * seeds)} of this machine (by FLOPs, within a factor of two; asking comes on top), or "
        f"{_hours(there * seeds)} of one H100.",
    ]
    need = enough(variance)
    if need is None:
        lines.append(f"No plan of up to {MOST_SEEDS} seeds sees {ablate.EFFECT}, the smallest that counts.")
    elif smallest_seen(seeds, variance) > ablate.EFFECT:
        more, times = need
        lines.append(
            f"To see {ablate.EFFECT}, the smallest that counts, takes {more} seeds"
            + (f" and {times} times the items" if times > 1 else "")
            + f": {_hours(here * more)} of this machine, or {_hours(there * more)} of one H100."
        )
    return "\n".join(lines)


def _configs(experiment: Experiment, arms: Sequence[Arm]) -> list[ConfigDict]:
    return [experiment.config(arm, 0) for arm in arms]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, round(seconds / 60))} minutes"


# ---- what came out --------------------------------------------------------------------------------------------------


def pairs(experiment: Experiment, seed: int) -> dict[str, tuple[list[Prediction], list[Prediction]]]:
    """{kind: answers of both sides to the same items} of one seed."""
    usual, others = experiment.arms()
    own = files.read_run(experiment.asked(usual, seed))
    if experiment.question.control:
        first, second = comparison.beside_control(own, experiment.question.control)
        return {kind: (first[kind], second[kind]) for kind in first}
    second: dict[str, list[Prediction]] = {}
    for arm in others:
        run = files.read_run(experiment.asked(arm, seed))
        second |= {kind: ones for kind, ones in run.items() if arm.task in ("", TASK_OF.get(kind))}
    kinds = [kind for kind in own if kind in second and "/" not in kind]
    return {kind: comparison.paired(own[kind], second[kind], kind) for kind in kinds}


def difference(found: Sequence[Mapping[str, tuple[list[Prediction], list[Prediction]]]]) -> dict[str, Any]:
    """The second side's score minus the first one's, from `pairs` of each seed.

    score: {kind: its metric}; first, second: the mean over kinds of the score, over seeds; seeds: the difference of
    each; ci95: of their mean, None for one seed; item_variance, seed_spread: what it rests on. The interval adds the
    variance between seeds to that between items, which are the same for all seeds.
    """
    scores, columns, units = {}, [], []
    for kind in found[0]:
        sides = [[comparison.columns(kind, ones, judged=True) for ones in seed[kind]] for seed in found]
        # Ranking the options is the finer of the two rules for closed questions; controls have only the other.
        known = [name for name in sides[0][0] if all(name in side for seed in sides for side in seed)]
        if not known:
            continue
        scores[kind] = name = "ranked_accuracy" if "ranked_accuracy" in known else known[0]
        columns.append(np.stack([np.stack(side[name], -1) for seed in sides for side in seed], 1))  # (N, 2 S, 2)
        units += [one.unit for one in found[0][kind][0]]
    if not scores:
        raise UserError(
            "the validation split has no item that is right or wrong; give it some, or look at metrics.json."
        )
    whole = np.zeros((len(units), len(columns), 2 * len(found), 2))
    start = 0
    for number, one in enumerate(columns):
        whole[start : start + len(one), number] = one
        start += len(one)

    def values(sums: np.ndarray) -> np.ndarray:
        """Sums (..., kinds, 2 S, 2) -> the score (..., S, 2 sides)."""
        ratio = (sums[..., 0] / np.maximum(sums[..., 1], 1e-9)).mean(-2)
        return ratio.reshape(*ratio.shape[:-1], len(found), 2)

    each = values(whole.sum(0))
    gaps = each[:, 1] - each[:, 0]
    sums = statistics.resampled_sums(whole.reshape(len(units), -1), units)
    if sums is None:
        raise UserError("the validation split has one volume, which nothing can be compared on; give it more.")
    again = values(sums.reshape(-1, *whole.shape[1:]))
    variance = float((again[..., 1] - again[..., 0]).mean(-1).var())
    spread = float(np.std(gaps, ddof=1)) if len(found) > 1 else None
    low_high = None
    if spread is not None:
        half = scipy.stats.t.ppf(0.975, len(found) - 1) * math.sqrt(spread**2 / len(found) + variance)
        low_high = [float(gaps.mean() - half), float(gaps.mean() + half)]
    return {
        "score": scores, "first": float(each[:, 0].mean()), "second": float(each[:, 1].mean()),
        "difference": float(gaps.mean()), "seeds": gaps.tolist(), "ci95": low_high, "item_variance": variance,
        "seed_spread": spread, "items": len(units), "units": len(set(units)),
    }  # fmt: skip


def verdict(question: Question, result: Mapping[str, Any]) -> str:
    """One paragraph: the scores, the difference with its interval, and what to do, by the rule of docs/ablations.md."""
    seeds, gap = len(result["seeds"]), result["difference"]
    kinds = ", ".join(f"{kind} {name.replace('_', ' ')}" for kind, name in result["score"].items())
    lines = [
        f"{question.asks} {question.sides[0].capitalize()}: {result['first']:.3f}; {question.sides[1]}: "
        f"{result['second']:.3f} (mean of {kinds}; {seeds} seeds, {result['items']} items about {result['units']} "
        "units of the validation split)."
    ]
    if result["ci95"] is None or seeds < ablate.LEAST_SEEDS:
        more = f"{ablate.LEAST_SEEDS - seeds} more {'seed' if ablate.LEAST_SEEDS - seeds == 1 else 'seeds'}"
        return f"{lines[0]} The difference is {gap:+.3f}. No verdict: it needs {more}, since seeds alone differ."
    low, high = result["ci95"]
    state = ablate.verdict(gap, (low, high))
    said = {
        "full better": question.first, "row better": question.second, "none that counts": question.equal,
        "not shown": _undecided(result),
    }  # fmt: skip
    if state == "row better" and gap < ablate.EFFECT:
        state = "none that counts" if high < ablate.EFFECT else "not shown"
    return f"{lines[0]} The difference is {gap:+.3f} [{low:+.3f}, {high:+.3f}]. {said[state]}"


def _undecided(result: Mapping[str, Any]) -> str:
    need = enough(result["item_variance"], result["seed_spread"])
    if need is None:
        return f"Undecided, and no plan of up to {MOST_SEEDS} seeds would see {ablate.EFFECT} here."
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
        result = difference(done)
        said = verdict(experiment.question, result)
        outputs.write_json(experiment.workdir / f"{experiment.name}.json", result | {"verdict": said})
        writing.write(experiment.workdir / f"{experiment.name}.txt", said + "\n")
    print(f"\n{said}", flush=True)
    return 0
