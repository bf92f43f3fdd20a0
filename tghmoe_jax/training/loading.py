"""A finished run read back: its model, parameters, tokeniser and what it recorded about itself.

Used wherever a run is only read (predict, evaluation alone): no optimiser, no data set, no base model is needed.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from flax import traverse_util

from tghmoe_jax.bases import base as bases
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.calibration import Calibration
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import generation, leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.sharding import rules as sharding_rules
from tghmoe_jax.training import compile_cache, run_folder, stored
from tghmoe_jax.training.exported import digest


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run on the host. `params` are the model's leaves {leaf path: array}; `config` and `manifest` as recorded.

    `digest` names the parameters as stored (`exported.digest`); `calibration` {kind: what its confidence means}.
    """

    name: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    model: MLLM
    tokenizer: Tokenizer
    params: dict[str, np.ndarray]
    step: int
    digest: str
    calibration: Mapping[str, Calibration] = dataclasses.field(default_factory=dict)


def load_run(run: str | Path, flag: str) -> LoadedRun:
    """The latest checkpoint of a run, of an exported one, or of `embedded`, the reader inside the package.

    The auxiliary finding head, which only training uses, is left out.

    UserError names `flag` or the run where it is not a finished run, or its checkpoint is damaged or does not fit.
    """
    folder = run_folder.find(str(run), flag)
    config, base_config = run_folder.read_config(folder), run_folder.read_base_config(folder)
    tokenizer = bases.tokenizer_of(run_folder.model_folder(folder), base_config)
    base = bases.describe(base_config, config["data"]["size"])
    try:
        model = MLLM(model_config.build(base, config["model"], **prompts.around_image(tokenizer)))
        shapes = param_shapes(generation.inference(model), config["data"])
    except UserError as error:
        raise UserError(f"{flag}={run}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, flax.errors.FlaxError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{flag}={run}: config.json and model/config.json describe no model ({what}); copy the run again."
        ) from error
    canonical, step = stored.load_params(folder)
    wanted = leaf_names.canonical_shapes({path: shape.shape for path, shape in shapes.items()})
    unfit = [name for name, shape in wanted.items() if name not in canonical or canonical[name].shape != shape]
    if unfit:
        raise UserError(
            f"{run} holds a checkpoint that does not fit its config.json (first {unfit[0]}); "
            "copy the run again, or name another."
        )
    params = leaf_names.from_canonical(list(shapes), canonical)
    return LoadedRun(
        name=str(run) if str(run) == "embedded" else folder.resolve().name, config=config, model=model,
        tokenizer=tokenizer, step=step, manifest=run_folder.read_manifest(folder), digest=digest(canonical),
        calibration=run_folder.read_calibration(folder, step),
        params={path: value.astype(shapes[path].dtype, copy=False) for path, value in params.items()},
    )  # fmt: skip


def batch_shapes(data: Mapping[str, Any], rows: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `samples.pipeline.collate` for a config's `data` section.

    Text alone (`data.slices` = 0) gets one slice, so that the parameters of the tower are there too.
    """
    size, slices, text = data["size"], max(1, data["slices"]), (rows, data["text_length"])
    return {
        "slices": jax.ShapeDtypeStruct((rows, slices, size, size, 3), np.uint8),
        "slice_mask": jax.ShapeDtypeStruct((rows, slices), bool),
        "slice_spacing": jax.ShapeDtypeStruct((rows,), np.float32),
        "tokens": jax.ShapeDtypeStruct(text, np.int32),
        "token_mask": jax.ShapeDtypeStruct(text, bool),
        "question_mask": jax.ShapeDtypeStruct(text, bool),
        "loss_mask": jax.ShapeDtypeStruct(text, bool),
        "task": jax.ShapeDtypeStruct((rows,), np.int32),
        "image_visible": jax.ShapeDtypeStruct((rows,), bool),
    }


def dummy_batch(data: Mapping[str, Any], rows: int = 1) -> dict[str, np.ndarray]:
    """A batch of `batch_shapes` with nothing in it, for initialisation: all of it is seen, all of it is zero."""
    return {key: np.full(s.shape, s.dtype == bool, s.dtype) for key, s in batch_shapes(data, rows).items()}


def param_shapes(model: MLLM, data: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """{leaf path: shape and dtype}, without allocating anything."""
    return dict(_param_shapes(model, data["slices"], data["size"], data["text_length"]))


@functools.lru_cache(maxsize=8)
def _param_shapes(model: MLLM, slices: int, size: int, text_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Tracing the model takes a second: a session may open several runs of one, and the next process opens it again."""

    def trace() -> bytes:
        batch = batch_shapes({"slices": slices, "size": size, "text_length": text_length})
        tree = jax.eval_shape(model.init, jax.random.key(0), batch)
        leaves = traverse_util.flatten_dict(tree["params"], sep="/")
        return json.dumps({path: [leaf.shape, leaf.dtype.name] for path, leaf in leaves.items()}).encode()

    known = json.loads(compile_cache.recall(f"shapes of {model} for {slices}, {size}, {text_length}", trace))
    return {path: jax.ShapeDtypeStruct(tuple(shape), dtype) for path, (shape, dtype) in known.items()}


def param_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: jax.sharding.Mesh
) -> dict[str, jax.NamedSharding]:
    """Where each leaf lies, by the rules of sharding/rules.py.

    UserError where a mesh axis does not divide a dimension, or the rules miss or double a leaf.
    """
    result = {}
    for path, s in shapes.items():
        try:
            specs = {
                sharding_rules.spec(name, leaf_names.is_stacked(path), s.shape, dict(mesh.shape))
                for name in leaf_names.canonical_names(path)
            }
        except ValueError as error:
            raise UserError(f"--config.mesh: {error}; change mesh.fsdp or mesh.expert.") from error
        (spec,) = specs  # the blocks of a scanned run are alike
        result[path] = jax.NamedSharding(mesh, spec)
    return result
