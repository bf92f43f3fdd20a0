"""A Gemma 3 in miniature: config.json as the hub's files have it, random tensors, and a tokeniser of its kind."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests import tiny
from tghmoe_jax.bases import gemma3
from tghmoe_jax.samples.tokenizer import FILES
from tghmoe_jax.weights import storage

TURNS = ["<start_of_turn>", "<end_of_turn>"]
IMAGES = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
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


def write_tokenizer(folder: Path) -> dict[str, int]:
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


def write_base(folder: Path, image_size: int = 32, seed: int = 0) -> Path:
    """Seven layers, four blocks over 8 x 8 patches, four tokens a picture."""
    ids = write_tokenizer(folder)
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 4,
        "boi_token_index": ids[IMAGES[0]], "eoi_token_index": ids[IMAGES[1]], "image_token_index": ids[IMAGES[2]],
        "eos_token_id": [1, 5], "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 10,
            "sliding_window": 16, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "vocab_size": 480,
            "max_position_embeddings": 2048,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
            "num_attention_heads": 2, "image_size": image_size, "patch_size": image_size // 8,
            "vision_use_head": False,
        },
    }  # fmt: skip
    flat = gemma3.flatten(config)
    leaves = {name: tiny.leaf(name, shape, seed) for name, shape in gemma3.FAMILY.shapes(flat).items()}
    for name in leaves:
        if name.endswith("scale") and not name.startswith("vision"):
            leaves[name] = leaves[name] - 1
        if name.endswith("embedding"):
            leaves[name] = leaves[name] * 0.1
    storage.write_tensors(folder, gemma3.FAMILY.to_checkpoint(leaves, flat))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
