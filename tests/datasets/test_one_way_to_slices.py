"""Training and prediction see the same uint8 volume for the same file, bit for bit."""

import gzip

import numpy as np
import pytest

from tests.datasets.dataset_fixtures import write_lines
from tests.scans.ct_fixtures import patient, write_dicom, write_nifti
from tghmoe_jax.datasets import preparing
from tghmoe_jax.datasets.file_source import FileSource
from tghmoe_jax.drawn import phantom_source
from tghmoe_jax.scans.scan import read_scan

SHAPE = (13, 37, 44)  # resampled along every axis, so HU between whole numbers are met


def noisy() -> np.ndarray:
    return (patient(SHAPE) + np.random.default_rng(0).integers(-40, 40, SHAPE)).astype(np.int16)


def nifti(folder):
    return write_nifti(folder / "scan.nii", noisy())


def packed_nifti(folder):
    (folder / "scan.nii.gz").write_bytes(gzip.compress(nifti(folder).read_bytes()))
    return folder / "scan.nii.gz"


def scaled_nifti(folder):
    return write_nifti(folder / "scaled.nii", 3 * noisy(), slope=1 / 3, inter=0.25)


def dicom(folder):
    return write_dicom(folder / "series", noisy(), slope=0.5)


def array(folder):
    np.save(folder / "scan.npy", np.random.default_rng(1).random((1, *SHAPE), np.float32))
    return folder / "scan.npy"


@pytest.mark.parametrize("channels", ["windows3", "repeat:brain"])
@pytest.mark.parametrize("write", [nifti, packed_nifti, scaled_nifti, dicom, array])
def test_training_and_predict_see_the_same_volume(tmp_path, write, channels):
    root = tmp_path / "scans"
    root.mkdir()
    path = write(root)
    line = {"volume": path.name, "split": "train", "question": "Which side?", "answer": "left"}
    write_lines(root / "manifest.jsonl", [line])
    data = {"name": "manifest", "root": str(root), "manifest": "manifest.jsonl", "slices": 9, "size": 24}
    data |= {"channels": channels}
    scan = read_scan(path, data, None)
    preparing.prepare(data, tmp_path / "set", say=lambda text: None)
    raw, prepared = FileSource(data, "train"), FileSource(data | {"root": str(tmp_path / "set")}, "train")
    wanted, mask = scan.slices()
    assert wanted.dtype == np.uint8 and len(np.unique(wanted)) > 50 and mask.all()
    for source in (raw, prepared):
        assert all(map(np.array_equal, source.slices(0), (wanted, mask)))
        assert source.slice_spacing(0) == scan.slice_spacing()
    measured = prepared.input_ranges().get("hu")
    assert measured == (list(scan.prepared.hu_range) if scan.prepared.hu_range else None)


def test_a_phantom_saved_as_a_scan_is_seen_as_in_training(tmp_path):
    """On the phantom's own grid nothing is resampled, so the slices are those of its source."""
    source = phantom_source.PhantomSource(tmp_path, "test", 4)
    for index, truth in enumerate(source.truths):
        axes = np.diag(truth.spacing_mm)[:, ::-1]
        path = write_nifti(tmp_path / f"{index}.nii.gz", np.asarray(source.volumes[index]), axes)
        scan = read_scan(path, {"slices": 16, "size": 64, "channels": "windows3"}, None)
        assert all(map(np.array_equal, scan.slices(), source.slices(index)))
