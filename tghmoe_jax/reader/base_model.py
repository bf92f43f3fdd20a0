"""A 2D base as it is, before any 3D adaptation: so that a port can be checked by asking it about a picture."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from tghmoe_jax.bases import pictures
from tghmoe_jax.bases.base import FAMILIES, describe, load_base, tokenizer_of
from tghmoe_jax.bases.family import Views
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
BUCKET = 32


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A 2D base ready to answer. `views_of`: how it cuts a picture."""

    model: MLLM
    variables: dict
    tokenizer: Tokenizer
    views_of: Views

    def ask(self, image: str | Path, question: str, new_tokens: int) -> str:
        """Greedy answer to a question about a picture file. UserError where it cannot be read."""
        cfg, pixels = self.model.cfg, pictures.read_picture(image)
        views, grid = self.views_of(pixels, cfg.tower.image_size)
        encoded = prompts.encode(self.tokenizer, " ".join(question.split()), None)
        visual = cfg.picture_tokens(grid)
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
    tokenizer = tokenizer_of(base.folder, base.config)
    facts = describe(base.config)
    if tokenizer.vocab_size > facts.decoder.vocab:
        raise UserError(
            f"--base={folder}: the tokeniser has {tokenizer.vocab_size} tokens and the model only "
            f"{facts.decoder.vocab}; use the tokeniser files of the same base."
        )
    prefix = prompts.encode(tokenizer, "", None).prefix_len
    model = MLLM(model_config.plain(facts, prefix))
    size = model.cfg.tower.image_size
    batch = dummy_batch({"slices": 1, "size": size, "text_length": prefix + 2})
    tree = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    leaves, _ = adapt.assemble(leaf_names.canonical_shapes(shapes), base.params)
    kept = [path for path in shapes if not path.startswith("task_router/")]  # no task is asked for
    params = {path: leaf.astype(np.float32) for path, leaf in leaf_names.from_canonical(kept, leaves).items()}
    views_of = FAMILIES[base.family].views_of(base.folder)
    return BaseModel(generation.inference(model), variables(params), tokenizer, views_of)
