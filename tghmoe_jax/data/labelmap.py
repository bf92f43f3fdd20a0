"""Questions and structured reports from any CT with a segmentation mask and a table of label names."""

from pathlib import Path

from tghmoe_jax.data.items import Dataset
from tghmoe_jax.errors import UserError


def open_labelmap(root: Path, manifest: str = "") -> Dataset:
    raise UserError("--config.data.name=labelmap cannot be read yet.")
