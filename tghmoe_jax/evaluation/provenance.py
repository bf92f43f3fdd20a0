"""`manifest.json` of an evaluation: what was scored, by which rules and versions. It names no patient's file."""

import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tghmoe_jax.evaluation import statistics
from tghmoe_jax.evaluation.protocols import Run
from tghmoe_jax.samples.tasks import KINDS

LIBRARIES = ("sacrebleu", "rouge_score", "nltk", "pycocoevalcap", "bert-score", "numpy")
RULES = {
    "closed/accuracy": "M3D: `<letter>.` occurs anywhere in the output",
    "closed/accuracy_strict": "the output starts with exactly one option letter as A, A., (A) or A), or is an option",
    "aggregation": "mean of sample scores; corpus_bleu of summed counts; an empty output scores 0",
    "interval": "95 % percentile bootstrap over cases, or volumes where no case is known; "
    "Wilson's where all of them agree",
}


def manifest(run: Run, **known: object) -> dict[str, object]:
    """Versions, rules, seeds and items of an evaluation; `known` says what else is certain (inputs, checkpoint)."""
    return {
        # The package offers `load`, whose module imports this one: importing the package here would be a cycle.
        "tghmoe_jax": sys.modules["tghmoe_jax"].__version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "rules": RULES,
        "seed": statistics.SEED,
        "resamples": statistics.RESAMPLES,
        "items": {kind: len(run.get(kind, ())) for kind in KINDS},
        "empty_outputs": {kind: sum(not one.output.strip() for one in run.get(kind, ())) for kind in KINDS},
        **known,
    }


def checkout() -> dict[str, Any] | None:
    """Commit of the checkout that this package lies in; None for an installed package or without git."""
    folder = Path(__file__).resolve().parents[2]

    def ask(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        done.check_returncode()
        return done.stdout.strip()

    try:
        # A package installed into another project's environment must not report that project's commit.
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != folder:
            return None
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def made_by() -> dict[str, str]:
    """Date, version and command of what is written now, for the head of a page."""
    found, version = checkout(), sys.modules["tghmoe_jax"].__version__
    commit = f"commit {found['commit'][:12]}{', with changes' if found['dirty'] else ''}" if found else "no checkout"
    program, *arguments = sys.orig_argv
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "code": f"tghmoe_jax {version}, {commit}",
        "command": shlex.join([Path(program).name, *arguments]),
    }


def digest(*files: str | Path) -> str:
    """SHA-256 of the bytes of the files, one after the other."""
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as data:
            hashlib.file_digest(data, lambda: whole)
    return whole.hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
