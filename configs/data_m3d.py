"""M3D-Cap and M3D-VQA as published -> shards of 32 slices of 336 x 336, the input of the full-scale recipe.

    python -m tghmoe_jax.prepare --config configs/data_m3d.py --config.data.root=M3D --to runs/data/m3d-32x336

`--config.data.manifest=M3D_Cap.json,M3D_VQA_test5k.csv` names other index files. Train on the result with
`--config.data.name=m3d --config.data.root=runs/data/m3d-32x336`.
"""

from configs import common


def get_config():
    c = common.get_config()
    c.data.update({"name": "m3d", "root": "", "slices": 32, "size": 336})
    return c
