"""Opens and writes a 2D base model: a folder with config.json, safetensors weights and tokeniser files."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from tghmoe_jax import digests, untrusted, writing
from tghmoe_jax.bases import gemma3, llava, phi3v
from tghmoe_jax.bases.family import Family
from tghmoe_jax.errors import UserError
from tghmoe_jax.models.config import Base
from tghmoe_jax.samples.chat import ChatTemplate
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.weights import adapt, storage

CONVERTED = "converted"  # in config.json: the tensors carry canonical names
EMBEDDED = Path(__file__).parent.parent / "assets" / "base"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


FAMILIES: dict[str, Family] = {family.name: family for family in (phi3v.FAMILY, llava.FAMILY, gemma3.FAMILY)}


@dataclasses.dataclass(frozen=True)
class LoadedBase:
    """A 2D model in memory. `config`: its config.json in flat form; `params`: flat canonical dict in the checkpoint's
    dtype."""

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
        file = base_folder(folder) / "config.json"
        if not file.is_file():
            raise UserError("it has no config.json; name the folder of a 2D base model.")
        config = untrusted.read_json(file, {}, remedy="copy or download it again")
        check_sizes(config)
        return family_of(config).flatten(config)
    except UserError as error:
        raise UserError(f"{flag}={folder}: {error}") from error
    except Exception as error:  # transformers and arithmetic raise many kinds for values that are none
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{flag}={folder}: config.json cannot be read ({what}); copy it again.") from error


def load_base(folder: str | os.PathLike, lazy: bool = False, flag: str = "--config.base") -> LoadedBase:
    """Reads a 2D base or a converted one; every tensor is accounted for, and `lazy` leaves stay on disk.

    UserError names the flag and all problems; where the folder has digests, a file that differs is one.
    """
    config, path = load_config(folder, flag), base_folder(folder)
    lost = path == EMBEDDED and not (path / digests.FILE).exists()
    if wrong := [f"{digests.FILE} is missing"] if lost else digests.problems(path):
        raise UserError(
            f"{flag}={folder} is damaged ({digests.told(wrong)}); copy it again, or delete its {digests.FILE} if you "
            "changed it yourself."
        )
    try:
        tensors = storage.read_tensors(path)
        if config.get(CONVERTED):
            family = family_of(config)
            params = _canonical(tensors, family.shapes(config))
        else:
            family = detect(config, tensors)
            config |= family.learnt(tensors, config)
            params = family.to_flax(tensors, config)
        if not lazy:
            params = {name: np.asarray(leaf) for name, leaf in params.items()}
        return LoadedBase(config, params, path, family.name)
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


def family_of(config: Mapping) -> Family:
    """The family that a config.json names. UserError for any other architecture."""
    said = [*(config.get("architectures") or []), config.get("model_type")]
    for family in FAMILIES.values():
        if {*family.architectures, *family.model_types} & set(said):
            return family
    known = ", ".join(one.architectures[0] for one in FAMILIES.values())
    raise UserError(f"config.json names the architecture {said[0] or 'none'}; use one of {known}.")


_COUNT = (range(1, 1 << 12), None)
_SIZE = (range(1, 1 << 30), None)  # `None`: transformers' own default, or none
_NAME = (str, None)
# What a config.json may say wherever it says it; anything else is for the family to judge.
_KINDS = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "patch_size"), _COUNT),
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "head_dim", "vocab_size", "image_size", "max_position_embeddings",
         "original_max_position_embeddings", "mm_tokens_per_image"), _SIZE),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_magnitude", "factor", "attention_factor",
         "query_pre_attn_scalar"), (float, None)),
    **dict.fromkeys(("tie_word_embeddings", "qkv_bias", "projector_bias", CONVERTED), (bool, None)),
    **dict.fromkeys(("model_type", "text_model_type", "hidden_act", "generation", "rope_type"), _NAME),
    **dict.fromkeys(("text_config", "vision_config", "published", "rope_scaling", "rope_parameters"), ({}, None)),
    **dict.fromkeys(("architectures", "layer_types"), ([str], None)),
    **dict.fromkeys(("short_factor", "long_factor"), ([float], None)),
    "sliding_window": (range(1 << 30), None), "token_ids": {str: range(1 << 30)},
    "vision_feature_layer": (range(-(1 << 12), 1 << 12), [int], None),
}  # fmt: skip


def check_sizes(config: Mapping, key: str = "") -> None:
    """UserError for the first size of a config.json that is none, or beyond any model, before it is used."""
    for name, value in config.items():
        where = f"{key}.{name}".lstrip(".")
        if wrong := untrusted.fault(value, _KINDS.get(name, object), where):
            raise UserError(f"config.json: {wrong}; use the model's own file.")
        if isinstance(value, Mapping):
            check_sizes(value, where)


def describe(config: Mapping, size: int | None = None) -> Base:
    """What a base's config.json in flat form says, of a tower for images of `size` pixels (its own where None).

    A config that names no family, as of a random start, is a Phi-3-V's. UserError for a size of no whole patch.
    """
    check_sizes(config)
    try:
        base = _family_or_phi3v(config).describe(config)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the base's config.json does not describe a model ({error!r}); copy it again.") from error
    return base if size in (None, base.tower.image_size) else resized(base, size)


def flattened(config: Mapping) -> dict:
    """A config.json in flat form, as `describe`: one that names no family is a Phi-3-V's."""
    return _family_or_phi3v(config).flatten(config)


def resized(base: Base, size: int) -> Base:
    """The base for images of another size. An averaging projector keeps its number of tokens, where it can."""
    tower = dataclasses.replace(base.tower, image_size=size)
    if tower.grid < 1 or size % tower.patch_size:
        raise UserError(f"--config.data.size={size} must be a multiple of the base's patches of {tower.patch_size}.")
    projector = base.projector
    if projector.kind == "mean_norm":
        merge = max(1, tower.grid * projector.merge // base.tower.grid)
        projector = dataclasses.replace(projector, merge=merge)
    return dataclasses.replace(base, tower=tower, projector=projector)


def tokenizer_of(folder: str | os.PathLike, config: Mapping) -> Tokenizer:
    """The tokeniser files in a folder, with the chat template of the base whose config.json in flat form is given.

    UserError where its special tokens are not those of the config.
    """
    tokenizer = Tokenizer.from_folder(folder, chat_of(config))
    for token, number in config.get("token_ids", {}).items():
        if (found := tokenizer.id_of(token)) != number:
            raise UserError(
                f"{folder}: the tokeniser gives {token} the id {found} where config.json says {number}; use the "
                "tokeniser files of the same base."
            )
    return tokenizer


def chat_of(config: Mapping) -> ChatTemplate:
    """The chat template of the base whose config.json in flat form is given."""
    return _family_or_phi3v(config).chat(config)


def _family_or_phi3v(config: Mapping) -> Family:
    return family_of(config) if config.get("architectures") or config.get("model_type") else phi3v.FAMILY


def detect(config: Mapping, names: Mapping) -> Family:
    """The family that config.json names; it must agree with the tensor names."""
    family = family_of(config)
    if not any(re.fullmatch(family.mark, name) for name in names):
        raise UserError(
            f"config.json says {family.name} but no tensor is named like its {family.mark_is}; use the config.json "
            "that belongs to the weights."
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
    family = _family_or_phi3v(config)
    kind = DTYPES[dtype] if dtype else None
    flat = {path: storage.cast(leaf, kind) for path, leaf in adapt.as_2d(flat).items()}
    tensors = family.to_checkpoint(flat, config)
    named = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    named |= {key: value for key, value in (config.get("published") or config).items() if key != CONVERTED}
    return _save(folder, tensors, named, dtype, max_shard_bytes)


def save_converted(folder: str | os.PathLike, base: LoadedBase, dtype: str | None = None) -> list[Path]:
    """Writes a base under canonical names with its flat config.json, tensor by tensor; returns the files written."""
    kind = DTYPES[dtype] if dtype else None
    tensors = {path: storage.cast(leaf, kind) for path, leaf in base.params.items()}
    return _save(folder, tensors, base.config | {CONVERTED: True}, dtype, 1 << 29)


def _save(folder, tensors: Mapping, config: dict, dtype: str | None, max_shard_bytes: int) -> list[Path]:
    files = storage.write_tensors(folder, tensors, max_shard_bytes)
    if dtype:
        config = config | {"dtype" if "dtype" in config else "torch_dtype": dtype}  # transformers 5 and 4
    writing.write(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")
    return [*files, Path(folder) / "config.json"]
