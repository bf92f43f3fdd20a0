"""The import rule: which part of the project may import which, read from the syntax tree of every file."""

import ast
import collections
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "tghmoe_jax"

# A part imports its own level and those below it; a dotted name stands for one module of a folder.
LEVELS = (
    {"ops"},
    {"models"},
    {"tools.chips", "tools.collectives", "tools.flops"},
    {"weights"},
    {"bases"},
    {"training"},
    {"reader"},
    {"app", "evaluate", "predict", "convert", "prepare", "verify", "tools", "studies"},
    {"train"},
    {"studies.ablate", "studies.deciding"},
    {"__main__", "ablate", "aot", "main", "selfcheck"},
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
# Light enough for worker processes: neither jax nor model code. Each names the others that it may import.
APART = {
    "scans": set(),
    "samples": {"scans"},
    "drawn": {"scans", "samples"},
    "datasets": {"scans", "samples"},
    "evaluation": {"scans", "samples", "datasets"},
}
REGISTRY = "tghmoe_jax.datasets.sources"  # knows the drawn data sets
SHOWN = "tghmoe_jax.app.examples"  # draws phantoms to look at; nothing else knows what is drawn
ANYWHERE = {"", "terminal", "errors", "untrusted", "writing", "digests"}  # what every command prints, reads and writes
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "torch", "tensorflow", "haiku"}
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def files(root):
    """Every source file the rule speaks of: the package, the configs, and the folders that use them."""
    return sorted(
        path for folder in (PACKAGE, "configs", "launch", "benchmarks") for path in root.glob(f"{folder}/**/*.py")
    )


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, root, known):
    """Absolute names a file imports anywhere in it, lazily too; a name taken from a package counts as its submodule."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in known else base)
    return found


def part_of(module):
    """The folder or file directly under the package; '' for the package itself."""
    return module.split(".")[1] if "." in module else ""


def level_of(module):
    """The level of a module that `LEVELS` names, else of its part."""
    return LEVEL.get(module.removeprefix(f"{PACKAGE}."), LEVEL.get(part_of(module)))


def may_import(module, target):
    """Whether one module of ours may import another."""
    if target.split(".")[0] == "configs":
        return target == "configs.common" and module.split(".")[0] == "configs"
    if module.split(".")[0] == "configs":
        return False
    own, other = part_of(module), part_of(target)
    if other == "main":
        return False
    if module.split(".")[0] != PACKAGE:
        return True  # benchmarks and the like stand above everything
    if module == PACKAGE:
        return other == "reader"  # `load`, through __getattr__ (see the test of eager imports)
    if own == other and own not in LEVEL:
        return True
    if own in ("terminal", "sharding"):
        return False
    if own in ANYWHERE:
        return other in {"errors": {"terminal"}}.get(own, ANYWHERE - {""})
    if other in ANYWHERE:
        return True
    if other == "drawn":
        return module in (REGISTRY, SHOWN)
    if own in APART:
        return other in APART[own]
    if other in APART:
        return level_of(module) >= LEVEL["bases"]  # ops and models are pure: arrays in, arrays out
    if other == "sharding":
        return True
    return level_of(module) >= level_of(target)


def violations(root):
    """One sentence for each import that breaks the rule."""
    sources = {module_name(path, root): path for path in files(root)}
    edges = {name: imports(path, root, sources) - {name} for name, path in sources.items()}
    found = []
    for name, targets in edges.items():
        top, part = name.split(".")[0], part_of(name)
        if top == PACKAGE and part not in {*LEVEL, *APART, *ANYWHERE, "sharding"}:
            found.append(f"{name} has no place in the import rule")
            continue
        for target in sorted(targets):
            outer = target.split(".")[0]
            if outer in (PACKAGE, "configs"):
                if not may_import(name, target):
                    found.append(f"{name} imports {target}")
            elif outer == "tests" or outer in PICKLING:
                found.append(f"{name} imports {target}")
            elif outer in HEAVY and top == PACKAGE and part in APART:
                found.append(f"{name} imports {target}")
    try:
        ours = {name: {target for target in targets if target in sources} for name, targets in edges.items()}
        graphlib.TopologicalSorter(ours).prepare()
    except graphlib.CycleError as error:
        found.append("cycle: " + " <- ".join(error.args[1]))
    return found


def unsafe_calls(root):
    """Every call that could run code held in a file."""
    found = []
    for path in files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            where = f"{path.relative_to(root)}:{node.lineno}"
            if ast.unparse(node.func) in ("torch.load", "eval", "exec", "builtins.eval", "builtins.exec"):
                found.append(f"{where} calls {ast.unparse(node.func)}")
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("allow_pickle", "trust_remote_code") and not off:
                    found.append(f"{where} passes {keyword.arg}")
    return found


def test_no_import_breaks_the_rule():
    assert violations(ROOT) == []


def test_no_two_classes_share_a_name():
    where = collections.defaultdict(list)
    for path in files(ROOT):
        if path.relative_to(ROOT).parts[0] == PACKAGE:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    where[node.name].append(module_name(path, ROOT))
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


def test_nothing_is_loaded_through_pickle_or_remote_code():
    assert unsafe_calls(ROOT) == []


def test_the_package_itself_imports_nothing_eagerly():
    for node in ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or PACKAGE} if isinstance(node, ast.ImportFrom) else set()
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names), names


@pytest.mark.parametrize("modules", ["tghmoe_jax", "tghmoe_jax.evaluation.outputs", "tghmoe_jax.samples.questions"])
def test_light_modules_bring_no_jax_with_them(modules):
    code = f"import sys, {modules}; sys.exit(bool({HEAVY!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def tree(root, **sources):
    """Writes a small project; `a__b` names the file a/b.py."""
    for name, text in sources.items():
        path = root / PACKAGE / (name.replace("__", "/") + ".py")
        path = root / (name.replace("__", "/") + ".py") if name.startswith("configs") else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "name, text",
    [
        ("ops__x", "from tghmoe_jax.models import y"),
        ("models__x", "import tghmoe_jax.weights.y"),
        ("models__x", "from ..training import y"),
        ("models__x", "from tghmoe_jax.samples import y"),
        ("training__x", "def f():\n    from tghmoe_jax import predict"),
        ("predict", "from tghmoe_jax.train import y"),
        ("train", "import tghmoe_jax.studies.ablate"),
        ("ablate", "import tghmoe_jax.main"),
        ("scans__x", "import jax.numpy"),
        ("samples__x", "def f():\n    import flax"),
        ("scans__x", "from tghmoe_jax.samples import y"),
        ("samples__x", "from tghmoe_jax.datasets import y"),
        ("datasets__x", "import tghmoe_jax.drawn.y"),
        ("evaluate", "import tghmoe_jax.drawn.y"),
        ("app__room", "import tghmoe_jax.drawn.y"),
        ("tools__flops", "from tghmoe_jax.training import y"),
        ("evaluation__x", "from tghmoe_jax.ops import y"),
        ("sharding__x", "from tghmoe_jax.models import y"),
        ("sharding__x", "from tghmoe_jax.errors import UserError"),
        ("errors", "import tghmoe_jax.scans.y"),
        ("digests", "import tghmoe_jax.weights.y"),
        ("ops__x", "from configs import common"),
        ("configs__x", "import tghmoe_jax.models.y"),
        ("configs__x", "import configs.stage1"),
        ("training__x", "import pickle"),
        ("helpers__x", "import os"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path, name, text):
    extra = {f"{part}__y": "" for part in (*APART, "models", "weights", "training", "ops")}
    extra |= dict.fromkeys(("configs__common", "configs__stage1", "predict", "train", "studies__ablate", "main"), "")
    assert len(violations(tree(tmp_path, **(extra | {name: text})))) == 1


@pytest.mark.parametrize(
    "name, text",
    [
        ("models__x", "import jax\nfrom tghmoe_jax.ops import y"),
        ("models__x", "from . import y"),
        ("training__x", "from ..models import y\nfrom tghmoe_jax.sharding import y"),
        ("train", "from tghmoe_jax import predict\nfrom tghmoe_jax.samples import y"),
        ("datasets__sources", "from tghmoe_jax.drawn import y"),
        ("app__examples", "from tghmoe_jax.drawn import y"),
        ("ablate", "from tghmoe_jax.studies.ablate import f"),
        ("tools__aot", "from tghmoe_jax.training import y\nfrom tghmoe_jax.tools import flops"),
        ("main", "from tghmoe_jax import train"),
        ("scans__x", "import numpy\nfrom tghmoe_jax.errors import UserError"),
        ("drawn__x", "from tghmoe_jax import digests"),
        ("digests", "from tghmoe_jax.errors import UserError"),
        ("configs__x", "from configs import common\nimport ml_collections"),
    ],
)
def test_an_allowed_import_passes(tmp_path, name, text):
    extra = {f"{part}__y": "" for part in (*APART, "models", "sharding", "training", "ops")}
    extra |= dict.fromkeys(("configs__common", "predict", "train", "main", "errors", "digests"), "")
    extra |= dict.fromkeys(("studies__ablate", "tools__flops"), "")
    assert violations(tree(tmp_path, **(extra | {name: text}))) == []


def test_a_cycle_is_seen_even_when_one_import_is_lazy(tmp_path):
    root = tree(
        tmp_path,
        ops__a="from tghmoe_jax.ops import b",
        ops__b="def f():\n    from tghmoe_jax.ops.a import g",
    )
    assert [text.split(":")[0] for text in violations(root)] == ["cycle"]


@pytest.mark.parametrize(
    "text",
    [
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "torch.load(f)",
        "eval(text)",
        "m(trust_remote_code=True)",
    ],
)
def test_an_unsafe_call_is_seen(tmp_path, text):
    assert len(unsafe_calls(tree(tmp_path, scans__x=text))) == 1


def test_a_safe_call_passes(tmp_path):
    assert (
        unsafe_calls(tree(tmp_path, scans__x="np.load(f, allow_pickle=False)\njax.eval_shape(f)\nre.compile(r)")) == []
    )
