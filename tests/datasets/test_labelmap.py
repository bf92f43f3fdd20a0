"""Questions from segmentation masks: true to the voxels, on the patient's sides, not to be guessed from text."""

import collections
import itertools
import json

import numpy as np
import pytest
from scipy import ndimage

from tests.datasets import dataset_fixtures as fixtures
from tests.scans.ct_fixtures import ORIGIN, REAL, axes_of, needs_real, turned, write_dicom, write_nifti
from tghmoe_jax.datasets import preparing
from tghmoe_jax.datasets.file_source import FileSource
from tghmoe_jax.datasets.labelmap import LEAST_ML, spoken
from tghmoe_jax.datasets.masks import read_labels, read_mask
from tghmoe_jax.datasets.parts import PLANES, part_of, split_key
from tghmoe_jax.datasets.preparing import source_digest
from tghmoe_jax.datasets.registry import open_dataset
from tghmoe_jax.datasets.sources import aux_names
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.slices import nearest
from tghmoe_jax.scans.volume import Volume

AXES = axes_of(fixtures.LABEL_SPACING)
ALL_TYPES = {"plane", "organ", "edge", "location", "side", "size"}


def blind_accuracy(items):
    """Of each question type: how often the commonest answer to the same words (and choices) is right."""
    answers = collections.defaultdict(collections.Counter)
    for item in items:
        answers[item.type, item.question, item.choices][item.answer] += 1
    right, asked = collections.Counter(), collections.Counter()
    for (type_, _, _), count in answers.items():
        right[type_] += max(count.values())
        asked[type_] += count.total()
    return {type_: right[type_] / asked[type_] for type_ in asked}


def assert_not_guessable(dataset, types):
    items = [item for item in dataset.items if item.task == "vqa"]
    for split, closed in itertools.product({item.split for item in items}, (True, False)):
        found = blind_accuracy([i for i in items if i.split == split and bool(i.choices) == closed])
        assert found
        for type_, accuracy in found.items():
            assert accuracy <= (1 / 3 if type_ == "plane" else 1 / 2) + 1e-9, (split, type_, accuracy)
    assert {item.type for item in items} >= types


def test_text_alone_gives_no_answer_on_generated_masks(tmp_path):
    assert_not_guessable(open_dataset(fixtures.write_labelmap_index(tmp_path / "a", 3, 60)), ALL_TYPES)
    whole = open_dataset(fixtures.write_labelmap(tmp_path / "b", 24))
    assert_not_guessable(whole, {"organ", "location", "side", "size"})
    assert "plane" not in {item.type for item in whole.items} and not any("#" in item.volume for item in whole.items)
    assert all(len({i.split for i in whole.items if i.case == case}) == 1 for case in {i.case for i in whole.items})


@needs_real
def test_text_alone_gives_no_answer_on_two_real_series(tmp_path):
    entries = [
        {"volume": "dicom_abdomen", "mask": "dicom_abdomen_labels.nii.gz", "case": "one"},
        {"volume": "abdomen_slab_3mm.nii.gz", "mask": "abdomen_slab_3mm_labels.nii.gz", "case": "two"},
    ]
    index = [entry | {"labels": "label_names.json", "split": "test", "parts": 24} for entry in entries]
    path = fixtures.write_json(tmp_path / "index.json", index)
    dataset = open_dataset({"name": "labelmap", "root": str(REAL), "manifest": str(path)})
    assert dataset.rejected == () and len({item.volume for item in dataset.items}) == 50
    assert_not_guessable(dataset, ALL_TYPES)
    key = next(item.volume for item in dataset.items if "sagittal" in item.volume and "dicom" in item.volume)
    assert dataset.read(key).spacing_mm == (0.9766, 2.0, 0.9766)


def upright(volume, key):
    """The array (D, H, W) of a part of a scan toward Superior, Posterior, Left again, and its plane."""
    plane = split_key(key)[1].rpartition("plane=")[2] or "axial"
    if plane == "coronal":
        return volume.array[:, ::-1].transpose(1, 0, 2), plane
    if plane == "sagittal":
        return volume.array[:, ::-1].transpose(1, 2, 0), plane
    return volume.array, plane


def test_answers_are_true_to_the_voxels_that_are_read(tmp_path):
    """The scan's HU tell the structures, so every answer is checked against the volume that the model would see."""
    dataset = open_dataset(fixtures.write_labelmap_index(tmp_path, 2, 24))
    hu = {spoken(name): 100 * value for value, name in fixtures.STRUCTURES.items()}
    checked = collections.Counter()
    for key in sorted({item.volume for item in dataset.items}):
        array, plane = upright(dataset.read(key), key)
        where = {name: np.argwhere(array == value) for name, value in hu.items()}
        middle = (np.array(array.shape) - 1) / 2

        def mean(name, axis):
            return where[name][:, axis].mean()  # noqa: B023 - called within the turn

        for item in (i for i in dataset.items if i.volume == key and i.task == "vqa"):
            named = sorted((n for n in hu if f" {n} " in f" {item.question[:-1]} "), key=item.question.index)
            first = named[0] if named else ""
            if item.type == "plane":
                truth = plane
            elif item.type == "organ":
                truth = "yes" if len(where[first]) else "no"
            elif item.type == "edge":
                ends = (where[first] == 0) | (where[first] == np.array(array.shape) - 1)
                truth = "yes" if ends.any() else "no"
            elif item.type == "size":
                truth = "larger" if len(where[first]) > len(where[named[1]]) else "smaller"
            elif item.type == "location" and "half" in item.question:
                truth = "upper" if mean(first, 0) > middle[0] else "lower"
            elif item.type == "location":
                truth = "above" if mean(first, 0) > mean(named[1], 0) else "below"
            elif "more kidney" in item.question:
                truth = "left" if len(where["left kidney"]) > len(where["right kidney"]) else "right"
            else:
                truth = "left" if mean(first, 2) > mean("vertebrae L1", 2) else "right"
            assert item.answer == truth, item
            checked[item.type] += 1
    assert set(checked) == ALL_TYPES


def test_report_names_what_is_shown(tmp_path):
    dataset = open_dataset(fixtures.write_labelmap_index(tmp_path, 1, 6))
    reports = {item.volume: item.answer for item in dataset.items if item.task == "report"}
    assert len(reports) == 7 and {text.split(".")[0] for text in reports.values()} == {f"Plane: {p}" for p in PLANES}
    _, mask = fixtures.segmented(0)
    voxel = float(np.prod(fixtures.LABEL_SPACING)) / 1000
    for value, name in fixtures.STRUCTURES.items():
        count = int(np.count_nonzero(mask == value))
        assert (spoken(name) in reports["scan0.nii.gz"]) == (count * voxel >= LEAST_ML)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(False, True, True), (True, False, False)])
def test_stored_axes_change_no_answer(tmp_path, order, flips):
    data = fixtures.write_labelmap_index(tmp_path, 1, 6)
    before = open_dataset(data)
    hu, mask = fixtures.segmented(0)
    write_nifti(tmp_path / "scan0.nii.gz", *turned(hu, AXES, ORIGIN, order, flips))
    write_nifti(tmp_path / "mask0.nii.gz", *turned(mask, AXES, ORIGIN, order[::-1], flips[::-1]))
    after = open_dataset(data)
    assert after.items == before.items and after.rejected == ()


def test_a_dicom_series_takes_a_nifti_mask(tmp_path):
    data = fixtures.write_labelmap_index(tmp_path, 1, 6)
    before = open_dataset(data)
    write_dicom(tmp_path / "series", fixtures.segmented(0)[0], axes=AXES)
    index = tmp_path / "index.json"
    index.write_text(index.read_text().replace("scan0.nii.gz", "series"))
    after = open_dataset(data)
    # Which questions stay is drawn by the key; what is said of the same part is the same.
    said, again = ({(i.volume.replace("series", "scan0.nii.gz"), i.kind, i.question): i.answer for i in d.items}
                   for d in (before, after))  # fmt: skip
    both = said.keys() & again.keys()
    assert sum(kind == "report" for _, kind, _ in both) == 7 and len(both) > 50
    assert all(said[key] == again[key] for key in both)
    key = next(item.volume for item in after.items if "coronal" in item.volume)
    np.testing.assert_array_equal(after.read(key).array, before.read(key.replace("series", "scan0.nii.gz")).array)


@pytest.mark.parametrize("kind", ["dots", "upper"])
def test_names_that_disks_and_programs_leave_change_nothing(tmp_path, kind):
    data = fixtures.write_labelmap(tmp_path, 4)
    before = open_dataset(data)
    key = before.items[0].volume
    digest = source_digest(tmp_path, key.partition("/")[0], before.read(key))
    for file in list(tmp_path.glob("*/segmentations/*")):
        if kind == "upper":
            file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
        else:
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7" + bytes(400))
    if kind == "dots":
        (tmp_path / ".Trashes" / "segmentations").mkdir(parents=True)
        assert source_digest(tmp_path, key.partition("/")[0], before.read(key)) == digest
    after = open_dataset(data)
    assert after.items == before.items and after.rejected == ()


def test_the_published_split_is_used_and_a_case_without_one_is_left_out(tmp_path):
    data = fixtures.write_labelmap(tmp_path, 6)
    table = tmp_path / "meta.csv"
    splits = {"s0000": "train", "s0001": "val", "s0002": "test", "s0003": "train", "s0004": ""}
    rows = [f"{case};61;m;{split};CT" for case, split in splits.items()]
    table.write_text("\n".join(["\ufeffimage_id;age;gender;split;manufacturer", *rows]), encoding="utf-8")
    dataset = open_dataset(data)
    said = {"train": "train", "val": "validation", "test": "test"}
    assert {item.case: item.split for item in dataset.items} == {c: said[s] for c, s in splits.items() if s}
    assert [one.where for one in dataset.rejected] == ["s0004", "s0005"]
    assert all(one.reason == "meta.csv states no split (train, val or test) for it." for one in dataset.rejected)
    table.write_text(table.read_text(encoding="utf-8").replace(";", ","), encoding="utf-8")
    assert open_dataset(data).items == dataset.items
    table.write_text("name,diagnosis\ns0000,none\n")
    dataset = open_dataset(data)
    assert [one.where for one in dataset.rejected] == ["meta.csv"] and "it is not read" in dataset.rejected[0].reason
    table.unlink()
    assert open_dataset(data).items == dataset.items


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layout", ["folder", "map"])
def test_a_scan_without_any_label_is_not_annotated(tmp_path, layout):
    """An organ is absent where others are labelled; where none is, nobody looked."""
    data = (fixtures.write_labelmap if layout == "folder" else fixtures.write_labelmap_index)(tmp_path, 3)
    files = (tmp_path / "s0001" / "segmentations").iterdir() if layout == "folder" else [tmp_path / "mask1.nii.gz"]
    for file in list(files):
        write_nifti(file, np.zeros((24, 40, 44), np.uint8), AXES)
    dataset = open_dataset(data)
    (left,) = dataset.rejected
    assert left.where == ("s0001/ct.nii.gz" if layout == "folder" else "scan1.nii.gz")
    assert "the scan is not annotated" in left.reason
    assert dataset.items and not any(item.volume.startswith(left.where[:5]) for item in dataset.items)


def test_two_masks_of_one_structure_are_refused(tmp_path):
    data = fixtures.write_labelmap(tmp_path, 2)
    masks = tmp_path / "s0001" / "segmentations"
    (masks / "liver.nii").write_bytes((masks / "liver.nii.gz").read_bytes())
    (left,) = open_dataset(data).rejected
    assert "two masks of one structure" in left.reason


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"origin": (ORIGIN[0] + 2.5, *ORIGIN[1:])}, "lies on another grid"),
        ({"axes": axes_of((3.0, 2.5, 2.6))}, "lies on another grid"),
        ({"axes": AXES * np.array([[1], [1], [-1]])}, "lies on another grid"),
        ({"edit": lambda m: m[1:]}, "lies on another grid"),
        ({"edit": lambda m: m + np.uint8(m > 8)}, "holds the label 10, which"),
        ({"edit": lambda m: m * np.float32(0.5)}, "values between labels"),
        ({"edit": lambda m: m.astype(np.int16) - 1}, "outside 0 to 4095"),
        ({"edit": lambda m: m.astype(np.float32) * np.nan}, "outside 0 to 4095"),
        ({"edit": lambda m: np.where(m == 3, 4, np.where(m == 4, 3, m)).astype(np.uint8)}, "mirrored"),
    ],
)
def test_a_mask_that_does_not_fit_is_left_out_with_its_reason(tmp_path, change, reason):
    data = fixtures.write_labelmap_index(tmp_path, 3, 6)
    whole = np.zeros((24, 40, 44), np.uint8)
    whole[2:12, 4:14, 26:36], whole[2:12, 4:14, 6:16], whole[15:20, 10:20, 4:14] = 3, 4, 9
    edit = change.get("edit", lambda m: m)
    write_nifti(tmp_path / "mask1.nii.gz", edit(whole), change.get("axes", AXES), change.get("origin", ORIGIN))
    dataset = open_dataset(data)
    assert [entry.where for entry in dataset.rejected] == ["scan1.nii.gz"]
    text = dataset.rejected[0].reason
    assert reason in text and text.endswith(".") and "\n" not in text and ":" in text
    assert {item.case for item in dataset.items} == {"case0", "case2"}


@pytest.mark.parametrize(
    "table, reason",
    [
        ("[]", "write a JSON object"),
        ("{}", "write a JSON object"),
        ('{"a": "b"}', "not a whole number"),
        ('{"1": 2}', None),
        ('{"-1": "liver"}', "not a whole number"),
        ('{"1": "liver", "01": "spleen"}', "names the label 1 twice"),
        ('{"1": "liver", "2": "liver"}', "one name to two labels"),
        ('{"0": "background"}', "one name to two labels, or none"),
        ('{"1": ""}', "empty, too long"),
        ('{"99999": "liver"}', "not a whole number"),
    ],
)
def test_a_bad_table_of_names_is_refused(tmp_path, table, reason):
    path = tmp_path / "names.json"
    path.write_text(table)
    with pytest.raises(UserError, match=reason) as caught:
        read_labels(path)
    assert str(path) in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", '{"1": "liver", "2": "spleen", "0": "background"}'),
        ("b.json", '{"liver": 1, "spleen": 2, "background": 0}'),
        ("c.csv", "value,name\n1,liver\n2,spleen\n0,background\n"),
        ("d.csv", "name,color,label\nliver,red,1\nspleen,blue,2\n"),
        ("dataset.json", '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}}'),
        ("old.json", '{"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver", "2": "spleen"}}'),
        ("slicer.ctbl", "# Color table file\n0 none 0 0 0 0\n1 liver 221 130 101 255\n2 spleen 157 108 162 255\n"),
        ("slicer.txt", "1 liver 221 130 101 255\r\n2 spleen 157 108 162 255\r\n"),
        (
            "snap.txt",
            '#####\n# IDX -R- -G- -B- -A-- VIS MSH LABEL\n    0     0    0    0        0  0  0    "Clear Label"\n'
            '    1   255    0    0        1  1  1    "liver"\n    2     0  255    0      0.5  1  1    "spleen"\n',
        ),
    ],
)
def test_tables_of_names_are_read_either_way_round(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_labels(tmp_path / name) == {1: "liver", 2: "spleen"}


def test_sides_of_label_names_are_seen_however_they_are_written(tmp_path):
    (tmp_path / "snap.txt").write_text('1 255 0 0 1 1 1 "Left kidney"\n2 0 255 0 1 1 1 "kidney Right"\n')
    names = read_labels(tmp_path / "snap.txt")
    assert names == {1: "left_kidney", 2: "kidney_right"}
    assert [spoken(name) for name in names.values()] == ["left kidney", "right kidney"]


@pytest.mark.parametrize(
    "name, text, reason",
    [
        (
            "dataset.json",
            '{"labels": {"background": 0, "whole": [1, 2], "core": 2}}',
            "names regions of several labels",
        ),
        ("dataset.json", '{"labels": {"background": 0, "liver": 1, "ignore": 2}}', "a label to ignore"),
        ("names.ctbl", "# table\n1 liver 221\n", "line 2 is not one of a label table of 3D Slicer or ITK-SNAP"),
        ("names.txt", "liver\n", "line 1 is not one of a label table"),
        ("names.txt", "# only this\n", "or none at all"),
    ],
)
def test_a_label_table_that_is_not_read_is_named(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        read_labels(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "entry, reason",
    [
        ("text", "does not name a volume and a mask"),
        ({"mask": None}, "does not name a volume and a mask"),
        ({"split": "dev"}, "its split is not one of"),
        ({"case": "case0", "split": "train"}, "is already in another split"),
        ({"parts": -1}, "its parts are not a whole number"),
        ({"parts": 10**9}, "its parts are not a whole number"),
        ({"volume": "../scan.nii.gz"}, "climbs out"),
        ({"mask": "none.nii.gz"}, "none.nii.gz does not exist"),
        ({"labels": "none.json"}, "none.json does not exist"),
        ({"labels": None}, "has no table of label names"),
        ({}, "its volume is listed already"),
        ({"volume": "names.json"}, "states no position of its voxels"),
    ],
)
def test_a_bad_entry_of_an_index_is_left_out(tmp_path, entry, reason):
    data = fixtures.write_labelmap_index(tmp_path, 2, 6)
    (tmp_path / "scan9.nii.gz").write_bytes((tmp_path / "scan1.nii.gz").read_bytes())
    path = tmp_path / "index.json"
    entries = json.loads(path.read_text())
    bad = entry if isinstance(entry, str) else {**entries[1], "case": "other", **entry}
    if isinstance(bad, dict) and entry and "volume" not in entry:
        bad["volume"] = "scan9.nii.gz"
    path.write_text(json.dumps([*entries, bad]))
    dataset = open_dataset(data)
    assert len(dataset.rejected) == 1 and reason in dataset.rejected[0].reason
    assert dataset.rejected[0].reason.endswith(".")


@pytest.mark.parametrize("fragment", ["z=0:99", "z=5:5", "z=9:3", "plane=oblique", "z=0:3", "y=0:3;plane=coronal"])
def test_a_part_outside_the_scan_is_refused(fragment):
    volume = Volume(np.zeros((20, 30, 30), np.float32), "HU", (3.0, 1.0, 1.0), "LPS", None, ())
    with pytest.raises(UserError, match="scan.nii.gz#") as caught:
        part_of(volume, fragment, f"scan.nii.gz#{fragment}")
    assert str(caught.value).endswith(".")


def test_a_file_name_with_a_hash_is_no_fragment():
    assert split_key("a#1.nii.gz") == ("a#1.nii.gz", "")
    assert split_key("a#1.nii.gz#z=0:4;plane=coronal") == ("a#1.nii.gz", "z=0:4;plane=coronal")


def test_masks_are_read_without_interpolation(tmp_path):
    data = fixtures.write_labelmap(tmp_path, 1)
    folder = tmp_path / "s0000"
    mask = read_mask(folder / "ct.nii.gz", folder / "segmentations", None)
    _, stored = fixtures.segmented(0)
    for value, name in mask.names.items():
        expected = next(v for v, n in fixtures.STRUCTURES.items() if n == name)
        np.testing.assert_array_equal(mask.array == value, stored == expected)
    assert data["manifest"] == "" and mask.spacing_mm == fixtures.LABEL_SPACING


# ---- auxiliary labels -----------------------------------------------------------------------------------------------


def prepared_source(data, folder, split="train"):
    preparing.prepare(data | {"slices": 16, "size": 64, "channels": "windows3"}, folder, say=lambda _: None)
    return FileSource(data | {"root": str(folder), "slices": 16, "size": 64, "channels": "windows3"}, split)


def test_labels_are_those_of_the_voxels_that_are_read(tmp_path):
    """The scan's HU tell the structures: of parts in every plane, and of the grid that the model sees."""
    data = fixtures.write_labelmap_index(tmp_path / "raw", 3, 6)
    dataset = open_dataset(data)
    value_of = {spoken(name): value for value, name in fixtures.STRUCTURES.items()}
    values = np.array([0, *(value_of[name] for name in dataset.structures)])
    keys = sorted({item.volume for item in dataset.items})
    for key in keys:
        labels, unknown = dataset.labels(key)
        array = dataset.read(key).array
        assert labels.dtype == np.uint16 and labels.shape == array.shape and unknown == ()
        np.testing.assert_array_equal(np.where(labels, 100 * values[labels], 0), np.where(array > 0, array, 0))
    source = prepared_source(data, tmp_path / "set", "test")
    assert source.aux_names == tuple(f"structure:{name}" for name in dataset.structures) and len(keys) > 12
    cell, planes, inside = (4, 8, 8), set(), 0
    for index, (_, key) in enumerate(source.volumes):
        grid = source._grid(index)
        planes.add(grid.orientation)
        # Where neighbours have one HU, nothing was mixed, and the label must be that of the structure with these HU.
        within = ndimage.minimum_filter(grid.values, 3) == ndimage.maximum_filter(grid.values, 3)
        within &= np.isin(grid.values, 100 * values[1:])
        inside += within.sum()
        np.testing.assert_array_equal(100 * values[grid.labels[within]], grid.values[within], key)
        aux, cells = source.aux(index), source.aux_cells(index, cell)
        assert cells.shape == (4, 8, 8, len(values) - 1) and cells.dtype == bool
        for number in range(len(values) - 1):
            places = np.argwhere(grid.labels == number + 1)
            assert aux[number] == float(len(places) > 0)
            touched = {tuple(place // cell) for place in places}
            assert not touched or touched == set(map(tuple, np.argwhere(cells[..., number])))
            assert touched or cells[..., number].all()
    assert len(planes) == 3 and inside > 1000


def test_a_structure_that_a_mask_does_not_name_is_unknown(tmp_path):
    """Two scans with other tables of names: what one does not name may lie in it all the same."""
    data = fixtures.write_labelmap_index(tmp_path / "raw", 2, 2)
    index = json.loads((tmp_path / "raw" / "index.json").read_text())
    root = tmp_path / "raw"
    names = json.loads((root / index[1]["labels"]).read_text())
    (root / "fewer.json").write_text(json.dumps({**names, "200": "spare"}))
    index[1]["labels"] = "fewer.json"
    for entry in index:
        entry["split"] = "train"
    (root / "index.json").write_text(json.dumps(index))
    source = prepared_source(data, tmp_path / "set")
    place = source.aux_names.index("structure:spare")
    for number, (_, key) in enumerate(source.volumes):
        with_spare = key.startswith(index[1]["volume"])
        assert source.aux(number)[place] == (0 if with_spare else -1)
        assert source.aux_cells(number, (4, 8, 8))[..., place].all()


def test_a_structure_between_the_centres_of_the_grid_is_unknown_and_not_absent(tmp_path):
    """It is in the picture, which is an average, so that the label 0 would teach what is wrong."""
    data = fixtures.write_labelmap_index(tmp_path / "raw", 1, 0, "train")
    root = tmp_path / "raw"
    hu, mask = fixtures.segmented(0)
    mask[mask == 3] = 0
    mask[11, 21, 23] = 3  # one voxel; of 24 slices the model takes every third
    write_nifti(root / "mask0.nii.gz", mask, AXES)
    preparing.prepare(data | {"slices": 8, "size": 16}, tmp_path / "set", say=lambda _: None)
    source = FileSource(
        data | {"root": str(tmp_path / "set"), "slices": 8, "size": 16, "channels": "windows3"}, "train"
    )
    place = source.aux_names.index(f"structure:{spoken(fixtures.STRUCTURES[3])}")
    assert not (source._grid(0).labels == place + 1).any() and source.aux(0)[place] == -1
    known = {source.aux_names.index(f"structure:{spoken(fixtures.STRUCTURES[v])}") for v in np.unique(mask) if v}
    assert any(source.aux(0)[number] == 1 for number in known)


def test_an_index_that_does_not_fit_the_structures_is_refused(tmp_path):
    data = fixtures.write_labelmap_index(tmp_path / "raw", 1, 0, "train")
    source = prepared_source(data, folder := tmp_path / "set")
    file = folder / "volumes" / "00000.jsonl"
    whole, row = file.read_text(), json.loads(file.read_text())
    parameters = (folder / "prepare.json").read_text()
    (folder / "digests.json").unlink()
    card = json.loads((folder / "card.json").read_text())
    card.pop("digests")
    (folder / "card.json").write_text(json.dumps(card))
    for wrong in ({"unknown": [77]}, {"unknown": [-1]}, {"unknown": None}):
        file.write_text(json.dumps(row | wrong) + "\n")
        with pytest.raises(UserError, match="prepare the set again"):
            FileSource(source.data, "train")
    file.write_text(json.dumps({key: row[key] for key in row if key != "unknown"}) + "\n")
    with pytest.raises(UserError, match="does not say what its volumes are"):
        FileSource(source.data, "train")
    file.write_text(whole)
    found = json.loads(parameters)
    (folder / "prepare.json").write_text(json.dumps(found | {"structures": found["structures"][:1]}) + "\n")
    with pytest.raises(UserError, match="does not name; prepare the set again"):
        FileSource(source.data, "train").aux(0)


def test_another_mask_is_other_data_and_a_set_of_an_earlier_version_stays_without(tmp_path):
    data = fixtures.write_labelmap_index(tmp_path / "raw", 1, 0, "train")
    first = prepared_source(data, tmp_path / "a")
    _, mask = fixtures.segmented(0)
    moved = mask.copy()
    moved[12, 20, 22] = 0 if mask[12, 20, 22] else mask.max()  # too little to change a question
    write_nifti(tmp_path / "raw" / "mask0.nii.gz", moved, AXES)
    second = prepared_source(data, tmp_path / "b")
    assert second.rows[0]["sha256"] == first.rows[0]["sha256"] and second.digest() != first.digest()
    assert second.rows[0]["labels_sha256"] != first.rows[0]["labels_sha256"]
    write_nifti(tmp_path / "raw" / "mask0.nii.gz", mask, AXES)
    file = tmp_path / "a" / "prepare.json"
    old = json.loads(file.read_text())
    old.pop("structures")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "volumes").mkdir()
    (tmp_path / "old" / "prepare.json").write_text(json.dumps(old) + "\n")
    again = prepared_source(data, tmp_path / "old")
    assert again.aux_names == () and again._grid(0).labels is None
    np.testing.assert_array_equal(again._grid(0).values, first._grid(0).values)


def test_labels_are_taken_at_the_centre_of_each_voxel_of_the_grid():
    """Against coordinates: a label that counts voxels of one axis says where each voxel of the grid came from."""
    shape, spacing = (30, 40, 50), (3.0, 2.0, 1.5)
    for axis in range(3):
        counted = np.moveaxis(np.broadcast_to(np.arange(1, shape[axis] + 1, dtype=np.uint16),
                                              (*np.delete(shape, axis), shape[axis])), -1, axis)  # fmt: skip
        grid = nearest(np.ascontiguousarray(counted), spacing, 10, 32)
        assert grid.shape == (10, 32, 32)
        side = (shape[axis] * spacing[0], 80.0, 80.0)[axis]  # mm: 40 rows of 2 mm are the longer side of the square
        steps = (10, 32, 32)[axis]
        centres = (np.arange(steps) + 0.5) * side / steps - (side - shape[axis] * spacing[axis]) / 2
        wanted = np.floor(centres / spacing[axis]).astype(int) + 1
        wanted[(centres < 0) | (centres >= shape[axis] * spacing[axis])] = 0
        line = np.moveaxis(grid, axis, -1).reshape(-1, steps).max(0)
        np.testing.assert_array_equal(line, wanted)


def test_sets_without_masks_have_no_auxiliary_labels(tmp_path):
    source = prepared_source(fixtures.write_manifest(tmp_path / "raw"), tmp_path / "set")
    assert source.aux_names == () == aux_names(source.data) and source._grid(0).labels is None
    assert source.aux(0).shape == (0,) and source.aux_cells(0, (4, 8, 8)).shape == (4, 8, 8, 0)
