"""The data sets of files that a config names, each opened as it lies on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tghmoe_jax.datasets.ct_rate import open_ct_rate
from tghmoe_jax.datasets.deeptumorvqa import open_deeptumorvqa
from tghmoe_jax.datasets.items import Dataset
from tghmoe_jax.datasets.labelmap import open_labelmap
from tghmoe_jax.datasets.llava_json import open_llava
from tghmoe_jax.datasets.m3d import open_m3d
from tghmoe_jax.datasets.manifest import open_manifest
from tghmoe_jax.datasets.rad3d import open_rad3d
from tghmoe_jax.errors import UserError

DATASETS: dict[str, Callable[[Path, str], Dataset]] = {
    "m3d": open_m3d,
    "ct_rate": open_ct_rate,
    "deeptumorvqa": open_deeptumorvqa,
    "3d_rad": open_rad3d,
    "llava": open_llava,
    "labelmap": open_labelmap,
    "manifest": open_manifest,
}


def open_dataset(data: Mapping[str, Any]) -> Dataset:
    """The data set `data["name"]` below the folder `data["root"]`; `data["manifest"]` names index files, if it has any.

    Volumes are not read; `Dataset.read(key)` reads one, and can be sent to other processes. UserError for an unknown
    name, a root that is not a folder, an index file of another format and a data set of which nothing is usable.
    """
    name, root = data["name"], str(data["root"])
    if name not in DATASETS:
        raise UserError(f"--config.data.name={name} is not a data set of files: use one of {', '.join(DATASETS)}.")
    if not root or not Path(root).is_dir():
        raise UserError(
            f"--config.data.root={root} is not a folder: name the local folder that holds the data set {name}."
        )
    return DATASETS[name](Path(root), str(data.get("manifest") or ""))
