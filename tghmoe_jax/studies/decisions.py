"""What `ablate --question` can ask: the two sides of each question, and what each outcome means (docs/deciding.md)."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tghmoe_jax.datasets.sources import DRAWN, make_source
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import statistics
from tghmoe_jax.samples import pipeline
from tghmoe_jax.samples.questions import ItemSource, Source
from tghmoe_jax.samples.tasks import TASK_OF
from tghmoe_jax.training import run_folder

USUAL = "as_configured"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training, and how it is asked. `changes` {config key: value}; `task`: of a specialist, the one task whose
    score it gives; `shows` a key of SHOWS, what is seen in place of each volume; `second`: it is the stage 2 that
    follows the config as it is, with the same seed."""

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = ""
    shows: str = ""
    second: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """`other` gives the arms of the second side; `own` is the first, mostly the config as it is. `sides` name both;
    `first`, `second` and `equal` are the verdicts."""

    asks: str
    sides: tuple[str, str]
    other: Callable[[ConfigDict], list[Arm]]
    first: str
    second: str
    equal: str
    from_base: bool = False  # changes what only a training from a 2D base may change
    own: Arm = Arm(USUAL)


# ---- what is shown --------------------------------------------------------------------------------------------------

Slices = tuple[np.ndarray, np.ndarray]  # uint8 (D, S, S, 3) and the mask bool (D,), as of `samples.Source.slices`


def shown(source: Source, how: str, seed: int) -> Source:
    """The source with what `how`, a key of SHOWS, lets be seen in place of each volume; questions and answers stay."""
    other = copy.copy(source)
    other.slices = SHOWS[how](source, seed)
    return other


def _others(source: Source, seed: int) -> Callable[[int], Slices]:
    """Another case's volume, of those that can be read. UserError where one case holds more than half of them."""
    readable = [index for index in range(len(source)) if _can_be_read(source, index)]
    cases = [source.case(index) if isinstance(source, ItemSource) else index for index in readable]
    order, moved = statistics.derangement_across(cases, seed)
    if not len(moved) or not moved.all():
        raise UserError("one case has more than half of the validation volumes, so no other can stand for it.")
    instead = {index: readable[other] for index, other in zip(readable, order, strict=True)}
    return lambda index: source.slices(instead.get(index, index))  # one that cannot be read is refused as ever


def _can_be_read(source: Source, index: int) -> bool:
    try:
        source.slices(index)
    except UserError:
        return False
    return True


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
    arm = Arm("half_of_the_volumes", {"data.share": config.data.share / 2})
    if config.init_from:
        before = run_folder.read_config(run_folder.find(config.init_from, "--config.init_from"))["data"]
        same = config.data.name in DRAWN or before.get("root") == config.data.root
        if same and before["name"] == config.data.name:
            raise UserError(
                f"--question volumes: --config.init_from={config.init_from} was trained on these data, so no side has "
                "seen half of them alone; ask about the first stage."
            )
    if config.data.name in DRAWN:
        counts = [math.ceil(config.data.volumes * share) for share in (config.data.share, config.data.share / 2)]
    else:
        halved = config.data.to_dict() | dict(share=config.data.share / 2)
        counts = [len(make_source(data, "train", 0)) for data in (config.data, halved)]
    if counts[0] == counts[1]:
        raise UserError("--question volumes: half of the training cases are as many volumes as all; give more cases.")
    return [arm]


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
    if config.model.tgh.groups > 1:
        raise UserError("--question tasks asks about experts that all tasks share; use a config with one group.")
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


TWO_STAGES = Arm("two_stages", second=True)


def _one_stage(config: ConfigDict) -> list[Arm]:
    """Task groups and routing from the first step on, for the steps of both stages (configs/ablations.py)."""
    _check_groups("stages", config)
    changes = {
        "model.tgh.groups": len(config.model.tasks), "trainable": (*config.trainable, r"task_router/.*"),
        "train.steps": 2 * config.train.steps,
    }  # fmt: skip
    return [Arm("one_stage", changes)]


def _one_group(config: ConfigDict) -> list[Arm]:
    _check_groups("groups", config)
    return [Arm("one_group", {"model.tgh.groups": 1}, second=True)]


def _check_groups(question: str, config: ConfigDict) -> None:
    if len(config.model.tasks) < 2:
        raise UserError(f"--question {question} needs two tasks or more, and model.tasks has one.")
    t = config.model.tgh
    if t.groups > 1:
        raise UserError(f"--question {question} asks about a stage 1, whose experts all tasks share; give one group.")
    if t.experts == 1 or not t.layers:
        raise UserError(
            f"--question {question} asks about experts; give model.tgh.experts above 1, and model.tgh.layers."
        )


def _dense(config: ConfigDict) -> list[Arm]:
    if config.model.tgh.experts == 1:
        raise UserError("--question experts: the config has one expert; give --config.model.tgh.experts above 1.")
    return [Arm("dense", {"model.tgh.experts": 1, "model.tgh.top_k": 1, "model.tgh.groups": 1})]


QUESTIONS = {
    "steps": Decision(
        "Is the training long enough?", ("as many steps as configured", "twice as many"),
        lambda config: [Arm("twice_the_steps", {"train.steps": 2 * config.train.steps})],
        "Twice the steps do worse: the model learns its training cases by heart. Stop earlier (eval.patience), or give "
        "more cases.",
        "The training is too short: twice the steps do better. Double train.steps, and ask this again, before you "
        "compare anything else.",
        "The training has flattened: twice the steps do as well. Other differences can be judged.",
    ),
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
    "stages": Decision(
        "Two stages or one?", ("two stages", "one stage with as many steps"), _one_stage,
        "Two stages help: train configs/stage1.py and then configs/stage2.py.",
        "One stage does better: train a group of experts for each task from the first step on (model.tgh.groups, and "
        "task_router/.* among trainable), for as many steps as both stages together.",
        "One stage, with a group of experts for each task from the first step on, does as well as two stages.",
        from_base=True, own=TWO_STAGES,
    ),
    "groups": Decision(
        "Should the prompt pick the experts?", ("a group of experts for each task", "one group for all tasks"),
        _one_group,
        "Groups help: keep a group of experts for each task, which the prompt picks (configs/stage2.py).",
        "One group does better: set --config.model.tgh.groups=1 in stage 2.",
        "One group does as well as a group for each task, with fewer parameters.",
        from_base=True, own=TWO_STAGES,
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
        "The answers need the slices in the order of training. Whether depth itself is used, --question slices shows.",
        "The answers are better in random order, which cannot be: look for stacks that are stored in a wrong order.",
        "The answers do not depend on the order of the slices, so nothing along the depth is used.",
    ),
}  # fmt: skip
