"""Opens and writes a 2D base model: a folder with config.json, safetensors weights and tokeniser files."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from tghmoe_jax.bases import llava, phi3v
from tghmoe_jax.bases.phi3v import export_phi3v, import_phi3v
from tghmoe_jax.errors import UserError
from tghmoe_jax.weights import adapt, storage

CONVERTED = "converted"  # in config.json: the tensors carry canonical names
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
    shapes: Callable[[Mapping], dict[str, tuple[int, ...]]]  # of the canonical leaves


def _flat_phi3v(config: Mapping) -> dict:
    """The unmerged Hugging Face port nests the decoder's part; the published file is flat."""
    config = dict(config)
    flat = dict(config.pop("text_config", {})) | config
    if "rope_magnitude" not in flat and (flat.get("rope_scaling") or flat.get("rope_parameters")):
        flat |= phi3v.flat_rope(flat)
        flat.pop("rope_parameters", None)
    return flat


FAMILIES = {
    "phi3_v": Family(
        ("Phi3VForCausalLM",), ("phi3_v",), r".*(glb_GN|glb_newline)", import_phi3v, export_phi3v, _flat_phi3v,
        phi3v.canonical_shapes,
    ),
    "llava": Family(
        ("LlavaForConditionalGeneration", "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM"),
        ("llava", "llava_llama", "llava_mistral", "llava_qwen2"),
        r".*(multi_modal_projector\.linear_1|mm_projector\.0).+", llava.import_llava, llava.export_llava, llava.flatten,
        llava.canonical_shapes,
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


def load_config(folder: str | os.PathLike, flag: str = "--config.base") -> dict:
    """Reads the config.json of a base, in the flat form of the published Phi-3-V (`Family.flatten`)."""
    try:
        config = json.loads((base_folder(folder) / "config.json").read_text())
        return FAMILIES[_said(config)].flatten(config)
    except UserError as error:
        raise UserError(f"{flag}={folder}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{flag}={folder} has no config.json; name the folder of a 2D base model.") from error
    except Exception as error:  # transformers and arithmetic raise many kinds for values that are none
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{flag}={folder}: config.json cannot be read ({what}); copy it again.") from error


def load_base(folder: str | os.PathLike, lazy: bool = False, flag: str = "--config.base") -> Base:
    """Reads a 2D base or a converted one; every tensor is accounted for, and `lazy` leaves stay on disk.

    UserError names the flag and all problems.
    """
    config = load_config(folder, flag)
    try:
        path = base_folder(folder)
        tensors = storage.read_tensors(path)
        if config.get(CONVERTED):
            family = _said(config)
            params = _canonical(tensors, FAMILIES[family].shapes(config))
        else:
            family = detect(config, tensors)
            params = FAMILIES[family].to_flax(tensors, config)
            if family == "llava":
                config["generation"] = llava.generation_of(tensors, config)
        return Base(config, params if lazy else {name: np.asarray(leaf) for name, leaf in params.items()}, path, family)
    except UserError as error:
        raise UserError(f"{flag}={folder}: {error}") from error
    except (
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        ZeroDivisionError,
    ) as error:  # of sizes that are no numbers
        raise UserError(
            f"{flag}={folder}: config.json does not describe a model ({error!r}); copy it again."
        ) from error


def _canonical(tensors: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """The leaves of a converted base, in the order of `shapes`. UserError names all that do not fit."""
    problems = [f"unknown {name}" for name in tensors if name not in shapes]
    problems += [f"missing {name}" for name in shapes if name not in tensors]
    problems += [
        f"{name} has shape {tensors[name].shape}, not {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if problems:
        raise UserError(
            f"the converted base does not match its config.json ({len(problems)} problems: {'; '.join(problems)}); "
            "convert it again."
        )
    return {name: tensors[name] for name in shapes}


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
    max_shard_bytes: int = 1 << 29,
) -> list[Path]:
    """Writes a 2D model under its family's published names with config.json; returns the files written.

    `flat` may come from the 3D model at patch depth 1 without experts, as `configs/pretrain2d.py` trains it, or hold
    lazy leaves, of which one shard at a time is in memory. `dtype` None keeps the arrays' own. Raises before anything
    is written where `flat` is not the model of `config`.
    """
    family = FAMILIES[_said(config) if config.get("architectures") or config.get("model_type") else "phi3_v"]
    kind = DTYPES[dtype] if dtype else None
    flat = {path: storage.cast(leaf, kind) for path, leaf in adapt.as_2d(flat).items()}
    tensors = family.to_checkpoint(flat, config)
    named = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    named |= {key: value for key, value in (config.get("published") or config).items() if key != CONVERTED}
    return _save(folder, tensors, named, dtype, max_shard_bytes)


def save_converted(folder: str | os.PathLike, base: Base, dtype: str | None = None) -> list[Path]:
    """Writes a base under canonical names with its flat config.json, tensor by tensor; returns the files written."""
    kind = DTYPES[dtype] if dtype else None
    tensors = {path: storage.cast(leaf, kind) for path, leaf in base.params.items()}
    return _save(folder, tensors, base.config | {CONVERTED: True}, dtype, 1 << 29)


def _save(folder, tensors: Mapping, config: dict, dtype: str | None, max_shard_bytes: int) -> list[Path]:
    files = storage.write_tensors(folder, tensors, max_shard_bytes)
    if dtype:
        config = config | {"dtype" if "dtype" in config else "torch_dtype": dtype}  # transformers 5 and 4
    storage.write_text(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")
    return [*files, Path(folder) / "config.json"]
