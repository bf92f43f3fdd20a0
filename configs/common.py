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
    """Every key, with the values of the embedded default (stage files change what differs).

    One key a line, each with its comment: `python -m benchmarks.reference` makes docs/reference.md of them.
    """
    c = ConfigDict()
    c.mode = "train"  # train | evaluate
    c.base = "embedded"  # folder of the 2D model or of a converted one; embedded: the package's own; empty: random init
    c.init_from = ""  # a run to start from
    c.base_config = ConfigDict()  # sizes of a model that is initialised at random (`base` and `init_from` empty)
    c.max_bad_fraction = 0.01  # largest share of unusable items; synthetic data have none
    c.trainable = ()  # regexes of the trained parameters, by their canonical names
    c.fresh = ()  # parameters (as in trainable) that start at random although the base or the run has them

    c.data = ConfigDict()
    c.data.name = "phantom"  # phantom | patients | scenes | one of the data sets of files, or a list a,b of them
    c.data.root = "runs/data"  # data on disk: a prepared set (tghmoe_jax.prepare) or a raw one; or a list of them
    c.data.manifest = ""  # index files of a raw data set
    c.data.weights = ()  # for a list of data sets: samples of each, as whole numbers; empty: by their items
    c.data.drop_leaks = "none"  # none | train | test: the side on which the leaks of leaks.csv are left out
    c.data.workers = 0  # processes that make the training batches; 0: a thread of this one
    c.data.augment = ConfigDict()
    c.data.augment.intensity = 0.0  # data on disk: largest change of brightness and contrast, as a share
    c.data.augment.shift = 0.0  # data on disk: largest shift within the plane, as a share of the size
    c.data.volumes = 6000  # number of volumes that are drawn for training (phantom, patients)
    c.data.share = 1.0  # share of the training cases that is used: of drawn volumes, or of the patients of data on disk
    c.data.slices = 16  # slices of the model's input
    c.data.size = 64  # pixels of a side of a slice
    c.data.channels = "windows3"  # windows3 | medgemma | repeat:<window>
    c.data.text_length = 80  # tokens of question and answer together; patients need 96
    # Kinds of samples in a batch.
    c.data.mixture = ConfigDict()
    c.data.mixture.report = 2  # report requests
    c.data.mixture.open = 2  # questions without choices
    c.data.mixture.closed = 3  # questions with choices
    c.data.mixture.binding = 1  # closed questions that state their answer, to keep the letters known

    c.model = ConfigDict()
    c.model.tasks = ("report", "vqa")  # names of the expert groups
    c.model.patch_depth = 4  # slices of a slab, which one 3D patch covers
    c.model.inflation = "average"  # average | centre: how the 2D patch kernel is spread over the slices of a slab
    c.model.attn3d_layers = (2, 3, 4)  # blocks of the tower whose attention passes from slab to slab
    c.model.attn3d_kind = "joint"  # joint | window (of attn3d_window slabs to each side)
    c.model.attn3d_window = 1  # slabs to each side, with attn3d_kind=window
    c.model.depth_embed = "rope"  # rope | learned_zero_init | none
    c.model.depth_rope = ConfigDict()
    c.model.depth_rope.enabled = True  # rotary positions along the depth
    c.model.depth_rope.rotary_dim = 32  # dimensions of a head that are rotated
    c.model.depth_rope.base = 10000.0  # base of the frequencies
    c.model.depth_rope.unit = "slice"  # slice | mm: what a position counts
    c.model.depth_rope.reference_mm = 10.0  # mm of one position, with unit=mm
    c.model.depth_rope.scale = 1.0  # factor of the rotation
    c.model.depth_rope.scale_init = 1.0  # where the factor starts, with ramp_steps
    c.model.depth_rope.ramp_steps = 0  # steps in which the factor goes from scale_init to scale; 0: at once
    c.model.tgh = ConfigDict()
    c.model.tgh.layers = (2, 4)  # blocks of the tower whose FFN becomes experts
    c.model.tgh.task_layers = ()  # for topology=stacked: blocks that hold the FFNs of the tasks
    c.model.tgh.topology = "nested"  # nested | stacked | parallel: how task groups and token experts are combined
    c.model.tgh.groups = 1  # groups of experts; stage 2 has one for each task
    c.model.tgh.experts = 4  # experts of a group
    c.model.tgh.top_k = 2  # experts that process a token
    c.model.tgh.token_input = "image_text"  # image_text | image | text: what the token router reads
    c.model.tgh.task_input = "text"  # text | image | image_text | oracle | random | none (mean of all groups)
    c.model.tgh.hidden = 256  # width of the prompt vector
    c.model.tgh.dispatch = "capacity"  # dense | capacity | ragged: how a device computes its experts
    c.model.tgh.transport = "all_to_all"  # all_to_all | gather | ragged (TPU): how tokens reach other devices
    c.model.tgh.capacity_factor = 1.5  # slots of an expert, as a multiple of a balanced load
    c.model.depth_pool = 1  # slabs that are averaged into one view
    c.model.spatial_pool = 1  # side of the squares of visual tokens that are averaged into one
    c.model.layout = "sub_glb_3d"  # sub_glb_3d | flat (no newlines, no global view)
    c.model.rope_factor = "auto"  # auto | short | long: regime of the decoder's scaled RoPE
    c.model.lora = ConfigDict()
    c.model.lora.rank = 0  # rank of the low-rank updates of the decoder; 0: none
    c.model.lora.alpha = 16.0  # updates are multiplied by alpha / rank
    c.model.lora.targets = "attn/(q|v)"  # regex of the projections: attn/{q,k,v,out}, mlp/{gate,up,down}
    c.model.dtype = "float32"  # float32 | bfloat16: type of activations
    c.model.param_dtype = "float32"  # float32 | bfloat16: type of parameters
    c.model.remat = "none"  # none | dots | full: what the backward pass computes again instead of storing it
    c.model.attention = "auto"  # auto | plain | blocked | splash (TPU) | cudnn (GPU)
    c.model.aux_findings = True  # the auxiliary finding head: not part of the paper, off at full scale

    c.loss = ConfigDict()
    c.loss.task = (1.0, 3.0)  # weight of the answer tokens of each task
    c.loss.first_token = 4.0  # weight of the first token of an answer (the letter of a closed question)
    c.loss.balance = 0.05  # weight of the loss that spreads tokens over experts
    c.loss.z = 0.001  # weight of the loss that keeps router logits small
    c.loss.router = 0.1  # weight of the task router's cross-entropy
    c.loss.aux = 20.0  # weight of the auxiliary finding loss

    c.optimizer = ConfigDict()
    c.optimizer.name = "muon"  # muon | adamw
    c.optimizer.rate = 2e-3  # highest learning rate
    c.optimizer.warmup = 0.03  # share of the steps in which the rate rises
    c.optimizer.final = 0.02  # share of the rate that is left at the end of the cosine
    c.optimizer.b1 = 0.9  # beta 1 of Adam
    c.optimizer.b2 = 0.98  # beta 2 of Adam
    c.optimizer.eps = 1e-8  # epsilon of Adam
    c.optimizer.clip = 1.0  # largest norm of the gradient of all trained parameters
    c.optimizer.decay = 0.0  # weight decay
    c.optimizer.rate_rules = ()  # (regex, factor) pairs: the first that matches a parameter scales its rate
    c.optimizer.decay_rules = ((r".*/(bias|scale)|.*newline|vision/(cls|pos)|.*embedding", 0.0),)  # 0: no decay

    c.train = ConfigDict()
    c.train.steps = 800  # optimiser steps
    c.train.batch = 16  # samples of a step
    c.train.seed = 0  # seed of parameters, data order and synthetic data
    c.train.accumulate = 1  # microbatches of a step
    c.train.bad_steps = 10  # steps in a row without a finite loss and gradient that end the run
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps between two checkpoints
    c.checkpoint.keep = 2  # newest checkpoints that stay on disk
    c.eval = ConfigDict()
    c.eval.every = -1  # -1: test split at the end; n: also validation split every n steps; 0: none
    c.eval.best = "loss"  # the validation score that chooses a checkpoint
    c.eval.patience = 0  # validations in a row without improvement that end the run; 0: never ends
    c.eval["items"] = 400  # questions of each kind
    c.eval.batch = 50  # questions asked at once
    c.eval.new_tokens = 80  # longest report, in tokens
    c.eval.answer_tokens = 24  # longest answer to a question, in tokens
    c.eval.seed = 42  # seed of the questions
    c.eval.controls = ("shuffled", "section_shuffled", "blind", "wrong_group")  # controls to evaluate
    c.eval.calibration = 200  # validation items of each kind that calibrate the confidence; 0: none
    c.eval.transfer = 0  # items in each drawing style of the phantom that is never trained on
    c.eval.adversarial = 0  # items of each kind for every hard way of asking
    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices with copies of the model; -1: all that remain
    c.mesh.fsdp = 1  # devices over which large matrices are split
    c.mesh.expert = 1  # devices over which experts are split
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
# One card fine-tunes at low rank and decodes (docs/training.md).
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
        if pod == "l4-1":
            c.eval.batch = 4  # FULL_EVAL's would take 58 GiB
    return c


FULL_SCALE = {"phi3v": phi3v, "medgemma": medgemma}
