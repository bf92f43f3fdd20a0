"""Small sets of scans whose answer to a question of `ablate --question` is known by how they were made.

depth      bright and dark slices of a slab in two orders that have the same slices: no single slice tells them apart
too_few    stripes over patches of random brightness, which 32 volumes teach better than 16
conflict   the report states the opposite of what the questions ask for, in the same words
words      the question's own words give the answer, whatever the scan shows
"""

import json
from pathlib import Path

import numpy as np

from tests import tiny_run

GRID = (8, 32, 32)
# {name: (question, the verdict: `first` or `second` side better, or `equal`)}
ANSWERS = {
    "depth": ("slices", "first"), "too_few": ("volumes", "first"), "conflict": ("tasks", "second"),
    "words": ("scan", "equal"),
}  # fmt: skip
VOLUMES = {"depth": 200, "too_few": 32, "conflict": 200, "words": 60}
STEPS = {"depth": 150, "too_few": 100, "conflict": 30, "words": 60}
# Validation volumes; of 100 that all agree a difference of 0.02 is not excluded.
ASKED = {"depth": 100, "too_few": 100, "conflict": 100, "words": 200}


def _plain(rng: np.random.Generator) -> np.ndarray:
    return 0.4 + rng.normal(0, 0.05, GRID)


def _depth(rng: np.random.Generator, answer: int) -> np.ndarray:
    """Slabs of 4 slices, two of them bright: 1 0 1 0 or 1 1 0 0, from a random slice of the pattern on."""
    pattern = np.array([[1, 0, 1, 0], [1, 1, 0, 0]][answer])
    return _plain(rng) + 0.3 * np.tile(pattern, 2)[:, None, None]


def _texture(rng: np.random.Generator, answer: int) -> np.ndarray:
    """Stripes along rows or along columns, from a random place on, over quadrants of random brightness."""
    volume = _plain(rng)
    volume += np.kron(rng.normal(0, 0.1, (1, 4, 4)), np.ones((1, 8, 8)))
    stripes = np.where((np.arange(GRID[1]) + rng.integers(8)) // 4 % 2, 0.1, -0.1)
    return volume + (stripes[:, None] if answer else stripes)


def _bright(rng: np.random.Generator, answer: int) -> np.ndarray:
    return _plain(rng) + 0.3 * answer


def _lines(name: str, volume: str, split: str, answer: int, rng: np.random.Generator) -> list[dict]:
    where = {"volume": volume, "case": volume, "split": split}
    choices = ["no", "yes"]
    ask = {"question": "Is there a pleural effusion?", "choices": choices, "answer": choices[answer]}
    if name == "words":
        told = int(rng.integers(2))
        ask = {"question": f"Say {choices[told]}.", "choices": choices, "answer": choices[told]}
    lines = [where | ask]
    if name == "conflict":
        report = ["There is a pleural effusion.", "There is no pleural effusion."][answer]
        lines.append(where | {"question": "", "task": "report", "answer": report})
    return lines


def write(name: str, folder: Path) -> list[str]:
    """The set `name`, below `folder`, and the flags that train on it from a tiny random base."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    draw = {"depth": _depth, "too_few": _texture}.get(name, _bright)
    lines = []
    for split, count in (("train", VOLUMES[name]), ("validation", ASKED[name])):
        for number in range(count):
            file = f"{split}{number}.npy"
            answer = number % 2
            np.save(folder / file, np.clip(draw(rng, answer), 0, 1).astype(np.float32)[None])
            lines += _lines(name, file, split, answer, rng)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny_run.write_base(folder / "base")
    report = int(name == "conflict")
    sizes = {
        "base": folder / "base", "data.root": folder, "data.name": "manifest",
        "data.manifest": folder / "manifest.jsonl", "data.volumes": 1, "data.channels": "repeat",
        "model.patch_depth": 4, "data.mixture.report": report, "data.mixture.open": 0, "data.mixture.closed": 1,
        "data.mixture.binding": 0, "train.accumulate": 1, "train.steps": STEPS[name], "checkpoint.every": STEPS[name],
        "eval.items": ASKED[name], "eval.batch": 50, "eval.new_tokens": 12, "data.text_length": 48,
        "model.aux_findings": False, "loss.aux": 0.0, "optimizer.rate": 5e-3,
    }  # fmt: skip
    changed = [f"--config.{key}={value}" for key, value in sizes.items()]
    kept = [flag for flag in tiny_run.options(folder) if flag.partition("=")[0] not in
            {one.partition("=")[0] for one in changed}]  # fmt: skip
    return kept + changed
