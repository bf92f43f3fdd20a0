"""Opens and writes a 2D base model: a folder with config.json, safetensors weights and tokeniser files."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.weights import adapt, llava, storage
from tghmoe_jax.weights.phi3v import export_phi3v, import_phi3v

EMBEDDED = Path(__file__).parent.parent / "assets" / "base"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of 2D model: its names in config.json, a tensor name only it has, and its porting functions.

    The first architecture is the one that is written.
    """

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    mark: str
    to_flax: Callable[[Mapping, Mapping], dict[str, np.ndarray]]
    to_checkpoint: Callable[[Mapping, Mapping], dict[str, np.ndarray]]
    flatten: Callable[[Mapping], dict]  # config.json -> the flat form that the model is built from


def _flat_phi3v(config: Mapping) -> dict:
    """The unmerged Hugging Face port nests the decoder's part; the published file is flat."""
    config = dict(config)
    return dict(config.pop("text_config", {})) | config


FAMILIES = {
    "phi3_v": Family(
        ("Phi3VForCausalLM",), ("phi3_v",), r".*(glb_GN|glb_newline)", import_phi3v, export_phi3v, _flat_phi3v
    ),
    "llava": Family(
        ("LlavaForConditionalGeneration", "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM"),
        ("llava", "llava_llama", "llava_mistral", "llava_qwen2"),
        r".*(multi_modal_projector\.linear_1|mm_projector\.0).+", llava.import_llava, llava.export_llava, llava.flatten,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Base:
    """A 2D model in memory. `config`: its config.json; `params`: flat canonical dict in the checkpoint's dtype."""

    config: dict
    params: dict[str, np.ndarray]
    folder: Path
    family: str


def base_folder(folder: str | os.PathLike) -> Path:
    """The folder of a base; `embedded` is the tiny one inside the package."""
    return EMBEDDED if str(folder) == "embedded" else storage.local_folder(folder)


def load_config(folder: str | os.PathLike) -> dict:
    """Reads the config.json of a base, in the flat form of the published Phi-3-V (`Family.flatten`)."""
    try:
        config = json.loads((base_folder(folder) / "config.json").read_text())
        return FAMILIES[_said(config)].flatten(config)
    except UserError as error:
        raise about_base(folder, error) from error
    except FileNotFoundError as error:
        raise UserError(f"--config.base={folder} has no config.json; name the folder of a 2D base model.") from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"--config.base={folder}: config.json cannot be read ({error}); copy it again.") from error


def load_base(folder: str | os.PathLike) -> Base:
    """Reads and converts a 2D base; every tensor is accounted for. UserError names --config.base and all problems."""
    config = load_config(folder)
    try:
        path = base_folder(folder)
        tensors = storage.read_tensors(path)
        family = detect(config, tensors)
        return Base(config, FAMILIES[family].to_flax(tensors, config), path, family)
    except UserError as error:
        raise about_base(folder, error) from error


def about_base(folder: str | os.PathLike, error: UserError) -> UserError:
    """The same error, naming the flag it came through."""
    return UserError(f"--config.base={folder}: {error}")


def _said(config: Mapping) -> str:
    """The family that a config.json names. UserError for any other architecture."""
    said = [*(config.get("architectures") or []), config.get("model_type")]
    found = [key for key, one in FAMILIES.items() if {*one.architectures, *one.model_types} & set(said)]
    if not found:
        known = ", ".join(one.architectures[0] for one in FAMILIES.values())
        raise UserError(f"config.json names the architecture {said[0] or 'none'}; use one of {known}.")
    return found[0]


def detect(config: Mapping, names: Mapping) -> str:
    """The family that config.json names; it must agree with the tensor names."""
    family = _said(config)
    if not any(re.fullmatch(FAMILIES[family].mark, name) for name in names):
        what = {"phi3_v": "newline embeddings", "llava": "projector"}[family]
        raise UserError(
            f"config.json says {family} but no tensor is named like its {what}; use the config.json that belongs to "
            "the weights."
        )
    return family


def save_base(
    folder: str | os.PathLike,
    flat: Mapping[str, np.ndarray],
    config: Mapping,
    dtype: str | None = "bfloat16",
    max_shard_bytes: int = 1 << 30,
) -> list[Path]:
    """Writes a 2D model under its family's published names with config.json; returns the files written.

    `flat` may come from the 3D model at patch depth 1 without experts, as `configs/pretrain2d.py` trains it. `dtype`
    None keeps the arrays' own. Raises before anything is written where `flat` is not the model of `config`.
    """
    family = FAMILIES[config.get("model_type", "phi3_v")]
    flat = {path: np.asarray(leaf) for path, leaf in adapt.as_2d(flat).items()}
    if dtype is not None:
        flat = {path: leaf.astype(DTYPES[dtype], copy=False) for path, leaf in flat.items()}
    tensors = family.to_checkpoint(flat, config)
    named = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    named |= dict(config.get("published") or config)
    if dtype is not None:
        named["torch_dtype"] = dtype
    files = storage.write_tensors(folder, tensors, max_shard_bytes)
    storage.write_text(Path(folder) / "config.json", json.dumps(named, indent=2) + "\n")
    return [*files, Path(folder) / "config.json"]
