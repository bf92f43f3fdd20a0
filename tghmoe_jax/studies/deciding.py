"""Small paired experiments that answer one question about the data of a config: `ablate --question` (docs/deciding.md).

Two sides differ in one thing. Both are trained with the same seeds and asked the validation split, never the test
split. What a plan of so many seeds and items can see is said before anything is trained
(`evaluation/paired_seeds.py`).
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tghmoe_jax import evaluate, train, writing
from tghmoe_jax.bases.base import tokenizer_of
from tghmoe_jax.datasets.sources import aux_names, make_source
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import files, outputs, paired_seeds, provenance, statistics, text_table
from tghmoe_jax.evaluation.paired_seeds import Graded
from tghmoe_jax.reader import examination
from tghmoe_jax.reader.opening import load_sharded
from tghmoe_jax.samples.questions import ItemSource, Source
from tghmoe_jax.samples.tasks import TASK_OF
from tghmoe_jax.studies import ablate
from tghmoe_jax.studies.decisions import QUESTIONS, USUAL, Arm, Decision, shown
from tghmoe_jax.training import command_line, program, run_folder, stored
from tghmoe_jax.training.loading import load_run

# A step takes about so many times the useful products at the rate of a large one (docs/speed.md, train_step).
STEP_OVER_PRODUCTS = 5
STAGE2_SEED = 1000  # added in a second stage, which visits the volumes in an order of its own (configs/ablations.py)
H100_FLOPS, H100_LEAST_STEP = 0.3 * 989e12, 0.02  # a third of its peak; a step of a tiny model is bound by its launches


# ---- what a plan costs ----------------------------------------------------------------------------------------------


def seconds_of_runs(config: ConfigDict) -> tuple[float, float]:
    """(here, on one H100): what all steps of a training take, by its FLOPs; within a factor of two or so."""
    origin = train.load_origin(config)
    tokenizer = tokenizer_of(origin.tokenizer, origin.config)
    mesh = evaluate.open_mesh(config, config.model.tgh.experts)
    spec = program.batch_spec(config, mesh)
    model = program.build_model(config, origin.config, aux_names(config.data), tokenizer, spec.task_shares)
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
    """A question about the config of `file` with `flags`, and the folder of its runs, which questions share.

    kinds: of drawn data, the kinds of items that are asked; empty: all.
    """

    name: str
    file: str
    workdir: Path
    flags: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    @property
    def question(self) -> Decision:
        return QUESTIONS[self.name]

    def config(self, arm: Arm, seed: int) -> ConfigDict:
        """UserError for an unknown flag, or where the config cannot be asked this question."""
        file = self.second_file() if arm.second else self.file
        config = command_line.parse(["ablate", f"--config={file}", *self.flags])[0]
        config.train.seed += seed
        config.update_from_flattened_dict({"eval.every": 0, "eval.calibration": 0, "eval.controls": ()})
        if arm.second:  # flags of these keys are meant for stage 1
            config.update({"init_from": str(self.folder(Arm(USUAL), seed)), "fresh": ()})
            config.model.tgh.groups = len(config.model.tasks)
            config.train.seed += STAGE2_SEED
        config.update_from_flattened_dict(dict(arm.changes))
        return config

    def second_file(self) -> str:
        """The config of the stage 2 that follows. UserError where none is known."""
        name, colon, argument = self.file.partition(":")
        path = Path(command_line.experiment(name))
        second = path.with_name("stage2.py")
        if path.name != "stage1.py" or not second.is_file():
            raise UserError(
                f"--question {self.name} asks about a stage1.py and the stage2.py in the same folder, and --config "
                f"{self.file} is not such a stage 1; use configs/stage1.py."
            )
        if any(flag.startswith("--config.trainable") for flag in self.flags):
            raise UserError(
                f"--question {self.name} compares what the two stages train, as their configs say; leave out "
                "--config.trainable."
            )
        return f"{second}{colon}{argument}"

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
        if self.question.own.second:
            self.second_file()
        return self.question.own, self.question.other(config)

    def trained(self) -> list[Arm]:
        """Every arm that is trained, once however often it is asked, and after what it starts from."""
        own, others = self.arms()
        first = [Arm(USUAL)] if own.second else []
        return [*{arm.name: arm for arm in (*first, *others, own)}.values()]

    def folder(self, arm: Arm, seed: int) -> Path:
        return self.workdir / f"{arm.name}-seed{seed}"

    def asked(self, arm: Arm, seed: int) -> Path:
        """The folder of the answers, whose name tells all that they depend on beside the run."""
        config = self.config(arm, seed)
        asked = config.eval.to_dict() | {"batch": 0, "steps": config.train.steps, "data": self.digest}
        asked |= {"kinds": self.kinds} if self.kinds else {}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        return self.folder(arm, seed) / "validation" / "-".join(filter(None, [digest, arm.shows]))

    @functools.cached_property
    def validation(self) -> Source:
        """The validation split. UserError where there is none."""
        config = self.config(Arm(USUAL), 0)
        try:
            source = make_source(config.data, "validation", config.eval["items"], "seen")
        except UserError as error:
            raise UserError(f"--question needs a validation split, which is asked: {error}") from error
        if self.kinds:
            source.kinds = self.kinds
        return source

    @functools.cached_property
    def digest(self) -> str:
        """Of the validation split; of drawn data, whose config says it all, empty."""
        return self.validation.digest() if isinstance(self.validation, ItemSource) else ""

    def finished(self, arm: Arm, seed: int) -> bool:
        return (self.folder(arm, seed) / "checkpoints" / str(self.config(arm, seed).train.steps)).is_dir()

    def run(self, arm: Arm, seed: int) -> None:
        """Trains what is missing and asks the validation split; a stopped command resumes."""
        for one in [Arm(USUAL), arm] if arm.second else [arm]:
            config, folder = self.config(one, seed), self.folder(one, seed)
            self.check_folder(one, config, folder)
            ablate.train_stage(config, folder)
        target = self.asked(arm, seed)
        if (target / "metrics.json").is_file():
            return
        loaded = load_run(str(folder), "--workdir")
        mesh = evaluate.open_mesh(config, loaded.model.cfg.tgh.experts)
        reader = load_sharded(loaded, config.data.text_length, min(config.eval.batch, config.eval["items"]), mesh)
        source = shown(self.validation, arm.shows, config.eval.seed) if arm.shows else self.validation
        examination.examine(reader, source, source, config, target, lambda text: None)
        print(f"{folder.name}: asked the validation split ({target.name})", flush=True)
        jax.clear_caches()

    def check_folder(self, arm: Arm, config: ConfigDict, folder: Path) -> None:
        """UserError where the folder holds a run of another config, of more steps, or of data that have changed."""
        run_folder.check_workdir(config, str(folder))
        known = (folder / "config.json").is_file()
        if arm.second and known and (had := run_folder.read_config(folder)["train"]["steps"]) != config.train.steps:
            raise UserError(
                f"{folder} began with a stage 1 of {had} steps, and --config.train.steps={config.train.steps}; name "
                "another --workdir."
            )
        if (newest := max(stored.steps(stored.folder_of(folder)), default=0)) > config.train.steps:
            raise UserError(
                f"{folder} was trained for {newest} steps, more than --config.train.steps={config.train.steps}; name "
                "another --workdir."
            )
        before = run_folder.read_manifest(folder).get("data", {}).get("sha256")
        if before and before != make_source(config.data, "train", config.data.volumes).digest():
            raise UserError(
                f"the training data have changed since {folder} was trained on them; name another --workdir."
            )

    def units(self) -> dict[str, int]:
        """{kind: the cases (or volumes) that its validation items are about}."""
        source, config, found = self.validation, self.config(Arm(USUAL), 0), {}
        for kind in examination.kinds_of(source, config.model.tasks):
            asked = examination.questions(source, kind, config.eval["items"], config.eval.seed, ())
            known = isinstance(source, ItemSource)
            found[kind] = len({source.case(volume) if known else volume for volume, _ in asked})
        if not found:
            raise UserError(f"the validation split has no item of the tasks {', '.join(config.model.tasks)}; add some.")
        return found


def plan(experiment: Experiment, seeds: int) -> str:
    """What so many seeds can see, what the smallest difference that counts would need, and what that costs."""
    question, arms, units = experiment.question, experiment.trained(), experiment.units()
    variance, cases = paired_seeds.planned_variance(units), max(units.values())
    sees = paired_seeds.smallest_seen(seeds, variance, cases)
    left = sum(not experiment.finished(arm, seed) for arm in arms for seed in range(seeds))
    # A stage 2 takes about as long as the stage that it follows.
    costs = [seconds_of_runs(experiment.config(Arm(USUAL) if arm.second else arm, 0)) for arm in arms]
    here, there = (sum(side) for side in zip(*costs, strict=True))
    asked = ", ".join(f"{kind} items about {count}" for kind, count in units.items())
    lines = [
        f"{question.asks} {_upper(question.sides[0])} against {question.sides[1]}.",
        f"{seeds} seeds and the cases or volumes of the validation split ({asked}) see a difference of {sees:.3f} or "
        f"more in about {paired_seeds.POWER:.0%} of such experiments."
        if sees < 1 and cases >= statistics.FEW_UNITS
        else f"So little shows no difference, however large: a verdict takes {paired_seeds.LEAST_SEEDS} seeds and "
        f"{statistics.FEW_UNITS} cases or volumes.",
        f"They take {len(arms) * seeds} trainings, {left} of them not finished: about {_hours(here * seeds)} of this "
        f"machine (by FLOPs, within a factor of two; asking comes on top), or {_hours(there * seeds)} of one H100.",
    ]
    need = paired_seeds.enough(variance, cases, ablate.EFFECT)
    if sees > ablate.EFFECT and need:
        lines.append(
            f"To see {ablate.EFFECT}, the smallest difference that counts, takes {_needs(need)}: "
            f"{_hours(here * need[0])} of this machine, or {_hours(there * need[0])} of one H100."
        )
    return "\n".join(lines)


def _needs(need: tuple[int, int]) -> str:
    seeds, times = need
    return f"{seeds} seeds" + (f" and {times} times the cases" if times > 1 else "")


def _upper(words: str) -> str:
    return words[:1].upper() + words[1:]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{max(1, round(seconds / 60))} minutes"


# ---- what came out --------------------------------------------------------------------------------------------------


def answers(experiment: Experiment, arm: Arm, seed: int) -> dict[str, Graded]:
    """{kind: the graded answers} of one training."""
    run = files.read_run(experiment.asked(arm, seed))
    return {kind: Graded.of(kind, ones) for kind, ones in run.items() if "/" not in kind}


def pairs(own: Mapping[str, Graded], others: Sequence[tuple[Arm, Mapping[str, Graded]]]) -> dict[str, tuple]:
    """{kind: answers of both sides} of one seed; of a specialist only the kinds of its task count."""
    second: dict[str, Graded] = {}
    for arm, run in others:
        second |= {kind: ones for kind, ones in run.items() if arm.task in ("", TASK_OF.get(kind))}
    return {kind: (own[kind], second[kind]) for kind in own if kind in second}


def verdict(question: Decision, result: Mapping[str, Any]) -> str:
    """One paragraph: the scores, the difference with its interval, and what to do, by the rule of docs/deciding.md.

    result: of `paired_seeds.difference`.
    """
    seeds, gap = len(result["seeds"]), result["difference"]
    began = (
        f"{question.asks} {_upper(question.sides[0])}: {result['first']:.3f}; {question.sides[1]}: "
        f"{result['second']:.3f} ({seeds} {'seed' if seeds == 1 else 'seeds'}, {result['items']} items about "
        f"{result['units']} cases or volumes of the validation split). "
    )
    if result["units"] < statistics.FEW_UNITS:
        return f"{began}The difference is {gap:+.3f}. No verdict: {statistics.FEW_UNITS} cases or volumes are needed."
    if seeds < paired_seeds.LEAST_SEEDS:
        more = paired_seeds.LEAST_SEEDS - seeds
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
    need = paired_seeds.enough(result["item_variance"], result["units"], ablate.EFFECT, result["seed_spread"])
    if need is None:
        return f"Undecided, and no plan of up to {paired_seeds.MOST_SEEDS} seeds would see {ablate.EFFECT} here."
    if need[0] <= len(result["seeds"]) and need[1] == 1:
        return f"Undecided: the difference is close to {ablate.EFFECT}, the smallest that counts."
    return f"Undecided: by these runs, {_needs(need)} would see {ablate.EFFECT}, the smallest that counts."


def decide(experiment: Experiment, seeds: int, only_plan: bool) -> int:
    """Prints the plan, runs what is missing, and prints and keeps the verdict (<workdir>/<question>.json)."""
    print(plan(experiment, seeds), flush=True)
    if only_plan:
        return 0
    own, others = experiment.arms()
    for seed in range(seeds):
        for arm in (own, *others):
            experiment.run(arm, seed)
    ranked = bool(experiment.config(own, 0).data.mixture.open)
    found = [
        pairs(answers(experiment, own, seed), [(arm, answers(experiment, arm, seed)) for arm in others])
        for seed in range(seeds)
    ]
    result = paired_seeds.difference(found, ranked)
    said = verdict(experiment.question, result)
    made = {
        "config": run_folder.flatten(experiment.config(own, 0)), **provenance.made_by(),
        "minutes": {arm.name: ablate.minutes_of(experiment.folder(arm, 0)) for arm in experiment.trained()},
    }  # fmt: skip
    outputs.write_json(experiment.workdir / f"{experiment.name}.json", result | {"verdict": said, "made": made})
    said = f"{by_kind(experiment.question, result)}\n\n{said}"
    writing.write(experiment.workdir / f"{experiment.name}.txt", said + "\n")
    print(f"\n{said}", flush=True)
    return 0
