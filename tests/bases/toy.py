"""A made-up family of 2D models that differs from Phi-3-V and LLaVA wherever a base may: all of it stands in this file.

A SigLIP-like tower (no class token, patch bias, no norm before the blocks, the last layer after its norm is the
feature, pixels in -1..1) and a Gemma-like decoder (two sliding layers to a full one, with a RoPE of their own;
zero-centred norms after the parts too, normed queries and keys, a scaled embedding, a tied head, images that see
themselves). Its template is Gemma 3's: one BOS, the image between tokens of its own, an answer that ends a turn.
"""

from pathlib import Path

from tghmoe_jax.bases import pictures
from tghmoe_jax.bases.family import Family
from tghmoe_jax.models.config import Base, Decoder, DecoderLayer, Projector, Rope, Tower
from tghmoe_jax.samples.chat import ChatTemplate
from tghmoe_jax.weights import porting
from tghmoe_jax.weights.porting import COPY, FLAT, HO, HQ, HWIO, T

CONFIG = {
    "architectures": ["ToyForPictures"], "model_type": "toy", "width": 32, "layers": 6, "heads": 4, "kv_heads": 2,
    "head": 12, "ffn": 48, "vocab_size": 64, "window": 5, "pattern": 3, "positions": 512,
    "vision": {"width": 24, "layers": 4, "heads": 2, "ffn": 40, "image": 16, "patch": 4},
}  # fmt: skip

_VISION, _TEXT = "vision.{i}.", "text.{i}."
TABLE = [
    ("patch.weight", "vision/patch/kernel", "P P 3 C", HWIO), ("patch.bias", "vision/patch/bias", "C", COPY),
    ("positions", "vision/pos", "S C", COPY),
    *((f"{_VISION}ln{n}.{torch}", f"vision/block_{{i}}/ln{n}/{ours}", "C", COPY)
      for n in "12" for torch, ours in (("weight", "scale"), ("bias", "bias"))),
    *((f"{_VISION}{n}.weight", f"vision/block_{{i}}/attn/{n}/kernel", "C N H", HQ) for n in "qkv"),
    *((f"{_VISION}{n}.bias", f"vision/block_{{i}}/attn/{n}/bias", "N H", FLAT) for n in "qkv"),
    (_VISION + "out.weight", "vision/block_{i}/attn/out/kernel", "N H C", HO),
    (_VISION + "out.bias", "vision/block_{i}/attn/out/bias", "C", COPY),
    (_VISION + "fc1.weight", "vision/block_{i}/mlp/fc1/kernel", "C F", T),
    (_VISION + "fc1.bias", "vision/block_{i}/mlp/fc1/bias", "F", COPY),
    (_VISION + "fc2.weight", "vision/block_{i}/mlp/fc2/kernel", "F C", T),
    (_VISION + "fc2.bias", "vision/block_{i}/mlp/fc2/bias", "C", COPY),
    ("norm.weight", "vision/post_ln/scale", "C", COPY), ("norm.bias", "vision/post_ln/bias", "C", COPY),
    ("projector.1.weight", "connector/fc1/kernel", "M W", T), ("projector.2.weight", "connector/fc2/kernel", "W W", T),
    ("embed.weight", "decoder/embed/embedding", "V W", COPY),
    *((f"{_TEXT}{n}", f"decoder/block_{{i}}/{n}/scale", "W", COPY)
      for n in ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")),
    (_TEXT + "q", "decoder/block_{i}/attn/q/kernel", "W Q D", HQ),
    *((f"{_TEXT}{n}", f"decoder/block_{{i}}/attn/{n}/kernel", "W K D", HQ) for n in "kv"),
    *((f"{_TEXT}{n}_norm", f"decoder/block_{{i}}/attn/{n}_norm/scale", "D", COPY) for n in "qk"),
    (_TEXT + "out", "decoder/block_{i}/attn/out/kernel", "Q D W", HO),
    *((f"{_TEXT}{n}", f"decoder/block_{{i}}/mlp/{n}/kernel", "W G", T) for n in ("gate", "up")),
    (_TEXT + "down", "decoder/block_{i}/mlp/down/kernel", "G W", T),
    ("final_norm", "decoder/final_norm/scale", "W", COPY),
]  # fmt: skip


def table(config):
    v = config["vision"]
    size = {
        "C": v["width"], "N": v["heads"], "H": v["width"] // v["heads"], "F": v["ffn"], "P": v["patch"], "3": 3,
        "S": (v["image"] // v["patch"]) ** 2, "M": 4 * v["width"], "W": config["width"], "Q": config["heads"],
        "K": config["kv_heads"], "D": config["head"], "G": config["ffn"], "V": config["vocab_size"],
    }  # fmt: skip
    return porting.entries(TABLE, size, {_VISION: v["layers"], _TEXT: config["layers"]})


def describe(config):
    v = config["vision"]
    near, far = Rope(1e4, (), (), 1.0), Rope(1e6, (8.0,) * (config["head"] // 2), (8.0,) * (config["head"] // 2), 1.0)
    blocks = tuple(
        DecoderLayer(far, 0) if (i + 1) % config["pattern"] == 0 else DecoderLayer(near, config["window"])
        for i in range(config["layers"])
    )
    return Base(
        "toy",
        Tower(
            width=v["width"], layers=v["layers"], heads=v["heads"], ffn=v["ffn"], image_size=v["image"],
            patch_size=v["patch"], eps=1e-6, activation="gelu_tanh", class_token=False, patch_bias=True, pre_norm=False,
            post_norm=True, feature_layer=-1, mean=(0.5,) * 3, std=(0.5,) * 3,
        ),
        Projector(merge=2, kind="mlp", separators="frames", bias=False, eps=0.0),
        Decoder(
            width=config["width"], heads=config["heads"], kv_heads=config["kv_heads"], head_size=config["head"],
            ffn=config["ffn"], vocab=config["vocab_size"], eps=1e-6, blocks=blocks, max_positions=config["positions"],
            original_positions=config["positions"], activation="gelu_tanh", query_scale=10**-0.5,
            embed_scale=config["width"] ** 0.5, qkv_bias=False, tied=True, zero_centred_norms=True, post_norms=True,
            qk_norm=True, image_blocks=True,
        ),
    )  # fmt: skip


def views_of(folder: Path, config):
    return pictures.square


CHAT = ChatTemplate(
    before_image="<start_of_turn>user\n\n\n<start_of_image>",
    between_images="<end_of_image>\n\n\n<start_of_image>", after_image="<end_of_image>", before_question="\n\n",
    after_question="<end_of_turn>\n<start_of_turn>model\n", after_answer="<end_of_turn>", bos_again=False, joint=None,
    eos_last=False, bos="<bos>", eos="<eos>", stop=("<end_of_turn>",),
    special=("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"),
)  # fmt: skip


def chat(config):
    return CHAT


FAMILY = Family(
    name="toy", architectures=("ToyForPictures",), model_types=("toy",), mark="projector.1.weight", mark_is="projector",
    flatten=dict, describe=describe, table=table, renamed=str, views_of=views_of, chat=chat,
)  # fmt: skip
