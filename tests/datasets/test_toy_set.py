"""A new data set of files is one module and one line of the registry: here from its index to a training batch."""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.scans.ct_fixtures import axes_of, patient, write_nifti
from tghmoe_jax.bases.base import EMBEDDED
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.datasets import preparing, registry
from tghmoe_jax.datasets.index_files import Gathered, index_file, read_csv, split_of_case
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.samples import pipeline
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.reading import read_volume

# ------------------------------------------------------- what the module of a new data set holds: an opener, a reader


def open_toy(root: Path, manifest: str = "") -> Dataset:
    """`toy.csv` lists scans and whether each shows a nodule."""
    gathered = Gathered("toy", root)
    for line, row in read_csv(index_file(root, manifest or "toy.csv"), ("scan", "nodule"), gathered.rejected):
        scan, nodule = row["scan"], row["nodule"]
        fault = gathered.path_fault(scan) or (None if nodule in ("yes", "no") else "the nodule is neither yes nor no.")
        of = functools.partial(Item, scan, split_of_case(scan), scan)
        report = of("report", "report", "", f"Nodule: {nodule}.")
        asked = of("vqa", "abnormality", "Is there a nodule?", nodule, ("yes", "no"))
        gathered.add(f"toy.csv:{line}", *([fault] if fault else [report, asked]))
    return gathered.dataset(functools.partial(read_toy, root))


def read_toy(root: Path, key: str):
    return read_volume(inside(root, key))


# ------------------------------------------------------------------------------------------------------------- its use


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The `data` section of a toy set whose module is registered."""
    monkeypatch.setitem(registry.DATASETS, "toy", open_toy)
    root = tmp_path / "toy"
    root.mkdir()
    lines = ["scan,nodule"]
    for number in range(6):
        hu = patient() + np.int16(number)
        write_nifti(root / f"{number}.nii", hu, axes_of())
        lines.append(f"{number}.nii,{('yes', 'no')[number % 2]}")
    (root / "toy.csv").write_text("\n".join([*lines, "6.nii,perhaps"]) + "\n")
    return {"name": "toy", "root": str(root), "manifest": "", "slices": 8, "size": 24, "channels": "windows3"}


@pytest.mark.parametrize("prepared", [False, True])
def test_a_registered_data_set_gives_a_training_batch(toy, tmp_path, prepared):
    data = toy
    if prepared:
        card = preparing.prepare(toy, tmp_path / "set", say=lambda text: None)
        assert card["name"] == "toy" and card["rejected"] == 1
        data = toy | {"root": str(tmp_path / "set")}
    source = make_source(data, "train", 0)
    spec = pipeline.BatchSpec(4, 1, 1, 96, (("report", 1), ("closed", 1)), ("report", "vqa"))
    tokenizer = Tokenizer.from_folder(EMBEDDED, CHAT)
    batch = next(pipeline.train_iterator(source, tokenizer, spec, 0, 1))
    assert batch["slices"].shape == (1, 4, 8, 24, 24, 3) and batch["skipped"] == []
    assert batch["task"].tolist() == [[0, 1, 0, 1]] and batch["slice_spacing"].tolist() == [[4.5] * 4]
    texts = [tokenizer.decode(row[mask]) for row, mask in zip(batch["tokens"][0], batch["loss_mask"][0], strict=True)]
    assert texts[0].startswith("Nodule: ") and texts[1] in ("A. yes", "B. no")
