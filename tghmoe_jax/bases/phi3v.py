"""Phi-3-Vision: its config.json, its tensor names in one table read in both directions (model-spec.md 2.6), and how it
cuts pictures (2.3).

Sizes, read from config.json: C vision width, N vision heads, H vision head size, F vision FFN, P patch, S positions
(CLS + patches), M merged 2x2 patches (4C); W decoder width, Q query heads, K key-value heads, D head size, G decoder
FFN, V vocabulary.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tghmoe_jax import untrusted
from tghmoe_jax.bases import pictures
from tghmoe_jax.bases.family import Family, Views
from tghmoe_jax.errors import UserError
from tghmoe_jax.models.config import Base, Decoder, DecoderLayer, Projector, Rope, Tower
from tghmoe_jax.samples.chat import ChatTemplate
from tghmoe_jax.weights import porting
from tghmoe_jax.weights.porting import COPY, FLAT, GLB, HO, HQ, HWIO, SUB, Entry, Row, T

EMBED = "model.vision_embed_tokens."
TOWER = EMBED + "img_processor.vision_model."
CLIP, VISION = TOWER + "encoder.layers.{i}.", "vision/block_{i}/"
PHI3, DECODER = "model.layers.{i}.", "decoder/block_{i}/"

TABLE: list[Row] = [
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
CROPS = 16  # num_crops where no preprocessor_config.json says otherwise
MOST_CROPS = 64
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
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_KEYS = tuple(CLIP_L_336)[:6]
TEXT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def flatten(config: Mapping) -> dict[str, Any]:
    """The flat form: the unmerged Hugging Face port nests the decoder's part; the published file is flat."""
    config = dict(config)
    flat = dict(config.pop("text_config", {})) | config
    if "rope_magnitude" not in flat and (flat.get("rope_scaling") or flat.get("rope_parameters")):
        flat |= flat_rope(flat)
        flat.pop("rope_parameters", None)
    return flat


def flat_rope(config: Mapping) -> dict:
    """The decoder's rotary keys in the published flat form: `rope_theta`, `rope_scaling` (su/longrope or None) and its
    `rope_magnitude` (model-spec 2.4, with what transformers lets a config override).

    Reads `rope_scaling` or transformers 5's `rope_parameters`. UserError for another kind of RoPE, or factor lists that
    do not fit the head size.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError("config.json holds a RoPE description that is no object; use the checkpoint's own.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    flat = {"rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10000.0, "rope_scaling": None}
    if kind == "default" and rope.get("partial_rotary_factor", 1) == 1:
        return flat
    if kind not in ("su", "longrope") or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"config.json asks for RoPE of the type {kind}, or for a part of the head; use another model.")
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    lists = {key: list(rope.get(key) or ()) for key in ("short_factor", "long_factor")}
    if wrong := [key for key, values in lists.items() if len(values) != head // 2]:
        raise UserError(
            f"config.json gives {' and '.join(wrong)} another length than half the head size, {head // 2}; use the "
            "checkpoint's own."
        )
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = original or config["max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return flat | {
        "rope_scaling": {"type": kind, **lists, **{k: rope[k] for k in ("factor", "attention_factor") if rope.get(k)}},
        "original_max_position_embeddings": original,
        "rope_magnitude": float(rope.get("attention_factor") or magnitude),
    }  # fmt: skip


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
        raise UserError(f"config.json does not hold together: {'; '.join(problems)}; use the checkpoint's own.")
    return {
        "C": vision_width, "N": vision_heads, "H": vision_width // vision_heads, "F": vision["intermediate_size"],
        "S": 1 + (vision["image_size"] // vision["patch_size"]) ** 2, "P": vision["patch_size"], "3": 3,
        "M": 4 * vision_width,
        "W": width, "Q": heads, "K": kv_heads, "D": head, "G": config["intermediate_size"], "V": config["vocab_size"],
    }  # fmt: skip


def entries(config: Mapping) -> list[Entry]:
    """The table for one config: every tensor of the checkpoint with its shapes, in table order."""
    size = sizes(config)  # complains of what config.json lacks
    layers = {CLIP: vision_config(config)["num_hidden_layers"], PHI3: config["num_hidden_layers"]}
    return porting.entries(TABLE, size, layers)


def published_name(name: str) -> str:
    """The published name of a tensor, whichever generation of names it comes from."""
    for pattern, replacement in RENAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def renamed(name: str) -> str | None:
    """The published name of a tensor, None for a buffer."""
    name = published_name(name)
    return None if IGNORED.fullmatch(name) else name


def clip_tower(config: Mapping) -> Tower:
    """A CLIP tower: class token, norm before the first block, no patch bias, a feature below the last norm."""
    vision = vision_config(config)
    return Tower(
        width=vision["hidden_size"], layers=vision["num_hidden_layers"], heads=vision["num_attention_heads"],
        ffn=vision["intermediate_size"], image_size=vision["image_size"], patch_size=vision["patch_size"],
        eps=vision["layer_norm_eps"], activation="quick_gelu", class_token=True, patch_bias=False, pre_norm=True,
        post_norm=False, feature_layer=config.get("vision_feature_layer", -2), mean=CLIP_MEAN, std=CLIP_STD,
    )  # fmt: skip


def llama_decoder(config: Mapping) -> Decoder:
    """The decoder of Phi-3, Llama, Mistral or Qwen2 (model-spec 2.4, 3.1) from a flat config."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head, positions = config.get("head_dim") or width // heads, config.get("max_position_embeddings", 4096)
    original, scaling = config.get("original_max_position_embeddings", positions), config.get("rope_scaling") or {}
    magnitude = config.get("rope_magnitude", 0.0)
    if not magnitude:  # runs of earlier versions recorded none
        ratio = positions / original
        longer = scaling and ratio > 1
        magnitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if longer else 1.0
    factors = (tuple(scaling.get(key, ())) for key in ("short_factor", "long_factor"))
    layer = DecoderLayer(Rope(config.get("rope_theta", 10000.0), *factors, magnitude), window=0)
    return Decoder(
        width=width, heads=heads, kv_heads=config.get("num_key_value_heads", heads), head_size=head,
        ffn=config["intermediate_size"], vocab=config["vocab_size"], eps=config.get("rms_norm_eps", 1e-5),
        blocks=(layer,) * config["num_hidden_layers"], max_positions=positions, original_positions=original,
        activation="silu", query_scale=head**-0.5, embed_scale=1.0, qkv_bias=config.get("qkv_bias", False),
        tied=bool(config.get("tie_word_embeddings", False)), zero_centred_norms=False, post_norms=False, qk_norm=False,
        image_blocks=False,
    )  # fmt: skip


def describe(config: Mapping) -> Base:
    """What a flat config says."""
    projector = Projector(merge=2, kind="mlp", separators="newlines", bias=True, eps=0.0)
    return Base("phi3_v", clip_tower(config), projector, llama_decoder(config))


def views_of(folder: Path, config: Mapping) -> Views:
    """Crops and global view of a picture, as many as preprocessor_config.json allows (`num_crops`).

    UserError where that is no whole number of at least 1.
    """
    file = folder / "preprocessor_config.json"
    crops = CROPS
    if file.is_file():
        crops = untrusted.read_json(file, {}, remedy="copy it again").get("num_crops", CROPS)
    if untrusted.fault(crops, range(1, MOST_CROPS + 1)):
        raise UserError(f"{file} says num_crops {crops!r}; give a whole number from 1 to {MOST_CROPS}.")
    return functools.partial(pictures.views, most=crops)


def aliases(config: Mapping) -> dict[str, str]:
    return dict([ALIAS])


# model-spec 2.5. An answer that goes on as `<|assistant|>` has ended too.
CHAT = ChatTemplate(
    before_image="<|user|>\n", between_images="", after_image="", before_question="\n",
    after_question="<|end|>\n<|assistant|>\n", after_answer="<|end|>", bos_again=True, joint=None, eos_last=True,
    bos="<s>", eos="<|endoftext|>",
    special=("<|user|>", "<|end|>", "<|assistant|>"), stop=("<|end|>", "<|assistant|>"),
)  # fmt: skip


def chat(config: Mapping) -> ChatTemplate:
    return CHAT


FAMILY = Family(
    name="phi3_v", architectures=("Phi3VForCausalLM",), model_types=("phi3_v",), mark=r".*(glb_GN|glb_newline)",
    mark_is="newline embeddings", flatten=flatten, describe=describe, table=entries, renamed=renamed,
    views_of=views_of, chat=chat, aliases=aliases,
)  # fmt: skip
