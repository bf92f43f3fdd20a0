"""Stage 2: one copy of the stage-1 experts per task, picked by the prompt (model-spec 4.6).

    python -m tghmoe_jax.main --config configs/stage2.py

starts from the stage 1 of the same preset (`runs/stage1`, or --config.init_from=RUN), trains and evaluates. The
embedded reader is what `:bench` leaves (docs/results.md).
"""

from configs import common


def get_config(arg: str | None = None):
    a = common.parse_arg(arg, patch_depth=0, lora=0, pod="")
    c = common.get_config()
    c.trainable = common.STAGE2_TRAINABLE
    common.lora(c, a["lora"])
    c.init_from = "runs/stage1" + (f"-{a['preset']}" if a["preset"] else "")
    if full_scale := common.FULL_SCALE.get(a["preset"]):
        c = full_scale(c, a["patch_depth"] or 2, a["pod"])
    elif a["patch_depth"]:
        c.model.patch_depth = a["patch_depth"]
    if a["preset"] == "bench":
        c = common.bench(c)
    c.model.tgh.groups = len(c.model.tasks)
    return c
