"""Opens a finished run or a 2D base as a Reader."""

from pathlib import Path

import jax
import numpy as np

from tghmoe_jax.bases.base import FAMILIES, describe, load_base, tokenizer_of
from tghmoe_jax.bases.family import Views
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.sharding import arrays
from tghmoe_jax.training import compile_cache, domain, run_folder, stored
from tghmoe_jax.training.loading import LoadedRun, load_run, param_shapes, param_shardings
from tghmoe_jax.weights import adapt


def load(run: str | Path = "embedded", batch: int = 1) -> Reader:
    """A finished run, ready to be asked about single scans; without a name the embedded reader. `batch`: rows at once.

    Compiled programs are kept for the next process (`compile_cache`). UserError where `run` is not one.
    """
    compile_cache.keep()
    loaded = load_run(run, "--checkpoint")
    length = loaded.config["data"]["text_length"]
    return Reader(loaded.model, loaded.tokenizer, jax.device_put(loaded.params), length, batch, loaded)


def refuse_report(run: str | Path, flag: str) -> None:
    """UserError where the run must not report on a scan, without its parameters, which may take minutes to read."""
    folder = run_folder.find(str(run), "--checkpoint")
    manifest, config = run_folder.read_manifest(folder), run_folder.read_config(folder)
    name = str(run) if str(run) == "embedded" else folder.resolve().name
    domain.refuse_report(name, domain.of(manifest, config, stored.newest_step(folder)), flag)


def load_sharded(run: LoadedRun, text_length: int, batch: int, mesh: jax.sharding.Mesh) -> Reader:
    """A finished run whose parameters lie over `mesh`, the current one, as in training."""
    shardings = param_shardings(run.params, mesh)
    params = {path: arrays.place(leaf, shardings[path]) for path, leaf in run.params.items()}
    return Reader(run.model, run.tokenizer, params, text_length, batch, run)


def load_picture_reader(folder: str | Path) -> Reader:
    """The 2D base in `folder`, ready to be asked about pictures. UserError names --base where it is not a base."""
    model, tokenizer, params, views_of = open_base(folder)
    return Reader(model, tokenizer, jax.device_put(params), 0, views_of=views_of)


def open_base(folder: str | Path) -> tuple[MLLM, Tokenizer, dict[str, np.ndarray], Views]:
    """The 2D base in `folder` as it is, in float32, without any 3D adaptation: model, tokeniser, {leaf path: array},
    and how it cuts a picture into views.

    UserError names --base where the folder is not a base.
    """
    base = load_base(folder, flag="--base")
    tokenizer = tokenizer_of(base.folder, base.config)
    facts = describe(base.config)
    if tokenizer.vocab_size > facts.decoder.vocab:
        raise UserError(
            f"--base={folder}: the tokeniser has {tokenizer.vocab_size} tokens and the model only "
            f"{facts.decoder.vocab}; use the tokeniser files of the same base."
        )
    model = MLLM(model_config.plain(facts, **prompts.around_image(tokenizer)))
    sizes = {"slices": 1, "size": model.cfg.tower.image_size, "text_length": model.cfg.prefix_length + 2}
    shapes = {path: leaf.shape for path, leaf in param_shapes(model, sizes).items()}
    leaves, _ = adapt.assemble(leaf_names.canonical_shapes(shapes), base.params)
    kept = [path for path in shapes if not path.startswith("task_router/")]  # no task is asked for
    params = {path: leaf.astype(np.float32) for path, leaf in leaf_names.from_canonical(kept, leaves).items()}
    return model, tokenizer, params, FAMILIES[base.family].views_of(base.folder, base.config)
