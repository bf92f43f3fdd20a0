"""The embedded 2D base: a tiny Phi-3-V trained on pictures that are not CT.

    python -m tghmoe_jax.main --config configs/pretrain2d.py:letters
    python -m tghmoe_jax.main --config configs/pretrain2d.py
    python -m tghmoe_jax.convert --from runs/pretrain2d --to tghmoe_jax/assets/base

Random initialisation, depth 1, no experts. The decoder learns letters from text alone first, then the whole model
pictures. The sizes below are written into the base's config.json.
"""

from ml_collections import ConfigDict

from configs import common

# Phi-3-V's keys; `vision_config` gives the sizes that its own file leaves to CLIP ViT-L/14-336.
BASE = {
    "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v",
    "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 256, "vocab_size": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 384,
        "image_size": 64, "patch_size": 8, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
    },
}  # fmt: skip


def get_config(arg: str | None = None):
    preset = common.parse_arg(arg, ("letters",))["preset"]
    c = common.get_config()
    c.base = ""
    c.base_config = ConfigDict(BASE)
    c.trainable = common.STAGE1_TRAINABLE
    c.data.update({"name": "scenes", "slices": 1, "volumes": 1_000_000, "text_length": 52})
    c.data.mixture.update({"report": 1, "open": 3, "closed": 3, "binding": 1})
    c.model.update({"patch_depth": 1, "attn3d_layers": ()})
    c.model.tgh.layers = ()
    c.optimizer.update({"rate": 3e-3, "decay": 0.01})
    c.train.update({"steps": 5000, "batch": 32, "accumulate": 1})
    c.checkpoint.every = 300
    c.eval.update({"items": 1000, "calibration": 0})
    if preset == "letters":
        c.trainable = (r"decoder/.*",)
        c.data.slices = 0
        c.data.mixture.update({"report": 0, "open": 0, "closed": 0, "binding": 1})
        c.optimizer.final = 0.3
        c.train.update({"steps": 600, "batch": 64})
        c.eval.every = 0
    else:
        c.init_from = "runs/pretrain2d-letters"
    return c
