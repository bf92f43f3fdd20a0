"""A drawn scan as a NIfTI file, and what may be wrong with it (see `differential`)."""

import gzip

import nibabel as nib
import numpy as np

from tests.scans.ct_fixtures import affine_of, turned
from tests.scans.faults import FAULTS, Inapplicable, fault


def begin_nifti(case):
    order, flips = tuple(case.rng.permutation(3)), tuple(case.rng.random(3) < 0.5)
    case.stored, case.axes, case.origin = turned(case.hu, case.axes, case.origin, order, flips)
    case.path = case.folder / "scan.nii"


def write_nifti(case):
    told = {key: case.header.pop(key) for key in list(case.header) if key[0].isupper()}
    values = case.header.pop("values", case.stored)
    values = values.astype(told.get("TYPE", values.dtype))
    affine = affine_of(case.axes * told.get("SCALE", 1), tuple(case.origin * told.get("SCALE", 1)))
    kind = told.get("KIND", nib.Nifti1Image)
    image = kind(values, affine, kind.header_class(endianness=told.get("ORDER", "<")))
    image.set_data_dtype(values.dtype.newbyteorder(told.get("ORDER", "<")))
    image.header.set_xyzt_units(told.get("UNIT", "mm"))
    codes = told.get("CODES", (1, 2))
    image.set_qform(told.get("QFORM", affine), code=codes[0])
    image.set_sform(affine, code=codes[1])
    if told.get("EXTENSION"):
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"SECRET text" * 9))
    image.to_filename(case.path)
    data = bytearray(case.path.read_bytes())
    head = np.frombuffer(bytes(data[: image.header.sizeof_hdr]), image.header.structarr.dtype).copy()
    for key, value in case.header.items():
        head[key] = value
    data[: image.header.sizeof_hdr] = head.tobytes()
    for change in case.files:
        data = change(data)
    if told.get("PACKED"):
        data = gzip.compress(data, 1)
        case.path = case.path.with_name("scan.nii.gz")
    if told.get("CUT"):
        data = data[: int(len(data) * told["CUT"])]
    if told.get("TWICE"):
        data = gzip.compress(data, 1)
    case.path.write_bytes(data)


def with_header(name, kind, make):
    """A fault that is a few entries of `Case.header`; capitals tell the writer, other keys are fields."""

    def apply(case):
        entries = make(case)
        forms = {"CODES", "QFORM", "srow_x"}
        if entries.keys() & case.header.keys() or (forms & entries.keys() and forms & case.header.keys()):
            raise Inapplicable
        case.header.update(entries)

    FAULTS["nifti"][name] = (kind, apply)


def _shifted(case, degrees=0.0, shift=0.0, flip=False):
    affine = affine_of(case.axes, tuple(case.origin))
    a = np.radians(degrees)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[2, 3] += shift
    return np.diag([-1, 1, 1, 1]) @ affine if flip else affine


with_header("packed", "harmless", lambda case: {"PACKED": True})
with_header("version_2", "harmless", lambda case: {"KIND": nib.Nifti2Image})
with_header("big_endian", "harmless", lambda case: {"ORDER": ">"})
with_header("other_type", "harmless", lambda case: {"TYPE": case.pick("i4", "f4", "f8")})
with_header("extension", "harmless", lambda case: {"EXTENSION": True})
with_header(
    "unit", "harmless", lambda case: case.pick({"UNIT": "micron", "SCALE": 1000}, {"UNIT": "meter", "SCALE": 1e-3})
)
with_header("sform_alone", "harmless", lambda case: {"CODES": (0, int(case.rng.integers(1, 5)))})
with_header("qform_alone", "harmless", lambda case: {"CODES": (int(case.rng.integers(1, 5)), 0)})
with_header("notes", "harmless", lambda case: {"descrip": b"SECRET", "aux_file": b"x.dcm"})
with_header(
    "scaled",
    "harmless",
    lambda case: {"values": ((case.stored.astype("i4") + 1024) * 2), "scl_slope": 0.5, "scl_inter": -1024},
)
with_header("slope_of_zero", "harmless", lambda case: {"scl_slope": 0, "scl_inter": 77})
with_header("never_rescaled", "told", lambda case: {"values": case.stored + np.int16(1024)})
with_header("rescaled_twice", "told", lambda case: {"values": case.stored - np.int16(1024)})
with_header(
    "clipped", "told", lambda case: {"values": case.stored.clip(*case.pick((-160, 240), (-57, 164), (-200, 300)))}
)
with_header("labels", "told", lambda case: {"values": (case.stored > 0).astype("i2")})
with_header("normalised", "told", lambda case: {"values": (case.stored / 1000).astype("f4")})
with_header(
    "not_a_number", "told", lambda case: {"values": np.where(case.stored > 30, np.nan, case.stored).astype("f4")}
)
with_header("wrong_sign", "told", lambda case: {"values": case.stored.astype("u2")})
with_header("no_form", "told", lambda case: {"CODES": (0, 0)})
with_header("sform_of_zeros", "told", lambda case: {"srow_x": 0, "srow_y": 0, "srow_z": 0})
with_header("other_side", "told", lambda case: {"QFORM": _shifted(case, flip=True)})
with_header("turned_qform", "told", lambda case: {"QFORM": _shifted(case, case.rng.uniform(2, 25))})
with_header("moved_qform", "told", lambda case: {"QFORM": _shifted(case, shift=case.rng.uniform(5, 90))})
with_header(
    "four_axes", "told", lambda case: {"dim": [4, *case.stored.shape[:2], case.stored.shape[2] // 2, 2, 1, 1, 1]}
)
with_header(
    "fewer_slices", "told", lambda case: {"dim": [3, *case.stored.shape[:2], case.stored.shape[2] - 4, 1, 1, 1, 1]}
)
with_header(
    "more_slices", "told", lambda case: {"dim": [3, *case.stored.shape[:2], case.stored.shape[2] + 2, 1, 1, 1, 1]}
)
with_header("cut_short", "told", lambda case: {"CUT": case.rng.uniform(0.3, 0.98)})
with_header("packed_twice", "told", lambda case: {"TWICE": True, "PACKED": True})
with_header("infinite_slope", "told", lambda case: {"scl_slope": np.inf})
with_header("other_spacing", "open", lambda case: {"SCALE": case.rng.uniform(0.5, 1.4)})


@fault("nifti", "open")
def bytes_of_the_start(case):
    def change(data):
        for _ in range(case.rng.integers(1, 4)):
            data[case.rng.integers(352)] = int(case.rng.integers(256))
        return data

    case.files.append(change)


@fault("nifti", "open")
def bytes_of_the_voxels(case):
    def change(data):
        for _ in range(case.rng.integers(1, 9)):
            data[case.rng.integers(700, len(data))] = int(case.rng.integers(256))
        return data

    case.files.append(change)
