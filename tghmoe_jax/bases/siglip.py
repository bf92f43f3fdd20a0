"""SigLIP's vision tower: no class token, a patch bias, no norm before the blocks, pixels in -1..1.

It is part of Gemma 3 and MedGemma (feature after the last norm) and of LLaVA with SigLIP (feature before it).
"""

from collections.abc import Mapping
from typing import Any

from tghmoe_jax.bases import phi3v
from tghmoe_jax.models.config import Tower
from tghmoe_jax.weights.porting import COPY, Row

# google/siglip-so400m-patch14-384 as LLaVA's own repository uses it: its last block is left out.
SO400M_384 = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
KEYS, MODEL_TYPE = tuple(SO400M_384), "siglip_vision_model"

_CLIP_ALONE = ("embeddings.class_embedding", "pre_layrnorm.")
TABLE: list[Row] = [
    ("tower.embeddings.patch_embedding.bias", "vision/patch/bias", "C", COPY),
    *(
        (row[0].replace(phi3v.TOWER, "tower."), *row[1:])
        for row in phi3v.TABLE
        if row[0].startswith(phi3v.TOWER) and not row[0].startswith(tuple(phi3v.TOWER + one for one in _CLIP_ALONE))
    ),
]


def is_siglip(config: Mapping) -> bool:
    """Whether the tower of a LLaVA's flat config is a SigLIP."""
    return config["vision_config"].get("model_type") == MODEL_TYPE


def problems(vision: Mapping[str, Any]) -> list[str]:
    """What a `vision_config` asks for that is not computed."""
    rules = {
        f"vision hidden_act is {vision['hidden_act']}, not gelu_pytorch_tanh":
            vision["hidden_act"] == "gelu_pytorch_tanh",
        "vision num_attention_heads must divide hidden_size":
            vision["hidden_size"] % vision["num_attention_heads"] == 0,
        "vision num_channels must be 3": vision.get("num_channels", 3) == 3,
    }  # fmt: skip
    return [rule for rule, holds in rules.items() if not holds]


def sizes(vision: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by the letters of `phi3v`; S is patches alone."""
    width, heads, patch = vision["hidden_size"], vision["num_attention_heads"], vision["patch_size"]
    return {
        "C": width, "N": heads, "H": width // heads, "F": vision["intermediate_size"], "P": patch, "3": 3,
        "S": (vision["image_size"] // patch) ** 2,
    }  # fmt: skip


def tower(vision: Mapping[str, Any], feature_layer: int, post_norm: bool) -> Tower:
    """The tower of a `vision_config`; its feature is as said."""
    return Tower(
        width=vision["hidden_size"], layers=vision["num_hidden_layers"], heads=vision["num_attention_heads"],
        ffn=vision["intermediate_size"], image_size=vision["image_size"], patch_size=vision["patch_size"],
        eps=vision["layer_norm_eps"], activation="gelu_tanh", class_token=False, patch_bias=True, pre_norm=False,
        post_norm=post_norm, feature_layer=feature_layer, mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
