"""What every experiment shares: the full list of keys with the defaults of model-spec 4.7, and the colon arguments.

Values that differ from the paper's public facts are this project's own choices (see NOTICE).
"""

from ml_collections import ConfigDict

PRESETS = ("bench", "phi3v", "medgemma")

# Stage 1 trains the vision tower, the connector and the decoder; stage 2 the experts, the routers, the connector and
# the decoder, so that the shared features stay (model-spec 4.6). Patterns match canonical parameter names in full.
STAGE1_TRAINABLE = (
    r"vision/(cls|pos|depth_pos|(patch|pre_ln)/.*)", r"vision/block_\d+/.*", r"task_router/(ln|proj)/.*",
    r"(connector|aux_head)/.*", r"decoder/.*",
)  # fmt: skip
STAGE2_TRAINABLE = (
    r"vision/block_\d+/(moe|task_ffn)/.*", r"task_router/.*", r"(connector|aux_head)/.*", r"decoder/.*",
)  # fmt: skip


def parse_arg(arg: str | None, presets: tuple[str, ...] = PRESETS, **typed) -> dict:
    """`phi3v,patch_depth=1` -> {"preset": "phi3v", "patch_depth": 1}; defaults give types. ValueError if unknown."""
    result = {"preset": "", **typed}
    for part in filter(None, (arg or "").split(",")):
        key, _, value = part.partition("=")
        if not value and key in presets:
            result["preset"] = key
        elif key in typed and value:
            kind = type(typed[key])
            result[key] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
        else:
            known = ", ".join([*presets, *(f"{k}=..." for k in typed)])
            raise ValueError(f"the colon argument {part!r} is unknown; use {known}")
    if result.get("pod") and result["preset"] not in FULL_SCALE:
        known = " or ".join(f"{name},pod={result['pod']}" for name in FULL_SCALE)
        raise ValueError(f"the colon argument pod={result['pod']} belongs to a full-scale preset; give {known}")
    return result


def get_config() -> ConfigDict:
    """Every key, with the values of the embedded default (stage files change what differs)."""
    c = ConfigDict()
    c.mode = "train"  # train | evaluate
    c.base = "embedded"  # folder of the 2D model or of a converted one; embedded: the package's own; empty: random init
    c.init_from = ""  # a run to start from
    c.base_config = ConfigDict()  # sizes of a model that is initialised at random (`base` and `init_from` empty)
    c.max_bad_fraction = 0.01  # share of the items seen that may be unusable; drawn data never are
    c.trainable = ()
    c.fresh = ()  # parameters (as in trainable) that are drawn at random although the base holds them

    c.data = ConfigDict()
    c.data.name = "phantom"  # phantom | scenes | m3d | ct_rate | llava | labelmap | manifest, or a list a,b of files
    c.data.root = "runs/data"  # of files: a prepared set (tghmoe_jax.prepare) or a raw one; a list where names are
    c.data.manifest = ""  # index files of a raw data set
    c.data.weights = ()  # of a list of data sets: whole numbers, samples of each; empty: as they have items
    c.data.drop_leaks = "none"  # none | train | test: leave out what leaks.csv of a prepared set names, on this side
    c.data.workers = 0  # processes that make the training batches; 0: a thread of this one
    c.data.augment = ConfigDict(
        {"intensity": 0.0, "shift": 0.0}
    )  # of files: largest change, a share (see data/augment)
    c.data.volumes = 6000  # drawn for training (phantom)
    c.data.slices = 16
    c.data.size = 64
    c.data.channels = "windows3"  # windows3 | medgemma | repeat:<window>
    c.data.text_length = 80
    # Kinds of samples in a batch. binding: closed questions that state their answer, so that letters stay known.
    c.data.mixture = ConfigDict({"report": 2, "open": 2, "closed": 3, "binding": 1})

    c.model = ConfigDict()
    c.model.tasks = ("report", "vqa")
    c.model.patch_depth = 4
    c.model.inflation = "average"  # average | centre
    c.model.attn3d_layers = (2, 3, 4)
    c.model.attn3d_kind = "joint"  # joint | window (of attn3d_window slabs to each side)
    c.model.attn3d_window = 1
    c.model.depth_embed = "rope"  # rope | learned_zero_init | none
    c.model.depth_rope = ConfigDict(
        {"enabled": True, "rotary_dim": 32, "base": 10000.0, "unit": "slice", "reference_mm": 10.0, "scale": 1.0,
         "scale_init": 1.0, "ramp_steps": 0}
    )  # fmt: skip
    c.model.tgh = ConfigDict(
        {"layers": (2, 4), "task_layers": (), "topology": "nested", "groups": 1, "experts": 4, "top_k": 2,
         "token_input": "image_text", "task_input": "text", "hidden": 256,
         "dispatch": "capacity",  # dense | capacity | ragged: how a device computes its experts
         "transport": "all_to_all",  # all_to_all | gather | ragged (TPU): how tokens reach experts of other devices
         "capacity_factor": 1.5}
    )  # fmt: skip
    c.model.depth_pool = 1
    c.model.spatial_pool = 1
    c.model.layout = "sub_glb_3d"  # sub_glb_3d | flat (no newlines, no global view)
    c.model.rope_factor = "auto"
    c.model.lora = ConfigDict({"rank": 0, "alpha": 16.0, "targets": "attn/(q|v)"})  # of the decoder; 0: none
    c.model.dtype = "float32"
    c.model.param_dtype = "float32"
    c.model.remat = "none"
    c.model.attention = "auto"
    c.model.aux_findings = True  # the auxiliary finding head: no part of the paper, off at full scale

    c.loss = ConfigDict(
        {"task": (1.0, 3.0), "first_token": 4.0, "balance": 0.05, "z": 0.001, "router": 0.1, "aux": 20.0}
    )

    c.optimizer = ConfigDict(
        {"name": "muon",  # muon | adamw
         "rate": 2e-3, "warmup": 0.03, "final": 0.02, "b1": 0.9, "b2": 0.98, "eps": 1e-8, "clip": 1.0, "decay": 0.0,
         "rate_rules": (), "decay_rules": ((r".*/(bias|scale)|.*newline|vision/(cls|pos)|.*embedding", 0.0),)}
    )  # fmt: skip

    c.train = ConfigDict(
        {"steps": 800, "batch": 16, "seed": 0, "accumulate": 1,
         "bad_steps": 10}  # steps in a row without a finite loss and gradient that end the run
    )  # fmt: skip
    c.checkpoint = ConfigDict({"every": 100, "keep": 2})
    c.eval = ConfigDict(
        {"every": -1,  # the test split at the end; n: the validation split every n steps too; 0: neither
         "best": "loss", "patience": 0,  # the validation score that chooses; validations without a better one, 0: any
         "items": 400, "batch": 50, "new_tokens": 80, "answer_tokens": 24, "seed": 42,
         "controls": ("shuffled", "section_shuffled", "blind", "wrong_group"),  # what stands beside the scores
         "calibration": 200,  # validation items a kind that say what the likelihood of an answer is worth; 0: none
         "transfer": 0,  # items on the second drawing style of the phantom
         "adversarial": 0}  # items a kind for each hard way of asking, under predicted, true and wrong routing
    )  # fmt: skip
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "expert": 1})
    return c


def lora(c: ConfigDict, rank: int) -> ConfigDict:
    """Of the decoder only low-rank updates of this rank train (0: all of it)."""
    if rank:
        c.model.lora.rank = rank
        c.trainable = tuple(r"decoder/.*/lora_[ab]" if p == r"decoder/.*" else p for p in c.trainable)
    return c


def bench(c: ConfigDict) -> ConfigDict:
    """The default with more volumes, more steps and a longer examination: what the embedded reader is made by."""
    c.data.volumes = 12000
    c.train.steps = 1500
    c.eval.update({"items": 1000, "calibration": 1000, "transfer": 400, "adversarial": 200})
    return c


# Sizes of microsoft/Phi-3-vision-128k-instruct. Its RoPE factor lists are read from the user's config.json only.
PHI3V = {
    "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 8192, "vocab_size": 32064, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
FULL_EVAL = {"items": 2000, "batch": 32, "new_tokens": 256}

# The published config.json of Gemma 3 4B, which is MedGemma's too; what it leaves out is transformers' default.
MEDGEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
    "eoi_token_index": 256000, "image_token_index": 262144, "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "patch_size": 14,
        "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27, "vision_use_head": False,
    },
}  # fmt: skip

# Mesh, microbatches and rematerialisation for pods, by the names Cloud TPU sells them under: chosen to leave a tenth of
# the memory free. Every device's part of a microbatch is four rows, the pattern of the mixture below. What compiling
# the steps for those chips reported (docs/scale.md), peak of GiB a chip and the part that stays free:
#             stage 1              stage 2              of
#   v5e-64    10.82  (31 %)         8.35  (47 %)        15.75
#   v5p-32    83.61  (13 %)        66.81  (30 %)        95.74
#   v6e-16    20.30  (35 %)        18.36  (41 %)        31.25
#   h100-8    22.18  (72 %)        18.78  (76 %)        79.11
# One card fine-tunes at low rank and decodes (docs/gpus.md).
PODS = {
    "v5e-64": ({"data": 1, "fsdp": 32, "expert": 2}, 1, "full"),
    "v5p-32": ({"data": 1, "fsdp": 4, "expert": 4}, 4, "dots"),
    "v6e-16": ({"data": 1, "fsdp": 8, "expert": 2}, 4, "full"),
    "h100-8": ({"data": 1, "fsdp": 8, "expert": 1}, 4, "full"),
    "h100-1": ({"data": 1, "fsdp": 1, "expert": 1}, 32, "full"),
    "l4-1": ({"data": 1, "fsdp": 1, "expert": 1}, 64, "full"),
}
# Of the preset medgemma.
MEDGEMMA_PODS = {
    "v5e-64": ({"data": 1, "fsdp": 32, "expert": 2}, 1, "full"),
    "v5p-32": ({"data": 1, "fsdp": 4, "expert": 4}, 4, "full"),
    "v6e-16": ({"data": 1, "fsdp": 8, "expert": 2}, 4, "full"),
}


def phi3v(c: ConfigDict, patch_depth: int, pod: str = "") -> ConfigDict:
    """Full scale: Phi-3-V 4.2B on M3D volumes of 32 slices (model-spec 0, 4.5, 4.6), on a pod of `PODS` or any mesh."""
    c.base_config = ConfigDict(PHI3V)  # --config.base=DIR of a Phi-3-vision checkpoint
    c.data.update({"name": "m3d", "size": 336, "channels": "repeat"})
    c.model.attn3d_layers = tuple(range(12, 23))
    c.model.tgh.layers = (12, 14, 16, 18, 20, 22)
    return full_scale(c, patch_depth, pod, PODS)


def medgemma(c: ConfigDict, patch_depth: int, pod: str = "") -> ConfigDict:
    """Full scale: Gemma 3 or MedGemma 4B on CT-RATE at 448 pixels, half the base's side, its positions interpolated.

    A view keeps the base's 256 tokens. The table of 262,208 embeddings, which is the head too, stays as it is: its
    optimiser state alone would take 5 GiB.
    """
    c.base_config = ConfigDict(MEDGEMMA)  # --config.base=DIR of such a checkpoint
    c.data.update({"name": "ct_rate", "size": 448, "channels": "medgemma"})
    c.model.attn3d_layers = tuple(range(16, 27))
    c.model.tgh.layers = (16, 18, 20, 22, 24, 26)
    parts = {r"decoder/.*": r"decoder/(block_\d+|final_norm)/.*"}
    c.trainable = tuple(parts.get(pattern, pattern) for pattern in c.trainable)
    if STAGE1_TRAINABLE[0] in c.trainable:
        c.trainable += (r"vision/post_ln/.*",)
    return full_scale(c, patch_depth, pod, MEDGEMMA_PODS)


def full_scale(c: ConfigDict, patch_depth: int, pod: str, pods: dict) -> ConfigDict:
    """What the full-scale recipes share."""
    c.base = ""
    c.data.update({"root": "", "slices": 32, "text_length": 512})
    c.data.mixture.update({"report": 1, "open": 1, "closed": 2, "binding": 0})  # the bases know their letters
    c.model.patch_depth = patch_depth
    c.model.depth_pool = 4 // patch_depth if patch_depth in (1, 2, 4) else 1
    c.model.depth_rope.rotary_dim = 64
    c.model.tgh.update({"dispatch": "ragged", "capacity_factor": 1.25})
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.aux_findings = False
    c.loss.update({"task": (1.0, 1.0), "first_token": 1.0, "balance": 0.01, "z": 0.0, "aux": 0.0})
    c.optimizer.update({"name": "adamw", "rate": 5e-5, "final": 0.0, "rate_rules": ((r"vision/.*", 0.2),)})
    c.train.update({"steps": 20000, "batch": 128, "accumulate": 1})
    c.checkpoint.every = 500
    c.eval.update(FULL_EVAL)
    c.mesh.update({"data": 1, "fsdp": -1})  # of several copies of the model none would fit
    if pod:
        if pod not in pods:
            raise ValueError(f"pod={pod} is unknown; use one of {', '.join(pods)}")
        c.mesh, c.train.accumulate, c.model.remat = ConfigDict(pods[pod][0]), *pods[pod][1:]
        c.train.update({"steps": 10000, "batch": 256})  # as many samples as above
    return c


FULL_SCALE = {"phi3v": phi3v, "medgemma": medgemma}
