"""A Hugging Face LLaVA with random weights, and the same weights in this project's form (tghmoe_jax/weights)."""

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tghmoe_jax.bases import llava


def llava_peer(vision: dict, text: dict) -> LlavaForConditionalGeneration:
    """The peer, with SDPA. Features are those of the tower's last layer, so that both sides run all of its layers.

    Biases and norms are moved from the zeros and ones that they are initialised with, so that each is seen to count;
    the decoder's layers are made strong enough that they, and not its embeddings, choose the next token.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), vision_feature_layer=-1,
        tie_word_embeddings=text["tie_word_embeddings"], attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    peer = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for block in peer.model.language_model.layers:
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    return peer.requires_grad_(False)


def ported(peer: LlavaForConditionalGeneration) -> tuple[dict, dict[str, np.ndarray]]:
    """The peer's config.json in this project's flat form, and its weights as canonical leaves."""
    config = llava.flatten(peer.config.to_dict())
    tensors = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    return config, llava.FAMILY.to_flax(tensors, config)
