"""NIfTI reading: any stored orientation gives one volume, HU once, and every fault is told in one sentence."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest

from tests.scans.ct_fixtures import (
    REAL,
    SPACING,
    affine_of,
    assert_same_volume,
    axes_of,
    needs_real,
    patient,
    refusal,
    turned,
    write_nifti,
)
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.slices import prepare_slices
from tghmoe_jax.scans.volume import MAX_VOXELS

ORIENTATIONS = [
    np.array(list(zip(order, signs, strict=True)), float)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def _input(path):
    prepared = prepare_slices(read_volume(path), slices=8, size=32)
    return prepared.slices, prepared.slice_mask, prepared.spacing_mm


def _assert_every_orientation_gives_one_input(image, folder):
    whole, inputs = None, None
    for index, orientation in enumerate(ORIENTATIONS):
        path = folder / f"{index}.nii"
        image.as_reoriented(orientation).to_filename(path)
        volume = read_volume(path)
        if whole is None:
            whole, inputs = volume, _input(path)
        assert_same_volume(volume, whole)
        for one, other in zip(_input(path), inputs, strict=True):
            np.testing.assert_array_equal(one, other)
        path.unlink()


def test_stored_orientation_does_not_change_the_model_input(tmp_path):
    assert len(ORIENTATIONS) == 48
    image = nib.load(write_nifti(tmp_path / "scan.nii", patient(), axes_of((3.0, 1.5, 1.25))))
    _assert_every_orientation_gives_one_input(image, tmp_path)


def test_stored_orientation_of_an_oblique_scan_does_not_change_the_model_input(tmp_path):
    for degrees in (12, 45):
        a = np.radians(degrees)
        turn = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        image = nib.Nifti1Image(patient((20, 36, 44)), affine_of(axes_of() @ turn.T))
        _assert_every_orientation_gives_one_input(image, tmp_path)


@needs_real
def test_stored_orientation_of_a_real_scan_does_not_change_the_model_input(tmp_path):
    _assert_every_orientation_gives_one_input(nib.load(REAL / "abdomen_slab_3mm.nii.gz"), tmp_path)


def test_canonical_axes_run_superior_posterior_left(tmp_path):
    hu = patient()
    stored, axes, origin = turned(hu, axes_of(), (0, 0, 0), (2, 0, 1), (True, False, True))
    volume = read_volume(write_nifti(tmp_path / "scan.nii.gz", stored, axes, origin))
    np.testing.assert_array_equal(volume.array, hu)
    assert volume.spacing_mm == SPACING
    assert (volume.unit, volume.orientation, volume.window) == ("HU", "LPS", None)


def test_marker_on_the_patients_left_ends_at_high_columns(tmp_path):
    # Built in NIfTI's own words: RAS, so the first index grows toward the patient's right.
    stored = np.full((40, 40, 10), -1000, np.int16)
    stored[8:32, 8:32] = 40
    stored[10, 20, :] = 1500  # far from +R: the patient's left
    stored[20, 30, :] = 800  # toward +A: the patient's front
    nib.Nifti1Image(stored, np.diag([2.0, 2.0, 3.0, 1.0])).to_filename(tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert np.argwhere(volume.array[0] == 1500).tolist() == [[19, 29]]
    assert np.argwhere(volume.array[0] == 800).tolist() == [[9, 19]]


def test_header_scaling_is_applied_exactly_once(tmp_path):
    hu = patient()
    stored = ((hu.astype(np.int32) + 1024) * 2).astype(np.uint16)
    volume = read_volume(write_nifti(tmp_path / "scan.nii", stored, slope=0.5, inter=-1024.0))
    np.testing.assert_array_equal(volume.array, hu)
    assert any("0.5" in line and "-1024" in line and "once" in line for line in volume.history)
    np.testing.assert_array_equal(nib.load(tmp_path / "scan.nii").get_fdata(), hu)


def test_scan_rescaled_twice_is_refused(tmp_path):
    assert "twice" in refusal(write_nifti(tmp_path / "scan.nii", patient() - np.int16(1024)))


def test_padding_outside_the_field_of_view_is_no_second_rescale(tmp_path):
    hu = patient()
    hu[:, :6] = -3024
    assert read_volume(write_nifti(tmp_path / "scan.nii", hu)).array.min() == -3024


def test_spacing_in_other_units_becomes_millimetres(tmp_path):
    for unit, scale in (("meter", 0.001), ("micron", 1000.0)):
        image = nib.Nifti1Image(patient(), affine_of(axes_of() * scale))
        image.header.set_xyzt_units(unit)
        image.to_filename(tmp_path / "scan.nii")
        assert read_volume(tmp_path / "scan.nii").spacing_mm == SPACING


@pytest.mark.parametrize(("unit", "notes"), [("mm", 0), ("unknown", 1)])
def test_a_file_without_a_unit_of_length_is_read_as_mm_and_says_so(tmp_path, unit, notes):
    image = nib.Nifti1Image(patient(), affine_of(axes_of()))
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.spacing_mm == SPACING
    assert [text[:46] for text in volume.warnings] == ["units: the file states no unit of length (xyzt"] * notes


def test_oblique_scan_keeps_its_grid_and_says_so(tmp_path):
    a = np.radians(12)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    volume = read_volume(write_nifti(tmp_path / "scan.nii", patient(), axes_of() @ turn.T))
    np.testing.assert_array_equal(volume.array, patient())
    assert any("oblique by 12.0 degrees" in line for line in volume.history)


def test_single_volume_with_a_time_axis_of_one_is_read(tmp_path):
    volume = read_volume(write_nifti(tmp_path / "scan.nii", patient()[..., None]))
    np.testing.assert_array_equal(volume.array, patient())


def test_history_names_no_path(tmp_path):
    volume = read_volume(write_nifti(tmp_path / "someone.nii", patient()))
    assert volume.history and not any("someone" in line or str(tmp_path) in line for line in volume.history)


def _windowed():
    return np.clip((patient() + 160.0) / 400 * 255, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda: np.stack([patient()] * 3, axis=-1), "is 4D"),
        (lambda: np.full((12, 40, 40), -1000, np.int16), "one value"),
        (lambda: np.where(patient() > 600, np.nan, patient()).astype(np.float32), "NaN"),
        (lambda: np.where(patient() > 600, np.inf, patient()).astype(np.float32), "infinite"),
        (_windowed, "not Hounsfield units"),
        (lambda: (patient() > 0).astype(np.uint8), "not Hounsfield units"),
        (lambda: patient().astype(np.uint16) & 0x0FFF, "not Hounsfield units"),
        (lambda: (patient() / 1000).astype(np.float32), "not Hounsfield units"),
        (lambda: patient()[:3], "3 axial slices"),
        (lambda: patient()[:, :4], "4 x 44 pixels"),
        (lambda: patient()[0], "is 2D"),
        (lambda: patient().astype(np.complex64), "complex"),
    ],
    ids=["4d", "blank", "nan", "inf", "windowed", "labels", "stored", "normalised", "thin", "small", "2d", "complex"],
)
def test_what_is_no_ct_scan_is_refused(tmp_path, values, words):
    assert words in refusal(write_nifti(tmp_path / "scan.nii.gz", values()))


def test_colour_image_is_refused(tmp_path):
    rgb = np.zeros((12, 40, 40), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "colours" in refusal(write_nifti(tmp_path / "scan.nii", rgb))


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("content", [b"these are notes, not a scan\n" * 40, b"", b"\x1f\x8b junk"])
def test_file_that_is_no_nifti_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert "empty file" in refusal(path) if not content else "not a NIfTI" in refusal(path)


def test_text_packed_as_gz_is_refused(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(b"notes " * 200))
    assert "not a NIfTI" in refusal(path)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_file_cut_short_is_refused(tmp_path, name):
    path = write_nifti(tmp_path / name, patient())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert "cut short" in refusal(path)


def _patched(path, **fields):
    """Write the patient's file with header fields replaced, however absurd."""
    write_nifti(path, patient())
    raw = path.read_bytes()
    header = np.frombuffer(raw[:348], nib.nifti1.header_dtype).copy()
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(header.tobytes() + raw[348:])
    return path


def test_scan_without_orientation_is_refused_and_not_guessed(tmp_path):
    message = refusal(_patched(tmp_path / "scan.nii", sform_code=0, qform_code=0))
    assert "no orientation" in message and "left and right" in message


def test_two_orientations_that_disagree_are_refused(tmp_path):
    image = nib.Nifti1Image(patient(), affine_of(axes_of()))
    image.set_sform(np.diag([-1, 1, 1, 1]) @ affine_of(axes_of()), code=1)
    image.set_qform(affine_of(axes_of()), code=1)
    image.to_filename(tmp_path / "scan.nii")
    assert "two orientations" in refusal(tmp_path / "scan.nii")


def test_orientation_by_quaternion_alone_is_read(tmp_path):
    image = nib.Nifti1Image(patient(), affine_of(axes_of()))
    image.set_sform(None, code=0)
    image.set_qform(affine_of(axes_of()), code=1)
    image.to_filename(tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    np.testing.assert_array_equal(volume.array, patient())
    assert volume.spacing_mm == SPACING


def test_missing_or_absurd_geometry_is_refused(tmp_path):
    path = tmp_path / "scan.nii"
    assert "no voxel spacing" in refusal(_patched(path, qform_code=0, srow_x=0, srow_y=0, srow_z=0))
    assert "NaN" in refusal(_patched(path, qform_code=0, srow_x=np.nan))
    write_nifti(path, patient(), axes_of() * 100)
    assert "300 x 150 x 150 mm" in refusal(path)


def test_sheared_grid_is_refused(tmp_path):
    axes = axes_of()
    axes[0, 1] = 0.8  # each slice lies further back: a tilted gantry
    assert "tilted gantry" in refusal(write_nifti(tmp_path / "scan.nii", patient(), axes))


def test_absurd_size_is_refused_before_reading(tmp_path):
    path = _patched(tmp_path / "scan.nii", dim=[3, 32000, 32000, 32000, 1, 1, 1, 1])
    assert str(MAX_VOXELS) in refusal(path)


def test_scan_without_voxels_is_refused(tmp_path):
    assert "empty" in refusal(_patched(tmp_path / "scan.nii", dim=[3, 0, 36, 44, 1, 1, 1, 1]))


@needs_real
def test_label_map_is_no_scan():
    assert "label map" in refusal(REAL / "abdomen_slab_3mm_labels.nii.gz")


@pytest.mark.parametrize("padding", [-2048, -3024, -8192])
def test_padding_of_public_data_sets_counts_as_air_and_hides_no_second_rescale(tmp_path, padding):
    # CT-RATE's second version holds -8192 HU outside the circle of reconstruction.
    hu = patient()
    hu[:, :4], hu[:, :, :4] = padding, padding
    path = tmp_path / "scan.nii"
    volume = read_volume(write_nifti(path, hu))
    assert volume.warnings == () and volume.array.min() == padding
    as_air = np.where(hu == padding, np.int16(-1024), hu)
    np.testing.assert_array_equal(_input(path)[0], _input(write_nifti(tmp_path / "air.nii", as_air))[0])
    assert "twice" in refusal(write_nifti(path, hu - np.int16(1024)))


@pytest.mark.parametrize(
    ("degrees", "voxel", "shift", "words"),
    [(3, 1, 0, "by 3.0 degrees"), (0, 1.04, 0, "in voxel size by 4 %"), (0, 1, 20, "in position by 20.0 mm")],
)
def test_small_differences_of_the_two_orientations_are_reported(tmp_path, degrees, voxel, shift, words):
    affine = affine_of(axes_of())
    a = np.radians(degrees)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    other = affine.copy()
    other[:3, :3] = turn @ other[:3, :3] * voxel
    other[2, 3] += shift
    image = nib.Nifti1Image(patient(), affine)
    image.set_sform(affine, code=1)
    image.set_qform(other, code=1)
    image.header.set_xyzt_units("mm")
    image.to_filename(tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert volume.warnings == (f"geometry: sform and qform differ {words}; the sform was used",)
    assert volume.spacing_mm == SPACING
    np.testing.assert_array_equal(volume.array, patient())


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i2", "i4", "f4", "f8"])
def test_either_version_byte_order_and_voxel_type_give_one_volume(tmp_path, kind, order, dtype):
    affine = affine_of(axes_of())
    header = kind.header_class(endianness=order)
    image = kind(patient().astype(dtype), affine, header)
    image.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    image.to_filename(tmp_path / "scan.nii")
    assert (tmp_path / "scan.nii").read_bytes()[0] == (0 if order == ">" else 0x5C if kind is nib.Nifti1Image else 0x1C)
    volume = read_volume(tmp_path / "scan.nii")
    np.testing.assert_array_equal(volume.array, patient())
    assert volume.spacing_mm == SPACING


def test_packing_is_reported_by_content_not_by_name(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", patient())
    path.rename(tmp_path / "plain.nii.gz")
    write_nifti(tmp_path / "scan.nii.gz", patient()).rename(tmp_path / "packed.nii")
    for name in ("plain.nii.gz", "packed.nii"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, patient())


def test_scan_without_soft_tissue_is_read_with_a_warning(tmp_path):
    hu = np.where(patient() == -1000, -1000, 1500).astype(np.int16)  # a phantom of metal, or a scale that is wrong
    (warning,) = read_volume(write_nifti(tmp_path / "scan.nii", hu)).warnings
    assert warning.startswith("rescale: ")


def test_sign_of_the_third_axis_that_is_left_out_counts_as_plus(tmp_path):
    path = tmp_path / "scan.nii"
    affine = np.diag([-1.5, -1.5, 3.0, 1.0])  # a right-handed grid
    image = nib.Nifti1Image(patient().transpose(2, 1, 0), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=0)
    image.to_filename(path)
    raw = np.frombuffer(path.read_bytes()[:348], nib.nifti1.header_dtype).copy()
    assert raw["pixdim"][0, 0] == 1
    raw["pixdim"][0, 0] = 0
    path.write_bytes(raw.tobytes() + path.read_bytes()[348:])
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, patient())
    assert volume.spacing_mm == SPACING


def test_sform_of_zeros_beside_a_good_qform_is_a_warning(tmp_path):
    path = tmp_path / "scan.nii"
    image = nib.Nifti1Image(patient(), affine_of(axes_of()))
    image.set_qform(affine_of(axes_of()), code=1)
    image.set_sform(affine_of(axes_of()), code=2)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    raw = np.frombuffer(path.read_bytes()[:348], nib.nifti1.header_dtype).copy()
    raw["srow_x"], raw["srow_y"], raw["srow_z"] = 0, 0, 0
    path.write_bytes(raw.tobytes() + path.read_bytes()[348:])
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, patient())
    assert volume.spacing_mm == SPACING
    assert volume.warnings == ("geometry: the sform states no voxel spacing; the qform was used",)


def test_file_packed_twice_or_left_as_a_pointer_is_named_as_that(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", patient())
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "packed twice" in refusal(path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name in ("scan.nii.gz", "scan.npy", "scan"):
        (tmp_path / name).write_bytes(pointer)
        assert "pointer of Git LFS" in refusal(tmp_path / name)
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "IM1").write_bytes(pointer)
    assert "1 are Git LFS pointers" in refusal(tmp_path / "series")
