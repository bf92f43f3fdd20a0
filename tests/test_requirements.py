"""Every package that the project imports is pinned exactly, and the pins and the ranges speak of the same ones."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path):
    """Requirement name -> its lines."""
    found = {}
    for line in (ROOT / path).read_text().splitlines():
        if line and not line.startswith(("#", "-r")):
            found.setdefault(normal(re.match(r"[\w.-]+", line)[0]), []).append(line)
    return found


def imported(*folders):
    """Distributions that the files of these folders import, ours and the standard library's left out."""
    names = set()
    for path in (path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    names -= {*sys.stdlib_module_names, "tghmoe_jax", "configs", "benchmarks", "tests"}
    known = importlib.metadata.packages_distributions()
    return {name: {normal(dist) for dist in known.get(name, [name])} for name in names}


def test_pins_are_exact_and_one_for_each_python():
    files = ("requirements.txt", "requirements-tpu.txt", "requirements-gpu.txt", "requirements-dev.txt")
    for lines in (lines for file in files for lines in pins(file).values()):
        assert all(
            re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+(; python_version (<|>=) \"3\.12\")?", line) for line in lines
        )
        assert len(lines) == 1 or sorted(re.findall(r"<|>=", " ".join(lines))) == ["<", ">="]


def test_what_the_package_imports_is_pinned():
    """An extra's packages are imported where they are asked for; the tests install and pin them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    optional = {normal(re.match(r"[\w.-]+", line)[0]) for line in extras["metrics"]}
    assert optional <= pins("requirements-dev.txt").keys()
    for name, dists in imported("tghmoe_jax", "configs").items():
        assert dists & (optional | pins("requirements.txt").keys()), f"{name} is imported but not in requirements.txt"


def test_what_the_tests_import_is_pinned():
    both = pins("requirements.txt").keys() | pins("requirements-dev.txt").keys()
    for name, dists in imported("tests").items():
        assert dists & both, f"{name} is imported but in neither requirements file"


def test_the_ranges_name_the_same_packages_as_the_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = project["dependencies"] + project["optional-dependencies"]["app"]
    assert {normal(re.match(r"[\w.-]+", line)[0]) for line in ranges} == pins("requirements.txt").keys()


def test_the_tpu_compiler_is_the_one_that_jax_asks_for():
    (wanted,) = [r for r in importlib.metadata.requires("jax") if re.match(r"libtpu.*extra == .tpu.", r)]
    release = re.search(r"==([\d.]+)\.\*", wanted)[1]
    assert any(f"libtpu=={release}." in line for line in pins("requirements-tpu.txt")["libtpu"])


def test_the_plugin_for_gpus_is_of_the_version_of_jax():
    gpu, jax = pins("requirements-gpu.txt"), pins("requirements.txt")
    for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        assert [line.replace(name, "jax") for line in gpu[name]] == jax["jax"]


def test_the_installed_packages_are_the_pinned_ones():
    old = sys.version_info < (3, 12)
    for name, lines in (pins("requirements.txt") | pins("requirements-tpu.txt")).items():
        (line,) = [line for line in lines if ";" not in line or ("<" in line) == old]
        assert importlib.metadata.version(name) == re.search(r"==([\w.]+)", line)[1], name
