"""Every size and choice of the model as frozen values without defaults.

`Tower`, `Projector` and `Decoder` are facts of a 2D checkpoint, which `bases/<family>.py` reads from its config.json.
`Volume3D` is the experiment on top of it, the `model` section of a config, whose defaults stand in configs/common.py.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from tghmoe_jax.errors import UserError
from tghmoe_jax.ops import choices

# ---- facts of a checkpoint -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tower:
    """A 2D ViT. Its feature is the output of block `layers + feature_layer`, after the final norm with `post_norm`.

    activation: a name of `ops.activations.ACTIVATIONS`. class_token: one token before the patches, with a position of
    its own. pre_norm: a norm before the first block. post_norm: whether the feature passes the norm after the last
    block; without, its leaves are only kept for export. mean and std: of the pixels in 0..1, for each channel.
    """

    width: int
    layers: int
    heads: int
    ffn: int
    image_size: int
    patch_size: int
    eps: float
    activation: str
    class_token: bool
    patch_bias: bool
    pre_norm: bool
    post_norm: bool
    feature_layer: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def executed(self) -> int:
        """Number of blocks that are run; the others are kept for export only."""
        return self.layers + self.feature_layer + 1

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of one picture or slab."""
        return self.grid**2 + self.class_token


@dataclasses.dataclass(frozen=True)
class Projector:
    """From patch features to visual tokens: `merge` x `merge` patches become one token.

    kind: `mlp`, patches joined and two layers (model-spec 2.3), or `mean_norm`, patches averaged, an RMSNorm of `eps`
    and one matrix (Gemma 3). bias: of the two layers. separators: what the base puts between visual tokens: `newlines`,
    learned newline and view separators; `frames`, the chat template's end and begin of image between views; `none`.
    """

    merge: int
    kind: str
    separators: str
    bias: bool
    eps: float


@dataclasses.dataclass(frozen=True)
class Rope:
    """One table of rotary positions: frequencies theta^(-2i/H) / factor_i; cos and sin times `magnitude`.

    The factors are those of the regime that the planned length falls into (model-spec 2.4); empty ones are 1.
    """

    theta: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    magnitude: float


@dataclasses.dataclass(frozen=True)
class DecoderLayer:
    """What may differ from layer to layer. window: how many positions back a token sees, itself included; 0: all."""

    rope: Rope
    window: int


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A causal language model (model-spec 2.4, 3.1).

    activation: of the gate, a name of `ops.activations.ACTIVATIONS`. query_scale: of the scores. embed_scale: of token
    embeddings, not of visual tokens. zero_centred_norms: RMSNorm multiplies by 1 + w before the cast (Gemma), else by
    w after it. post_norms: a norm after attention and FFN too. qk_norm: of each head's queries and keys.
    image_blocks: visual tokens of one view see each other in both directions. tied: the head is the embedding table.
    """

    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    eps: float
    blocks: tuple[DecoderLayer, ...]
    max_positions: int
    original_positions: int  # beyond them the long factors hold
    activation: str
    query_scale: float
    embed_scale: float
    qkv_bias: bool
    tied: bool
    zero_centred_norms: bool
    post_norms: bool
    qk_norm: bool
    image_blocks: bool

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Each table once."""
        return tuple(dict.fromkeys(layer.rope for layer in self.blocks))

    @property
    def windows(self) -> tuple[int, ...]:
        """Each window once."""
        return tuple(dict.fromkeys(layer.window for layer in self.blocks))


@dataclasses.dataclass(frozen=True)
class Base:
    """What the config.json of a 2D model of one family says."""

    family: str
    tower: Tower
    projector: Projector
    decoder: Decoder


# ---- the experiment --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DepthRope:
    """Rotary depth positions (model-spec 4.3). `unit`: `slice` (slab index) or `mm` (index * spacing / reference)."""

    enabled: bool
    rotary_dim: int
    base: float
    unit: str
    reference_mm: float
    scale: float
    scale_init: float  # with ramp_steps > 0 the scale goes linearly from scale_init to scale
    ramp_steps: int


@dataclasses.dataclass(frozen=True)
class TGH:
    """Text-guided hierarchical MoE (model-spec 4.4).

    task_layers: of the stacked topology, the layers that hold the task FFNs. token_input: what the token router reads,
    image_text being [u ; t]. task_input: what the task router reads, or what takes its place; `none` is the mean of
    all groups. hidden: width of the prompt vector t. dispatch: how a device computes its experts; transport: how tokens
    reach experts of other devices. group_shares: each group's part of a batch, for fixed capacities; empty: equal.
    """

    layers: tuple[int, ...]
    task_layers: tuple[int, ...]
    topology: str
    groups: int
    experts: int
    top_k: int
    token_input: str
    task_input: str
    hidden: int
    dispatch: str
    transport: str
    capacity_factor: float
    group_shares: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Volume3D:
    """How the 2D model is carried to volumes (model-spec 0, 4.1 to 4.5).

    patch_depth: slices of a slab, whose patch kernel comes from the 2D one by `inflation`. depth_pool: slabs averaged
    into one view. layout: `sub_glb_3d` closes rows with newlines and adds a global view; `frames` puts the template's
    end and begin of image between views; `flat` has neither. A base has the layout of its own separators, or `flat`.
    """

    patch_depth: int
    inflation: str
    attn3d_layers: tuple[int, ...]
    attn3d_kind: str
    attn3d_window: int
    depth_embed: str
    depth_rope: DepthRope
    tgh: TGH
    depth_pool: int
    spatial_pool: int
    layout: str


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank updates of the decoder's projections; rank 0: none. `targets`: regex on the names in LORA_PLACES."""

    rank: int
    alpha: float
    targets: str


LORA_PLACES = ("attn/q", "attn/k", "attn/v", "attn/out", "mlp/gate", "mlp/up", "mlp/down")
MAX_DEPTH = 128  # rows of the learned depth positions
LAYOUTS = {"newlines": "sub_glb_3d", "frames": "frames", "none": "flat"}  # of a base's separators

# The allowed values of the `model` section's keys.
ALLOWED = {
    "inflation": ("average", "centre"),
    "attn3d_kind": ("joint", "window"),
    "depth_embed": ("rope", "learned_zero_init", "none"),
    "depth_rope.unit": ("slice", "mm"),
    "tgh.topology": ("nested", "stacked", "parallel"),
    "tgh.token_input": ("image_text", "image", "text"),
    "tgh.task_input": ("text", "image", "image_text", "oracle", "random", "none"),
    "tgh.dispatch": choices.DISPATCHES,
    "tgh.transport": choices.TRANSPORTS,
    "layout": ("sub_glb_3d", "flat"),
    "rope_factor": ("auto", "short", "long"),
    "remat": ("none", "dots", "full"),
    "attention": choices.BACKENDS,
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One 3D multimodal LLM.

    tasks: names of the expert groups. aux_labels: token ids of the phrase of each label of the auxiliary finding head.
    prefix_length: tokens before the image (BOS and the user tag), the same for every sample. frame: ids of the tokens
    between two views of the layout `frames`; labels: of those after each view, -1 filling up. dtype: of activations.
    scan_decoder: layers run as loops over stacked leaves; False with a cache alone (see generation.unrolled).
    """

    tower: Tower
    projector: Projector
    decoder: Decoder
    volume: Volume3D
    lora: Lora
    rope_factor: str
    tasks: tuple[str, ...]
    aux_labels: tuple[tuple[int, ...], ...]
    prefix_length: int
    frame: tuple[int, ...]
    dtype: str
    param_dtype: str
    remat: str
    attention: str
    scan_decoder: bool = True
    labels: tuple[tuple[int, ...], ...] = ()

    @property
    def tgh(self) -> TGH:
        return self.volume.tgh

    def with_tgh(self, **changes) -> "Model":
        """The same model with changes to its TGH."""
        tgh = dataclasses.replace(self.tgh, **changes)
        return dataclasses.replace(self, volume=dataclasses.replace(self.volume, tgh=tgh))

    @property
    def flat(self) -> bool:
        """Whether visual tokens have neither newlines nor a global view."""
        return self.volume.layout != "sub_glb_3d"

    @property
    def view_side(self) -> int:
        """Visual tokens along a side of a view."""
        return self.tower.grid // self.projector.merge // self.volume.spatial_pool

    @property
    def cell(self) -> tuple[int, int, int]:
        """Voxels (slices, rows, columns) of one visual token of the connector's views."""
        side = self.projector.merge * self.tower.patch_size * self.volume.spatial_pool
        return (self.volume.patch_depth * self.volume.depth_pool, side, side)

    def slabs(self, slices: int) -> int:
        return -(-slices // self.volume.patch_depth)

    def views(self, slices: int) -> int:
        """Groups of slabs that become one view each."""
        return -(-self.slabs(slices) // self.volume.depth_pool)

    def visual_tokens(self, slices: int) -> int:
        """Number of visual tokens of a volume of `slices` slices (model-spec 4.5, I24)."""
        view = self.view_side * (self.view_side + (not self.flat))
        return view * self.views(slices) + (0 if self.flat else 1 + view)

    def image_positions(self, slices: int) -> int:
        """Positions that a volume of `slices` slices takes in the decoder: visual tokens, frames and labels."""
        views, label = self.views(slices), len(self.labels[0]) if self.labels else 0
        return self.visual_tokens(slices) + max(0, views - 1) * len(self.frame) + views * label

    def picture_tokens(self, crops: tuple[int, int] | None) -> int:
        """Number of visual tokens of a 2D base's picture in (rows, columns) of crops, or as a single view."""
        if crops is None:
            return self.visual_tokens(1)
        side = self.view_side
        return side * crops[0] * (side * crops[1] + 1) + 1 + side * (side + 1)

    def rope_factors(self, rope: Rope, length: int) -> tuple[float, ...]:
        """The factors for a planned length of `length` positions (prompt and new tokens), chosen once per call."""
        long = length > self.decoder.original_positions if self.rope_factor == "auto" else self.rope_factor == "long"
        return rope.long_factor if long else rope.short_factor


def build(
    base: Base,
    section: Mapping[str, Any],
    aux_labels: tuple[tuple[int, ...], ...] = (),
    prefix_length: int = 4,
    frame: tuple[int, ...] = (),
    group_shares: tuple[float, ...] = (),
) -> Model:
    """The model of a base and an experiment's `model` section. UserError names the invalid key."""
    for key, allowed in ALLOWED.items():
        value = section
        for part in key.split("."):
            value = value[part]
        if value not in allowed:
            raise UserError(f"--config.model.{key}={value} is unknown; use one of {', '.join(allowed)}.")
    tgh = dict(section["tgh"])
    tgh |= {"layers": tuple(tgh["layers"]), "task_layers": tuple(tgh["task_layers"]), "group_shares": group_shares}
    volume = {field.name: section[field.name] for field in dataclasses.fields(Volume3D)}
    volume |= {
        "attn3d_layers": tuple(section["attn3d_layers"]), "depth_rope": DepthRope(**section["depth_rope"]),
        "tgh": TGH(**tgh), "layout": LAYOUTS[base.projector.separators] if section["layout"] != "flat" else "flat",
    }  # fmt: skip
    copied = {key: section[key] for key in ("rope_factor", "dtype", "param_dtype", "remat", "attention")}
    model = Model(
        base.tower, base.projector, base.decoder, Volume3D(**volume), Lora(**section["lora"]),
        tasks=tuple(section["tasks"]), aux_labels=aux_labels, prefix_length=prefix_length,
        frame=frame if volume["layout"] == "frames" else (), **copied,
    )  # fmt: skip
    check(model)
    return model


def plain(base: Base, prefix_length: int, frame: tuple[int, ...] = ()) -> Model:
    """The 2D model as it is, in float32: depth 1, no experts, no attention between slices; views are its slices."""
    tgh = TGH(
        layers=(), task_layers=(), topology="nested", groups=1, experts=1, top_k=1, token_input="image",
        task_input="text", hidden=1, dispatch="dense", transport="gather", capacity_factor=1.0,
    )  # fmt: skip
    rope = DepthRope(
        enabled=False, rotary_dim=2, base=1.0, unit="slice", reference_mm=1.0, scale=0.0, scale_init=0.0, ramp_steps=0
    )
    volume = Volume3D(
        patch_depth=1, inflation="average", attn3d_layers=(), attn3d_kind="joint", attn3d_window=0, depth_embed="none",
        depth_rope=rope, tgh=tgh, depth_pool=1, spatial_pool=1,
        layout=LAYOUTS[base.projector.separators],
    )  # fmt: skip
    return Model(
        base.tower, base.projector, base.decoder, volume, Lora(rank=0, alpha=1.0, targets=LORA_PLACES[0]),
        rope_factor="auto", tasks=("all",), aux_labels=(), prefix_length=prefix_length, frame=frame, dtype="float32",
        param_dtype="float32", remat="none", attention="auto",
    )  # fmt: skip


# Keys that earlier versions had, each with the only value that is still computed.
_REMOVED = {"newline": True, "global_view": True, "tgh.gate": "renormalised"}
# Keys that earlier versions lack.
_ADDED = {"lora": {"rank": 0, "alpha": 16.0, "targets": "attn/(q|v)"}, "tgh.transport": "all_to_all"}


def current(section: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a run of an earlier version in today's form. UserError for what is no longer computed."""
    section = {key: dict(one) if isinstance(one, Mapping) else one for key, one in section.items()}

    def holder(key: str) -> tuple[dict, str]:
        above, _, name = key.rpartition(".")
        return (section.setdefault(above, {}) if above else section), name

    for key, value in _ADDED.items():
        place, name = holder(key)
        place.setdefault(name, value)
    for key, only in _REMOVED.items():
        place, name = holder(key)
        if (value := place.pop(name, only)) != only:
            raise UserError(
                f"the run was trained with model.{key}={value}, which this version does not compute; read it with the "
                "version that trained it, or retrain it."
            )
    return section


def check(model: Model) -> None:
    """UserError for an invalid combination."""
    tower, volume, tgh = model.tower, model.volume, model.tgh
    try:
        hit = any(re.fullmatch(model.lora.targets, place) for place in LORA_PLACES)
    except re.error:
        hit = False
    if model.lora.rank and not hit:
        places = ", ".join(LORA_PLACES)
        raise UserError(f"--config.model.lora.targets={model.lora.targets} is no regex that matches one of {places}.")
    for flag, value, least in (
        ("patch_depth", volume.patch_depth, 1), ("attn3d_window", volume.attn3d_window, 0),
        ("tgh.experts", tgh.experts, 1), ("lora.rank", model.lora.rank, 0), ("depth_pool", volume.depth_pool, 1),
        ("spatial_pool", volume.spatial_pool, 1),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"--config.model.{flag}={value} must be at least {least}.")
    for flag, layers in (
        ("attn3d_layers", volume.attn3d_layers), ("tgh.layers", tgh.layers), ("tgh.task_layers", tgh.task_layers)
    ):  # fmt: skip
        bad = [i for i in layers if not 0 <= i < tower.executed]
        if bad:
            remedy = "leave the others out"
            if len(bad) == len(layers):
                remedy = "name some of these; a full-scale preset such as :phi3v needs a base of full size"
            raise UserError(
                f"--config.model.{flag} names layers {bad}, but this base executes only layers 0 to "
                f"{tower.executed - 1}; {remedy}."
            )
    if tgh.groups not in (1, len(model.tasks)):
        raise UserError(f"--config.model.tgh.groups={tgh.groups} must be 1 or the number of tasks, {len(model.tasks)}.")
    if not 1 <= tgh.top_k <= tgh.experts:
        raise UserError(f"--config.model.tgh.top_k={tgh.top_k} must lie between 1 and the {tgh.experts} experts.")
    if set(tgh.layers) & set(tgh.task_layers):
        raise UserError("--config.model.tgh.task_layers must share no layer with tgh.layers (stacked topology).")
    merge = model.projector.merge
    if merge < 1 or tower.grid % merge or (tower.grid // merge) % volume.spatial_pool:
        raise UserError(
            f"--config.model.spatial_pool={volume.spatial_pool} must divide the {tower.grid}-patch grid after "
            f"{merge} x {merge} patches are joined."
        )
    head = tower.width // tower.heads
    if volume.depth_rope.rotary_dim > head or volume.depth_rope.rotary_dim % 2:
        raise UserError(
            f"--config.model.depth_rope.rotary_dim={volume.depth_rope.rotary_dim} must be even and at most the head "
            f"size {head}."
        )
