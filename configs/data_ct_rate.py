"""CT-RATE as published -> shards of 32 slices of 336 x 336, the input of the full-scale recipe.

    python -m tghmoe_jax.prepare --config configs/data_ct_rate.py --config.data.root=CT-RATE --to runs/data/ct-rate

Train on the result with `--config.data.name=ct_rate --config.data.root=runs/data/ct-rate`.
"""

from configs import common


def get_config():
    c = common.get_config()
    c.data.update({"name": "ct_rate", "root": "", "slices": 32, "size": 336})
    return c
