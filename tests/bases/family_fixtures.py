"""Bases in miniature: config.json as the hub's files have it, random tensors, and a tokeniser of the family's kind."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests import tiny
from tghmoe_jax.bases import gemma3, llava
from tghmoe_jax.bases.family import Family
from tghmoe_jax.samples.tokenizer import FILES
from tghmoe_jax.weights import storage

TURNS = ["<start_of_turn>", "<end_of_turn>"]
IMAGES = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 2, "vision_use_head": False, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
TEXT = (
    "Write a report for this CT. Is there a lesion in the liver? Which side? The kidney, spleen and lung are normal. "
    "A. left B. right C. axial D. coronal. What does this scan show? There is a mass of 12 mm in the upper lobe."
)
# Rendered as the published template does it; the text of a message is trimmed, parts follow each other without a gap.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\\n' }}{% for part in m['content'] %}"
    "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}{{ '<start_of_turn>model\\n' if add_generation_prompt else '' }}"
)


def write_gemma_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-fallback BPE without a space in front of the first word, whose runs of newlines are tokens that are not
    special. Returns the ids of the image tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *TURNS]
    byte = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=len(byte) + 160, special_tokens=[*special, *byte], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] not in byte]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(saved))  # bytes are pieces of the model alone
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(1, 9)])
    tokenizer.add_special_tokens(IMAGES)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / FILES[0]))
    extra = {"boi_token": IMAGES[0], "eoi_token": IMAGES[1], "image_token": IMAGES[2]}
    settings = {
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>",
        "unk_token": "<unk>", "chat_template": TEMPLATE, "extra_special_tokens": extra, "padding_side": "left",
    }  # fmt: skip
    (folder / FILES[1]).write_text(json.dumps(settings | extra))
    return {token: tokenizer.token_to_id(token) for token in IMAGES}


def gemma3_config(ids: dict[str, int], size: int = 32) -> dict:
    """Seven layers, four blocks over 8 x 8 patches, four tokens a picture."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 4,
        "boi_token_index": ids[IMAGES[0]], "eoi_token_index": ids[IMAGES[1]], "image_token_index": ids[IMAGES[2]],
        "eos_token_id": [1, 5], "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 10,
            "sliding_window": 16, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "vocab_size": 480,
            "max_position_embeddings": 2048,
        },
        "vision_config": SIGLIP | {"image_size": size, "patch_size": size // 8},
    }  # fmt: skip


def write_gemma3(folder: Path, size: int = 32) -> Path:
    config = gemma3_config(write_gemma_tokenizer(folder), size)
    return _write(folder, config, gemma3.FAMILY)


def siglip_qwen2_config(vocab: int, size: int = 32) -> dict:
    """A LLaVA of SigLIP and Qwen2: four blocks over 8 x 8 patches, a token each, its feature before the last norm."""
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "image_token_index": vocab - 1, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab, "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        "vision_config": SIGLIP | {"image_size": size, "patch_size": size // 8},
    }  # fmt: skip


def write_siglip_qwen2(folder: Path, size: int = 32) -> Path:
    """With a tokeniser of Qwen2's kind: bytes, no BOS, ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / FILES[0]))
    settings = {"bos_token": None, "eos_token": special[2], "pad_token": special[0]}
    (folder / FILES[1]).write_text(json.dumps(settings))
    return _write(folder, siglip_qwen2_config(tokenizer.get_vocab_size() + 3, size), llava.FAMILY)


def _write(folder: Path, config: dict, family: Family) -> Path:
    """The folder of a base with random tensors."""
    flat = family.flatten(config)
    zero_centred = family.describe(flat).decoder.zero_centred_norms
    leaves = {name: tiny.leaf(name, shape, 0, zero_centred) for name, shape in family.shapes(flat).items()}
    storage.write_tensors(folder, family.to_checkpoint(leaves, flat))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Configs in flat form, at which the invariants of the model are tested, and what writes such a base.
FAMILIES = {
    "phi3_v": tiny.CONFIG, "gemma3": gemma3.flatten(gemma3_config(dict.fromkeys(IMAGES, 0), 16)),
    "siglip_qwen2": llava.flatten(siglip_qwen2_config(tiny.VOCAB, 16)),
}  # fmt: skip
WRITERS = {"gemma3": write_gemma3, "siglip_qwen2": write_siglip_qwen2}
