"""The recipe that this project's measurements favour at the size of the embedded default (docs/ablations.md).

    python -m tghmoe_jax.main --config configs/simple.py

One stage instead of two, and one FFN instead of experts; everything trains for as many steps as both stages take. The
3D tower, the carried-over 2D parameters and the questions are those of stage 1. `:bench` is the longer training.
"""

from configs import common


def get_config(arg: str | None = None):
    preset = common.parse_arg(arg, ("bench",))["preset"]
    c = common.get_config()
    c.trainable = common.STAGE1_TRAINABLE
    if preset == "bench":
        c = common.bench(c)
    c.model.tgh.layers = ()
    c.train.steps *= 2
    return c
