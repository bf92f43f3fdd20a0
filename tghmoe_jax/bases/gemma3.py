"""Gemma 3 and MedGemma: a SigLIP tower, an averaging projector, and a decoder of sliding and full layers.

Letters are those of `phi3v`. Read in transformers 5.23 (models gemma3 and siglip), whose tensor names come in four
generations (`generations`).
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tghmoe_jax.bases import generations, pictures, siglip
from tghmoe_jax.bases.family import Family, Views
from tghmoe_jax.bases.generations import BLOCK, HEAD, SPLIT, TEXT, TEXT_TABLE
from tghmoe_jax.errors import UserError
from tghmoe_jax.models.config import Base, Decoder, DecoderLayer, Projector, Rope
from tghmoe_jax.samples.chat import ChatTemplate
from tghmoe_jax.weights import porting
from tghmoe_jax.weights.porting import COPY, Entry, Row

TOWER = "tower.encoder.layers.{i}."
TABLE: list[Row] = [
    *siglip.TABLE,
    ("conn.mm_soft_emb_norm.weight", "connector/norm/scale", "C", COPY),
    ("conn.mm_input_projection_weight", "connector/proj/kernel", "C W", COPY),
    *TEXT_TABLE,
    *SPLIT,
    (TEXT + "self_attn.q_norm.weight", BLOCK + "attn/q_norm/scale", "D", COPY),
    (TEXT + "self_attn.k_norm.weight", BLOCK + "attn/k_norm/scale", "D", COPY),
    (TEXT + "post_attention_layernorm.weight", BLOCK + "attn_post_norm/scale", "W", COPY),
    (TEXT + "pre_feedforward_layernorm.weight", BLOCK + "mlp_norm/scale", "W", COPY),
    (TEXT + "post_feedforward_layernorm.weight", BLOCK + "mlp_post_norm/scale", "W", COPY),
]

_KEPT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "max_position_embeddings", "query_pre_attn_scalar", "sliding_window", "layer_types",
    "tie_word_embeddings", "rope_parameters",
)  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


def flatten(config: Mapping) -> dict[str, Any]:
    """A published config.json in this project's flat form, which keeps the original under `published`.

    Values that a config leaves to its library (the published 4B names few) are those of transformers. UserError for
    what this project's model cannot compute.
    """
    if "published" in config:
        return dict(config)
    from transformers import Gemma3Config  # takes a second, and only Gemma needs it

    full = Gemma3Config.from_dict(dict(config))
    text, vision = full.text_config.to_dict(), full.vision_config.to_dict()
    ropes, kinds = text["rope_parameters"], set(text["layer_types"])
    side = math.isqrt(full.mm_tokens_per_image)
    grid = vision["image_size"] // vision["patch_size"]
    rules = {
        "logits or scores are soft-capped": not (text["final_logit_softcapping"] or text["attn_logit_softcapping"]),
        f"layer_types names {', '.join(sorted(kinds - {FULL, SLIDING}))}": kinds <= {FULL, SLIDING},
        "layer_types does not name every layer": len(text["layer_types"]) == text["num_hidden_layers"],
        "attention has biases": not text["attention_bias"],
        "text attention is bidirectional": not text["use_bidirectional_attention"],
        f"hidden_activation is {text['hidden_activation']}, not gelu_pytorch_tanh":
            text["hidden_activation"] == "gelu_pytorch_tanh",
        "RoPE is neither default nor linear": kinds - {FULL, SLIDING}
        or all(ropes[kind]["rope_type"] in ("default", "linear") for kind in kinds),
        f"vision_config.model_type is {vision['model_type']}, not {siglip.MODEL_TYPE}":
            vision["model_type"] == siglip.MODEL_TYPE,
        f"mm_tokens_per_image {full.mm_tokens_per_image} is no square that divides the {grid} x {grid} patches":
            side > 0 and side**2 == full.mm_tokens_per_image and grid % side == 0,
        "num_key_value_heads must divide num_attention_heads":
            text["num_attention_heads"] % text["num_key_value_heads"] == 0,
    }  # fmt: skip
    if problems := [rule for rule, holds in rules.items() if not holds] + siglip.problems(vision):
        raise UserError(f"config.json describes a Gemma 3 that cannot be ported: {'; '.join(problems)}; name another.")
    return {key: text[key] for key in _KEPT} | {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "published": dict(config),
        "mm_tokens_per_image": full.mm_tokens_per_image, "vision_config": {key: vision[key] for key in siglip.KEYS},
        "token_ids": {"<start_of_image>": full.boi_token_id, "<end_of_image>": full.eoi_token_id},
    }  # fmt: skip


def entries(config: Mapping) -> list[Entry]:
    """The table of one flat config, under normal names."""
    vision = config["vision_config"]
    size = siglip.sizes(vision) | {
        "W": config["hidden_size"], "Q": config["num_attention_heads"], "K": config["num_key_value_heads"],
        "D": config["head_dim"], "G": config["intermediate_size"], "V": config["vocab_size"],
    }  # fmt: skip
    rows = TABLE + ([] if config["tie_word_embeddings"] else HEAD)
    return porting.entries(rows, size, {TOWER: vision["num_hidden_layers"], TEXT: config["num_hidden_layers"]})


def describe(config: Mapping) -> Base:
    """What a flat config says. Each picture of the base is a block of tokens between begin and end of image."""
    vision = config["vision_config"]
    grid, side = vision["image_size"] // vision["patch_size"], math.isqrt(config["mm_tokens_per_image"])
    projector = Projector(
        merge=grid // side, kind="mean_norm", separators="frames", bias=False, eps=vision["layer_norm_eps"]
    )
    return Base("gemma3", siglip.tower(vision, -1, post_norm=True), projector, decoder(config))


def decoder(config: Mapping) -> Decoder:
    """The decoder alone, of the text-only sizes too."""
    head, positions = config["head_dim"], config["max_position_embeddings"]

    def layer(kind: str) -> DecoderLayer:
        rope = config["rope_parameters"][kind]
        factor = rope.get("factor", 1.0) if rope["rope_type"] == "linear" else 1.0
        factors = (float(factor),) * (head // 2) if factor != 1 else ()
        window = config["sliding_window"] if kind == SLIDING else 0
        return DecoderLayer(Rope(float(rope["rope_theta"]), factors, factors, 1.0), window)

    return Decoder(
        width=config["hidden_size"], heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"],
        head_size=head, ffn=config["intermediate_size"], vocab=config["vocab_size"], eps=config["rms_norm_eps"],
        blocks=tuple(layer(kind) for kind in config["layer_types"]), max_positions=positions,
        original_positions=positions, activation="gelu_tanh", query_scale=config["query_pre_attn_scalar"] ** -0.5,
        embed_scale=config["hidden_size"] ** 0.5, qkv_bias=False, tied=bool(config["tie_word_embeddings"]),
        zero_centred_norms=True, post_norms=True, qk_norm=True, image_blocks=True,
    )  # fmt: skip


def views_of(folder: Path, config: Mapping) -> Views:
    """The whole picture, squashed to a square; pan and scan is off, as in the published files."""
    return functools.partial(pictures.squashed, resample=Image.Resampling.BILINEAR)


# Runs of newlines are tokens of their own, so that each text between special tokens stands whole: `user`, a newline and
# the two that the processor puts before an image are three.
CHAT = ChatTemplate(
    before_image="<start_of_turn>user\n\n\n<start_of_image>",
    between_images="<end_of_image>\n\n\n\n<start_of_image>", after_image="<end_of_image>", before_question="\n\n",
    after_question="<end_of_turn>\n<start_of_turn>model\n", after_answer="<end_of_turn>", bos_again=False, joint=None,
    eos_last=False, bos="<bos>", eos="<eos>", stop=("<end_of_turn>", "<eos>"),
    special=("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<eos>"),
)  # fmt: skip


def chat(config: Mapping) -> ChatTemplate:
    return CHAT


NAMES = generations.Generations(entries, generations.hugging_face({"conn.": ""}))
FAMILY = Family(
    name="gemma3", architectures=("Gemma3ForConditionalGeneration",), model_types=("gemma3",),
    mark=r".*mm_soft_emb_norm\.weight", mark_is="projector", flatten=flatten, describe=describe, table=NAMES.table,
    renamed=generations.renamed, views_of=views_of, chat=chat, aliases=NAMES.aliases, learnt=NAMES.learnt,
)  # fmt: skip
