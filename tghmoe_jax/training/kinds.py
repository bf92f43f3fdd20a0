"""What the files of a run may hold: the kind of each key of config.json (configs/common.py), and of manifest.json."""

from typing import Any

from flax import traverse_util

_LAYERS = [range(1024)]
_RULES = [[str, float]]
_FLAT: dict[str, Any] = {
    **dict.fromkeys(
        ("mode", "base", "init_from", "data.name", "data.root", "data.manifest", "data.drop_leaks", "data.channels",
         "model.inflation", "model.attn3d_kind", "model.depth_embed", "model.depth_rope.unit", "model.tgh.topology",
         "model.tgh.token_input", "model.tgh.task_input", "model.tgh.dispatch", "model.tgh.transport", "model.layout",
         "model.rope_factor", "model.lora.targets", "model.dtype", "model.param_dtype", "model.remat",
         "model.attention", "optimizer.name", "eval.best"), str),
    **dict.fromkeys(
        ("data.volumes", "data.slices", "data.size", "data.text_length", "data.workers", "model.patch_depth",
         "model.attn3d_window", "model.depth_rope.rotary_dim", "model.depth_rope.ramp_steps", "model.tgh.groups",
         "model.tgh.experts", "model.tgh.top_k", "model.tgh.hidden", "model.depth_pool", "model.spatial_pool",
         "model.lora.rank", "train.steps", "train.batch", "train.seed", "train.accumulate", "train.bad_steps",
         "checkpoint.every", "checkpoint.keep", "eval.every", "eval.items", "eval.batch", "eval.new_tokens",
         "eval.answer_tokens", "eval.seed", "eval.calibration", "eval.patience", "eval.transfer",
         "eval.adversarial",
         "mesh.data", "mesh.fsdp", "mesh.expert"), int),
    **dict.fromkeys(
        ("max_bad_fraction", "data.augment.intensity", "data.augment.shift", "data.share", "model.depth_rope.base",
         "model.depth_rope.reference_mm", "model.depth_rope.scale", "model.depth_rope.scale_init",
         "model.tgh.capacity_factor", "model.lora.alpha", "loss.first_token", "loss.balance", "loss.z", "loss.router",
         "loss.aux", "optimizer.rate", "optimizer.warmup", "optimizer.final", "optimizer.b1", "optimizer.b2",
         "optimizer.eps", "optimizer.clip", "optimizer.decay"), float),
    "model.depth_rope.enabled": bool, "model.aux_findings": bool,
    "model.attn3d_layers": _LAYERS, "model.tgh.layers": _LAYERS, "model.tgh.task_layers": _LAYERS,
    "trainable": [str], "fresh": [str], "model.tasks": [str], "eval.controls": [str],
    "data.weights": [int], "loss.task": [float], "optimizer.rate_rules": _RULES, "optimizer.decay_rules": _RULES,
}  # fmt: skip
CONFIG: dict[str, Any] = traverse_util.unflatten_dict(_FLAT, sep=".") | {"base_config": {}}
CONFIG["data"]["mixture"] = {str: int}  # kinds of samples: samples/tasks.py may have more of them
# What a model needs to be built; runs of earlier versions lack some of the other keys.
REQUIRED = (
    *(key for key in _FLAT if key.startswith("model.") and key != "model.aux_findings"),
    "data.name", "data.slices", "data.size", "data.text_length", "train.steps",
)  # fmt: skip
CLOSED = ("model.depth_rope.", "model.tgh.", "model.lora.")  # sections without a key that is not known here

_PAIR = [float, float]
MANIFEST: dict[str, Any] = {
    "name": str, "step": range(1 << 31), "dtype": str, "digest": str, "files": str, "domain": str, "sealed": str,
    "base": ({"base": str, "init_from": str}, None), "git": ({"commit": (str, None)}, None),
    "input_ranges": ({"spacing_mm": [_PAIR] * 3, "slices": _PAIR, "field_of_view_mm": _PAIR, "hu": _PAIR}, None),
    "scores": {str: {str: object}}, "calibration": {str: {}},
    "origin": ({"domain": str, "real_samples": range(1 << 53)}, None),
    "schedules": [{"from_step": int, "steps": int, "steps_before": int}],
}  # fmt: skip
