"""Own scans and texts, listed in a manifest (docs/own-data.md) -> shards of 32 slices of 336 x 336.

    python -m tghmoe_jax.prepare --check scans/manifest.jsonl
    python -m tghmoe_jax.prepare --config configs/data_manifest.py --config.data.root=scans --to runs/data/own

`--config.data.slices=16 --config.data.size=64` is the input of the embedded reader. Train on the result with
`--config configs/finetune.py --config.data.root=runs/data/own`.
"""

from configs import common


def get_config():
    c = common.get_config()
    c.data.update({"name": "manifest", "root": "", "manifest": "manifest.jsonl", "slices": 32, "size": 336})
    return c
