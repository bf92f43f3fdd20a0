"""What chooses a checkpoint and what scores it share no case, in any data set."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets import dataset_fixtures as fixtures
from tghmoe_jax.datasets import file_source, index_files, registry
from tghmoe_jax.datasets.file_source import FileSource
from tghmoe_jax.datasets.items import Item
from tghmoe_jax.drawn.cache import SPLITS, seeds_of
from tghmoe_jax.errors import UserError

DATA = {"slices": 8, "size": 32, "channels": "repeat"}
SETS = ("m3d", "ct_rate", "deeptumorvqa", "3d_rad", "llava", "manifest", "labelmap")


def items(data: dict, split: str) -> set[tuple[str, str]]:
    """(case, volume) of the items that a split asks; none where the set has no such split."""
    try:
        source = FileSource(DATA | data, split)
    except UserError as error:
        assert f"holds no item of the split {split}" in str(error)
        return set()
    return {(str(source.case(i)), source.key(i)) for i in range(len(source))}


@pytest.mark.parametrize("name", SETS)
def test_validation_shares_no_case_with_test(tmp_path, name):
    data = getattr(fixtures, f"write_{name}")(tmp_path)
    asked = {split: items(data, split) for split in ("train", "validation", "test")}
    assert asked["train"]
    assert not {key for _, key in asked["validation"]} & {key for _, key in asked["test"]}


def test_a_case_that_a_set_puts_into_both_is_only_tested(tmp_path, monkeypatch):
    """Published splits may go by volume, as M3D's do; a manifest of this kind is refused."""
    data = fixtures.write_manifest(tmp_path, cases=12)
    whole, opened = items(data, "validation"), file_source._open

    def moved(*args, **more):
        found, *rest = opened(*args, **more)
        return [replace(item, case="c2") if item.case == "c3" else item for item in found], *rest

    monkeypatch.setattr(file_source, "_open", moved)
    left = {key for _, key in items(data, "validation")}
    assert left == {key for _, key in whole} - {"scans/2.nii.gz"} and len(whole) == 3
    assert len(items(data, "test")) == 3


def test_no_two_splits_of_drawn_volumes_share_a_seed():
    seeds = [set(seeds_of(split, 20_000, seed)) for split in SPLITS for seed in range(3)]
    assert len(set.union(*seeds)) == sum(map(len, seeds))


def test_a_set_without_a_validation_split_holds_one_training_case_in_twenty_out():
    def gather(offset: int) -> dict[str, str]:
        gathered = index_files.Gathered("some", Path("."))
        for number in range(offset, offset + 3000):
            case = f"case_{number}"
            split = "test" if number % 3 == 0 else "train"
            gathered.add("", *[Item(f"{case}_{scan}", split, case, "vqa", "organ", "Which?", "this") for scan in "ab"])
        return {item.case: item.split for item in gathered.dataset(None, hold_out=True).items}

    first, second = gather(0), gather(1500)
    held_out = sum(split == "validation" for split in first.values())
    assert 70 <= held_out <= 130  # of 2,000
    assert all((split == "test") == (int(case[5:]) % 3 == 0) for case, split in first.items())
    assert all(second[case] == first[case] for case in first.keys() & second.keys())


@pytest.mark.parametrize("name", SETS)
def test_published_validation_splits_stay_as_they_are(tmp_path, monkeypatch, name):
    data = getattr(fixtures, f"write_{name}")(tmp_path)
    found = registry.open_dataset(data).items
    monkeypatch.setattr(index_files, "HELD_OUT", 1.0)
    held_out = registry.open_dataset(data).items
    to = {"train": "validation"} if name in ("ct_rate", "deeptumorvqa", "3d_rad") else {}
    assert held_out == tuple(replace(item, split=to.get(item.split, item.split)) for item in found)
    assert not to or any(item.split == "validation" for item in held_out)
