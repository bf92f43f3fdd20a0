"""Stage 1: features shared by all tasks, one expert group (model-spec 4.6).

    python -m tghmoe_jax.main --config configs/stage1.py

trains on the embedded phantom from the embedded 2D base and evaluates. `:bench` is the same at the size where phantoms
are really read; `:phi3v` and `:medgemma` are the full-scale recipes, which need `--config.base=` and
`--config.data.root=`.
"""

from configs import common


def get_config(arg: str | None = None):
    a = common.parse_arg(arg, patch_depth=0, lora=0, pod="")
    c = common.get_config()
    c.trainable = common.STAGE1_TRAINABLE
    common.lora(c, a["lora"])
    if full_scale := common.FULL_SCALE.get(a["preset"]):
        return full_scale(c, a["patch_depth"] or 2, a["pod"])
    if a["patch_depth"]:
        c.model.patch_depth = a["patch_depth"]
    return common.bench(c) if a["preset"] == "bench" else c
