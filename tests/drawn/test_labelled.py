"""Drawn scans with masks: labels that fit the picture, sides that are the patient's, and a data set that is read."""

import json

import nibabel
import numpy as np
import pytest

from tghmoe_jax.datasets.labelmap import MAX_PARTS, open_labelmap
from tghmoe_jax.drawn import labelled, patients
from tghmoe_jax.drawn.canvas import NOTHING, Canvas, Frame
from tghmoe_jax.drawn.patient_scanner import field_of
from tghmoe_jax.drawn.patient_trunk import RIBS

GRID = (24, 48, 48)


@pytest.fixture(scope="module")
def drawn():
    return [labelled.draw(seed, GRID) for seed in range(40)]


def inside(one, name):
    return one.labels == 1 + labelled.STRUCTURES.index(name)


def test_labels_change_no_voxel():
    plain = patients.draw(3, GRID, "axial")
    assert plain.labels is None
    with_labels = labelled.draw(3, GRID)
    np.testing.assert_array_equal(with_labels.hu, plain.hu)
    assert with_labels.truth == plain.truth and with_labels.truth.plane == "axial"
    assert with_labels.labels.shape == GRID and with_labels.labels.dtype == np.uint8


def test_every_structure_is_found_in_some_patient():
    seen = np.unique(np.concatenate([np.unique(labelled.draw(seed, (16, 40, 40)).labels) for seed in range(120)]))
    missing = [name for n, name in enumerate(labelled.STRUCTURES, 1) if n not in seen]
    assert missing == [] and seen.max() <= len(labelled.STRUCTURES)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("liver", 0, 160), ("lung_lower_lobe_left", -950, -400), ("rib_left_9", 80, 700),
     ("lung_upper_lobe_right", -950, -400),
     ("kidney_left", 0, 250), ("urinary_bladder", -20, 400), ("hip_right", 100, 900), ("autochthon_right", -20, 90),
     ("spinal_cord", -40, 120)],
)  # fmt: skip
def test_what_a_mask_covers_has_the_hu_of_its_tissue(drawn, name, low, high):
    medians = [np.median(one.hu[inside(one, name)]) for one in drawn if inside(one, name).sum() > 30]
    assert len(medians) >= 4
    assert low < np.median(medians) < high


def test_what_was_not_scanned_has_no_label():
    """A round field, and rows that were left out, are padding: a structure there is not in the picture."""
    cut = 0
    for seed in range(60):
        scanner = patients.plan(seed, GRID, "axial").scanner
        if scanner.circle or scanner.high < 1:
            outside = ~field_of(scanner, GRID[1:])
            one = labelled.draw(seed, GRID)
            assert outside.any() and not one.labels[:, outside].any() and (one.hu[:, outside] == -1024).all()
            cut += 1
    assert cut >= 5


def test_what_is_drawn_over_a_structure_leaves_takes_or_ends_its_label():
    frame = Frame((4, 20, 20), np.zeros(3), np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], float), np.ones(3))
    canvas = Canvas(frame, 1.0, ("organ", "vessel"))
    canvas.ellipsoid((10, 10, 2), (9, 9, 9), 50.0, mark="organ")
    for at, mark, label in ((6, "", 1), (10, "vessel", 2), (14, NOTHING, 0)):
        canvas.ellipsoid((at, 10, 2), (2, 2, 9), 100.0, mark=mark)
        assert canvas.labels[2, 10, at] == label and canvas.hu[2, 10, at] == 100
    assert canvas.labels[2, 4, 10] == 1 and canvas.labels[2, 0, 0] == 0


def test_sides_are_the_patients(drawn):
    """Columns run toward the patient's left, and slices toward the head."""
    pairs, levels = 0, []
    for one in drawn:
        for name in labelled.PAIRED:
            left, right = (inside(one, f"{name}_{side}") for side in ("left", "right"))
            if min(left.sum(), right.sum()) > 30:
                pairs += 1
                assert np.argwhere(left)[:, 2].mean() > np.argwhere(right)[:, 2].mean(), name
        for side in ("left", "right"):  # each rib begins at the vertebra of its number
            for number in range(12, 12 - RIBS, -1):
                rib, bone = inside(one, f"rib_{side}_{number}"), inside(one, f"vertebrae_T{number}")
                if rib.sum() > 20 and bone.sum() > 20:
                    places = np.argwhere(rib)
                    back = places[places[:, 1] >= np.percentile(places[:, 1], 80)]
                    levels.append((back[:, 0].mean() - np.argwhere(bone)[:, 0].mean()) * one.truth.spacing_mm[0])
        column = [np.argwhere(found)[:, 0].mean() for name in labelled.VERTEBRAE if (found := inside(one, name)).any()]
        assert column == sorted(column)
    assert pairs > 60 and len(levels) > 20
    assert abs(np.median(levels)) < 18, "half a vertebra"


def test_the_command_writes_a_data_set_that_is_read_without_a_rejection(tmp_path, capsys):
    folder = tmp_path / "set"
    sizes = ["--volumes", "10", "--parts", "3", "--grid", *map(str, GRID)]
    assert labelled.main(["--to", str(folder), *sizes]) == 0
    assert f"{folder}: 10 scans with masks; next: python -m tghmoe_jax.prepare" in capsys.readouterr().out
    data = open_labelmap(folder, str(folder / labelled.INDEX))
    assert not data.rejected
    splits = {split: {item.case for item in data.items if item.split == split} for split in labelled.SPLITS}
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 8, "validation": 1, "test": 1}
    assert {item.type for item in data.items if item.split == "train" and item.choices} >= {"organ", "side", "location"}
    first = json.loads((folder / labelled.INDEX).read_text())[0]
    scan, mask = (nibabel.load(folder / first[key]) for key in ("volume", "mask"))
    drawn = labelled.draw(0, GRID)
    np.testing.assert_array_equal(np.asarray(scan.dataobj), drawn.hu.transpose(2, 1, 0))
    np.testing.assert_array_equal(np.asarray(mask.dataobj), drawn.labels.transpose(2, 1, 0))
    np.testing.assert_array_equal(scan.affine, mask.affine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--volumes", "9"], "--volumes 9 must be 10 to"), (["--grid", "8", "48", "48"], "each must be 16 to 512"),
     (["--parts", "-1"], "--parts -1 must be 0 to 1000")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, flags, said):
    assert labelled.main(["--to", str(tmp_path / "set"), *flags]) == 2
    assert said in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_folder_that_exists_stays_as_it_is(tmp_path, capsys):
    assert labelled.MAX_PARTS == MAX_PARTS
    (tmp_path / "kept").write_text("kept")
    assert labelled.main(["--to", str(tmp_path)]) == 2
    assert "exists and is never overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
