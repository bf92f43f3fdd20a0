"""The notebooks run from top to bottom, hold no outputs, and are set up alike."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests import tiny_run
from tests.test_requirements import normal, pins
from tghmoe_jax.evaluation import DISCLAIMER

ROOT = tiny_run.ROOT
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Pictures that a notebook shows, files that it leaves, and what it must print.
LEAVES = {
    "evaluate": (3, ["evaluate/eval/*/metrics.json", "evaluate/eval/*/report.html"], "closed/accuracy"),
    "own_data": (2, ["own-prepared/card.md", "before/eval/*/metrics.json", "after/eval/2/metrics.json"], DISCLAIMER),
    "read_a_scan": (3, ["phantom-*/000.dcm", "viewed.nii.gz", "routing.png"], DISCLAIMER),
}


def code(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def text(outputs) -> str:
    """All that cells wrote, without colours."""
    parts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs]
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(parts))


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_from_top_to_bottom(file, tmp_path, monkeypatch):
    for name in ("configs", "tghmoe_jax"):  # as in a clone, but what it leaves is not left in this one
        (tmp_path / name).symlink_to(ROOT / name)
    for name, value in tiny_run.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("TGHMOE_SMOKE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(file, nbformat.NO_CONVERT)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    if folder := os.environ.get("NOTEBOOKS_TO"):  # to be looked at
        nbformat.write(notebook, Path(folder) / file.name)

    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    pictures, files, words = LEAVES[file.stem]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == pictures
    assert not [pattern for pattern in files if not list((tmp_path / "runs" / "notebooks").glob(pattern))]
    assert words in text(outputs)
    # A command that fails in a cell does not stop the notebook.
    assert not re.search(r"^(error: |.*Traceback|.*command not found)", text(outputs), re.MULTILINE), text(outputs)


def test_every_notebook_is_executed():
    assert [file.stem for file in NOTEBOOKS] == sorted(LEAVES)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_kept_without_outputs(file):
    notebook = nbformat.read(file, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"colab", "kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata and not cell.get("outputs") and cell.get("execution_count") is None, cell.id


def test_they_are_opened_and_set_up_alike():
    """The same set-up cell, which names no account; linked from the README; and said what they are not for."""
    setups, readme = set(), (ROOT / "README.md").read_text()
    for file in NOTEBOOKS:
        notebook = nbformat.read(file, nbformat.NO_CONVERT)
        assert "not for clinical use" in notebook.cells[0].source and f"](notebooks/{file.name})" in readme
        assert "OWNER" not in file.read_text() and "github.com/" not in file.read_text()
        setups.add(code(notebook)[0])
    assert len(setups) == 1 and 'REPOSITORY = ""' in setups.pop()


def test_they_import_only_what_is_pinned():
    known = pins("requirements.txt").keys() | pins("requirements-dev.txt").keys()
    known |= {"tghmoe-jax", "ipython", "google", *map(normal, sys.stdlib_module_names)}  # google.colab, in Colab alone
    for file in NOTEBOOKS:
        for source in code(nbformat.read(file, nbformat.NO_CONVERT)):
            found = re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE)
            assert not {normal(name) for name in found} - known, f"{file.name} imports {found}"
