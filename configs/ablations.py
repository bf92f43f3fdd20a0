"""One row of the ablation tables: the full recipe with one thing changed (model-spec 4.8), and two outside baselines.

    python -m tghmoe_jax.ablate --rows guidance=image,stages=one --seeds 3      trains, scores and tabulates rows
    python -m tghmoe_jax.main --config configs/ablations.py:guidance=image      trains the last stage of one row

Colon arguments: the row (`full` by default), `stage` (1 or 2; by default the row's last) and `seed`. Every row takes
2 x STEPS steps of the same batch size, is asked the same questions, and a seed's data order is the same in all rows.
"""

from typing import NamedTuple

from configs import common

STEPS = 250  # of each of two stages
STAGE2_SEED = 1000  # added in the second half, which visits the volumes in an order of its own

_DENSE = {"model.tgh.experts": 1, "model.tgh.top_k": 1}
# Where stage 2 has no experts it trains the FFNs of the 3D layers instead.
_DENSE_TRAINABLE = (r"vision/block_[234]/mlp/.*", *common.STAGE2_TRAINABLE[1:])
_FRESH_VISION = {"fresh": (r"vision/.+",)}


class Row(NamedTuple):
    """What a row changes. `both`, `first` and `second` {config key: value} of both stages or of one.

    `seeds`: how many it takes by default; `stages`: `two`, `one` (task groups from the first step on), `shared` (stage
    1 all the way) or `stopped` (stage 1 alone, half the steps).
    """

    what: str
    seeds: int = 1
    both: dict = {}
    first: dict = {}
    second: dict = {}
    stages: str = "two"

    @property
    def last_stage(self) -> int:
        return 2 if self.stages == "two" else 1


ROWS = {
    "full": Row("two stages, groups picked by the prompt, higher layers in 3D, 4 experts a group", 5),
    # ---- the two key claims
    "stages=one": Row("one stage: task groups and routing from the first step on", 5, stages="one"),
    "guidance=image": Row("groups picked by the volume", 5, second={"model.tgh.task_input": "image"}),
    "guidance=none": Row("the mean of both groups", 5, second={"model.tgh.task_input": "none"}),
    # ---- the other claims
    "init=random": Row("vision tower from random numbers", 3, first=_FRESH_VISION),
    "attention=2d": Row("no attention between slices", 3, {"model.attn3d_layers": ()}),
    "attention=3d": Row("attention between slices in every layer", 3, {"model.attn3d_layers": (0, 1, 2, 3, 4)}),
    "experts=dense": Row(
        "one FFN (T, E, k) = (1, 1, 1)", 3, _DENSE,
        second={"model.tgh.groups": 1, "trainable": _DENSE_TRAINABLE},
    ),
    "experts=token": Row("token experts alone (1, 4, 2)", 3, second={"model.tgh.groups": 1}),
    "experts=task": Row("task experts alone (2, 1, 1)", 3, _DENSE),
    # ---- outside baselines
    "baseline=m3d": Row(
        "3D ViT from random numbers, learned depth positions, spatial pooling", 3,
        {**_DENSE, "model.attn3d_layers": (0, 1, 2, 3, 4), "model.depth_embed": "learned_zero_init",
         "model.depth_rope.enabled": False, "model.layout": "flat", "model.spatial_pool": 2,
         "fresh": (r"vision/.+", r"connector/.+")},
        stages="shared",
    ),
    "baseline=slices": Row(
        "the 2D model fed single slices, their tokens averaged over four", 3,
        {**_DENSE, "model.attn3d_layers": (), "model.patch_depth": 1, "model.depth_pool": 4}, stages="shared",
    ),
    # ---- one number or choice at a time
    "stages=shared": Row("stage 1 all the way", stages="shared"),
    "stages=stopped": Row("stage 1 alone, half the steps", stages="stopped"),
    "guidance=oracle": Row("groups given by the true task", second={"model.tgh.task_input": "oracle"}),
    "guidance=random": Row("groups drawn by a coin when asked", second={"model.tgh.task_input": "random"}),
    "depth=none": Row("no depth positions", both={"model.depth_rope.enabled": False, "model.depth_embed": "none"}),
    "depth=learned": Row(
        "learned depth positions",
        both={"model.depth_rope.enabled": False, "model.depth_embed": "learned_zero_init"},
    ),
    "topology=stacked": Row(
        "task FFNs in a layer of their own", both={"model.tgh.topology": "stacked", "model.tgh.task_layers": (3,)}
    ),
    "topology=parallel": Row("task FFNs beside token experts", both={"model.tgh.topology": "parallel"}),
    "token_input=image": Row("token router sees the token alone", both={"model.tgh.token_input": "image"}),
    "token_input=text": Row("token router sees the prompt alone", both={"model.tgh.token_input": "text"}),
    "experts=2": Row("2 experts a group", both={"model.tgh.experts": 2}),
    "experts=8": Row("8 experts a group", both={"model.tgh.experts": 8}),
    "top_k=1": Row("1 expert a token", both={"model.tgh.top_k": 1}),
    "top_k=4": Row("all 4 experts a token", both={"model.tgh.top_k": 4}),
    "moe_layers=one": Row("experts in the top layer alone", both={"model.tgh.layers": (4,)}),
    "moe_layers=3d": Row("experts in every 3D layer", both={"model.tgh.layers": (2, 3, 4)}),
    "depth_pool=2": Row("two slabs averaged into one", both={"model.depth_pool": 2}),
    "patch_depth=1": Row(
        "single slices through the tower, four averaged after it: as many tokens",
        both={"model.patch_depth": 1, "model.depth_pool": 4},
    ),
    "patch_depth=2": Row("slabs of 2 slices, twice the tokens", both={"model.patch_depth": 2}),
    "patch_depth=8": Row("slabs of 8 slices, half the tokens", both={"model.patch_depth": 8}),
}  # fmt: skip
AXES = tuple(dict.fromkeys(name.partition("=")[0] for name in ROWS if "=" in name))


def get_config(arg: str | None = None):
    a = common.parse_arg(arg, ("full",), stage=0, seed=0, **dict.fromkeys(AXES, ""))
    changed = [f"{axis}={a[axis]}" for axis in AXES if a[axis]] or ["full"]
    if len(changed) > 1 or changed[0] not in ROWS:
        raise ValueError(f"{' and '.join(changed)} is no row; use one of {', '.join(ROWS)}")
    name, row = changed[0], ROWS[changed[0]]
    stage = a["stage"] or row.last_stage
    if not 1 <= stage <= row.last_stage:
        raise ValueError(f"stage={stage} is none of row {name}, which has {row.last_stage}")

    c = common.get_config()
    c.trainable = common.STAGE1_TRAINABLE if stage == 1 else common.STAGE2_TRAINABLE
    c.train.update({"steps": STEPS, "seed": a["seed"] + STAGE2_SEED * (stage - 1)})
    # tghmoe_jax.ablate asks the last stage. The items are many, for they are most of the spread; the control is a row
    # of the table, and no part of a first stage, which other rows share.
    c.eval.update(
        {
            "every": 0,
            "items": 1000,
            "calibration": 0,
            "controls": ("wrong_group",) if name == "full" and stage == 2 else (),
        }
    )
    if stage == 2:
        c.model.tgh.groups = len(c.model.tasks)
        c.init_from = f"runs/ablations/{name}-stage1-seed{a['seed']}"
    if row.stages == "one":
        c.model.tgh.groups = len(c.model.tasks)
        c.trainable = (*common.STAGE1_TRAINABLE, r"task_router/.*")
    if row.stages in ("one", "shared"):
        c.train.steps = 2 * STEPS
    c.update_from_flattened_dict({**row.both, **(row.first if stage == 1 else row.second)})
    return c
