"""No path that a data file names leaves its root."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scans.ct_fixtures import patient, write_nifti
from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.paths import inside
from tghmoe_jax.scans.reading import read_volume


@pytest.mark.parametrize(
    "relative", ["scan.nii.gz", "a/b/scan.nii.gz", "a\\b\\scan.nii.gz", "./scan.nii.gz", "..scan", "ü/ä"]
)
def test_a_path_under_the_root_is_returned(tmp_path, relative):
    path = inside(tmp_path, relative)
    assert path == tmp_path.joinpath(*relative.replace("\\", "/").split("/"))


@pytest.mark.parametrize(
    ("relative", "fragment"),
    [
        ("../scan.nii", "climbs out"),
        ("a/../../scan.nii", "climbs out"),
        ("a\\..\\..\\scan.nii", "climbs out"),
        ("a/..", "climbs out"),
        ("/etc/passwd", "absolute"),
        ("\\\\server\\share\\scan.nii", "absolute"),
        ("\\scan.nii", "absolute"),
        ("C:\\scan.nii", "absolute"),
        ("C:scan.nii", "absolute"),
        ("scan\0.nii", "control character"),
        ("scan\n.nii", "control character"),
        ("", "empty"),
        ("  ", "empty"),
        ("a" * 5000, "5000 characters"),
        ("out/scan.nii", "through a link"),
        ("far/scan.nii", "through a link"),
        ("file.nii", "through a link"),
    ],
)
def test_a_path_that_leaves_the_root_is_refused(tmp_path, relative, fragment):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "scan.nii").write_bytes(b"")
    (root / "out").symlink_to(outside)
    (root / "far").symlink_to("out")
    (root / "file.nii").symlink_to(outside / "scan.nii")
    with pytest.raises(UserError, match=fragment) as error:
        inside(root, relative)
    assert len(str(error.value)) < 600 and "\0" not in str(error.value) and "\n" not in str(error.value)


def test_links_within_the_root_and_a_linked_root_are_followed(tmp_path):
    real = tmp_path / "real"
    (real / "a").mkdir(parents=True)
    (real / "b").symlink_to("a")
    (tmp_path / "root").symlink_to(real)
    assert inside(tmp_path / "root", "b/scan.nii") == tmp_path / "root" / "b" / "scan.nii"


def test_the_links_of_a_hub_cache_are_followed_into_that_cache_alone(tmp_path):
    for name in ("datasets--one", "datasets--other"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "hash").write_bytes(b"")
    folder = tmp_path / "datasets--one" / "snapshots" / "commit" / "a"
    folder.mkdir(parents=True)
    (folder / "scan.nii").symlink_to("../../../blobs/hash")
    (folder / "other.nii").symlink_to("../../../../datasets--other/blobs/hash")
    assert inside(folder.parent, "a/scan.nii") == folder / "scan.nii" and inside(folder, "scan.nii").is_file()
    with pytest.raises(UserError, match="through a link"):
        inside(folder, "other.nii")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "scan.nii").symlink_to(folder / "scan.nii")
    with pytest.raises(UserError, match="through a link"):
        inside(tmp_path / "plain", "scan.nii")


def test_a_circle_of_links_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    try:
        path = inside(tmp_path, "a/scan.nii")
    except UserError as error:
        assert "circle" in str(error)
    else:  # newer Pythons resolve what they can; it then still lies under the root and opens nothing
        assert path == tmp_path / "a" / "scan.nii"
        with pytest.raises(OSError, match="[Ll]ink"):
            path.open("rb")


@settings(deadline=None)
@given(st.text(st.sampled_from("ab./\\:C \0\n~é"), max_size=12))
def test_whatever_the_text_the_result_is_under_the_root_or_an_error(text):
    root = Path("/nonexistent/root")
    try:
        path = inside(root, text)
    except UserError:
        return
    assert path.resolve().is_relative_to(root)


@pytest.mark.parametrize(("stored", "named"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_however_its_accents_are_written(tmp_path, stored, named):
    parts = ("Größe", "Schädel é.nii")
    file = tmp_path.joinpath(*(unicodedata.normalize(stored, part) for part in parts))
    file.parent.mkdir()
    write_nifti(file, patient())
    relative = "/".join(unicodedata.normalize(named, part) for part in parts)
    assert inside(tmp_path, relative) == file
    np.testing.assert_array_equal(read_volume(tmp_path / relative).array, patient())
