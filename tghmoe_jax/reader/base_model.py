"""A 2D base as it is, before any 3D adaptation: so that a port can be checked by asking it about a picture."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from tghmoe_jax.bases import pictures
from tghmoe_jax.bases.base import load_base
from tghmoe_jax.errors import UserError
from tghmoe_jax.models import config as model_config
from tghmoe_jax.models import generation, leaf_names
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.training.loading import dummy_batch
from tghmoe_jax.training.step import variables
from tghmoe_jax.weights import adapt

MOST_TOKENS = 4096  # of one answer: its cache is reserved as a whole
MOST_CROPS = 64
BUCKET = 32
# The 2D model is the 3D one at depth 1 without experts and without attention between slices: views are its slices.
_PLAIN = {
    "patch_depth": 1, "attn3d_layers": (), "attn3d_kind": "joint", "attn3d_window": 1, "depth_embed": "none",
    "depth_rope": dataclasses.asdict(model_config.DepthRope(enabled=False, rotary_dim=2)),
    "tgh": dataclasses.asdict(model_config.TGH()), "tasks": ("report", "vqa"), "depth_pool": 1, "spatial_pool": 1,
    "newline": True, "global_view": True, "layout": "sub_glb_3d", "rope_factor": "auto", "dtype": "float32",
    "param_dtype": "float32", "remat": "none", "attention": "auto",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A 2D base ready to answer. `crops`: into how many a picture may be cut; 0 for LLaVA, which sees its middle."""

    model: MLLM
    variables: dict
    tokenizer: Tokenizer
    crops: int

    def ask(self, image: str | Path, question: str, new_tokens: int) -> str:
        """Greedy answer to a question about a picture file. UserError where it cannot be read."""
        cfg, pixels = self.model.cfg, pictures.read_picture(image)
        if self.crops:
            views, grid = pictures.views(pixels, cfg.vision.image_size, self.crops)
        else:
            views, grid = pictures.square(pixels, cfg.vision.image_size), None
        encoded = prompts.encode(self.tokenizer, " ".join(question.split()), None)
        half = cfg.vision.grid // 2
        visual = half * grid[0] * (half * grid[1] + 1) + 1 + half * (half + 1) if grid else cfg.visual_tokens(1)
        room = min(MOST_TOKENS, cfg.decoder.max_positions - len(encoded.tokens) - visual)
        if not 1 <= new_tokens <= room:
            raise UserError(
                f"--new-tokens {new_tokens} must lie between 1 and {room}, the room beside {visual} visual tokens."
            )
        length = padded_length(cfg.decoder, len(encoded.tokens), visual + new_tokens)
        batch = prompts.batch([encoded], length, self.tokenizer.pad_id)
        batch |= {"slices": views[None], "slice_mask": np.ones((1, len(views)), bool)}
        visual, mask = generation.encode_picture(self.model, self.variables, batch, grid)
        stops = tuple(sorted(self.tokenizer.stop_ids))
        ids = np.asarray(generation.generate(self.model, self.variables, batch, visual, mask, new_tokens, stops))[0]
        return self.tokenizer.decode([int(i) for i in ids if i >= 0]).strip()


def padded_length(decoder: model_config.Decoder, tokens: int, others: int) -> int:
    """Of a text of `tokens` tokens beside `others` positions: a multiple of BUCKET, so that questions of about one
    length share a compiled program; padding alone never leads into another RoPE regime or past the last position.
    """
    most = decoder.original_positions
    if tokens + others > most:
        most = decoder.max_positions
    return min(-(-tokens // BUCKET) * BUCKET, most - others)


def load(folder: str | Path) -> BaseModel:
    """The 2D base in `folder`, computed in float32.

    UserError names --base where the folder is no base.
    """
    base = load_base(folder, flag="--base")
    tokenizer = Tokenizer.from_folder(base.folder)
    if tokenizer.vocab_size > base.config["vocab_size"]:
        raise UserError(
            f"--base={folder}: the tokeniser has {tokenizer.vocab_size} tokens and the model only "
            f"{base.config['vocab_size']}; use the tokeniser files of the same base."
        )
    prefix = prompts.encode(tokenizer, "", None).prefix_len
    model = MLLM(model_config.build(base.config, _PLAIN, prefix_length=prefix))
    size = model.cfg.vision.image_size
    batch = dummy_batch({"slices": 1, "size": size, "text_length": prefix + 2})
    tree = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    leaves, _ = adapt.assemble(leaf_names.canonical_shapes(shapes), base.params)
    kept = [path for path in shapes if not path.startswith("task_router/")]  # no task is asked for
    params = {path: leaf.astype(np.float32) for path, leaf in leaf_names.from_canonical(kept, leaves).items()}
    crops = crops_of(base.folder) if base.family == "phi3_v" else 0
    return BaseModel(generation.inference(model), variables(params), tokenizer, crops)


def crops_of(folder: Path) -> int:
    """`num_crops` of a base's preprocessor_config.json. UserError where that is no whole number of at least 1."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return pictures.CROPS
    try:
        crops = dict(json.loads(file.read_text())).get("num_crops", pictures.CROPS)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{file} holds no JSON object ({error}); copy it again.") from error
    if not isinstance(crops, int) or not 1 <= crops <= MOST_CROPS:
        raise UserError(f"{file} says num_crops {crops!r}; give a whole number from 1 to {MOST_CROPS}.")
    return crops
