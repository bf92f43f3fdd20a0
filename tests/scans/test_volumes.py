"""From a volume to the model's slices: windows, resampling, masks, NumPy volumes, and what reading refuses."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.scans.ct_fixtures import REAL, needs_real, patient, refusal, write_dicom, write_nifti
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.slices import WINDOWS, prepare_slices, resample, to_channels
from tghmoe_jax.scans.volume import Volume, canonicalise


def _volume(array, spacing=(3.0, 1.5, 1.5), unit="HU"):
    return Volume(np.asarray(array, np.float32), unit, spacing, "LPS", None, ())


def rounded(volume):
    return np.rint(volume.array).astype(np.int16)


# -------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("name", WINDOWS)
def test_window_spans_all_grey_levels_and_clips_beyond(name):
    centre, width = WINDOWS[name]
    low, high = centre - width / 2, centre + width / 2
    values = np.array([[[low - 500, low, centre, high, high + 500]]], np.int16)
    channels = to_channels(values, f"repeat:{name}")
    assert channels.dtype == np.uint8 and channels.shape == (1, 1, 5, 3)
    assert channels[0, 0, :, 0].tolist() in ([0, 0, 127, 255, 255], [0, 0, 128, 255, 255])
    assert np.all(channels == channels[..., :1])


def test_three_windows_are_lung_mediastinum_bone_in_this_order():
    hu = np.arange(-1200, 1500, 7, dtype=np.int16).reshape(1, 2, -1)
    three = to_channels(hu, "windows3")
    for channel, name in enumerate(("lung", "mediastinum", "bone")):
        np.testing.assert_array_equal(three[..., channel], to_channels(hu, f"repeat:{name}")[..., 0])


@given(st.lists(st.integers(-3024, 4095), min_size=2, max_size=30))
@settings(deadline=None)
def test_channels_rise_with_hu(values):
    hu = np.sort(np.array(values, np.int16)).reshape(1, 1, -1)
    channels = to_channels(hu)
    assert np.all(np.diff(channels.astype(int), axis=2) >= 0)
    np.testing.assert_array_equal(channels, to_channels(np.ascontiguousarray(hu[..., ::-1]))[..., ::-1, :])


def test_channels_are_made_of_whole_values_only():
    np.testing.assert_array_equal(to_channels(np.full((1, 2, 2), 77, np.uint8)), np.full((1, 2, 2, 3), 77))
    with pytest.raises(ValueError, match="int16 HU or uint8, not of float32"):
        to_channels(np.zeros((1, 2, 2), np.float32))


@pytest.mark.parametrize("channels", ["windows", "repeat:skin", "repeat:", "bone", ""])
def test_unknown_channels_are_refused(channels):
    with pytest.raises(UserError, match=r"windows3, medgemma or repeat:<window>"):
        to_channels(np.zeros((1, 2, 2), np.int16), channels)


# ------------------------------------------------------------------------------------------------------ resampling


@pytest.mark.parametrize(("source", "target"), [(64, 20), (37, 16), (20, 33), (24, 24), (512, 64)])
def test_resampling_in_plane_is_pillows_antialiased_bilinear(source, target):
    array = np.random.default_rng(source).uniform(-1000, 1000, (2, source, source)).astype(np.float32)
    for mine, original in zip(resample(_volume(array), 4, target).array, array, strict=True):
        theirs = np.asarray(Image.fromarray(original).resize((target, target), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(mine, theirs, atol=2e-3)


def test_grid_of_the_same_size_is_left_alone():
    array = np.random.default_rng(0).uniform(-1000, 1000, (8, 24, 24)).astype(np.float32)
    np.testing.assert_array_equal(resample(_volume(array), 8, 24).array, array)


def test_depth_is_averaged_in_order_when_slices_are_too_many():
    array = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None] * 10, (40, 16, 16))
    grid = resample(_volume(array), 10, 16)
    np.testing.assert_allclose(grid.array[1:-1, 0, 0], (np.arange(10) * 40 + 15)[1:-1], atol=1e-3)
    assert np.all(np.diff(grid.array[:, 0, 0]) > 0)
    assert grid.spacing_mm == (12.0, 1.5, 1.5)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(4, 20), st.integers(16, 40), st.integers(16, 40)),
    target=st.tuples(st.integers(4, 12), st.integers(8, 48)),
    pixel=st.tuples(st.floats(0.4, 4.0), st.floats(0.4, 4.0)),
    seed=st.integers(0, 99),
)
def test_resampling_stays_within_its_values_and_keeps_a_constant(shape, target, pixel, seed):
    hu = np.random.default_rng(seed).integers(-1000, 2000, shape)
    grid = resample(_volume(hu, (2.0, *pixel)), *target)
    assert grid.array.shape == (min(shape[0], target[0]), target[1], target[1])
    assert grid.array.min() >= -1000.001 and grid.array.max() <= hu.max() + 1e-3
    side = max(shape[1] * pixel[0], shape[2] * pixel[1])
    np.testing.assert_allclose(grid.spacing_mm[1:], side / target[1], rtol=1e-6)
    air = resample(_volume(np.full(shape, -1000), (2.0, *pixel)), *target)
    np.testing.assert_allclose(air.array, -1000, atol=1e-3)


def test_short_side_is_padded_with_air_on_both_sides_alike():
    array = np.full((4, 20, 40), 50.0)
    grid = resample(_volume(array), 4, 40).array
    assert np.all(grid[:, :10] == -1000) and np.all(grid[:, 30:] == -1000) and np.all(grid[:, 10:30] == 50)


def test_square_is_square_in_millimetres_not_in_pixels():
    # A disc of 24 mm radius on pixels twice as tall as wide.
    y, x = np.meshgrid((np.arange(32) - 15.5) * 2, np.arange(64) - 31.5, indexing="ij")
    disc = np.where(x**2 + y**2 < 24**2, 100.0, -1000.0)
    grid = resample(_volume(np.stack([disc] * 4), (3.0, 2.0, 1.0)), 4, 32).array[0] > -450
    assert abs(int(grid.any(axis=0).sum()) - int(grid.any(axis=1).sum())) <= 1
    assert grid.any(axis=0).sum() == 24


@settings(max_examples=15, deadline=None)
@given(pixel=st.floats(0.3, 3.0), noise=st.floats(-1e-6, 1e-6))
def test_rounding_of_a_header_does_not_change_the_input(pixel, noise):
    hu = patient()
    one = prepare_slices(_volume(hu, (3.0, pixel, pixel)), 8, 32)
    other = prepare_slices(_volume(hu, (3.0, pixel, pixel * (1 + noise))), 8, 32)
    np.testing.assert_array_equal(one.slices, other.slices)


def test_same_volume_gives_the_same_bits_whatever_its_memory_layout():
    hu = patient((20, 50, 60)).astype(np.float32)
    one = resample(_volume(hu), 8, 32).array
    other = resample(_volume(np.asfortranarray(hu)), 8, 32).array
    assert one.tobytes() == other.tobytes() == resample(_volume(hu), 8, 32).array.tobytes()


def test_values_outside_the_field_of_view_count_as_air():
    hu = patient()
    marked = hu.copy()
    marked[:, :3] = -3024
    hu[:, :3] = -1024
    np.testing.assert_array_equal(resample(_volume(marked), 8, 20).array, resample(_volume(hu), 8, 20).array)


# ------------------------------------------------------------------------------------------------- the model's input


def test_prepared_slices_are_windowed_after_resampling():
    volume = _volume(patient((20, 40, 40)))
    prepared = prepare_slices(volume, 8, 32, "windows3")
    np.testing.assert_array_equal(prepared.slices, to_channels(rounded(resample(volume, 8, 32))))
    assert prepared.slices.dtype == np.uint8 and prepared.slices.shape == (8, 32, 32, 3)
    assert prepared.slice_mask.dtype == np.bool_ and prepared.slice_mask.all()
    assert prepared.spacing_mm == (7.5, 1.875, 1.875)
    assert any("lung, mediastinum, bone" in line for line in prepared.history)


def test_missing_depth_is_masked_at_the_end_and_not_invented():
    volume = _volume(patient((6, 32, 32)))
    prepared = prepare_slices(volume, 16, 32)
    assert prepared.slice_mask.tolist() == [True] * 6 + [False] * 10
    np.testing.assert_array_equal(prepared.slices[:6], to_channels(rounded(volume)))
    assert not prepared.slices[6:].any()
    assert prepared.spacing_mm[0] == 3.0
    assert any("10 slices masked" in line for line in prepared.history)


def test_head_and_left_of_the_patient_stay_where_they_are(tmp_path):
    volume = read_volume(write_dicom(tmp_path / "series"))
    slices = prepare_slices(volume, 12, 32, "windows3").slices.astype(int)
    lung, bone = slices[..., 0], slices[..., 2]
    marker = np.unravel_index(np.argmax(bone[2]), bone[2].shape)
    assert marker[1] > 20  # the patient's left on the image's right
    assert (lung[9:, 12:20, 4:28] < 120).mean() > 0.2 > (lung[:3, 12:20, 4:28] < 120).mean()  # lungs above, at the end
    assert bone[6, 16:, 14:18].mean() > bone[6, :16, 14:18].mean() + 20  # the spine at the bottom


@needs_real
@pytest.mark.parametrize(
    ("scan", "labels", "shape"),
    [
        ("abdomen_slab_3mm.nii.gz", "abdomen_slab_3mm_labels.nii.gz", (30, 101, 122)),
        ("dicom_abdomen", "dicom_abdomen_labels.nii.gz", (20, 512, 512)),
    ],
)
def test_real_scans_show_the_liver_on_the_left_and_the_spine_at_the_bottom(scan, labels, shape):
    volume = read_volume(REAL / scan)
    assert volume.array.shape == shape
    image = nib.load(REAL / labels)
    axes = image.affine[:3, :3].T * [-1, -1, 1]
    organs, spacing, _ = canonicalise(np.asarray(image.dataobj), axes, "labels")
    assert organs.shape == shape and spacing == volume.spacing_mm
    # TotalSegmentator's numbers: 1 spleen, 5 liver, 52 aorta; vertebrae from 26 to 50.
    liver, spleen = (np.argwhere(organs == number).mean(axis=0) for number in (5, 1))
    spine = np.argwhere((organs >= 26) & (organs <= 50)).mean(axis=0)
    assert liver[2] < shape[2] / 2 < spleen[2]
    assert spine[1] > liver[1]
    # The labels lie on the scan's own voxels: bone is dense, liver is soft tissue.
    assert 0 < np.median(volume.array[organs == 5]) < 200
    assert np.median(volume.array[(organs >= 26) & (organs <= 50)]) > 100


@needs_real
def test_real_scan_is_read_head_at_the_end():
    volume = read_volume(REAL / "abdomen_pelvis_3mm.nii.gz")
    assert volume.array.shape == (112, 101, 122) and volume.spacing_mm == (3.0, 3.0, 3.0)
    inner = volume.array[:, 30:80, 20:100]
    lung = ((inner > -950) & (inner < -650)).mean(axis=(1, 2))
    assert lung[-10:].mean() > 3 * lung[:60].mean()


# ---------------------------------------------------------------------------------------------------- NumPy volumes


def _unit(shape=(1, 8, 24, 24), seed=0):
    return np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 8, 24, 24), (8, 24, 24)])
@pytest.mark.parametrize("packed", [False, True])
def test_m3d_array_is_read_as_unit_interval_of_unknown_spacing(tmp_path, shape, packed):
    array = _unit(shape)
    path = tmp_path / ("volume.npz" if packed else "volume.npy")
    np.savez_compressed(path, array) if packed else np.save(path, array)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, array.reshape(8, 24, 24))
    assert (volume.unit, volume.spacing_mm, volume.orientation) == ("unit-interval", None, "as stored")
    assert volume.window and any("unknown" in line for line in volume.history)


@pytest.mark.parametrize("channels", ["windows3", "repeat:lung"])
def test_unit_interval_gets_no_hu_window(tmp_path, channels):
    np.save(tmp_path / "volume.npy", _unit())
    prepared = prepare_slices(read_volume(tmp_path / "volume.npy"), 8, 24, channels)
    np.testing.assert_array_equal(prepared.slices[..., 0], np.rint(_unit()[0] * 255).astype(np.uint8))
    assert np.all(prepared.slices == prepared.slices[..., :1])
    assert prepared.spacing_mm is None and any("no HU window" in line for line in prepared.history)


def test_pickled_arrays_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    for name, save in (("volume.npy", np.save), ("volume.npz", np.savez)):
        save(tmp_path / name, np.array([Trap(), None], dtype=object), allow_pickle=True)
        assert "pickle" in refusal(tmp_path / name) or "1D" in refusal(tmp_path / name)
    save = np.full((4, 16, 16), None, dtype=object)
    save[0, 0, 0] = Trap()
    np.save(tmp_path / "volume.npy", save, allow_pickle=True)
    assert "pickle" in refusal(tmp_path / "volume.npy")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (patient(), "where a NumPy volume lies in 0 to 1"),
        (_unit((2, 8, 24, 24)), "is 4D"),
        (_unit((24, 24)), "is 2D"),
        (_unit((0, 24, 24)), "empty"),
        (np.full((8, 24, 24), 0.5), "one value"),
        (np.where(_unit() > 0.9, np.nan, _unit()), "NaN"),
        (_unit().astype(np.complex64), "real numbers"),
        (_unit((3, 24, 24)), "3 axial slices"),
    ],
    ids=["hu", "4d", "2d", "empty", "blank", "nan", "complex", "thin"],
)
def test_array_that_is_no_m3d_volume_is_refused(tmp_path, array, words):
    np.save(tmp_path / "volume.npy", array)
    assert words in refusal(tmp_path / "volume.npy")


def test_file_that_is_no_array_is_refused(tmp_path):
    for name in ("volume.npy", "volume.npz"):
        for content in (b"", b"PK\x03\x04 nothing", b"\x93NUMPY\x01\x00 nothing", b"notes"):
            (tmp_path / name).write_bytes(content)
            assert "not a plain NumPy array" in refusal(tmp_path / name)
    np.savez(tmp_path / "two.npz", a=_unit(), b=_unit())
    assert "2 arrays" in refusal(tmp_path / "two.npz")


def test_absurd_array_is_refused_before_reading(tmp_path):
    path = tmp_path / "volume.npy"
    np.lib.format.write_array_header_1_0(
        path.open("wb"), {"descr": "<f4", "fortran_order": False, "shape": (1, 9000, 9000, 9000)}
    )
    assert "more than" in refusal(path)


# --------------------------------------------------------------------------------------------------- what is no scan


def test_numbered_pictures_are_read_by_number_and_odd_sizes_are_left_out(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (12, 40, 32), np.uint8)
    for number, plane in enumerate(grey, 1):  # as text 10 comes before 2
        Image.fromarray(plane).save(tmp_path / f"{number}.png")
    Image.fromarray(grey[0, :20]).save(tmp_path / "13.png")
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array, grey.astype(np.float32) / 255)
    assert (volume.unit, volume.spacing_mm, volume.orientation) == ("unit-interval", None, "as stored")
    (warning,) = volume.warnings
    assert "1 of 13 pictures left out" in warning


def test_path_that_is_no_scan_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "absent.nii.gz")
    for name in ("notes.txt", "scan.vtk", "scan"):
        (tmp_path / name).write_text("notes")
        assert "not a known kind of scan" in refusal(tmp_path / name)


def test_series_number_is_refused_where_it_means_nothing(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", patient())
    assert "--series applies to DICOM folders" in refusal(path, series=1)


def test_volume_is_frozen_and_holds_float32():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _volume(patient()).unit = "HU"
    with pytest.raises(ValueError, match="float32"):
        Volume(patient(), "HU", None, "LPS", None, ())
