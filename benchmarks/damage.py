"""Damages files of checkpoints, models and data, and checks what the program does with them.

    python -m benchmarks.damage [--cases 500] [--seed 0]

Each case spoils one file: a flipped bit, a cut, zeros, a deletion, or a file too many. Then a run is resumed and its
parameters are read, the model or the base is loaded, the prepared set is read, or the drawn volumes are. Outcomes:

    went on      damage was named, and the run goes on from the checkpoint before, bit for bit; volumes are drawn anew
    refused      one sentence that names the file or its folder
    harmless     the result is bitwise that of whole files
    told         the result differs, after a line on the error stream (a model without digests)
    SILENT       the result differs and nobody is told
    TRACEBACK    anything else
"""

import argparse
import collections
import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from tghmoe_jax.bases.base import EMBEDDED, load_base, tokenizer_of
from tghmoe_jax.datasets import prepared, preparing
from tghmoe_jax.datasets.file_source import FileSource
from tghmoe_jax.drawn.phantom_source import PhantomSource
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import leaf_names
from tghmoe_jax.training import checkpoints, run_folder, stored
from tghmoe_jax.training.loading import load_run
from tghmoe_jax.training.step import TrainState

KINDS = ("flip", "cut", "zero", "delete", "add")
BAD = ("SILENT", "TRACEBACK")
QUESTION = "Which plane is this? Ärzte 12.5 mm"


def spoil(file: Path, kind: str, rng: np.random.Generator) -> None:
    """Damages a file of at least one byte; `add` puts another beside it."""
    content = bytearray(file.read_bytes())
    at = int(rng.integers(max(1, len(content))))
    if kind == "flip":
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        end = at + int(rng.integers(1, 4097))
        content[at:end] = bytes(len(content[at:end]))
    if kind == "delete":
        file.unlink()
    elif kind == "add":
        file.with_name(file.name + ".1").write_bytes(content)
    else:
        file.write_bytes(content)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def state(step: int) -> TrainState:
    """A small state whose numbers belong to the step."""
    rng = np.random.default_rng(step)
    leaf = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    trained = {"connector/fc1/kernel": leaf(64, 32), "decoder/scan_1_2_1/block_1/mlp/up/kernel": leaf(2, 48, 32)}
    opt = jax.tree.map(lambda x: x + step, optax.adam(1e-3).init(trained))
    return TrainState(jnp.int32(step), trained, {"vision/cls": leaf(500), "vision/pos": leaf(32, 9)}, opt)


def numbers(step: int) -> grain.DatasetIterator:
    iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
    for _ in range(step):
        next(iterator)
    return iterator


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def write_run(folder: Path) -> Path:
    store = checkpoints.Checkpoints(folder, keep=2)
    for step in (2, 4):
        store.save(state(step), numbers(step))
    store.close()
    return folder


def resume(run: Path) -> str:
    """The outcome of going on with a run whose checkpoint of step 4 may be damaged."""
    said, store = [], checkpoints.Checkpoints(run, keep=2)
    try:
        iterator = numbers(0)
        found = store.restore(jax.tree.map(jnp.zeros_like, state(0)), iterator, said.append)
    finally:
        store.close()
    step = int(found.step)
    if bits(found) != bits(state(step)) or next(iterator) != step:
        return "SILENT"
    return "harmless" if step == 4 else "went on" if said and "step 4" in said[0] else "SILENT"


def read_params(run: Path) -> str:
    found, step = stored.load_params(run)
    expected = leaf_names.to_canonical({path: np.asarray(x) for path, x in state(4).params.items()})
    same = step == 4 and found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in found)
    return "harmless" if same else "SILENT"


# ---- an exported model -----------------------------------------------------------------------------------------------


def load(model: Path) -> str:
    """The outcome of loading a copy of the embedded reader."""
    found, whole = (load_run(one, "--checkpoint") for one in (model, "embedded"))
    same = (found.digest, found.config, found.manifest, found.model) == (
        whole.digest, whole.config, whole.manifest, whole.model
    )  # fmt: skip
    return "harmless" if same and found.tokenizer.encode(QUESTION) == whole.tokenizer.encode(QUESTION) else "SILENT"


def load_base_of(copy: Path) -> str:
    """The outcome of loading a copy of the embedded base."""
    found, whole = (load_base(one) for one in (str(copy), "embedded"))
    same = found.config == whole.config and bits(found.params) == bits(whole.params)
    ids = [tokenizer_of(one.folder, one.config).encode(QUESTION) for one in (found, whole)]
    return "harmless" if same and ids[0] == ids[1] else "SILENT"


# ---- data ------------------------------------------------------------------------------------------------------------


def write_set(raw: Path, folder: Path) -> Path:
    """A prepared set of twelve volumes of noise in three shards."""
    raw.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for number in range(12):
        np.save(raw / f"{number}.npy", rng.random((1, 8, 24, 24), np.float32))
        row = {"volume": f"{number}.npy", "case": str(number), "split": "train", "question": "Which?", "answer": "left"}
        rows.append(json.dumps(row) + "\n")
    (raw / "manifest.jsonl").write_text("".join(rows))
    data = {"name": "manifest", "root": str(raw), "manifest": "manifest.jsonl", "slices": 8, "size": 24}
    with mock.patch.object(prepared, "SHARD", 4):
        preparing.prepare(data, folder, say=lambda text: None)
    return folder


def digest_of_source(source) -> bytes:
    return b"".join(source.slices(index)[0].tobytes() for index in range(len(source)))


def read_set(folder: Path) -> str:
    data = {"name": "manifest", "manifest": "manifest.jsonl", "slices": 8, "size": 24, "channels": "windows3"}
    found, whole = (FileSource(data | {"root": str(one)}, "train") for one in (folder, folder.parent.parent / "set"))
    same = digest_of_source(found) == digest_of_source(whole)
    return "harmless" if same and found.digest() == whole.digest() else "SILENT"


def draw(root: Path) -> list[PhantomSource]:
    return [PhantomSource(root, split, 3, grid=(8, 24, 24)) for split in ("train", "test")]


def read_drawn(root: Path) -> str:
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        found = draw(root)
    whole = draw(root.parent.parent / "drawn")
    if [(digest_of_source(one), one.truths) for one in found] != [(digest_of_source(one), one.truths) for one in whole]:
        return "SILENT"
    return "went on" if "are drawn anew" in told.getvalue() else "harmless"


# ---- the campaign ----------------------------------------------------------------------------------------------------


def outcome(act: Callable[[Path], str], folder: Path) -> tuple[str, str]:
    """(outcome, what was said)."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            found = act(folder)
    except UserError as error:
        text = str(error)
        return ("refused" if "\n" not in text and folder.name in text else "TRACEBACK"), text
    except Exception as error:  # what a user would see as a traceback
        return "TRACEBACK", f"{type(error).__name__}: {error}"
    return ("told" if found == "SILENT" and told.getvalue() else found), told.getvalue()


def campaign(cases: int, seed: int, folder: Path, progress=print) -> list[dict[str, str]]:
    """One record a case: {what, file, kind, outcome, said}. Files and kinds go round, places are drawn."""
    logging.set_verbosity(logging.ERROR)
    draw(folder / "drawn")
    whole = {
        "checkpoint": write_run(folder / "run"), "model": Path(shutil.copytree(run_folder.EMBEDDED, folder / "m")),
        "base": Path(shutil.copytree(EMBEDDED, folder / "b")), "set": write_set(folder / "raw", folder / "set"),
        "caches": folder / "drawn",
    }  # fmt: skip
    acts = {
        "resume": ("checkpoint", resume), "parameters": ("checkpoint", read_params), "load": ("model", load),
        "base": ("base", load_base_of), "prepared set": ("set", read_set), "drawn caches": ("caches", read_drawn),
    }  # fmt: skip
    rng, targets = np.random.default_rng(seed), []
    for what, (kept, _) in acts.items():
        places = (whole[kept] / ("checkpoints/4" if kept == "checkpoint" else ".")).rglob("[!.]*")
        files = sorted(p.relative_to(whole[kept]) for p in places if p.is_file())
        targets.append([(what, file, kind) for file in files for kind in KINDS])
        rng.shuffle(targets[-1])
    found = []
    for number in range(cases):
        own = targets[number % len(targets)]
        what, file, kind = own[number // len(targets) % len(own)]
        kept, act = acts[what]
        copy = Path(shutil.copytree(whole[kept], folder / "copy" / f"case-{number}"))
        spoil(copy / file, kind, rng)
        result, said = outcome(act, copy)
        shutil.rmtree(copy)
        found.append({"what": what, "file": str(file), "kind": kind, "outcome": result, "said": said})
        if result in BAD:
            progress(f"{result}: {what} {file} {kind}: {said}")
    return found


def table(found: list[dict[str, str]]) -> str:
    outcomes = [*dict.fromkeys(one["outcome"] for one in found), *BAD]
    outcomes = list(dict.fromkeys(outcomes))
    counts = collections.Counter((one["what"], one["kind"], one["outcome"]) for one in found)
    lines = [f"| what | damage | {' | '.join(outcomes)} |", "|---" * (len(outcomes) + 2) + "|"]
    for what, kind in dict.fromkeys((one["what"], one["kind"]) for one in sorted(found, key=lambda one: one["what"])):
        lines.append(f"| {what} | {kind} | {' | '.join(str(counts[what, kind, one]) for one in outcomes)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(args.cases, args.seed, Path(folder))
    print(table(found))
    return int(any(one["outcome"] in BAD for one in found))


if __name__ == "__main__":
    sys.exit(main())
