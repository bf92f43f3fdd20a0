"""Uploads that hold no scan that can be opened, each as [(ending, bytes)]; names of patients are planted in them."""

import io
import stat
import zipfile
import zlib

from tests.app.client import files_of
from tests.scans.ct_fixtures import SECRET, patient, write_nifti
from tests.scans.test_malformed import KINDS


def zipped(members, method=zipfile.ZIP_DEFLATED):
    """A zip file of {name or ZipInfo: bytes}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def nifti(folder, shape=(12, 36, 44)):
    return write_nifti(folder / f"{SECRET}.nii", patient(shape)).read_bytes()


def link():
    info = zipfile.ZipInfo(f"{SECRET}.nii")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def with_password(content):
    """The flag of a password in the local and the central header."""
    data = bytearray(zipped({f"{SECRET}.nii": content}))
    data[6] |= 1
    data[data.rindex(b"PK\1\2") + 8] |= 1
    return bytes(data)


def stated_shorter(content):
    """A member that unpacks to more than the list says."""
    data = bytearray(zipped({f"{SECRET}.nii": content}))
    at = data.rindex(b"PK\1\2") + 24
    data[at : at + 4] = (400).to_bytes(4, "little")
    return bytes(data)


def many(count=20_001):
    return zipped({f"{SECRET}{i}.dcm": b"" for i in range(count)}, zipfile.ZIP_STORED)


def end_of_many():
    """An end that states more files than there are bytes."""
    return b"PK\5\6" + bytes(4) + b"\xff\xff\xff\xff" + (2**31).to_bytes(4, "little") + bytes(6)


def zips(folder, slow=True):
    """{kind: the bytes of a zip file}; without `slow` not those that take long to make."""
    scan = nifti(folder)
    whole = zipped({f"{SECRET}.nii": scan})
    return {
        "a zip file cut short": whole[: len(whole) // 2],
        "no zip file": f"{SECRET} is no zip file".encode(),
        "an empty zip file": zipped({}),
        "a zip file of hidden files": zipped({f".{SECRET}": scan, "__MACOSX/x.nii": scan}),
        "a name with ..": zipped({f"../../{SECRET}.nii": scan}),
        "a name with .. in the middle": zipped({f"a/../../{SECRET}.nii": scan}),
        "a name with backslashes": zipped({f"..\\{SECRET}.nii": scan}),
        "an absolute name": zipped({f"/etc/{SECRET}.nii": scan}),
        "a drive": zipped({f"C:\\{SECRET}.nii": scan}),
        "a zip file of zip files": zipped({f"{SECRET}.zip": whole}),
        "a zip file in a zip file under another name": zipped({f"{SECRET}.nii": whole}),
        "a link": zipped({link(): b"/etc/passwd"}),
        "a password": with_password(scan),
        "an unusual packing": zipped({f"{SECRET}.nii": scan}, zipfile.ZIP_LZMA),
        "a bomb": zipped({f"{SECRET}.nii": bytes(2**27)}),
        "a member longer than stated": stated_shorter(scan),
        "a damaged member": whole[:60] + bytes(60) + whole[120:],
        **({"too many files": many()} if slow else {}),
        "an end that lies": end_of_many(),
        "texts alone": zipped({f"{SECRET}.txt": b"notes", "LICENSE": b"free"}),
        "a stream in a stream": zipped({f"{SECRET}.nii.gz": zlib.compress(bytes(2**20))}),
    }


def malformed(folder, step):
    """{kind: files} of every `step`th kind of the readers' table that a browser can send."""
    found = {}
    for number, (kind, (make, _)) in enumerate(list(KINDS.items())[::step]):
        if kind in ("DICOM: two series", "NIfTI: nothing there"):  # the first is listed
            continue
        place = folder / str(number)
        place.mkdir()
        path = make(place)
        if all(not one.is_symlink() and (one.is_file() or one.is_dir()) for one in place.rglob("*")):
            found[kind] = files_of(path)
    return found
