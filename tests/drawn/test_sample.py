"""The sample scan: read as it was drawn, and never written over anything."""

import numpy as np
import pytest

from tghmoe_jax.drawn import phantom, sample
from tghmoe_jax.scans.reading import read_volume


def test_the_sample_is_read_as_it_was_drawn(tmp_path, capsys):
    file = tmp_path / "sample.nii.gz"
    assert sample.main(["--to", str(file)]) == 0
    drawn = phantom.draw(20_000_000 + sample.NUMBER)
    volume = read_volume(file)
    assert np.array_equal(volume.array, drawn.hu) and not volume.warnings
    assert np.allclose(volume.spacing_mm, drawn.truth.spacing_mm)
    assert "kidney cyst (right upper" in capsys.readouterr().out
    middle = volume.affine @ [*(np.array(drawn.hu.shape) - 1) / 2, 1.0]
    assert np.allclose(middle[:3], 0.0, atol=1e-3), "the sides of a place are the patient's"


@pytest.mark.parametrize("flags, said", [
    (["--to", "there.nii.gz"], "exists and is never overwritten"),
    (["--to", "link.nii.gz"], "exists and is never overwritten"),
    (["--to", "scan.nii"], "must end in .nii.gz"),
    (["--to", "nowhere/scan.nii.gz"], "create the folder first"),
    (["--to", "scan.nii.gz", "--number", "-1"], "must be 0 to 9999999"),
    ([], "--to"),
])  # fmt: skip
def test_wrong_flags_are_one_sentence_and_write_nothing(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.nii.gz").write_text("mine")
    (tmp_path / "link.nii.gz").symlink_to("elsewhere")
    assert sample.main(flags) == 2
    assert said in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.nii.gz", "there.nii.gz"]
