"""Phi-3-Vision checkpoint names <-> canonical Flax names: one table, read in both directions (model-spec.md 2.6).

Sizes, read from config.json: C vision width, N vision heads, H vision head size, F vision FFN, P patch, S positions
(CLS + patches), M merged 2x2 patches (4C); W decoder width, Q query heads, K key-value heads, D head size, G decoder
FFN, V vocabulary. Arrays keep their dtype; nothing is cast, so export(import(x)) is x bit for bit.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from tghmoe_jax.errors import UserError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """How a torch tensor becomes a Flax leaf of a given shape, and back."""

    torch_shape: Callable[[Shape], Shape]
    to_flax: Callable[[np.ndarray, Shape], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


# Torch keeps (out, in); Flax (in, out), with the head axes split.
COPY = Op(lambda s: s, lambda t, s: t, lambda a: a)
T = Op(lambda s: s[::-1], lambda t, s: t.T, lambda a: a.T)
HWIO = Op(lambda s: (s[3], s[2], s[0], s[1]), lambda t, s: t.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
HQ = Op(lambda s: (s[1] * s[2], s[0]), lambda t, s: t.T.reshape(s), lambda a: a.reshape(len(a), -1).T)
HO = Op(lambda s: (s[2], s[0] * s[1]), lambda t, s: t.T.reshape(s), lambda a: a.reshape(-1, a.shape[2]).T)
FLAT = Op(lambda s: (math.prod(s),), lambda t, s: t.reshape(s), lambda a: a.reshape(-1))
SUB = Op(lambda s: (1, 1, 1, *s), lambda t, s: t.reshape(s), lambda a: a.reshape(1, 1, 1, -1))
GLB = Op(lambda s: (1, 1, *s), lambda t, s: t.reshape(s), lambda a: a.reshape(1, 1, -1))

EMBED = "model.vision_embed_tokens."
TOWER = EMBED + "img_processor.vision_model."
CLIP, VISION = TOWER + "encoder.layers.{i}.", "vision/block_{i}/"
PHI3, DECODER = "model.layers.{i}.", "decoder/block_{i}/"

# (checkpoint name, canonical path, canonical shape, op). `|` in path and shape: consecutive rows of one fused tensor.
TABLE: list[tuple[str, str, str, Op]] = [
    (TOWER + "embeddings.class_embedding", "vision/cls", "C", COPY),
    (TOWER + "embeddings.patch_embedding.weight", "vision/patch/kernel", "P P 3 C", HWIO),
    (TOWER + "embeddings.position_embedding.weight", "vision/pos", "S C", COPY),
    (TOWER + "pre_layrnorm.weight", "vision/pre_ln/scale", "C", COPY),
    (TOWER + "pre_layrnorm.bias", "vision/pre_ln/bias", "C", COPY),
    (CLIP + "layer_norm1.weight", VISION + "ln1/scale", "C", COPY),
    (CLIP + "layer_norm1.bias", VISION + "ln1/bias", "C", COPY),
    (CLIP + "self_attn.q_proj.weight", VISION + "attn/q/kernel", "C N H", HQ),
    (CLIP + "self_attn.q_proj.bias", VISION + "attn/q/bias", "N H", FLAT),
    (CLIP + "self_attn.k_proj.weight", VISION + "attn/k/kernel", "C N H", HQ),
    (CLIP + "self_attn.k_proj.bias", VISION + "attn/k/bias", "N H", FLAT),
    (CLIP + "self_attn.v_proj.weight", VISION + "attn/v/kernel", "C N H", HQ),
    (CLIP + "self_attn.v_proj.bias", VISION + "attn/v/bias", "N H", FLAT),
    (CLIP + "self_attn.out_proj.weight", VISION + "attn/out/kernel", "N H C", HO),
    (CLIP + "self_attn.out_proj.bias", VISION + "attn/out/bias", "C", COPY),
    (CLIP + "layer_norm2.weight", VISION + "ln2/scale", "C", COPY),
    (CLIP + "layer_norm2.bias", VISION + "ln2/bias", "C", COPY),
    (CLIP + "mlp.fc1.weight", VISION + "mlp/fc1/kernel", "C F", T),
    (CLIP + "mlp.fc1.bias", VISION + "mlp/fc1/bias", "F", COPY),
    (CLIP + "mlp.fc2.weight", VISION + "mlp/fc2/kernel", "F C", T),
    (CLIP + "mlp.fc2.bias", VISION + "mlp/fc2/bias", "C", COPY),
    (TOWER + "post_layernorm.weight", "vision/post_ln/scale", "C", COPY),
    (TOWER + "post_layernorm.bias", "vision/post_ln/bias", "C", COPY),
    (EMBED + "sub_GN", "connector/sub_newline", "M", SUB),
    (EMBED + "glb_GN", "connector/glb_newline", "M", GLB),
    (EMBED + "img_projection.0.weight", "connector/fc1/kernel", "M W", T),
    (EMBED + "img_projection.0.bias", "connector/fc1/bias", "W", COPY),
    (EMBED + "img_projection.2.weight", "connector/fc2/kernel", "W W", T),
    (EMBED + "img_projection.2.bias", "connector/fc2/bias", "W", COPY),
    ("model.embed_tokens.weight", "decoder/embed/embedding", "V W", COPY),
    (PHI3 + "input_layernorm.weight", DECODER + "attn_norm/scale", "W", COPY),
    (PHI3 + "self_attn.qkv_proj.weight", DECODER + "attn/q|k|v/kernel", "W Q D|W K D|W K D", HQ),
    (PHI3 + "self_attn.o_proj.weight", DECODER + "attn/out/kernel", "Q D W", HO),
    (PHI3 + "post_attention_layernorm.weight", DECODER + "mlp_norm/scale", "W", COPY),
    (PHI3 + "mlp.gate_up_proj.weight", DECODER + "mlp/gate|up/kernel", "W G|W G", T),
    (PHI3 + "mlp.down_proj.weight", DECODER + "mlp/down/kernel", "G W", T),
    ("model.norm.weight", "decoder/final_norm/scale", "W", COPY),
    ("lm_head.weight", "decoder/lm_head/kernel", "W V", T),
]

# Names of the unmerged Hugging Face port -> published names; a published name passes through unchanged.
RENAMES: list[tuple[str, str]] = [
    (r"model\.vision_model\.(?:vision_model\.)?(.+)", TOWER + r"\1"),
    (r"model\.(?:vision_embed_tokens\.)?image_projection\.fc1\.(.+)", EMBED + r"img_projection.0.\1"),
    (r"model\.(?:vision_embed_tokens\.)?image_projection\.fc2\.(.+)", EMBED + r"img_projection.2.\1"),
    (r"model\.(?:vision_embed_tokens\.)?(sub|glb)_newline", EMBED + r"\1_GN"),
    (r"model\.vision_embed_tokens\.vision_model\.(?:vision_model\.)?(.+)", TOWER + r"\1"),
    (r"model\.language_model\.(.+)", r"model.\1"),
]
ALIAS = (EMBED + "wte.weight", "model.embed_tokens.weight")  # one tensor under two names in raw state dicts
IGNORED = re.compile(r".*\.(position_ids|rotary_emb\.inv_freq)")  # buffers, recomputed from the config

# CLIP ViT-L/14-336: Microsoft's config.json names the tower but does not give its sizes.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
VISION_KEYS = tuple(CLIP_L_336)[:6]
TEXT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint tensor: its name and torch shape, and the canonical leaves that its rows become."""

    name: str
    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]
    op: Op

    @property
    def rows(self) -> list[int]:
        """Rows of the torch tensor that each leaf takes."""
        return [self.op.torch_shape(shape)[0] for shape in self.shapes]

    @property
    def torch_shape(self) -> Shape:
        """Shape in the checkpoint."""
        return (sum(self.rows), *self.op.torch_shape(self.shapes[0])[1:])

    def to_flax(self, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, leaf); views where numpy allows."""
        start = 0
        for path, shape, rows in zip(self.paths, self.shapes, self.rows, strict=True):
            part = tensor[start : start + rows] if len(self.paths) > 1 else tensor
            yield path, self.op.to_flax(part, shape)
            start += rows

    def to_torch(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """The checkpoint tensor from its leaves."""
        parts = [self.op.to_torch(np.asarray(leaves[path])) for path in self.paths]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def vision_config(config: Mapping) -> dict:
    """The tower's part of config.json, completed with CLIP ViT-L/14-336 where it is silent."""
    return CLIP_L_336 | dict(config.get("vision_config") or {})


def sizes(config: Mapping) -> dict[str, int]:
    """Sizes by letter; raises a `UserError` that names every key of config.json that is missing or cannot be."""
    vision = vision_config(config)
    given = {key: config.get(key) for key in TEXT_KEYS} | {f"vision {key}": vision[key] for key in VISION_KEYS}
    if missing := [key for key, value in given.items() if not isinstance(value, int) or value < 1]:
        raise UserError(f"config.json lacks a number for {', '.join(missing)}; use the checkpoint's own.")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    vision_heads, vision_width = vision["num_attention_heads"], vision["hidden_size"]
    kv_heads, head = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
    whole = {
        "num_key_value_heads must divide num_attention_heads": heads % kv_heads == 0,
        "hidden_size must be num_attention_heads times the head size": width == heads * head,
        "vision num_attention_heads must divide hidden_size": vision_width % vision_heads == 0,
        "vision patch_size must divide image_size": vision["image_size"] % vision["patch_size"] == 0,
        "vision hidden_act must be quick_gelu": vision["hidden_act"] == "quick_gelu",
        "hidden_act must be silu": config.get("hidden_act", "silu") == "silu",
        "tie_word_embeddings must be false": not config.get("tie_word_embeddings", False),
    }
    if problems := [rule for rule, holds in whole.items() if not holds]:
        raise UserError(f"config.json is not that of a Phi-3-V: {'; '.join(problems)}; use the checkpoint's own.")
    return {
        "C": vision_width, "N": vision_heads, "H": vision_width // vision_heads, "F": vision["intermediate_size"],
        "S": 1 + (vision["image_size"] // vision["patch_size"]) ** 2, "P": vision["patch_size"], "3": 3,
        "M": 4 * vision_width,
        "W": width, "Q": heads, "K": kv_heads, "D": head, "G": config["intermediate_size"], "V": config["vocab_size"],
    }  # fmt: skip


def entries(config: Mapping) -> list[Entry]:
    """The table for one config: every tensor of the checkpoint with its shapes, in table order."""
    size = sizes(config)
    layers = {CLIP: vision_config(config)["num_hidden_layers"], PHI3: config["num_hidden_layers"]}
    found = []
    for name, path, shape, op in TABLE:
        shapes = tuple(tuple(size[letter] for letter in part.split()) for part in shape.split("|"))
        repeats = next((range(count) for prefix, count in layers.items() if name.startswith(prefix)), [0])
        for i in repeats:
            found.append(Entry(name.format(i=i), expand(path.format(i=i)), shapes, op))
    return found


def expand(path: str) -> tuple[str, ...]:
    """`a/q|k|v/kernel` -> (`a/q/kernel`, `a/k/kernel`, `a/v/kernel`)."""
    parts = path.split("/")
    choice = next((i for i, part in enumerate(parts) if "|" in part), 0)
    return tuple("/".join([*parts[:choice], one, *parts[choice + 1 :]]) for one in parts[choice].split("|"))


def canonical_shapes(config: Mapping) -> dict[str, Shape]:
    """{canonical path: shape} of the 2D model."""
    return {path: shape for entry in entries(config) for path, shape in zip(entry.paths, entry.shapes, strict=True)}


def published_name(name: str) -> str:
    """The published name of a tensor, whichever generation of names it comes from."""
    for pattern, replacement in RENAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def import_phi3v(tensors: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Checkpoint tensors (arrays or lazy ones) -> flat canonical dict, dtypes kept.

    Every key must be consumed exactly once or be on the ignore list, every leaf written exactly once; otherwise one
    `UserError` names all unknown, doubled, missing and wrongly shaped keys.
    """
    table = {entry.name: entry for entry in entries(config)}
    keys = account(tensors, table)
    flat = {}
    for name, entry in table.items():
        flat.update(entry.to_flax(np.asarray(tensors[keys[name]])))
    return flat


def account(tensors: Mapping[str, np.ndarray], table: Mapping[str, Entry]) -> dict[str, str]:
    """Strict accounting; returns {published name: key in `tensors`} with exactly the names of the table."""
    keys: dict[str, str] = {}
    problems, aliases = [], []
    for key in tensors:
        name = published_name(key)
        if IGNORED.fullmatch(name):
            continue
        if name == ALIAS[0]:
            aliases.append(key)
        elif name not in table:
            problems.append(f"unknown {key}")
        elif name in keys:
            problems.append(f"{key} doubles {keys[name]}")
        else:
            keys[name] = key
            if (shape := tuple(tensors[key].shape)) != (due := table[name].torch_shape):
                problems.append(f"{key} has shape {shape}, not {due}")
    problems += [f"missing {name}" for name in table if name not in keys]
    for key in aliases:
        if ALIAS[1] in keys and not same_bits(tensors[key], tensors[keys[ALIAS[1]]]):
            problems.append(f"{key} differs from {keys[ALIAS[1]]}")
    if problems:
        raise UserError(
            f"The checkpoint does not match its config.json ({len(problems)} problems: {'; '.join(problems)}); "
            "use the complete checkpoint and the config.json that belongs to it."
        )
    return keys


def same_bits(a, b) -> bool:
    """Whether two tensors are equal bit for bit (NaNs included)."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def export_phi3v(flat: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Flat canonical dict of the 2D model -> {published checkpoint name: array}; the inverse of `import_phi3v`."""
    table, due = entries(config), canonical_shapes(config)
    problems = [f"unknown {path}" for path in flat if path not in due]
    problems += [f"missing {path}" for path in due if path not in flat]
    problems += [
        f"{path} has shape {tuple(flat[path].shape)}, not {shape}"
        for path, shape in due.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    if problems:
        raise UserError(
            f"These parameters are not the 2D model that config.json describes ({len(problems)} problems: "
            f"{'; '.join(problems)}); export the 2D base, or correct config.json."
        )
    return {entry.name: entry.to_torch(flat) for entry in table}
