"""A tiny Phi-3-V: its config.json and random checkpoint tensors, every size different from every other."""

import numpy as np
import pytest

from tghmoe_jax.bases import phi3v


@pytest.fixture
def config() -> dict:
    return {
        "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "hidden_act": "silu",
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 50, "rms_norm_eps": 1e-5,
        "vision_config": {
            "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 3,
            "image_size": 28, "patch_size": 7,
        },
    }  # fmt: skip


@pytest.fixture
def checkpoint(config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {e.name: rng.standard_normal(e.torch_shape).astype(np.float32) for e in phi3v.entries(config)}
