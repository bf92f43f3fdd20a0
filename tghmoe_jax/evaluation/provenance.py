"""`manifest.json` of an evaluation: what was scored, by which rules and versions. It names no patient's file."""

import hashlib
import importlib.metadata
import platform
import sys
from pathlib import Path

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


def manifest(run: Run, *, seed: int, **known: object) -> dict[str, object]:
    """Versions, rules, seeds and items of an evaluation; `known` says what else is certain (inputs, checkpoint)."""
    return {
        # The package offers `load`, whose module imports this one: importing the package here would be a cycle.
        "tghmoe_jax": sys.modules["tghmoe_jax"].__version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "rules": RULES,
        "seed": seed,
        "resamples": statistics.RESAMPLES,
        "items": {kind: len(run.get(kind, ())) for kind in KINDS},
        "empty_outputs": {kind: sum(not one.output.strip() for one in run.get(kind, ())) for kind in KINDS},
        **known,
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
