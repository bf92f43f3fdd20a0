"""The tensor names in the files of Hugging Face's image-text models, whose prefixes changed between releases.

A table speaks normal names (`tower.`, `conn.`, `text.`, `head.`); a generation puts its own prefixes in front.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tghmoe_jax.bases import phi3v
from tghmoe_jax.weights.porting import COPY, HO, HQ, Entry, Row, T

Prefixes = dict[str, str]
TEXT, BLOCK = "text.layers.{i}.", "decoder/block_{i}/"
# What every text part has, and what one has whose projections are not fused. Letters are those of `phi3v`.
TEXT_TABLE: list[Row] = [
    ("text.embed_tokens.weight", "decoder/embed/embedding", "V W", COPY),
    (TEXT + "input_layernorm.weight", BLOCK + "attn_norm/scale", "W", COPY),
    (TEXT + "self_attn.o_proj.weight", BLOCK + "attn/out/kernel", "Q D W", HO),
    (TEXT + "mlp.down_proj.weight", BLOCK + "mlp/down/kernel", "G W", T),
    ("text.norm.weight", "decoder/final_norm/scale", "W", COPY),
]
SPLIT: list[Row] = [
    (TEXT + "self_attn.q_proj.weight", BLOCK + "attn/q/kernel", "W Q D", HQ),
    (TEXT + "self_attn.k_proj.weight", BLOCK + "attn/k/kernel", "W K D", HQ),
    (TEXT + "self_attn.v_proj.weight", BLOCK + "attn/v/kernel", "W K D", HQ),
    (TEXT + "mlp.gate_proj.weight", BLOCK + "mlp/gate/kernel", "W G", T),
    (TEXT + "mlp.up_proj.weight", BLOCK + "mlp/up/kernel", "W G", T),
]
HEAD: list[Row] = [("head.weight", "decoder/lm_head/kernel", "W V", T)]


def hugging_face(projector: Mapping[str, str]) -> dict[str, Prefixes]:
    """The prefixes of each generation; `projector` gives those of its parts without `multi_modal_projector.`.

    G1: files of the hub, saved by transformers 4.50 and before. G2: saved by 4.52 to 4.57. G3: saved by 5. G4: the
    names in memory of 5.
    """

    def named(conn: str, tower: str, text: str, head: str) -> Prefixes:
        parts = {part: f"{conn}multi_modal_projector.{name}" for part, name in projector.items()}
        return parts | {"tower.": tower, "text.": text, "head.": head}

    outer, inner = ("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")
    return {
        "G1": named("", "vision_tower.vision_model.", *outer),
        "G2": named("model.", "model.vision_tower.vision_model.", *inner),
        "G3": named("", "vision_tower.", *outer),
        "G4": named("model.", "model.vision_tower.", *inner),
    }


@dataclasses.dataclass(frozen=True)
class Generations:
    """The tables of a family whose files have several generations of names.

    entries: flat config -> the table under normal names. prefixes: {generation: {normal prefix: its own}}.
    """

    entries: Callable[[Mapping], list[Entry]]
    prefixes: Mapping[str, Prefixes]

    def named(self, name: str, generation: str) -> str:
        """A normal name as one generation writes it."""
        old, new = next((old, new) for old, new in self.prefixes[generation].items() if name.startswith(old))
        return new + name.removeprefix(old)

    def of(self, names: Mapping, config: Mapping) -> str:
        """The generation that explains the most names; the later ones lose a tie."""
        due = [entry.name for entry in self.entries(config)]
        return max(self.prefixes, key=lambda one: sum(self.named(name, one) in names for name in due))

    def table(self, config: Mapping) -> list[Entry]:
        """The table under the names of the config's `generation`, which `bases.base.load_base` records, or of G1."""
        generation = config.get("generation", "G1")
        return [dataclasses.replace(one, name=self.named(one.name, generation)) for one in self.entries(config)]

    def aliases(self, config: Mapping) -> dict[str, str]:
        """A tied head may be written out all the same."""
        if not config.get("tie_word_embeddings"):
            return {}
        generation = config.get("generation", "G1")
        return {self.named("head.weight", generation): self.named("text.embed_tokens.weight", generation)}

    def learnt(self, tensors: Mapping, config: Mapping) -> dict[str, Any]:
        """The generation of the names."""
        return {"generation": self.of(tensors, config)}


def renamed(name: str) -> str | None:
    """The name itself, None for a buffer."""
    return None if phi3v.IGNORED.fullmatch("." + name) else name
