"""A run without its training state: one safetensors file under canonical names in place of the checkpoints.

    config.json  manifest.json  model.safetensors  README.md  model/{config.json, tokenizer.json, tokenizer_config.json}
    digests.json

The rest of the folder is that of a run (run_folder.py), so whatever reads a run reads this too. The manifest adds the
step, the scores of the run's last evaluation and the digest of the parameters, which is checked whenever they are read,
as are those of the files.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from etils import epath

from tghmoe_jax import digests, untrusted, writing
from tghmoe_jax.bases.base import DTYPES
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import model_card, run_folder
from tghmoe_jax.weights import storage

_SCORES = ("metrics.json", "second_style/metrics.json", "third_style/metrics.json", "adversarial.json")


def digest(canonical: Mapping[str, np.ndarray]) -> str:
    """16 hex digits that name a set of canonical parameters: of sha256 over names and bytes in order of name."""
    whole = hashlib.sha256()
    for name in sorted(canonical):
        whole.update(name.encode())
        whole.update(np.ascontiguousarray(canonical[name]).reshape(-1).view(np.uint8))
    return whole.hexdigest()[:16]


def write(run: Path, params: Mapping[str, np.ndarray], step: int, folder: Path, dtype: str) -> list[Path]:
    """Writes the parameters of a run's `step` without the auxiliary head, which only training uses.

    `params` are canonical and merged (`stored.load_merged`); `dtype` is a key of `bases.base.DTYPES`. Returns
    the files written.
    """
    config = run_folder.read_config(run)
    if "lora" in config["model"]:
        config["model"]["lora"]["rank"] = 0
    kept = {name: np.asarray(value).astype(DTYPES[dtype]) for name, value in sorted(params.items())
            if not name.startswith("aux_head/")}  # fmt: skip
    manifest = run_folder.read_manifest(run)
    evaluation = run / "eval" / str(step)
    files = {name: evaluation / name for name in _SCORES}
    scores = {name: untrusted.read_json(file, {str: object}) for name, file in files.items() if file.is_file()}
    manifest["calibration"] = {kind: one.to_json() for kind, one in run_folder.read_calibration(run, step).items()}
    # The folder's name alone, not a path of a machine; `embedded` alone means the base inside the package.
    base = dict(manifest.get("base") or {})
    manifest["base"] = {"base": _name_of(base.get("base", "unknown")), "init_from": _name_of(base.get("init_from", ""))}
    for section, key in ((config, "base"), (config, "init_from"), (config["data"], "root")):
        section[key] = Path(section[key]).name
    scores = scores or manifest.get("scores", {})  # of a run that was exported before
    name = manifest.get("name") or run.resolve().name
    manifest |= {"name": name, "step": step, "dtype": dtype, "digest": digest(kept), "scores": scores}
    manifest["files"] = f"{digests.FILE} (sha256)"  # it belongs to this folder
    manifest = run_folder.sealed(manifest)
    card = model_card.card(manifest, config)
    files = storage.write_tensors(folder, kept, max_shard_bytes=1 << 62)
    run_folder.write_model(folder, run_folder.read_base_config(run), run_folder.model_folder(run))
    writing.write(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    writing.write(folder / "README.md", card)
    text = json.dumps(config, indent=1) + "\n"
    found = digests.of_files(folder, digests.files(folder))
    digests.write(folder, found | {"config.json": digests.of_bytes(text.encode())})
    writing.write(folder / "config.json", text)  # last: it makes the folder a run
    return files


def _name_of(base: str) -> str:
    """What a manifest may say of a base: never a path, and `embedded` of none but the package's own."""
    if base in ("", "embedded", "unknown") or base.startswith("folder "):
        return base
    return "folder " + Path(base).name


def is_exported(run: epath.Path) -> bool:
    return (run / storage.SINGLE).is_file() and not (run / "checkpoints").is_dir()


def read(folder: epath.Path) -> tuple[dict[str, np.ndarray], int]:
    """Canonical parameters in the dtype they are stored in, and their step. UserError where they were altered."""
    digests.tell_absence(folder)
    expected = digests.read(folder)
    if expected and digests.of_file(storage.local_folder(folder) / storage.SINGLE) != expected.get(storage.SINGLE):
        raise UserError(f"{folder / storage.SINGLE} has changed since it was written; copy the folder again.")
    params = {name: tensor.load() for name, tensor in storage.read_tensors(folder).items()}
    manifest = run_folder.read_manifest(folder)
    if not isinstance(manifest.get("step"), int) or manifest.get("digest") != digest(params):
        raise UserError(
            f"{folder / storage.SINGLE} does not hold the parameters that manifest.json names; copy the folder again."
        )
    return params, manifest["step"]
