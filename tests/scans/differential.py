"""Drawn scans with up to three random faults, read by this project and by plain code that shares nothing with it.

    python -m tests.scans.differential 2000        the counts of the docs, and what was read wrongly

A fault is `harmless` (the drawn scan must come out), `told` (the scan must be refused or warned about) or `open` (the
plain reader says what comes out). The seed of a scan is its number.
"""

import collections
import gzip
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian

from tests.scans.bodies import REGIONS, draw
from tests.scans.dicom_faults import begin_dicom, write_dicom
from tests.scans.faults import FAULTS, Case, Inapplicable
from tests.scans.nifti_faults import begin_nifti, write_nifti
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.reading import read_volume


def drawn(number, family, folder):
    """The scan of this number, with its faults applied and written: (Case, names of the faults)."""
    rng = np.random.default_rng([number, len(family)])
    shape = tuple(int(n) for n in rng.integers((9, 32, 32), (15, 45, 45)))
    name = list(REGIONS)[rng.integers(len(REGIONS))]
    hu = draw(REGIONS[name], rng.choice([0, 5, 15]), seed=number, shape=shape).clip(-1024, 3000).astype(np.int16)
    spacing = tuple(float(round(s, 2)) for s in rng.uniform(0.6, 4, 3))
    angle = rng.choice([0, 0, np.radians(9)])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    axes = np.diag(spacing)[:, ::-1] @ turn.T
    case = Case(rng, folder, hu, spacing, axes, rng.uniform(-300, 300, 3).round(2))
    wanted = rng.permutation(list(FAULTS[family]))[: rng.integers(0, 4)]
    applied = []
    (begin_dicom if family == "dicom" else begin_nifti)(case)
    for fault_name in sorted(wanted):
        try:
            FAULTS[family][fault_name][1](case)
        except (Inapplicable, AttributeError, ValueError):  # or a tag that another fault took out
            continue
        applied.append(str(fault_name))
    (write_dicom if family == "dicom" else write_nifti)(case)
    return case, applied


def judge(number, family, folder):
    """(outcome, faults, message): `equal`, `refused`, `warned` or `different`."""
    case, applied = drawn(number, family, folder)
    kinds = {FAULTS[family][name][0] for name in applied}
    try:
        volume = read_volume(case.path)
    except UserError as error:
        return "refused", applied, str(error)
    if volume.warnings:
        return "warned", applied, "; ".join(volume.warnings)
    if "told" in kinds:
        return "different", applied, "read without a word"
    if kinds <= {"harmless"}:
        array, spacing = case.hu, case.spacing
    else:
        try:
            array, spacing = (plain_dicom if family == "dicom" else plain_nifti)(case.path)
        except Exception as error:  # noqa: BLE001 - damage that the plain reader does not survive
            return "different", applied, f"the plain reader fails: {error!r}"
    if array.shape != volume.array.shape or not np.allclose(array, volume.array, atol=1e-3, rtol=1e-6):
        return "different", applied, f"voxels: {array.shape} and {volume.array.shape}"
    if not np.allclose(spacing, volume.spacing_mm, rtol=0.02 if "rounded_positions" in applied else 1e-3):
        return "different", applied, f"spacing: {spacing} and {volume.spacing_mm}"
    return "equal", applied, ""


# ------------------------------------------------------------------------------------------------- the plain readers


def canonical(array, affine):
    """An array with a RAS affine as (S, P, L), and its spacing (z, y, x), by nibabel."""
    image = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    return np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0), image.header.get_zooms()[2::-1]


def plain_dicom(path):
    found = []
    for file in sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith(".") and f.stat().st_size):
        try:
            ds = pydicom.dcmread(file, force=True)
            if "Rows" not in ds or "PixelData" not in ds:
                continue
        except Exception:  # noqa: BLE001
            continue
        if "TransferSyntaxUID" not in ds.file_meta:
            ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2" if ds.original_encoding[0] else ExplicitVRLittleEndian
        stored = ds.pixel_array.astype(float)
        hu = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        if "PixelPaddingValue" in ds:
            outside_hu = ds.PixelPaddingValue * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
            if not -1024 <= outside_hu <= 3071:
                hu[stored == ds.PixelPaddingValue] = -1024
        row, column = np.reshape(np.array(ds.ImageOrientationPatient, float), (2, 3))
        position = np.array(ds.ImagePositionPatient, float)
        found.append((position @ np.cross(row, column), position, row, column, np.array(ds.PixelSpacing, float), hu))
    found.sort(key=lambda entry: entry[0])
    _, first, row, column, (high, wide), _ = found[0]
    step = (found[-1][1] - first) / (len(found) - 1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.stack([step, column * high, row * wide], axis=1), first
    return canonical(np.stack([entry[-1] for entry in found]), np.diag([-1, -1, 1, 1]) @ affine)


def plain_nifti(path):
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    order = "<" if struct.unpack("<i", data[:4])[0] in (348, 540) else ">"

    def get(offset, code, count):
        return np.array(struct.unpack_from(f"{order}{count}{code}", data, offset), float)

    if struct.unpack(f"{order}i", data[:4])[0] == 540:
        dim, kind, pixdim = get(16, "q", 8), get(12, "h", 1), get(104, "d", 8)
        (offset,), (slope, inter) = get(168, "q", 1), get(176, "d", 2)
        codes, quaternion, shift, rows = get(344, "i", 2), get(352, "d", 3), get(376, "d", 3), get(400, "d", 12)
        units = int(get(500, "i", 1)[0])
    else:
        dim, kind, pixdim = get(40, "h", 8), get(70, "h", 1), get(76, "f", 8)
        (offset,), (slope, inter) = get(108, "f", 1), get(112, "f", 2)
        codes, quaternion, shift, rows = get(252, "h", 2), get(256, "f", 3), get(268, "f", 3), get(280, "f", 12)
        units = data[123]
    shape = tuple(int(n) for n in dim[1:4])
    dtype = np.dtype({4: "i2", 8: "i4", 16: "f4", 64: "f8", 512: "u2", 2: "u1", 256: "i1", 768: "u4"}[int(kind[0])])
    values = np.frombuffer(data, dtype.newbyteorder(order), int(np.prod(shape)), int(offset)).reshape(shape, order="F")
    values = values.astype(float) * slope + inter if slope and not np.isnan(slope) else values.astype(float)
    affine = np.eye(4)
    if codes[1] > 0:
        affine[:3] = rows.reshape(3, 4)
    else:
        b, c, d = quaternion
        a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        turn = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        )
        affine[:3, :3] = turn * pixdim[1:4] * [1, 1, -1 if pixdim[0] < 0 else 1]
        affine[:3, 3] = shift
    affine[:3] *= {0: 1, 1: 1000, 2: 1, 3: 0.001}[units & 7]
    return canonical(values, affine)


def campaign(numbers, say=print):
    """Outcomes of these scans of both families: {family: Counter}; what was read wrongly without a word is said."""
    found = {family: collections.Counter() for family in FAULTS}
    for number in numbers:
        family = ("dicom", "nifti")[number % 2]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome, applied, message = judge(number, family, Path(folder))
        found[family][outcome] += 1
        if outcome == "different":
            say(f"{family} {number}: {', '.join(applied) or 'no fault'}: {message}")
        found[family]["right scans refused or warned"] += outcome in ("refused", "warned") and all(
            FAULTS[family][name][0] == "harmless" for name in applied
        )
    return found


if __name__ == "__main__":
    for family, counts in campaign(range(int(sys.argv[1]))).items():
        print(family, dict(counts))
