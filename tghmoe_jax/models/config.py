"""Every size of the model as a frozen number, built from the base's config.json and an experiment's `model` section.

Defaults are those of model-spec 0 and 4.7 where they do not depend on the base.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from tghmoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DepthRope:
    """Rotary depth positions (model-spec 4.3). `unit`: `slice` (slab index) or `mm` (index * spacing / reference)."""

    enabled: bool = True
    rotary_dim: int = 64
    base: float = 10000.0
    unit: str = "slice"
    reference_mm: float = 10.0
    scale: float = 1.0
    scale_init: float = 1.0  # with ramp_steps > 0 the scale goes linearly from scale_init to scale
    ramp_steps: int = 0


@dataclasses.dataclass(frozen=True)
class TGH:
    """Text-guided hierarchical MoE (model-spec 4.4)."""

    layers: tuple[int, ...] = ()
    task_layers: tuple[int, ...] = ()  # stacked topology only: layers that hold the task FFNs
    topology: str = "nested"  # nested | stacked | parallel
    groups: int = 1
    experts: int = 4
    top_k: int = 2
    token_input: str = "image_text"  # image_text ([u ; t]) | image | text
    task_input: str = "text"  # text | image | image_text | oracle | random | none (the mean of all groups)
    gate: str = "renormalised"  # renormalised | unnormalised | sigmoid | noisy
    hidden: int = 256  # width of the prompt vector t
    dispatch: str = "ragged"  # dense | capacity | ragged: how a device computes its experts
    transport: str = "all_to_all"  # all_to_all | gather | ragged: how tokens reach experts of other devices
    capacity_factor: float = 1.25
    group_shares: tuple[float, ...] = ()  # each group's part of a batch, for fixed capacities; empty: equal parts


@dataclasses.dataclass(frozen=True)
class Vision:
    """CLIP tower over slabs of slices (model-spec 2.2, 4.1, 4.2). Its output is block `layers + feature_layer`."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    ffn: int = 4096
    image_size: int = 336
    patch_size: int = 14
    patch_depth: int = 2
    eps: float = 1e-5
    feature_layer: int = -2
    attn3d_layers: tuple[int, ...] = ()
    attn3d_kind: str = "joint"  # joint | window | depth_axial | divided
    attn3d_window: int = 1
    depth_embed: str = "rope"  # rope | learned_zero_init | none
    depth_rope: DepthRope = DepthRope()
    max_depth: int = 128  # rows of the learned depth embedding

    @property
    def executed(self) -> int:
        """Number of blocks that are run; the others are kept for export only."""
        return self.layers + self.feature_layer + 1

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class Connector:
    """Visual tokens for the decoder (model-spec 2.3, 4.5)."""

    depth_pool: int = 1
    spatial_pool: int = 1
    merge: int = 2  # side of the square of patches that one visual token joins
    separators: bool = True  # whether the base has newline and view separators
    bias: bool = True  # of the projector
    newline: bool = True
    global_view: bool = True
    layout: str = "sub_glb_3d"  # sub_glb_3d | flat (no newlines, no global view)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank updates of the decoder's projections. `targets`: regex on `attn/{q,k,v,out}`, `mlp/{gate,up,down}`."""

    rank: int = 0  # 0: none
    alpha: float = 16.0
    targets: str = "attn/(q|v)"


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Phi-3, Llama, Mistral or Qwen2 language model (model-spec 2.4, 3.1)."""

    width: int = 3072
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    ffn: int = 8192
    vocab: int = 32064
    eps: float = 1e-5
    rope_theta: float = 10000.0
    short_factor: tuple[float, ...] = ()  # empty: plain RoPE
    long_factor: tuple[float, ...] = ()
    max_positions: int = 131072
    original_positions: int = 4096
    rope_factor: str = "auto"  # auto | short | long
    magnitude: float = 0.0  # of cos and sin under su/longrope; 0: from the two numbers of positions
    head_dim: int = 0  # 0: width / heads
    qkv_bias: bool = False
    tied: bool = False  # the head is the embedding table

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def rope_magnitude(self) -> float:
        """su/longrope attention factor sqrt(1 + ln(max/original) / ln(original)), in both regimes."""
        if self.magnitude:
            return self.magnitude
        ratio = self.max_positions / self.original_positions
        if not self.short_factor or ratio <= 1:
            return 1.0
        return math.sqrt(1 + math.log(ratio) / math.log(self.original_positions))

    def factors(self, length: int) -> tuple[float, ...]:
        """The factor list for a planned length of `length` positions (prompt and new tokens), chosen once per call."""
        regime = self.rope_factor
        if regime == "auto":
            regime = "short" if length <= self.original_positions else "long"
        return self.short_factor if regime == "short" else self.long_factor


@dataclasses.dataclass(frozen=True)
class Model:
    """One 3D multimodal LLM. `tasks` names the expert groups; `aux_labels`, token ids of the
    phrase of each label, adds the auxiliary finding head."""

    vision: Vision = Vision()
    tgh: TGH = TGH()
    connector: Connector = Connector()
    decoder: Decoder = Decoder()
    lora: Lora = Lora()
    tasks: tuple[str, ...] = ("report", "vqa")
    aux_labels: tuple[tuple[int, ...], ...] = ()
    prefix_length: int = 4  # tokens before the image (BOS and the user tag), the same for every sample
    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"
    remat: str = "none"  # none | dots | full
    attention: str = "auto"
    scan_decoder: bool = True  # as one loop over stacked leaves; False with a cache alone: see generation.unrolled

    def slabs(self, slices: int) -> int:
        return -(-slices // self.vision.patch_depth)

    @property
    def cell(self) -> tuple[int, int, int]:
        """Voxels (slices, rows, columns) of one visual token of the connector's views."""
        side = self.connector.merge * self.vision.patch_size * self.connector.spatial_pool
        return (self.vision.patch_depth * self.connector.depth_pool, side, side)

    def visual_tokens(self, slices: int) -> int:
        """Number of visual tokens of a volume of `slices` slices (model-spec 4.5, I24)."""
        c = self.connector
        side = self.vision.grid // c.merge // c.spatial_pool
        rows = side * (side + (1 if c.newline and c.layout != "flat" else 0))
        views = -(-self.slabs(slices) // c.depth_pool)
        if c.layout == "flat" or not c.global_view:
            return rows * views
        return rows * views + 1 + rows


def build(
    base: Mapping[str, Any],
    model: Mapping[str, Any],
    aux_labels: tuple[tuple[int, ...], ...] = (),
    prefix_length: int = 4,
    group_shares: tuple[float, ...] = (),
) -> Model:
    """Model sizes from a base's flat config.json (`weights.base.load_config`) and an experiment's `model` section.

    UserError names the key that cannot hold.
    """
    clip = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "image_size": 336, "patch_size": 14, "layer_norm_eps": 1e-5,
    } | dict(base.get("vision_config", {}))  # fmt: skip
    scaling = base.get("rope_scaling") or {}
    tgh = dict(model["tgh"])
    tgh |= {"layers": tuple(tgh["layers"]), "task_layers": tuple(tgh["task_layers"]), "group_shares": group_shares}
    rope = dict(model["depth_rope"])
    vision = Vision(
        width=clip["hidden_size"], layers=clip["num_hidden_layers"], heads=clip["num_attention_heads"],
        ffn=clip["intermediate_size"], image_size=clip["image_size"], patch_size=clip["patch_size"],
        eps=clip["layer_norm_eps"], patch_depth=model["patch_depth"], attn3d_layers=tuple(model["attn3d_layers"]),
        attn3d_kind=model["attn3d_kind"], attn3d_window=model["attn3d_window"], depth_embed=model["depth_embed"],
        depth_rope=DepthRope(**rope), feature_layer=base.get("vision_feature_layer", -2),
    )  # fmt: skip
    connector = Connector(
        depth_pool=model["depth_pool"], spatial_pool=model["spatial_pool"], newline=model["newline"],
        global_view=model["global_view"], layout=model["layout"], bias=base.get("projector_bias", True),
    )  # fmt: skip
    if base.get("model_type") == "llava":  # one token a patch, and nothing to separate rows and views with
        connector = dataclasses.replace(
            connector, merge=1, separators=False, newline=False, global_view=False, layout="flat"
        )
    result = Model(
        vision=vision,
        tgh=TGH(**tgh),
        connector=connector,
        decoder=Decoder(
            width=base["hidden_size"], layers=base["num_hidden_layers"], heads=base["num_attention_heads"],
            kv_heads=base.get("num_key_value_heads", base["num_attention_heads"]), ffn=base["intermediate_size"],
            vocab=base["vocab_size"], eps=base.get("rms_norm_eps", 1e-5), rope_theta=base.get("rope_theta", 10000.0),
            short_factor=tuple(scaling.get("short_factor", ())), long_factor=tuple(scaling.get("long_factor", ())),
            max_positions=base.get("max_position_embeddings", 4096),
            original_positions=base.get("original_max_position_embeddings", base.get("max_position_embeddings", 4096)),
            rope_factor=model["rope_factor"], head_dim=base.get("head_dim") or 0,
            magnitude=base.get("rope_magnitude", 0.0),
            qkv_bias=base.get("qkv_bias", False), tied=bool(base.get("tie_word_embeddings", False)),
        ),
        lora=Lora(**model.get("lora", {})),  # runs of earlier versions have none
        tasks=tuple(model["tasks"]), aux_labels=aux_labels, prefix_length=prefix_length, dtype=model["dtype"],
        param_dtype=model["param_dtype"], remat=model["remat"], attention=model["attention"],
    )  # fmt: skip
    check(result)
    return result


_CHOICES = {
    "model.tgh.topology": (lambda m: m.tgh.topology, ("nested", "stacked", "parallel")),
    "model.tgh.token_input": (lambda m: m.tgh.token_input, ("image_text", "image", "text")),
    "model.tgh.task_input": (lambda m: m.tgh.task_input, ("text", "image", "image_text", "oracle", "random", "none")),
    "model.tgh.gate": (lambda m: m.tgh.gate, ("renormalised", "unnormalised", "sigmoid", "noisy")),
    "model.tgh.dispatch": (lambda m: m.tgh.dispatch, ("dense", "capacity", "ragged")),
    "model.tgh.transport": (lambda m: m.tgh.transport, ("all_to_all", "gather", "ragged")),
    "model.attn3d_kind": (lambda m: m.vision.attn3d_kind, ("joint", "window", "depth_axial", "divided")),
    "model.depth_embed": (lambda m: m.vision.depth_embed, ("rope", "learned_zero_init", "none")),
    "model.depth_rope.unit": (lambda m: m.vision.depth_rope.unit, ("slice", "mm")),
    "model.layout": (lambda m: m.connector.layout, ("sub_glb_3d", "flat")),
    "model.remat": (lambda m: m.remat, ("none", "dots", "full")),
    "model.attention": (lambda m: m.attention, ("auto", "plain", "blocked", "splash", "cudnn")),
    "model.rope_factor": (lambda m: m.decoder.rope_factor, ("auto", "short", "long")),
    "model.dtype": (lambda m: m.dtype, ("float32", "bfloat16")),
    "model.param_dtype": (lambda m: m.param_dtype, ("float32", "bfloat16")),
}  # fmt: skip


def check(model: Model) -> None:
    """Raises UserError for a combination that has no meaning."""
    for flag, (read, allowed) in _CHOICES.items():
        if read(model) not in allowed:
            raise UserError(f"--config.{flag}={read(model)} is unknown; use one of {', '.join(allowed)}.")
    v, t = model.vision, model.tgh
    places = ("attn/q", "attn/k", "attn/v", "attn/out", "mlp/gate", "mlp/up", "mlp/down")
    try:
        hit = any(re.fullmatch(model.lora.targets, place) for place in places)
    except re.error:
        hit = False
    if model.lora.rank and not hit:
        raise UserError(
            f"--config.model.lora.targets={model.lora.targets} is no regex that matches one of {', '.join(places)}."
        )
    for flag, value, least in (
        ("patch_depth", v.patch_depth, 1), ("attn3d_window", v.attn3d_window, 0), ("tgh.experts", t.experts, 1),
        ("lora.rank", model.lora.rank, 0),
        ("depth_pool", model.connector.depth_pool, 1), ("spatial_pool", model.connector.spatial_pool, 1),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"--config.model.{flag}={value} must be at least {least}.")
    for flag, layers in (
        ("attn3d_layers", v.attn3d_layers), ("tgh.layers", t.layers), ("tgh.task_layers", t.task_layers)
    ):  # fmt: skip
        bad = [i for i in layers if not 0 <= i < v.executed]
        if bad:
            raise UserError(
                f"--config.model.{flag} names layers {bad}, but only layers 0 to {v.executed - 1} are executed; "
                "leave the others out."
            )
    if t.groups not in (1, len(model.tasks)):
        raise UserError(f"--config.model.tgh.groups={t.groups} must be 1 or the number of tasks, {len(model.tasks)}.")
    if not 1 <= t.top_k <= t.experts:
        raise UserError(f"--config.model.tgh.top_k={t.top_k} must lie between 1 and the {t.experts} experts.")
    if set(t.layers) & set(t.task_layers):
        raise UserError("--config.model.tgh.task_layers must share no layer with tgh.layers (stacked topology).")
    merge = model.connector.merge
    if v.grid % merge or (v.grid // merge) % model.connector.spatial_pool:
        raise UserError(
            f"--config.model.spatial_pool={model.connector.spatial_pool} must divide the {v.grid}-patch grid after "
            f"{merge} x {merge} patches are joined."
        )
    if v.depth_rope.rotary_dim > v.width // v.heads or v.depth_rope.rotary_dim % 2:
        raise UserError(
            f"--config.model.depth_rope.rotary_dim={v.depth_rope.rotary_dim} must be even and at most the head size "
            f"{v.width // v.heads}."
        )
