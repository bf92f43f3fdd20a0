"""Every kind of scan that SimpleITK reads too: the same voxels, grid and order, but where SimpleITK itself is wrong.

The rows of `KINDS` are the table of docs/volumes.md.
"""

import functools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.scans.ct_fixtures import (
    ORIGIN,
    REAL,
    affine_of,
    axes_of,
    dicom_slices,
    needs_real,
    patient,
    save,
    turned,
    write_dicom,
    write_enhanced,
    write_nifti,
)
from tests.scans.test_itk_formats import write
from tghmoe_jax.scans.dicom import read_geometry
from tghmoe_jax.scans.nifti import open_nifti
from tghmoe_jax.scans.reading import read_volume
from tghmoe_jax.scans.volume import canonical_grid

DOCS = Path(__file__).resolve().parents[2] / "docs" / "volumes.md"
HU = patient((16, 36, 44))


def by_simpleitk(path):
    """Voxels float32 (D, H, W), axes (3, 3) and origin, turned to the canonical order by SimpleITK's own filter."""
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(path))
    canonical = sitk.DICOMOrient(image, "LPS")
    axes = (np.reshape(canonical.GetDirection(), (3, 3)) * canonical.GetSpacing()).T[::-1]
    return sitk.GetArrayFromImage(canonical).astype(np.float32), axes, np.array(canonical.GetOrigin())


def grid_of(path):
    """Axes (3, 3) and origin in LPS of the canonical grid, as this project reads them."""
    if path.is_dir() or path.suffix == ".dcm":
        shape, axes, origin = read_geometry(path)
    else:
        with open_nifti(path) as stored:
            shape, axes, origin = stored.shape, stored.axes, stored.origin
    grid = canonical_grid(axes, "scan")
    for axis, flip in zip(grid.order, grid.flips, strict=True):
        if flip:
            origin, axes[axis] = origin + axes[axis] * (shape[axis] - 1), -axes[axis]
    return axes[list(grid.order)], origin


def series(edit=None, **options):
    def make(folder):
        slices = dicom_slices(folder / "series", HU, **options)
        for index, ds in enumerate(slices):
            if edit:
                edit(index, ds)
        save(slices)
        return folder / "series"

    return make


def rescaled(slope, intercept):
    def edit(index, ds):
        ds.RescaleSlope, ds.RescaleIntercept = slope(index), intercept(index)
        ds.PixelData = np.rint((HU[index] - intercept(index)) / slope(index)).astype(np.uint16).tobytes()

    return series(edit)


def padded(index, ds):
    pixels = ds.pixel_array.copy()
    pixels[:3] = 63536
    ds.PixelData, ds.PixelPaddingValue = pixels.tobytes(), 63536


def rounded(index, ds):
    ds.ImagePositionPatient = [-31.5, -40, round(100 + 0.625 * index, 1)]


def signed(index, ds):
    ds.PixelRepresentation, ds.RescaleIntercept, ds.PixelData = 1, 0, HU[index].tobytes()


def twelve_bits(index, ds):
    ds.BitsStored, ds.HighBit = 12, 11


def many_turned(suffix):
    def make(folder):
        stored, axes, origin = turned(HU, axes_of(), ORIGIN, (2, 0, 1), (True, False, True))
        if suffix == "dicom":
            return write_dicom(folder / "series", stored, axes=axes, origin=origin)
        if suffix == ".nii":
            return write_nifti(folder / "scan.nii", stored.transpose(2, 1, 0), axes[::-1], origin)
        return write(folder / f"scan{suffix}", stored, axes, origin)

    return make


def oblique():
    a = np.radians(12)
    return axes_of() @ np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]).T


def nifti(values=HU, axes=None, **options):
    axes = axes_of() if axes is None else axes
    return lambda folder: write_nifti(folder / "scan.nii.gz", values.transpose(2, 1, 0), axes[::-1], **options)


def scaled_nifti(folder):
    stored = ((HU.astype(int) + 1024) * 2).astype(np.uint16).transpose(2, 1, 0)
    return write_nifti(folder / "scan.nii", stored, axes_of()[::-1], slope=0.5, inter=-1024.0)


def forms(sform, qform, unit="mm", scale=1):
    """sform and qform by their codes and the shift of the qform in mm."""

    def make(folder):
        affine = affine_of(axes_of()[::-1] * scale)
        other = affine.copy()
        other[2, 3] += qform[1]
        image = nib.Nifti1Image(HU.transpose(2, 1, 0), affine)
        image.set_qform(other, code=qform[0])
        image.set_sform(affine, code=sform)
        image.header.set_xyzt_units(unit)
        image.to_filename(folder / "scan.nii")
        return folder / "scan.nii"

    return make


def enhanced(slopes=False):
    def make(folder):
        file = write_enhanced(folder / "scan.dcm", HU)
        if slopes:
            ds = dcmread(file)
            for index, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
                inner = Dataset()
                inner.RescaleSlope, inner.RescaleIntercept, inner.RescaleType = 1, -1024 - 100 * (index % 2), "HU"
                group.PixelValueTransformationSequence = [inner]
            pixels = ds.pixel_array + np.uint16(100) * (np.arange(len(HU), dtype=np.uint16) % 2)[:, None, None]
            del ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
            ds.PixelData = pixels.tobytes()
            ds.save_as(file)
        return file

    return make


def by_itk(suffix, packed):
    return lambda folder: write(folder / f"scan{suffix}", HU, axes_of(), packed=packed)


def scaled_meta_image(folder):
    path = write(folder / "scan.mha", (HU.astype(int) + 1024).astype(np.uint16), axes_of())
    path.write_bytes(
        path.read_bytes().replace(b"ElementType", b"ElementToIntensityFunctionOffset = -1024\nElementType")
    )
    return path


EQUAL = "equal"
# Kind -> (maker, what SimpleITK gives: equal, or what is wrong with it).
KINDS = {
    "DICOM series, plain": (series(), EQUAL),
    "DICOM series, RLE": (series(lambda index, ds: ds.compress(RLELossless)), EQUAL),
    "DICOM series, JPEG 2000": (series(lambda index, ds: ds.compress(JPEG2000Lossless)), EQUAL),
    "DICOM series, JPEG-LS": (series(lambda index, ds: ds.compress(JPEGLSLossless)), EQUAL),
    "DICOM series, signed pixels": (series(signed), EQUAL),
    "DICOM series, 12 bits": (series(twelve_bits), EQUAL),
    "DICOM series, slope 0.5": (series(slope=0.5), EQUAL),
    "DICOM series, an intercept for each slice": (rescaled(lambda i: 1, lambda i: -1024 - 100 * (i % 3)), EQUAL),
    "DICOM series, a slope for each slice": (
        rescaled(lambda i: 1 + 0.5 * (i % 2), lambda i: -1024),
        "rounds to whole numbers by the type of the first slice",
    ),
    "DICOM series, slices thicker than their step": (
        series(lambda index, ds: setattr(ds, "SliceThickness", 9)),
        EQUAL,
    ),
    "DICOM series, positions rounded to 0.1 mm": (series(rounded), EQUAL),
    "DICOM series, sagittal": (many_turned("dicom"), EQUAL),
    "DICOM series, oblique": (series(axes=oblique()), EQUAL),
    "DICOM series, padding by its tag": (series(padded), "keeps the padding as HU"),
    "DICOM, enhanced multi-frame": (enhanced(), EQUAL),
    "DICOM, enhanced, an intercept for each frame": (enhanced(slopes=True), "takes the first frame's for all"),
    "NIfTI-1, int16, packed": (nifti(), EQUAL),
    "NIfTI-1, float64": (nifti(HU.astype(np.float64)), EQUAL),
    "NIfTI-1, scl_slope and scl_inter": (scaled_nifti, EQUAL),
    "NIfTI-1, any order of axes": (many_turned(".nii"), EQUAL),
    "NIfTI-1, oblique": (nifti(axes=oblique()), EQUAL),
    "NIfTI-1, sform alone": (forms(1, (0, 0)), EQUAL),
    "NIfTI-1, qform alone": (forms(0, (1, 0)), EQUAL),
    "NIfTI-1, sform and qform 20 mm apart": (
        forms(2, (1, 20)),
        "takes the position of the qform; the sform is used, with a warning",
    ),
    "NIfTI-1, micrometres": (forms(1, (0, 0), "micron", 1000), EQUAL),
    "NRRD": (by_itk(".nrrd", False), EQUAL),
    "NRRD, gzip, data apart": (by_itk(".nhdr", True), EQUAL),
    "NRRD, any order of axes": (many_turned(".nrrd"), EQUAL),
    "MetaImage": (by_itk(".mha", False), EQUAL),
    "MetaImage, packed, data apart": (by_itk(".mhd", True), EQUAL),
    "MetaImage, any order of axes": (many_turned(".mha"), EQUAL),
    "MetaImage, a scale in the header": (scaled_meta_image, "does not apply the scale"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_read_one_scan_alike_and_the_docs_say_where_not(tmp_path, kind):
    make, wanted = KINDS[kind]
    path = make(tmp_path)
    ours = read_volume(path)
    theirs, axes, origin = by_simpleitk(path)
    right = HU.astype(np.float32)
    if "padding" in kind:
        right[:, :3] = -1024
    np.testing.assert_allclose(ours.array, right, atol=0.75 if "a slope for each" in kind else 0)  # of the fixture
    same = theirs.shape == ours.array.shape and np.array_equal(theirs, ours.array)
    same = same and np.allclose(np.linalg.norm(axes, axis=1), ours.spacing_mm, atol=5.1e-5)
    placed = ours.affine[:3, :3].T, ours.affine[:3, 3]
    same = same and all(map(functools.partial(np.allclose, atol=1e-3), placed, (axes, origin)))
    assert same == (wanted == EQUAL)
    assert f"| {kind} | {wanted} |" in DOCS.read_text(encoding="utf-8")


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dicom_abdomen", "abdomen_slab_3mm.nii.gz", "abdomen_pelvis_3mm.nii.gz"])
def test_both_read_real_scans_alike(name):
    ours = read_volume(REAL / name)
    theirs, axes, origin = by_simpleitk(REAL / name)
    np.testing.assert_array_equal(ours.array, theirs)
    np.testing.assert_allclose(ours.spacing_mm, np.linalg.norm(axes, axis=1), atol=5.1e-5)
    for one, other in zip(grid_of(REAL / name), (axes, origin), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
