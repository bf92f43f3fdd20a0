"""Greedy text from a 135M-parameter decoder shaped like Llama: prefill of 1,405 visual and 64 text tokens, then 128
tokens, batch 1 and 8, against `generate` of Hugging Face on the same weights and embeddings. The tokens must be equal
up to ties: of random weights the best logits lie close together, and rounding may turn one token and all after it.
"""

from collections.abc import Callable

import jax
import numpy as np
from flax import traverse_util

from benchmarks import models, port
from benchmarks.measure import Row, alternate, better, prepare_torch
from tghmoe_jax.models import generation
from tghmoe_jax.tools import flops

LLAMA_135M = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
FULL, SMALL = (1405, 64, 128), (10, 8, 5)  # visual tokens, text tokens, new tokens
PREFIX = 4  # text tokens before the visual ones
TIE = 1e-3  # of the spread of a step's logits
# (batch, bound)
ROWS = ((1, 0.7), (8, 0.75))


def run(small: bool, runs: int) -> list[Row]:
    torch = prepare_torch(small)
    visual_tokens, text_tokens, new_tokens = SMALL if small else FULL
    peer = port.llava_peer(models.CLIP_SMALL, models.LLAMA_SMALL if small else LLAMA_135M)
    config, leaves = port.ported(peer)
    model, variables = models.ours(config, leaves, models.CLIP_SMALL["image_size"], PREFIX)
    llama = causal_lm(peer)

    rows = []
    for batch, bound in ROWS:
        rng = np.random.default_rng(batch)
        tokens = rng.integers(3, config["vocab_size"], (batch, text_tokens)).astype(np.int32)
        spread = float(leaves["decoder/embed/embedding"].std())
        visual = rng.standard_normal((batch, visual_tokens, config["hidden_size"]), np.float32) * np.float32(spread)
        with torch.inference_mode():
            text = llama.get_input_embeddings()(torch.from_numpy(tokens).long())
            embeds = torch.cat([text[:, :PREFIX], torch.from_numpy(visual), text[:, PREFIX:]], dim=1)
        ours = our_generation(model, variables, tokens, visual)

        for what, count, most in (("whole text", new_tokens, bound), ("first token", 1, None)):
            ways = {"eager": lambda n=count, e=embeds: hf_generation(llama, e, n)}
            if not small and what == "whole text":
                ways["static cache"] = lambda n=count, e=embeds: hf_generation(llama, e, n, "static")
                ways["static cache, torch.compile"] = lambda n=count, e=embeds: hf_generation(
                    llama, e, n, "static", True
                )
            with torch.inference_mode():
                best, way, tried = better(ways)
                found, expected = ours(count), way().numpy()
                if not np.array_equal(found, expected):
                    gap = behind(llama, embeds, found)
                    if not gap <= TIE:
                        raise SystemExit(
                            f"error: decode, batch {batch}: a token lies {gap:.2g} of the spread behind the best."
                        )
                times = alternate(lambda f=ours, n=count: f(n), way, runs)
            prompt = visual_tokens + text_tokens
            rows.append(Row(
                f"batch {batch}, {what}", *times, most,
                work=work(model, variables, batch, prompt, count),
                notes={"peer": best, "tried": tried, "tokens": count, "distinct": len(np.unique(expected)),
                       "equal": float((found == expected).mean())},
            ))  # fmt: skip
    return rows


def our_generation(model, variables, tokens: np.ndarray, visual: np.ndarray) -> Callable[[int], np.ndarray]:
    """number of new tokens -> token ids (B, new)."""
    seen = np.ones(tokens.shape, bool)
    batch = {"tokens": tokens, "token_mask": seen, "question_mask": seen}
    visible = np.ones(visual.shape[:2], bool)
    batch, visual, visible = jax.device_put((batch, visual, visible))
    return lambda count: np.asarray(generation.generate(model, variables, batch, visual, visible, count, (-1,)))


def causal_lm(peer):
    """The peer's decoder as a model of its own."""
    from transformers import LlamaForCausalLM

    text = peer.config.text_config
    text._attn_implementation = "sdpa"
    alone = LlamaForCausalLM(text).eval()
    alone.model.load_state_dict(peer.model.language_model.state_dict())
    alone.tie_weights()
    alone.generation_config.eos_token_id = None
    alone.generation_config.pad_token_id = 0
    return alone.requires_grad_(False)


def hf_generation(llama, embeds, count: int, cache: str | None = None, compiled: bool = False):
    """Greedy token ids (B, count), the library's own loop; it compiles the step after the prefill, with a static cache.

    On a CPU it does so only where a flag of its own asks for it.
    """
    import torch
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=False, mode="default") if compiled else None
    if compiled:
        config._compile_all_devices = True
    return llama.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), max_new_tokens=count,
        min_new_tokens=count, do_sample=False, cache_implementation=cache, compile_config=config,
    )  # fmt: skip


def behind(llama, embeds, tokens: np.ndarray) -> float:
    """How far the peer's logits of our tokens (B, N) lie below the best, over their spread: the largest."""
    import torch

    ids = torch.from_numpy(tokens).long()
    text = torch.cat([embeds, llama.get_input_embeddings()(ids[:, :-1])], dim=1)
    logits = llama(inputs_embeds=text, logits_to_keep=tokens.shape[1]).logits
    chosen = logits.gather(-1, ids[..., None])[..., 0]
    return float(((logits.max(-1).values - chosen) / logits.std(-1)).max())


def work(model, variables, batch: int, prompt: int, count: int) -> list[tuple[float, float]]:
    """FLOPs and bytes of the prefill, with logits of its last token alone, and of all further tokens.

    A further token reads all weights once for the whole batch, and the keys and values of each sample.
    """
    leaves = traverse_util.flatten_dict(variables["params"]["decoder"], sep="/")
    token = flops.decode_token(model.cfg, {f"decoder/{path}": leaf.shape for path, leaf in leaves.items()}, 0).useful
    weights = sum(leaf.nbytes for leaf in leaves.values())
    d = model.cfg.decoder
    logits, pair = 2.0 * d.vocab * d.width, 4.0 * d.heads * d.head_size * d.layers  # pair: of a query and a key
    key = 2 * 4 * d.kv_heads * d.head_size * d.layers  # bytes of a key and its value in all layers
    seen = sum(prompt + i for i in range(1, count))
    return [
        (batch * (prompt * (token - logits) + logits + pair * prompt**2 / 2), weights),
        (batch * ((count - 1) * token + pair * seen), (count - 1) * weights + batch * key * seen),
    ]
