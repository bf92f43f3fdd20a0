"""DICOM series as people have them: every slice is read, or what is missing is counted and told."""

import os

import numpy as np
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import dcmwrite

from tests.scans.ct_fixtures import (
    REAL,
    SECRET,
    SPACING,
    dicom_slices,
    needs_real,
    nothing_secret,
    patient,
    refusal,
    save,
    write_dicom,
    write_dicomdir,
    write_enhanced,
)
from tghmoe_jax.scans.reading import read_volume

N = 16


def body():
    return patient((N, 36, 44))


def edited(folder, edit, **options):
    slices = dicom_slices(folder, body(), **options)
    for index, ds in enumerate(slices):
        edit(index, ds)
    save(slices)
    return folder


def bare(ds, implicit=True):
    """Written without preamble, `DICM` and file meta group, as older programs do."""
    plain = ds.copy()
    plain.file_meta, plain.preamble = FileMetaDataset(), None
    dcmwrite(ds.filename, plain, implicit_vr=implicit, little_endian=True)


# ------------------------------------------------------------------------------------- a series shorter than it looks


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("first", [0, 11])
def test_slices_without_a_preamble_are_read(tmp_path, first, implicit):
    slices = dicom_slices(tmp_path / "series", body())
    save(slices[:first])
    for ds in slices[first:]:
        bare(ds, implicit)
    volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.array, body())
    assert volume.warnings == ()


def test_slices_with_a_preamble_but_no_meta_group_are_read(tmp_path):
    slices = dicom_slices(tmp_path / "series", body())
    for ds in slices:
        bare(ds)
        file = tmp_path / "series" / os.path.basename(ds.filename)
        file.write_bytes(bytes(128) + b"DICM" + file.read_bytes())
    np.testing.assert_array_equal(read_volume(tmp_path / "series").array, body())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: file.write_bytes(b""), "5 are empty"),
        (lambda file: file.write_bytes(bytes(file.stat().st_size)), "5 are zeros"),
        (lambda file: file.write_bytes(b"<html>not found</html>" * 20), "5 are not DICOM"),
        (lambda file: (file.unlink(), file.symlink_to("nowhere")), "5 lead nowhere"),
    ],
)
def test_files_that_are_passed_over_at_one_end_are_counted(tmp_path, change, reason):
    slices = dicom_slices(tmp_path / "series", body())
    save(slices)
    for ds in slices[11:]:
        change(tmp_path / "series" / os.path.basename(ds.filename))
    volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.array, body()[:11])
    assert volume.warnings == (f"files: 5 of 16 passed over ({reason}); check that no slice is missing",)


def test_an_index_that_lists_empty_files_says_so(tmp_path):
    index = write_dicomdir(tmp_path / "medium", body())
    (tmp_path / "medium" / "IMAGES" / "IM0015").write_bytes(b"")
    (warning,) = read_volume(index).warnings
    assert "1 of 16 passed over (1 are empty)" in warning


@pytest.mark.parametrize("inside", [True, False])
def test_a_linked_folder_is_refused(tmp_path, inside):
    folder = tmp_path / "study"
    write_dicom(folder / "DISK1", body()[:10])
    store = folder / ".store" if inside else tmp_path / "store"
    write_dicom(store, body())
    (folder / "DISK2").symlink_to(store)
    assert "a linked folder" in refusal(folder)


def test_a_link_to_a_folder_that_is_read_anyway_changes_nothing(tmp_path):
    write_dicom(tmp_path / "study" / "series", body())
    (tmp_path / "study" / "latest").symlink_to("series")
    np.testing.assert_array_equal(read_volume(tmp_path / "study").array, body())


def test_files_linked_to_a_store_are_refused(tmp_path):
    store = write_dicom(tmp_path / "store", body())
    (tmp_path / "series").mkdir()
    for file in store.iterdir():
        (tmp_path / "series" / file.name).symlink_to(file)
    assert "link that leads out" in refusal(tmp_path / "series")


def test_the_links_of_a_hub_cache_and_hidden_folders(tmp_path):
    """Links into the cache that holds the snapshot are followed; what is hidden is nobody's series."""
    repository = tmp_path / "datasets--x--y"
    blobs = write_dicom(repository / "blobs", body())
    folder = repository / "snapshots" / "0a1b" / "series"
    folder.mkdir(parents=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    write_dicom(folder / ".Trash", body()[:3])
    np.testing.assert_array_equal(read_volume(folder).array, body())


def test_slices_copied_in_part_are_counted(tmp_path):
    def edit(index, ds):
        if index >= 14:
            ds.PixelData = bytes(len(ds.PixelData))

    (warning,) = read_volume(edited(tmp_path / "series", edit)).warnings
    assert "2 of 16 hold one value beside tissue" in warning


# ------------------------------------------------------------------------------------- two acquisitions in one series


def two_phases(folder, label, shift=SPACING[0] / 2, shared=False):
    """Two phases under one UID, `shift` mm apart; `label(ds, phase, index)` sets what tells them apart."""
    hu = body()
    phases = [hu, np.where(hu == 40, 140, hu).astype(np.int16)]
    for phase, values in enumerate(phases):
        slices = dicom_slices(folder, values, origin=(-31.5, -250.25, 410.5 + phase * shift))
        for index, ds in enumerate(slices):
            ds.filename = f"{ds.filename}.{phase}"
            ds.InstanceNumber = index + 1 + (0 if shared else phase * N)
            label(ds, phase, index)
        save(slices)
    return phases


def _number(ds, phase, index):
    ds.AcquisitionNumber = phase + 1


def _time(ds, phase, index):
    ds.AcquisitionTime = f"{101500 + 40 * phase + index:06d}.25"


def _same_time(ds, phase, index):
    ds.AcquisitionTime = f"1015{20 * phase:02d}"


def _position(ds, phase, index):
    ds.TemporalPositionIdentifier = phase + 1


def _kernel(ds, phase, index):
    ds.ConvolutionKernel = ("B30f", "B70f")[phase]


@pytest.mark.parametrize("shift", [SPACING[0] / 2, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("label", "by"),
    [
        (_number, "acquisition number"),
        (_time, "time"),
        pytest.param(_same_time, "time", marks=pytest.mark.slow),
        pytest.param(_position, "temporal position", marks=pytest.mark.slow),
        pytest.param(_kernel, "kernel", marks=pytest.mark.slow),
        (lambda *_: None, "instance number"),
    ],
)
def test_two_acquisitions_in_one_series_are_named_and_chosen(tmp_path, label, by, shift):
    phases = two_phases(tmp_path, label, shift)
    message = refusal(tmp_path)
    assert f"2 acquisitions in one series, told apart by {by} (2: 16 slices; 3: 16 slices)" in message
    for number, values in enumerate(phases, 2):
        volume = read_volume(tmp_path, series=number)
        np.testing.assert_array_equal(volume.array, values)
        assert volume.spacing_mm == SPACING
    assert refusal(tmp_path, series=1) == message
    assert "--series 4 does not exist" in refusal(tmp_path, series=4)


def test_numbers_of_series_do_not_depend_on_the_acquisitions_in_one(tmp_path):
    two_phases(tmp_path, _number)
    write_dicom(tmp_path, patient((9, 36, 44)), series=2)
    assert "holds 2 series" in refusal(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path, series=2).array, patient((9, 36, 44)))
    assert "(3: 16 slices; 4: 16 slices)" in refusal(tmp_path, series=1)
    assert read_volume(tmp_path, series=4).array.shape == body().shape


def test_instance_numbers_that_occur_twice_are_a_warning(tmp_path):
    two_phases(tmp_path, lambda *_: None, shared=True)
    (warning,) = read_volume(tmp_path).warnings
    assert "every instance number occurs more than once" in warning


def test_acquisition_numbers_without_order_are_a_warning(tmp_path):
    def edit(index, ds):
        ds.AcquisitionNumber = 2 if index in (3, 7, 12) else 1

    (warning,) = read_volume(edited(tmp_path / "series", edit)).warnings
    assert "acquisition number alternates" in warning


@pytest.mark.parametrize(
    "edit",
    [
        lambda index, ds: setattr(ds, "AcquisitionNumber", index + 1),
        lambda index, ds: setattr(ds, "AcquisitionNumber", 1 + index // 4),
        lambda index, ds: setattr(ds, "AcquisitionTime", f"{101500 + index // 3:06d}.5"),
        lambda index, ds: setattr(ds, "AcquisitionTime", f"{101530 - index:06d}"),
        # Rows of a detector that are stamped out of order.
        lambda index, ds: setattr(ds, "AcquisitionTime", f"{101500 + index // 4 * 4 + 3 - index % 4:06d}"),
        lambda index, ds: setattr(ds, "InstanceNumber", 1),
    ],
    ids=["number a slice", "step and shoot", "helical", "feet first", "out of order", "one instance number"],
)
def test_one_acquisition_is_read_however_it_is_numbered(tmp_path, edit):
    volume = read_volume(edited(tmp_path / "series", edit))
    np.testing.assert_array_equal(volume.array, body())
    assert volume.warnings == ()


def test_two_acquisitions_in_one_multi_frame_file_are_chosen(tmp_path):
    from pydicom import dcmread
    from pydicom.dataset import Dataset

    file = write_enhanced(tmp_path / "enhanced", body())
    ds = dcmread(file)
    for index, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        content = Dataset()
        content.FrameAcquisitionNumber = 1 + index % 2
        group.FrameContentSequence = [content]
    ds.save_as(file)
    assert "told apart by acquisition number (2: 8 slices; 3: 8 slices)" in refusal(file)
    np.testing.assert_array_equal(read_volume(file, series=2).array, body()[1::2])
    np.testing.assert_array_equal(read_volume(file, series=3).array, body()[::2])


# ---------------------------------------------------------------------------------------- false refusals and messages


@pytest.mark.parametrize("step", [0.625, 1.25, 0.33, 2.0])
def test_positions_rounded_to_a_tenth_of_a_millimetre_are_read(tmp_path, step):
    def edit(index, ds):
        ds.ImagePositionPatient = [-31.5, -40, round(100 + step * index, 1)]

    volume = read_volume(edited(tmp_path / "series", edit))
    np.testing.assert_array_equal(volume.array, body())
    assert abs(volume.spacing_mm[0] - step) < 0.1 / (N - 1) + 1e-4


@pytest.mark.parametrize(("step", "skip"), [(0.1, 7), (0.3, 14), (0.625, 1), (5.0, 14)])
def test_a_missing_slice_is_seen_at_any_step(tmp_path, step, skip):
    slices = dicom_slices(tmp_path / "series", body())
    for index, ds in enumerate(slices):
        ds.ImagePositionPatient = [-31.5, -40, 100 + step * index]
    save(slices, (skip,))
    assert "misses slices" in refusal(tmp_path / "series")


@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "SeriesNumber"])
def test_a_uid_or_number_for_each_slice_is_one_short_sentence(tmp_path, keyword):
    def edit(index, ds):
        setattr(ds, keyword, f"{ds.SeriesInstanceUID}.{index}" if keyword.endswith("UID") else index + 100)

    message = refusal(edited(tmp_path / "series", edit))
    assert "each slice has a UID or number of its own" in message and "and 4 more" in message
    assert len(message) < 800


@pytest.mark.parametrize(
    "keyword", ["PhotometricInterpretation", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation"]
)
def test_a_missing_tag_of_the_pixels_is_named(tmp_path, keyword):
    assert f"states no {keyword}" in refusal(edited(tmp_path / "series", lambda index, ds: delattr(ds, keyword)))


@needs_real
@pytest.mark.slow
def test_the_real_series_is_read_without_its_preambles(tmp_path):
    for file in (REAL / "dicom_abdomen").iterdir():
        (tmp_path / file.name.replace("CT", SECRET)).write_bytes(file.read_bytes()[132:])
    volume, whole = read_volume(tmp_path), read_volume(REAL / "dicom_abdomen")
    np.testing.assert_array_equal(volume.array, whole.array)
    nothing_secret(" ".join((*volume.history, *volume.warnings)))
    assert volume.warnings == whole.warnings == ()
