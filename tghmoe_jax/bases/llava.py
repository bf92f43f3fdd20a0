"""LLaVA: its config.json, and its tensor names of every generation and text part (model-spec 3.1, 3.2).

The table below speaks normal names (`generations`). Letters are those of `phi3v`. The tower is CLIP or SigLIP, the text
part Llama, Mistral, Qwen2 or Phi-3.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tghmoe_jax.bases import generations, phi3v, pictures, siglip
from tghmoe_jax.bases.family import Family, Views
from tghmoe_jax.bases.generations import BLOCK, HEAD, SPLIT, TEXT, TEXT_TABLE
from tghmoe_jax.errors import UserError
from tghmoe_jax.models.config import Base, Projector
from tghmoe_jax.samples.chat import ChatTemplate
from tghmoe_jax.weights import porting
from tghmoe_jax.weights.porting import COPY, FLAT, HQ, Entry, Row, T

CLIP = phi3v.CLIP.replace(phi3v.TOWER, "tower.")
CLIP_TOWER: list[Row] = [
    (row[0].replace(phi3v.TOWER, "tower."), *row[1:]) for row in phi3v.TABLE if row[0].startswith(phi3v.TOWER)
]
SHARED: list[Row] = [
    ("conn.fc1.weight", "connector/fc1/kernel", "C W", T),
    ("conn.fc2.weight", "connector/fc2/kernel", "W W", T),
    *TEXT_TABLE,
    (TEXT + "post_attention_layernorm.weight", BLOCK + "mlp_norm/scale", "W", COPY),
]
BIASES: list[Row] = [
    ("conn.fc1.bias", "connector/fc1/bias", "W", COPY),
    ("conn.fc2.bias", "connector/fc2/bias", "W", COPY),
]
FUSED: list[Row] = [
    (TEXT + "self_attn.qkv_proj.weight", BLOCK + "attn/q|k|v/kernel", "W Q D|W K D|W K D", HQ),
    (TEXT + "mlp.gate_up_proj.weight", BLOCK + "mlp/gate|up/kernel", "W G|W G", T),
]
QKV_BIASES: list[Row] = [
    (TEXT + "self_attn.q_proj.bias", BLOCK + "attn/q/bias", "Q D", FLAT),
    (TEXT + "self_attn.k_proj.bias", BLOCK + "attn/k/bias", "K D", FLAT),
    (TEXT + "self_attn.v_proj.bias", BLOCK + "attn/v/bias", "K D", FLAT),
]

_TEXT_KINDS = {"mistral": "mistral", "qwen": "qwen2", "llama": "llama"}  # in what the original repository calls a model
_TOWERS = {  # by the end of mm_vision_tower: how the original repository uses each
    "clip-vit-large-patch14-336": phi3v.CLIP_L_336 | {"model_type": "clip_vision_model"},
    "siglip-so400m-patch14-384": siglip.SO400M_384 | {"model_type": siglip.MODEL_TYPE},
}


def flatten(config: Mapping) -> dict[str, Any]:
    """A published config.json in this project's flat form, which keeps the original under `published`.

    Values that a config leaves to its library (LLaVA-1.5 names its decoder's type and little more) are those of
    transformers. UserError for what this project's model cannot compute.
    """
    if "published" in config:
        return dict(config)
    from transformers import LlavaConfig  # takes a second, and only LLaVA needs it

    full = LlavaConfig.from_dict(_nested(config))
    text, vision = full.text_config, full.vision_config
    kinds = ("llama", "mistral", "qwen2", "phi3")
    layer, of_siglip = full.vision_feature_layer, vision.model_type == siglip.MODEL_TYPE
    selected = "full" if of_siglip else "default"  # all tokens, or all but the class token
    rules = {
        f"text_config.model_type {text.model_type} is none of {', '.join(kinds)}": text.model_type in kinds,
        f"vision_config.model_type {vision.model_type} is neither clip_vision_model nor {siglip.MODEL_TYPE}":
            "clip" in vision.model_type or of_siglip,
        f"vision_feature_layer {layer} is not one layer before the last": isinstance(layer, int) and layer < 0,
        f"vision_feature_select_strategy is {full.vision_feature_select_strategy}, not {selected}":
            full.vision_feature_select_strategy == selected,
        f"projector_hidden_act is {full.projector_hidden_act}, not gelu": full.projector_hidden_act == "gelu",
        "an output bias in attention is not computed": text.model_type == "qwen2"
        or not getattr(text, "attention_bias", False),
    }  # fmt: skip
    problems = [rule for rule, holds in rules.items() if not holds]
    if problems := problems + (siglip.problems(vision.to_dict()) if of_siglip else []):
        raise UserError(f"config.json describes a LLaVA that cannot be ported: {'; '.join(problems)}; name another.")
    kept = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "rms_norm_eps", "max_position_embeddings", "hidden_act", "head_dim",
    )  # fmt: skip
    flat = {key: value for key in kept if (value := getattr(text, key, None)) is not None}
    flat |= phi3v.flat_rope(text.to_dict())
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True):
        flat["max_position_embeddings"] = min(flat["max_position_embeddings"], window)  # beyond it attention differs
    return flat | {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_model_type": text.model_type,
        "qkv_bias": text.model_type == "qwen2", "vision_feature_layer": layer, "published": dict(config),
        "projector_bias": bool(getattr(full, "multimodal_projector_bias", True)),
        "tie_word_embeddings": bool(full.tie_word_embeddings or getattr(text, "tie_word_embeddings", False)),
        "vision_config": {key: getattr(vision, key) for key in phi3v.CLIP_L_336}
        | ({"model_type": siglip.MODEL_TYPE} if of_siglip else {}),
    }  # fmt: skip


def _nested(config: Mapping) -> dict[str, Any]:
    """The config.json of the original LLaVA repository, whose keys are its decoder's, in Hugging Face's form."""
    if "text_config" in config:
        return dict(config)
    names = " ".join(map(str, [*(config.get("architectures") or []), config.get("model_type")])).lower()
    kind = next((kind for word, kind in _TEXT_KINDS.items() if word in names), None)
    tower = str(config.get("mm_vision_tower", "")).rpartition("/")[2]
    rules = {
        "it has no text_config and names no Llama, Mistral or Qwen": kind,
        f"mm_projector_type is {config.get('mm_projector_type')}, not mlp2x_gelu":
            config.get("mm_projector_type") == "mlp2x_gelu",
        f"mm_vision_tower is {tower or 'not named'}, none of {', '.join(_TOWERS)}": tower in _TOWERS,
        f"mm_vision_select_feature is {config.get('mm_vision_select_feature')}, not patch":
            config.get("mm_vision_select_feature", "patch") == "patch",
    }  # fmt: skip
    if problems := [rule for rule, holds in rules.items() if not holds]:
        raise UserError(f"config.json describes a LLaVA that cannot be ported: {'; '.join(problems)}; name another.")
    of_siglip = tower.startswith("siglip")  # its last block is left out, and the feature is what comes before
    return {
        "text_config": dict(config) | {"model_type": kind}, "vision_config": _TOWERS[tower],
        "vision_feature_layer": -1 if of_siglip else config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if of_siglip else "default", "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }  # fmt: skip


def entries(config: Mapping) -> list[Entry]:
    """The table of one flat config, under normal names."""
    vision, of_siglip = config["vision_config"], siglip.is_siglip(config)
    size = phi3v.sizes(config | {"tie_word_embeddings": False} | ({"vision_config": {}} if of_siglip else {}))
    size |= siglip.sizes(vision) if of_siglip else {}
    rows = [*(siglip.TABLE if of_siglip else CLIP_TOWER), *SHARED]
    rows += FUSED if config["text_model_type"] == "phi3" else SPLIT
    rows += (BIASES if config["projector_bias"] else []) + (QKV_BIASES if config["qkv_bias"] else [])
    rows += [] if config.get("tie_word_embeddings") else HEAD
    layers = {CLIP: vision["num_hidden_layers"], TEXT: config["num_hidden_layers"]}
    return porting.entries(rows, size, layers)


def describe(config: Mapping) -> Base:
    """What a flat config says: one token a patch, and nothing to separate rows and views with."""
    projector = Projector(merge=1, kind="mlp", separators="none", bias=config["projector_bias"], eps=0.0)
    tower = phi3v.clip_tower(config)
    if siglip.is_siglip(config):  # hidden_states[-1] of transformers is before the last norm
        tower = siglip.tower(config["vision_config"], config["vision_feature_layer"], post_norm=False)
    return Base("llava", tower, projector, phi3v.llama_decoder(config))


def views_of(folder: Path, config: Mapping) -> Views:
    """The middle of a picture for CLIP, the whole of it for SigLIP."""
    if siglip.is_siglip(config):
        return functools.partial(pictures.squashed, resample=Image.Resampling.BICUBIC)
    return pictures.square


VICUNA = ChatTemplate(
    before_image="USER: ", between_images="", after_image="", before_question="\n", after_question=" ASSISTANT:",
    after_answer="", bos_again=False, joint=" ", eos_last=True, bos="<s>", eos="</s>", special=(), stop=(),
)  # fmt: skip


CHATML = ChatTemplate(
    before_image="<|im_start|>user\n", between_images="", after_image="", before_question="\n",
    after_question="<|im_end|>\n<|im_start|>assistant\n", after_answer="<|im_end|>", bos_again=False, joint=None,
    eos_last=False, bos="", eos="<|im_end|>", special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    stop=("<|im_end|>", "<|endoftext|>"),
)  # fmt: skip


def chat(config: Mapping) -> ChatTemplate:
    """Vicuna's plain words, as LLaVA-1.5 was trained; the special tokens of Phi-3 or Qwen2 where that is the text
    part."""
    return {"phi3": phi3v.CHAT, "qwen2": CHATML}.get(config["text_model_type"], VICUNA)


_ORIGINAL = {
    "conn.fc1.": "model.mm_projector.0.", "conn.fc2.": "model.mm_projector.2.",
    "tower.": "model.vision_tower.vision_tower.vision_model.", "text.": "model.", "head.": "lm_head.",
}  # fmt: skip
_HUGGING_FACE = generations.hugging_face({"conn.fc1.": "linear_1.", "conn.fc2.": "linear_2."})
NAMES = generations.Generations(entries, _HUGGING_FACE | {"G5": _ORIGINAL})  # G5: LLaVA's own repository
FAMILY = Family(
    name="llava",
    architectures=(
        "LlavaForConditionalGeneration", "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaQwenForCausalLM",
    ),
    model_types=("llava", "llava_llama", "llava_mistral", "llava_qwen2"),
    mark=r".*(multi_modal_projector\.linear_1|mm_projector\.0).+", mark_is="projector", flatten=flatten,
    describe=describe, table=NAMES.table, renamed=generations.renamed, views_of=views_of, chat=chat,
    aliases=NAMES.aliases, learnt=NAMES.learnt,
)  # fmt: skip
