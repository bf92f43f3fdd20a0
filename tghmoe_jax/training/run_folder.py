"""A run's folder, on a disk or at a URL: what it must hold, when it may be continued, and how another run finds it.

config.json  manifest.json  params.txt  model/{config.json, tokenizer.json, ...}  checkpoints/  metrics.jsonl  eval/
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from tghmoe_jax import digests, untrusted, writing
from tghmoe_jax.bases.base import check_sizes
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.calibration import Calibration
from tghmoe_jax.evaluation.protocols import CONTROLS, score, scores_of
from tghmoe_jax.models import config as model_config
from tghmoe_jax.training import kinds
from tghmoe_jax.training.selection import LOSS
from tghmoe_jax.weights import storage

EMBEDDED = Path(__file__).parent.parent / "assets" / "reader"
# Data sets that are drawn: what a checkpoint has seen of them says little about a scan of a patient.
SYNTHETIC = {"phantom": "drawn phantoms", "patients": "drawn patients", "scenes": "drawn 2D pictures"}
CALIBRATION = "calibration.json"  # of an evaluation
MODEL = "model"  # the 2D base's config.json and tokeniser, so that a run can be read without its base
_OF_BASE = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")  # copied where the base has them
_SEAL = "sealed"
_AGAIN = "copy the run again, or delete it and train again"
_ADDED = {"data.share": 1.0}  # keys that configs of earlier versions lack, with what these versions did
_MAY_CHANGE = ("train.steps", "train.bad_steps", "checkpoint.", "eval.", "mesh.", "model.tgh.transport")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} with tuples as lists, as JSON keeps them."""
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    result = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            result.update(flatten(value, name + "."))
        else:
            result[name] = json.loads(json.dumps(value))
    return result


_AT_LEAST = {
    "train.steps": 1, "train.bad_steps": 1, "train.batch": 1, "train.accumulate": 1, "train.seed": 0,
    "checkpoint.every": 1, "checkpoint.keep": 1, "eval.every": -1, "eval.items": 2, "eval.batch": 1,
    "eval.new_tokens": 1, "eval.answer_tokens": 1, "eval.seed": 0, "eval.transfer": 0, "eval.adversarial": 0,
    "eval.calibration": 0, "eval.patience": 0,
    "data.volumes": 1, "data.slices": 1, "data.size": 1, "data.text_length": 1, "data.workers": 0,
    "model.patch_depth": 1, "model.depth_pool": 1, "model.spatial_pool": 1, "model.tgh.experts": 1,
    "model.tgh.hidden": 1,
}  # fmt: skip

# Beyond these a size is a mistake that would take the memory of the machine, or its time, before anybody notices.
_AT_MOST = {
    "data.slices": 1 << 12, "data.size": 1 << 12, "data.text_length": 1 << 20, "data.workers": 1 << 10,
    "model.patch_depth": 1 << 10, "model.depth_pool": 1 << 10, "model.spatial_pool": 1 << 10,
    "model.attn3d_window": 1 << 12, "model.depth_rope.rotary_dim": 1 << 12, "model.tgh.groups": 1 << 10,
    "model.tgh.experts": 1 << 12, "model.tgh.top_k": 1 << 12, "model.tgh.hidden": 1 << 16, "model.lora.rank": 1 << 12,
    "train.batch": 1 << 20, "train.accumulate": 1 << 16, "eval.batch": 1 << 16, "eval.items": 1 << 24,
    "eval.new_tokens": 1 << 20, "eval.answer_tokens": 1 << 20, "mesh.data": 1 << 20, "mesh.fsdp": 1 << 20,
    "mesh.expert": 1 << 20,
}  # fmt: skip
_MOST_WHOLE = (1 << 31) - 1
_MOST_VOXELS = 1 << 30  # of a volume on the model's grid

_ABOVE_ZERO = (
    "optimizer.eps", "optimizer.clip", "model.tgh.capacity_factor", "model.lora.alpha", "model.depth_rope.base",
    "model.depth_rope.reference_mm",
)  # fmt: skip
_BELOW_ONE = ("optimizer.b1", "optimizer.b2")


def check_config(config: ConfigDict) -> None:
    """UserError for an invalid number, before anything is read or drawn."""
    if wrong := untrusted.fault(json.loads(json.dumps(config.to_dict())), kinds.CONFIG):
        raise UserError(f"--config.{wrong}; correct it.")
    flat = flatten(config)
    if wrong := _wrong_number(flat, config.mode == "evaluate"):
        raise UserError(f"--config.{wrong}")
    for key in ("eval.transfer", "eval.adversarial"):
        if flat[key] == 1:
            raise UserError(f"--config.{key}=1 is too small to shuffle volumes; give 2 or more, or 0 for none.")
        if flat[key] and flat["data.name"] not in ("phantom", ""):
            raise UserError(f"--config.{key}={flat[key]} needs the phantom; {flat['data.name']} has no such test.")
    if (best := flat.get("eval.best", LOSS)) not in (LOSS, *scores_of(score({}))):
        raise UserError(f"--config.eval.best={best} is no score of metrics.json; give one of these, or {LOSS}.")
    if unknown := [name for name in flat.get("eval.controls", ()) if name not in CONTROLS]:
        raise UserError(f"--config.eval.controls: {unknown[0]!r} is unknown; use some of {', '.join(CONTROLS)}.")
    for key in ("mesh.data", "mesh.fsdp", "mesh.expert"):
        if flat[key] < 1 and flat[key] != -1:
            raise UserError(f"--config.{key}={flat[key]} is too small; give 1 or more, or -1 for all that is left.")
    drawn = flat["data.name"] in SYNTHETIC
    for key in ("data.augment.intensity", "data.augment.shift"):
        if flat.get(key) and drawn:
            raise UserError(f"--config.{key}={flat[key]} needs a data set of files; {flat['data.name']} is drawn.")
    if not 0 < flat.get("data.share", 1.0) <= 1:
        raise UserError(f"--config.data.share={flat['data.share']} is no share; give more than 0 and at most 1.")
    if not 0 <= flat["max_bad_fraction"] <= 1:
        raise UserError(f"--config.max_bad_fraction={flat['max_bad_fraction']} is not a share; give 0 to 1.")
    if len(flat["loss.task"]) != len(flat["model.tasks"]):
        raise UserError(
            f"--config.loss.task holds {len(flat['loss.task'])} weights; give one for each of the "
            f"{len(flat['model.tasks'])} tasks of model.tasks."
        )


def _wrong_number(flat: Mapping[str, Any], own_text: bool) -> str:
    """`KEY=VALUE is ...` for the first number of a flat config that is out of its bounds; empty where none is.

    `own_text`: a text length of 0 is that of a run.
    """
    for key, value in flat.items():
        if wrong := _wrong_rate(key, value):
            return wrong
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and value > (most := _AT_MOST.get(key, _MOST_WHOLE)):
            return f"{key}={value} is too large; give {most} or less."
    for key, least in _AT_LEAST.items():
        if key == "data.slices" and flat["data.name"] == "scenes":
            least = 0  # text alone
        if key == "data.text_length" and own_text:
            least = 0
        if flat.get(key, least) < least:  # runs of earlier versions lack the newest keys
            return f"{key}={flat[key]} is too small; give {least} or more."
    if (voxels := flat["data.slices"] * flat["data.size"] ** 2) > _MOST_VOXELS:
        return f"data.slices and data.size make volumes of {voxels} voxels; give {_MOST_VOXELS} or less."
    return ""


def _wrong_rate(key: str, value: Any) -> str:
    """The same of a rate, weight or factor, or one in a list, that is not finite, is negative, or has no effect."""
    if isinstance(value, list):
        return next((wrong for one in value if (wrong := _wrong_rate(key, one))), "")
    if not (isinstance(value, float) or (isinstance(value, int) and key.startswith(("loss.", "optimizer.")))):
        return ""
    if not 0 <= value < math.inf:
        return f"{key} holds {value}; give a finite number of at least 0."
    if not value and key in _ABOVE_ZERO:
        return f"{key}={value} must be above 0."
    return f"{key}={value} must be below 1." if value >= 1 and key in _BELOW_ONE else ""


def check_workdir(config: ConfigDict, workdir: epath.PathLike) -> None:
    """UserError where `workdir` holds a run of another config; keys in _MAY_CHANGE do not count."""
    folder = place(workdir, "--workdir")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder.")
    if (folder / "model.safetensors").is_file():
        raise UserError(f"--workdir {workdir} holds an exported model; name another folder.")
    if not (folder / "config.json").is_file():
        if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
            raise UserError(
                f"--workdir {workdir} holds checkpoints but no config.json; copy that back, or name another folder."
            )
        return
    differ = differing(flatten(read_config(workdir)), flatten(config), _MAY_CHANGE)
    if differ:
        raise UserError(
            f"--workdir {workdir} holds a run of another config, which differs in {', '.join(differ)}; "
            "choose another --workdir or delete that folder."
        )


def differing(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    """The keys of two flat configs that differ, but for those that begin with one of `free`."""
    old, new = _ADDED | old, _ADDED | new
    keys = (key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
    return [key for key in keys if not key.startswith(free)]


def read_config(run: epath.PathLike) -> dict[str, Any]:
    """A run's resolved config in today's form. UserError where the folder is not a run, or needs another version."""
    file = epath.Path(run) / "config.json"
    if not file.is_file():
        raise UserError(f"{run} is not a run (it has no config.json); name the folder that a training wrote.")
    config = untrusted.read_json(file, kinds.CONFIG, remedy=_AGAIN)
    config["model"] = model_config.current(config.get("model", {}))
    flat = flatten(config)
    wrong = [f"it lacks {key}" for key in kinds.REQUIRED if key not in flat]
    wrong += [f"{key} is unknown" for key in flat if key.startswith(kinds.CLOSED) and key not in kinds.REQUIRED]
    wrong = wrong or [_wrong_number(flat, flat.get("mode") == "evaluate").partition(";")[0].rstrip(".")]
    if wrong[0]:
        raise UserError(f"{file}: {wrong[0]}; {_AGAIN}.")
    return config


def read_manifest(run: epath.PathLike) -> dict[str, Any]:
    """What a run recorded about itself; empty where it has no manifest. UserError where it is damaged."""
    file = epath.Path(run) / "manifest.json"
    if not file.is_file():
        return {}
    manifest = untrusted.read_json(file, kinds.MANIFEST, remedy=_AGAIN)
    if _SEAL in manifest and manifest[_SEAL] != sealed(manifest)[_SEAL]:
        raise UserError(f"{file}: its domain or input_ranges have changed since they were written; {_AGAIN}.")
    return manifest


def read_calibration(run: epath.PathLike, step: int) -> dict[str, Calibration]:
    """{kind: what the evaluation at `step` found that confidence means}, of an export from its manifest; empty where
    there is none. UserError where it is damaged."""
    file = epath.Path(run) / "eval" / str(step) / CALIBRATION
    found = untrusted.read_json(file, {str: {}}) if file.is_file() else read_manifest(run).get("calibration", {})
    try:
        return {kind: Calibration.of(one) for kind, one in found.items()}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{file if file.is_file() else run} holds no valid calibration ({error}); evaluate the run "
            "again, or copy it again."
        ) from error


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the digest of what its model was trained on: the refusal of reports and the warnings about a
    scan rest on that alone."""
    kept = json.dumps([manifest.get(key) for key in ("domain", "origin", "input_ranges")], sort_keys=True)
    return manifest | {_SEAL: hashlib.sha256(kept.encode()).hexdigest()[:16]}


def place(path: epath.PathLike, flag: str) -> epath.Path:
    """A folder on a disk or at a URL. UserError where URLs of its kind cannot be reached from here."""
    if "://" in str(path):
        try:
            epath.Path(path).exists()
        except Exception as error:  # each kind of URL has errors of its own
            why = " ".join(str(error).split())[:200].rstrip(".")
            raise UserError(f"{flag} {path} cannot be reached ({why}); docs/hosts.md says what URLs need.") from error
    return epath.Path(path)


def find(run: str, flag: str) -> epath.Path:
    """The folder of a finished run or of an exported one; `embedded` is the reader inside the package.

    UserError names the flag and the remedy.
    """
    folder = place(EMBEDDED if run == "embedded" else run, flag)
    parameters = (folder / "checkpoints").is_dir() or (folder / "model.safetensors").is_file()
    if not (folder / "config.json").is_file() or not parameters:
        hint = "python -m tghmoe_jax.main --config configs/stage1.py" if "stage1" in run else "its training"
        what = "" if (folder / "config.json").is_file() else " (it has no config.json)"
        raise UserError(f"{flag}={run} is not a finished run{what}; run {hint} first, or name another run.")
    if not (folder / "checkpoints").is_dir() and (wrong := damage_of_export(folder)):
        raise UserError(f"{flag}={run} is damaged ({digests.told(wrong)}); copy it again, or name another.")
    return folder


def damage_of_export(folder: epath.Path) -> list[str]:
    """What is wrong with the files that describe an exported model; its parameters are looked at when they are read."""
    if lacks_digests(folder):
        return [f"{digests.FILE} is missing"]
    return digests.problems(folder, lambda name: not name.endswith(".safetensors"))


def lacks_digests(folder: epath.Path) -> bool:
    """Whether the digests of an exported model have gone; earlier versions wrote none."""
    return not (folder / digests.FILE).exists() and "files" in read_manifest(folder)


def record_steps(run: epath.PathLike, step: int, steps: int) -> int:
    """The `train.steps` that the run had so far; a change of it at `step` is added to the manifest's `schedules`."""
    manifest = read_manifest(run)
    changes = manifest.get("schedules", [])
    before = changes[-1].get("steps") if changes else flatten(read_config(run))["train.steps"]
    if before != steps:
        manifest["schedules"] = [*changes, {"from_step": step, "steps": steps, "steps_before": before}]
        writing.write(epath.Path(run) / "manifest.json", json.dumps(manifest, indent=1))
    return before


def model_folder(run: epath.PathLike) -> epath.Path:
    return epath.Path(run) / MODEL


def read_base_config(run: epath.PathLike) -> dict[str, Any]:
    """The 2D base's config.json as the run recorded it."""
    config = untrusted.read_json(model_folder(run) / "config.json", {}, remedy=_AGAIN)
    try:
        check_sizes(config)
    except UserError as error:
        raise UserError(f"{model_folder(run)}: {error}") from error
    return config


def write_model(folder: epath.PathLike, base_config: dict, tokenizer: epath.PathLike) -> None:
    """Writes the 2D base's config.json and copies its tokeniser files."""
    model = model_folder(folder)
    model.mkdir(parents=True, exist_ok=True)
    writing.write(model / "config.json", json.dumps(base_config, indent=1))
    storage.copy_files(_OF_BASE, tokenizer, model)


def write_description(
    workdir: epath.PathLike, config: ConfigDict, base_config: dict, tokenizer: epath.PathLike, table: str,
    manifest: dict[str, Any],
) -> None:  # fmt: skip
    """Writes what describes a run, before its first step; config.json last, since it makes the folder a run."""
    folder = epath.Path(workdir)
    write_model(workdir, base_config, tokenizer)
    writing.write(folder / "params.txt", table + "\n")
    writing.write(folder / "manifest.json", json.dumps(sealed(manifest), indent=1))
    writing.write(folder / "config.json", json.dumps(config.to_dict(), indent=1))
