"""DICOM reading: order and spacing by position, HU once, one complete series, and no patient data anywhere."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import BasicTextSRStorage, JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.scans.ct_fixtures import (
    ORIGIN,
    REAL,
    SPACING,
    assert_same_volume,
    axes_of,
    dicom_slices,
    needs_real,
    nothing_secret,
    patient,
    refusal,
    save,
    turned,
    write_dicom,
    write_dicomdir,
    write_enhanced,
    write_nifti,
)
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.slices import prepare_slices


def _edited(folder, edit, **options):
    """The patient's series with `edit(index, slice)` applied to every slice."""
    slices = dicom_slices(folder, patient(), **options)
    for index, ds in enumerate(slices):
        edit(index, ds)
    save(slices)
    return folder


def _set(**values):
    def edit(index, ds):
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return edit


def _drop(keyword):
    return lambda index, ds: delattr(ds, keyword)


# ------------------------------------------------------------------------------------------------- what must hold


def test_slices_are_ordered_by_position_not_by_name_or_number(tmp_path):
    # The fixture's names run backwards and its instance numbers at random.
    volume = read_volume(write_dicom(tmp_path / "series"))
    np.testing.assert_array_equal(volume.array, patient())
    assert (volume.unit, volume.orientation, volume.window) == ("HU", "LPS", None)


def test_spacing_comes_from_positions_not_from_slice_thickness(tmp_path):
    folder = write_dicom(tmp_path / "series")
    assert float(pydicom.dcmread(next(folder.iterdir())).SliceThickness) == 5.0
    assert read_volume(folder).spacing_mm == SPACING


@pytest.mark.parametrize("slope", [1.0, 0.5, 2.0])
def test_rescale_is_applied_exactly_once(tmp_path, slope):
    hu = patient() // 2 * 2
    volume = read_volume(write_dicom(tmp_path / "series", hu, slope=slope, intercept=-2000.0))
    np.testing.assert_array_equal(volume.array, hu)


def test_each_slice_has_its_own_rescale(tmp_path):
    folder, hu = tmp_path / "series", patient() // 4 * 4
    slices = [dicom_slices(folder, hu, slope=slope)[i] for i in range(len(hu)) for slope in ([1.0, 2.0, 4.0][i % 3],)]
    save(slices)
    np.testing.assert_array_equal(read_volume(folder).array, hu)


def test_signed_pixels_are_read_as_signed(tmp_path):
    def edit(index, ds):
        ds.PixelRepresentation, ds.RescaleIntercept = 1, 0
        ds.PixelData = patient()[index].tobytes()

    np.testing.assert_array_equal(read_volume(_edited(tmp_path / "series", edit)).array, patient())


@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()] * 3))
def test_any_acquired_plane_and_direction_gives_the_same_volume(tmp_path_factory, order, flips):
    folder = tmp_path_factory.mktemp("acquired")
    hu = patient((16, 20, 24))
    stored, axes, origin = turned(hu, axes_of(), ORIGIN, tuple(order), flips)
    volume = read_volume(write_dicom(folder, stored, axes=axes, origin=origin))
    np.testing.assert_array_equal(volume.array, hu)
    assert volume.spacing_mm == SPACING


def _as_nifti(path, folder):
    """The series written as NIfTI with pydicom and the standard's own formula (C.7.6.2.1.1), not by the reader."""
    slices = sorted((pydicom.dcmread(file) for file in folder.iterdir()), key=lambda ds: ds.ImagePositionPatient[2])
    hu = np.stack([ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept for ds in slices]).astype(np.int16)
    orientation = np.array(slices[0].ImageOrientationPatient, float)
    first, last = (np.array(ds.ImagePositionPatient, float) for ds in (slices[0], slices[-1]))
    rows, columns = slices[0].PixelSpacing
    axes = np.stack([orientation[:3] * columns, orientation[3:] * rows, (last - first) / (len(slices) - 1)])
    return write_nifti(path, hu.transpose(2, 1, 0), axes, first)


def _assert_same_input(folder, path):
    one, other = read_volume(folder), read_volume(path)
    assert_same_volume(one, other)
    for slices, size, channels in ((16, 64, "windows3"), (8, 48, "repeat:bone")):
        a, b = (prepare_slices(volume, slices, size, channels) for volume in (one, other))
        np.testing.assert_array_equal(a.slices, b.slices)
        np.testing.assert_array_equal(a.slice_mask, b.slice_mask)
        assert a.spacing_mm == b.spacing_mm


def test_series_and_its_nifti_give_identical_model_inputs(tmp_path):
    folder = write_dicom(tmp_path / "series", axes=axes_of((2.5, 0.7031, 0.7031)))
    _assert_same_input(folder, _as_nifti(tmp_path / "scan.nii.gz", folder))


@needs_real
def test_real_series_and_its_nifti_give_identical_model_inputs(tmp_path):
    _assert_same_input(REAL / "dicom_abdomen", _as_nifti(tmp_path / "scan.nii", REAL / "dicom_abdomen"))


@needs_real
def test_real_series_has_its_stated_geometry_and_hu():
    volume = read_volume(REAL / "dicom_abdomen")
    assert volume.array.shape == (20, 512, 512)
    assert volume.spacing_mm == (2.0, 0.9766, 0.9766)  # 3 mm thick slices at a 2 mm step
    assert volume.array.min() == -1024
    assert abs(np.median(volume.array[:, :40]) + 1000) < 30  # air above the patient


def test_monochrome1_is_a_hint_for_displays_and_keeps_its_hu(tmp_path):
    volume = read_volume(_edited(tmp_path / "series", _set(PhotometricInterpretation="MONOCHROME1")))
    np.testing.assert_array_equal(volume.array, patient())
    assert any("MONOCHROME1" in line for line in volume.warnings)


def test_export_of_an_inverted_display_is_refused(tmp_path):
    def edit(index, ds):
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.PixelData = (4095 - ds.pixel_array).tobytes()

    assert "not Hounsfield units" in refusal(_edited(tmp_path / "series", edit))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_series_equals_the_plain_one(tmp_path, syntax):
    folder = _edited(tmp_path / "series", lambda index, ds: ds.compress(syntax))
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.array, patient())
    assert syntax.name in volume.history[0]


def test_enhanced_multi_frame_file_equals_the_series(tmp_path):
    file = write_enhanced(tmp_path / "enhanced", patient())
    assert_same_volume(read_volume(file), read_volume(write_dicom(tmp_path / "series")))
    np.testing.assert_array_equal(read_volume(file).array, patient())


def test_medium_is_read_by_its_index_and_by_its_folder(tmp_path):
    index = write_dicomdir(tmp_path / "medium", patient())
    np.testing.assert_array_equal(read_volume(index).array, patient())
    assert_same_volume(read_volume(index), read_volume(tmp_path / "medium"))


def test_index_gives_only_what_it_lists(tmp_path):
    index = write_dicomdir(tmp_path / "medium", patient())
    write_dicom(tmp_path / "medium" / "another", series=2)
    np.testing.assert_array_equal(read_volume(index).array, patient())
    assert "2 series" in refusal(tmp_path / "medium")


def test_marker_on_the_patients_left_ends_at_high_columns(tmp_path):
    # Built in DICOM's own words: columns run toward the patient's left, rows toward the back, positions are LPS.
    hu = np.full((10, 40, 40), -1000, np.int16)
    hu[:, 8:32, 8:32] = 40
    hu[:, 20, 30] = 1500  # the patient's left
    hu[:, 10, 20] = 800  # the patient's front
    hu[9, 20, 20] = 300  # the head
    for name, order in (("upward", range(10)), ("downward", reversed(range(10)))):
        slices = dicom_slices(tmp_path / name, hu)
        for place, ds in zip(order, slices, strict=True):
            assert ds.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
            ds.ImagePositionPatient = [0, 0, 3.0 * place]
            ds.PixelData = (hu[place].astype(np.int32) + 1024).astype(np.uint16).tobytes()
        save(slices)
        array = read_volume(tmp_path / name).array
        assert np.argwhere(array[0] == 1500).tolist() == [[20, 30]]
        assert np.argwhere(array[0] == 800).tolist() == [[10, 20]]
        assert np.argwhere(array == 300).tolist() == [[9, 20, 20]]


def _by_simpleitk(folder):
    """HU (N, H, W), and affine in LPS, of a series as SimpleITK reads it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return _array_and_affine(reader.Execute())


def _array_and_affine(image):
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


def _assert_equals_simpleitk(folder, nifti):
    """Bits of HU; spacing to the tenth of a micrometre that a Volume keeps; SimpleITK's affine in both files."""
    ours = read_volume(folder)
    (series, affine), (copy, copied) = _by_simpleitk(folder), _array_and_affine(sitk.ReadImage(str(nifti)))
    np.testing.assert_array_equal(ours.array, series.astype(np.float32))
    np.testing.assert_array_equal(read_volume(nifti).array, copy.astype(np.float32))
    np.testing.assert_array_equal(series, copy)
    np.testing.assert_allclose(affine, copied, atol=1e-4)
    np.testing.assert_allclose(ours.spacing_mm, np.linalg.norm(affine[:3, :3], axis=0)[::-1], atol=5.1e-5)
    # Canonical already, so no permutation hides a difference.
    np.testing.assert_allclose(affine[:3, :3], np.diag(ours.spacing_mm[::-1]), atol=5.1e-5)


def test_series_equals_simpleitks_reading_bit_for_bit(tmp_path):
    folder = write_dicom(tmp_path / "series", axes=axes_of((2.5, 0.7031, 0.7031)))
    _assert_equals_simpleitk(folder, _as_nifti(tmp_path / "scan.nii", folder))


@needs_real
def test_real_series_equals_simpleitks_reading_bit_for_bit(tmp_path):
    _assert_equals_simpleitk(REAL / "dicom_abdomen", _as_nifti(tmp_path / "scan.nii.gz", REAL / "dicom_abdomen"))


def test_other_files_and_folders_do_not_disturb(tmp_path):
    folder = tmp_path / "study"
    write_dicom(folder / "images" / "a")
    (folder / "README.txt").write_text("notes")
    (folder / ".hidden").write_text("x")
    report = dicom_slices(folder / "report", patient()[:1], series=9)[0]
    report.Modality, report.SOPClassUID = "SR", BasicTextSRStorage
    report.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    for keyword in ("Rows", "Columns", "PixelData"):
        delattr(report, keyword)
    save([report])
    np.testing.assert_array_equal(read_volume(folder).array, patient())


def test_padding_outside_the_field_of_view_becomes_air(tmp_path):
    def edit(index, ds):
        pixels = ds.pixel_array.copy()
        pixels[:3] = 63536  # 62512 HU once rescaled
        ds.PixelData, ds.PixelPaddingValue = pixels.tobytes(), 63536

    array = read_volume(_edited(tmp_path / "series", edit)).array
    assert np.all(array[:, :3] == -1024)
    np.testing.assert_array_equal(array[:, 3:], patient()[:, 3:])


def test_padding_value_that_is_a_tissue_changes_nothing(tmp_path):
    volume = read_volume(_edited(tmp_path / "series", _set(PixelPaddingValue=1064)))  # 40 HU
    np.testing.assert_array_equal(volume.array, patient())


def test_history_lists_the_steps_and_no_patient_data(tmp_path):
    history = " | ".join(read_volume(write_dicom(tmp_path / "series")).history)
    for word in ("12 slices of 36 x 44", "slope 1 and intercept -1024", "once", "position", "SPL"):
        assert word in history
    nothing_secret(history)
    assert str(tmp_path) not in history


def test_damaged_patient_data_reaches_no_warning(tmp_path, recwarn, caplog):
    def edit(index, ds):
        with pydicom.config.disable_value_validation():
            ds.SeriesInstanceUID, ds.PatientBirthDate = "SECRET not a uid", "SECRET not a date"

    folder = _edited(tmp_path / "series", edit)
    recwarn.clear()
    caplog.clear()
    read_volume(folder)
    nothing_secret(caplog.text)
    assert not recwarn.list


# ---------------------------------------------------------------------------------------------- what is refused


def test_two_series_are_listed_and_chosen_by_number(tmp_path):
    folder = tmp_path / "study"
    write_dicom(folder, series=4)
    write_dicom(folder, patient((9, 32, 32)), series=7)
    message = refusal(folder)
    assert "2 series (1: CT, 36 x 44, 12 slices; 2: CT, 32 x 32, 9 slices)" in message and "--series N" in message
    np.testing.assert_array_equal(read_volume(folder, series=1).array, patient())
    np.testing.assert_array_equal(read_volume(folder, series=2).array, patient((9, 32, 32)))
    for number in (0, 3, -1):
        assert f"--series {number} does not exist" in refusal(folder, series=number)


def test_other_modality_is_refused_and_listed_beside_ct(tmp_path):
    folder = _edited(tmp_path / "study", _set(Modality="MR"))
    assert "MR images, not CT" in refusal(folder)
    write_dicom(folder, series=2)
    assert "1: MR" in refusal(folder)
    assert "not CT" in refusal(folder, series=1)
    np.testing.assert_array_equal(read_volume(folder, series=2).array, patient())


@pytest.mark.parametrize("skip", [(5,), (4, 5), (1,), (10,)])
def test_missing_slices_are_refused(tmp_path, skip):
    folder = tmp_path / "series"
    save(dicom_slices(folder, patient()), skip)
    message = refusal(folder)
    assert "misses slices" in message and f"{3.0 * (len(skip) + 1):.2f} mm apart where 3.00 mm" in message


def test_two_slices_at_one_position_are_refused(tmp_path):
    folder = write_dicom(tmp_path / "series")
    copy = dicom_slices(folder, patient())[5]
    copy.filename = str(folder / "copy")
    save([copy])
    assert "1 slice at the position of another" in refusal(folder)


def test_two_phases_in_one_series_are_refused(tmp_path):
    folder = write_dicom(tmp_path / "series")
    second = dicom_slices(folder, patient())
    for index, ds in enumerate(second):
        ds.filename = str(folder / f"phase2.{index}")
    save(second)
    assert "12 slices at the position of another" in refusal(folder)


def test_tilted_gantry_is_refused(tmp_path):
    axes = axes_of()
    axes[0, 1] = 0.5
    assert "tilted by 9.5 degrees" in refusal(write_dicom(tmp_path / "series", axes=axes))


def test_slices_shifted_in_plane_are_refused(tmp_path):
    def edit(index, ds):
        if index == 6:
            ds.ImagePositionPatient = [ORIGIN[0] + 8, ORIGIN[1], ORIGIN[2] + 6 * SPACING[0]]

    assert "shifted" in refusal(_edited(tmp_path / "series", edit))


def test_localizer_among_the_slices_is_refused(tmp_path):
    def edit(index, ds):
        if index == 3:
            ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    assert "mixes orientations" in refusal(_edited(tmp_path / "series", edit))


def test_mixed_sizes_and_spacings_are_refused(tmp_path):
    def edit(index, ds):
        if index == 3:
            ds.PixelSpacing = [1.4, 1.4]

    assert "mixes pixel spacings" in refusal(_edited(tmp_path / "spacing", edit))
    slices = dicom_slices(tmp_path / "size", patient())
    slices[3] = dicom_slices(tmp_path / "size", patient((12, 36, 40)))[3]
    save(slices)
    assert "different size" in refusal(tmp_path / "size")


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("ImagePositionPatient", "no slice position"),
        ("ImageOrientationPatient", "no slice orientation"),
        ("PixelSpacing", "no pixel spacing"),
        ("RescaleSlope", "no rescale slope, so HU are unknown"),
        ("RescaleIntercept", "no rescale intercept, so HU are unknown"),
        ("PixelData", "has no pixels"),
        ("Rows", "cannot be parsed"),
        ("Modality", "unnamed images, not CT"),
    ],
)
def test_missing_tag_is_refused(tmp_path, keyword, words):
    assert words in refusal(_edited(tmp_path / "series", _drop(keyword)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"RescaleType": "US"}, "another unit than HU"),
        ({"RescaleSlope": 0}, "a rescale slope that is not positive"),
        ({"RescaleSlope": -1, "RescaleIntercept": 1024}, "a rescale slope that is not positive"),
        ({"RescaleSlope": "nan"}, "no rescale slope"),
        ({"RescaleSlope": "inf"}, "no rescale slope"),
        ({"PixelSpacing": [0, 0]}, "a pixel spacing that is not positive"),
        ({"PixelSpacing": [1.5, -1.5]}, "a pixel spacing that is not positive"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "right angles"),
        ({"ImageOrientationPatient": [1, 0, 0]}, "no slice orientation"),
        ({"NumberOfFrames": 3}, "multi-frame"),
        ({"RescaleIntercept": 0}, "not Hounsfield units"),
        ({"RescaleIntercept": -2048}, "twice"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_unfit_tag_is_refused(tmp_path, values, words):
    assert words in refusal(_edited(tmp_path / "series", _set(**values)))


def test_unreadable_number_is_refused_without_quoting_it(tmp_path):
    folder = write_dicom(tmp_path / "series")
    for file in folder.iterdir():
        raw = file.read_bytes()
        file.write_bytes(
            raw.replace(b"-1024 ", b"SECRET") if b"-1024 " in raw else raw.replace(b"-1024.0 ", b"SECRET  ")
        )
    assert "rescale intercept" in refusal(folder)


def test_blank_series_is_refused(tmp_path):
    assert "one value" in refusal(write_dicom(tmp_path / "series", np.full((8, 24, 24), -1000, np.int16)))


@pytest.mark.parametrize(("count", "words"), [(1, "one slice"), (3, "3 axial slices")])
def test_too_few_slices_are_refused(tmp_path, count, words):
    assert words in refusal(write_dicom(tmp_path / "series", patient()[:count]))


def test_single_file_of_a_series_is_refused(tmp_path):
    folder = write_dicom(tmp_path / "series")
    with pytest.raises(ValueError, match=r"one slice.*folder of the whole series"):
        read_volume(next(folder.iterdir()))


def test_folder_without_images_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "empty folder" in refusal(folder)
    (folder / "notes.txt").write_text("DICM")
    (folder / "short.dcm").write_bytes(b"\0" * 128 + b"DICM")
    assert "no DICOM image" in refusal(folder)


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_slice_cut_short_is_refused(tmp_path, syntax):
    folder = tmp_path / "series"
    _edited(folder, lambda index, ds: syntax and ds.compress(syntax))
    file = sorted(folder.iterdir())[4]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - (len(whole) - 1000) // 2])
    message = refusal(folder)
    assert "of 12 in" in message and ("decoded" in message or "cut short" in message)
