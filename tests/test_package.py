"""The package as it is installed: its commands, experiments by name, and wheel and source distribution."""

import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import tghmoe_jax
from tests import tiny_run
from tests.scans import ct_fixtures as ct
from tghmoe_jax import __main__ as commands
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import command_line

ROOT = tiny_run.ROOT


def test_every_command_is_listed_and_nothing_else(monkeypatch, capsys):
    files = [*(ROOT / "tghmoe_jax").glob("*.py"), *(ROOT / "tghmoe_jax").glob("*/__main__.py")]
    ended = [file for file in files if "sys.exit(run_command(" in file.read_text()]
    modules = {file.parent.name if file.stem == "__main__" else file.stem for file in ended}
    assert {module for module, _ in commands.COMMANDS.values()} == modules
    monkeypatch.setattr(sys, "argv", ["tghmoe"])
    commands.main()
    out = capsys.readouterr().out
    assert all(f"tghmoe_jax.{module})" in out for module in modules)


def test_a_command_gets_its_flags_and_an_unknown_one_is_one_sentence(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(commands.runpy, "run_module", lambda name, run_name: called.append((name, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["tghmoe", "train", "--config", "stage1"])
    commands.main()
    assert called == [("tghmoe_jax.main", ["--config", "stage1"])]
    monkeypatch.setattr(sys, "argv", ["tghmoe", "fly"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 2 and "'fly' is not a command; use one of predict, " in capsys.readouterr().err


def test_an_experiment_is_found_by_name_and_by_path_in_the_clone_and_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = []
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        for name in ("stage1", "configs/stage1.py", "configs/stage1"):
            found.append(Path(command_line.experiment(name)).resolve())
    assert set(found) == {ROOT / "configs" / "stage1.py"}
    (tmp_path / "configs").mkdir()
    own = shutil.copy(ROOT / "configs" / "stage1.py", tmp_path / "configs" / "stage1.py")
    assert Path(command_line.experiment("stage1")).resolve() == Path(own).resolve(), "one's own goes first"
    config, workdir = command_line.parse(["x", "--config.train.steps=7", "--config", "stage1:bench"])
    assert (config.train.steps, workdir) == (7, "runs/stage1-bench")
    for name in ("stage9", "configs/stage9.py", "elsewhere/stage1.py"):
        with pytest.raises(UserError, match=f"--config {name} does not exist; .* ablations, data_ct_rate, .*stage2"):
            command_line.experiment(name)


@pytest.mark.parametrize(("installed", "environment", "chips", "expected"), [
    ({"libtpu"}, {}, [], "cpu"),
    (set(), {}, [], None),
    ({"libtpu", "jax_plugins"}, {}, [], None),  # of a GPU
    ({"libtpu"}, {}, ["/dev/vfio/0"], None),
    ({"libtpu"}, {"TPU_WORKER_ID": "0"}, [], None),
    ({"libtpu"}, {"JAX_PLATFORMS": "tpu"}, [], "tpu"),
])  # fmt: skip
def test_no_tpu_is_searched_for_where_none_is(monkeypatch, installed, environment, chips, expected):
    for name in [name for name in os.environ if name == "JAX_PLATFORMS" or name.startswith("TPU_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(glob, "glob", lambda pattern: [chip for chip in chips if chip.startswith(pattern[:9])])
    tghmoe_jax._leave_tpu_out()
    after = os.environ.get("JAX_PLATFORMS")
    os.environ.pop("JAX_PLATFORMS", None)  # what was set here is no change that monkeypatch takes back
    assert after == expected


@pytest.mark.slow
def test_wheel_and_source_distribution_build_install_and_answer(tmp_path):
    """The wheel is made from the source distribution, without a network, and put into an environment of its own."""
    source = tmp_path / "source"
    for name in ("tghmoe_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command, cwd=tmp_path) -> str:
        done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('../dist')", cwd=source)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", tmp_path / "wheels", archive)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    programs = tmp_path / "venv" / "bin"
    run(*pip, "--python", programs / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # what the project depends on

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    said = run(programs / "python", "-c", "import tghmoe_jax; print(tghmoe_jax.__file__)", cwd=elsewhere)
    assert Path(said.strip()).is_relative_to(packages)
    assert run(programs / "tghmoe", cwd=elsewhere) == run(programs / "python", "-m", "tghmoe_jax", cwd=elsewhere)
    ask = "from tghmoe_jax.training.command_line import parse; import sys; print(parse(sys.argv)[0].to_json())"
    named, by_path = (
        json.loads(run(programs / "python", "-c", ask, "--config", name, cwd=elsewhere))
        for name in ("stage1:bench", "configs/stage1.py:bench")
    )
    assert named == by_path and named["train"]["steps"] == 1500
    ct.write_nifti(elsewhere / "scan.nii.gz", ct.patient())
    flags = ("--volume", "scan.nii.gz", "--question", "Which plane is this?", "--json")
    assert json.loads(run(programs / "tghmoe", "predict", *flags, cwd=elsewhere))["text"]
