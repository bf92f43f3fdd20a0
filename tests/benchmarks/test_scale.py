"""The tables of docs/scale.md and docs/speed.md are those of the kept reports."""

import shutil
from pathlib import Path

from benchmarks import scale


def test_the_pages_hold_the_tables_of_the_kept_reports(monkeypatch, tmp_path):
    for key in ("PAGE", "SPEED"):
        monkeypatch.setattr(scale, key, Path(shutil.copy(getattr(scale, key), tmp_path)))
    scale.write()
    for page in (scale.DOCS / "scale.md", scale.DOCS / "speed.md"):
        assert (tmp_path / page.name).read_text() == page.read_text()


def test_the_rate_of_a_chip_follows_from_the_least_time_of_a_step():
    report = {
        "roofline": {"compute": 2.0, "hbm": 0.5, "ici": 0.1, "seconds": 2.0}, "batch": 64, "chips": 16,
        "samples": {"number": 7200, "chip_hours": 4.0},
    }  # fmt: skip
    assert scale.rates("row", report) == ["row", "2.00", "products", "2.00 samples", "0.50 samples"]
    decoding = {"compute": 0.1, "hbm": 4.0, "ici": 0.0, "seconds": 4.0}
    report = {"roofline": decoding, "batch": 2, "chips": 1, "new_tokens": 6}
    assert scale.rates("row", report) == ["row", "4.00", "memory", "3 tokens", ""]


def test_a_row_that_cannot_be_compiled_here_keeps_its_report(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scale.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(scale, "REPORTS", tmp_path / "scale.json")
    assert scale.main(["decode, l4-1"]) == scale.main(["decode, one v5e"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: 'decode, l4-1' needs pip install -r requirements-gpu.txt.")
    assert told[1].startswith("error: 'decode, one v5e' needs pip install -r requirements-tpu.txt.")
    assert not scale.REPORTS.exists()
