"""The whole model: volume and prompt in, next-token logits out.

Axis legend: B batch, S slice, T text token, L visual token, W decoder width, V vocabulary, A auxiliary labels.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from tghmoe_jax.models.config import Model
from tghmoe_jax.models.connector import Connector, cells_to_tokens
from tghmoe_jax.models.decoder import Cache, LanguageModel, Scores, empty_cache
from tghmoe_jax.models.router import TaskRouter, masked_mean
from tghmoe_jax.models.tgh_moe import MoEStats
from tghmoe_jax.models.vit3d import ViT3D

Batch = dict[str, jax.Array]  # the keys of samples/pipeline.py


def variables(flat: Mapping[str, jax.Array]) -> dict:
    """Leaves {leaf path: array} as the tree that `MLLM.apply` takes."""
    return {"params": traverse_util.unflatten_dict(dict(flat), sep="/")}


class EncodedVolume(NamedTuple):
    """Visual tokens (B, L, W), mask (B, L), task logits (B, tasks) or None, the group used (B,), MoE statistics."""

    tokens: jax.Array
    mask: jax.Array
    task_logits: jax.Array | None
    group: jax.Array
    stats: dict[int, MoEStats]


class Output(NamedTuple):
    """For text tokens prefix + 1 onwards logits float32 (B, T - prefix - 1, V) or the batch's own tokens' scores, the
    other None; aux_logits (B, A) or None; encoded."""

    logits: jax.Array | None
    scores: Scores | None
    aux_logits: jax.Array | None
    encoded: EncodedVolume


def unit_vectors(x: jax.Array) -> jax.Array:
    """x (..., W) at length one, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


class AuxHead(nn.Module):
    """A label is stated by a visual token that points along the label's words, as the decoder's own embeddings do.

    So the decoder reads what is seen as it reads what is written, and its letters serve pictures as they serve texts.
    Only true labels are confined to the cells where they are seen. So that this alone gives nothing away, what is
    confined is a soft maximum with a weight above zero: over fewer tokens it can only be lower.
    """

    labels: int
    SHARP, GAIN = 20.0, 10.0  # of the soft maximum; of all logits, so that cosines reach certainty

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array, confined: jax.Array, phrases: jax.Array) -> jax.Array:
        """tokens (B, L, W), mask bool (B, L), confined bool (B, L, A): the tokens that may state each label,
        phrases (A, W): sums of word embeddings -> logits float32 (B, A)."""
        scale = self.param("scale", lambda *_: jnp.tile(jnp.array([[0.0], [1.25]]), (1, self.labels)))
        bias = self.param("bias", nn.initializers.constant(-0.35), (self.labels,))
        cosine = unit_vectors(tokens) @ unit_vectors(phrases).T  # (B, L, A)
        mean = masked_mean(cosine, mask, axis=1)
        soft = jax.nn.logsumexp(jnp.where(confined, self.SHARP * cosine, -1e4), axis=1) / self.SHARP
        return self.GAIN * (scale[0] * mean + nn.softplus(scale[1]) * soft + bias)


class MLLM(nn.Module):
    """3D multimodal LLM with a text-guided hierarchical MoE in its vision tower."""

    cfg: Model

    def setup(self):
        self.vision = ViT3D(self.cfg)
        self.connector = Connector(self.cfg)
        self.decoder = LanguageModel(self.cfg)
        self.task_router = TaskRouter(self.cfg.tgh, len(self.cfg.tasks))
        if self.cfg.aux_labels:
            self.aux_head = AuxHead(len(self.cfg.aux_labels))

    def __call__(
        self, batch: Batch, group: jax.Array | None = None, depth_scale: Any = None, score: bool = False
    ) -> Output:
        """Teacher-forced logits, or with `score` only what a loss needs of them, which takes less memory.

        `group` (B,) forces the expert group; None lets the task router predict it. A batch without slices (S = 0) is
        text alone: the decoder sees the prompt without visual tokens.
        """
        if not batch["slices"].shape[1]:
            rows = batch["tokens"].shape[0]
            nothing = jnp.zeros((rows, 0, self.cfg.decoder.width), jnp.dtype(self.cfg.dtype))
            unseen = jnp.zeros((rows, 0), bool)
            encoded = EncodedVolume(nothing, unseen, None, jnp.zeros(rows, jnp.int32), {})
            return Output(*self._text(batch, nothing, unseen, score), None, encoded)
        encoded = self.encode(batch, group, depth_scale)
        aux = self.aux_logits(encoded, batch.get("aux_cells")) if self.cfg.aux_labels else None
        return Output(*self._text(batch, encoded.tokens, encoded.mask, score), aux, encoded)

    def _text(self, batch, visual, visual_mask, score: bool):
        if score:
            return None, self.text_scores(batch, visual, visual_mask)
        return self.text_logits(batch, visual, visual_mask), None

    # ---- the tower ------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch, group: jax.Array | None = None, depth_scale: Any = None) -> EncodedVolume:
        """slices (B, S, H, W, 3), slice_mask (B, S), tokens and question_mask (B, T) -> visual tokens and routing."""
        t = self.task_router.prompt_vector(self.decoder.embeddings(batch["tokens"]), batch["question_mask"])
        logits = self._task_logits(t, batch)
        if group is None:
            group = jnp.zeros(t.shape[0], jnp.int32) if logits is None else self._picked_group(logits, batch)
        features, slab_mask, stats = self.vision(
            batch["slices"], batch["slice_mask"], t, group, batch.get("slice_spacing"), depth_scale,
            batch.get("depth_index"),
        )  # fmt: skip
        tokens, mask = self.connector(features, slab_mask)
        if "image_visible" in batch:
            mask = mask & batch["image_visible"][:, None]
        return EncodedVolume(tokens, mask, logits, group, stats)

    def encode_picture(self, batch: Batch, crops: tuple[int, int] | None) -> tuple[jax.Array, jax.Array]:
        """Visual tokens (B, L, W) and mask of a 2D base: slices are a picture's global view and its crops, row by row,
        or without `crops` a single view.

        For a model without experts and without attention between slices (model-spec 2.3).
        """
        rows = batch["slices"].shape[0]
        t = jnp.zeros((rows, self.cfg.tgh.hidden), jnp.float32)
        features, mask, _ = self.vision(batch["slices"], batch["slice_mask"], t, jnp.zeros(rows, jnp.int32))
        return self.connector(features, mask, crops)

    def route(self, batch: Batch) -> jax.Array | None:
        """Task logits float32 (B, tasks) from the prompt alone; None with one group."""
        t = self.task_router.prompt_vector(self.decoder.embeddings(batch["tokens"]), batch["question_mask"])
        return self._task_logits(t, batch)

    def _task_logits(self, t: jax.Array, batch: Batch) -> jax.Array | None:
        if self.cfg.tgh.groups == 1:
            return None
        return self.task_router.task_logits(t, self.coarse_view(batch))

    def coarse_view(self, batch: Batch) -> jax.Array:
        """The pixels in 0..1, averaged over slices, colours and each row of patches' own rows: (B, grid * width)."""
        pixels = batch["slices"].astype(jnp.float32) / (255 if batch["slices"].dtype == jnp.uint8 else 1)
        grid = self.cfg.tower.grid
        pixels = pixels[:, :, : pixels.shape[2] // grid * grid]  # a side need not be whole patches
        rows = jnp.mean(pixels.reshape(pixels.shape[0], pixels.shape[1], grid, -1, pixels.shape[3], 3), axis=(3, 5))
        mean = masked_mean(rows, batch["slice_mask"], axis=1)
        return mean.reshape(mean.shape[0], -1)

    def _picked_group(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """int32 (B,): the router's decision, or what takes its place in the ablations of model-spec 4.8.

        `oracle` needs the batch's `task` and falls back to the router without; `random` is a coin fixed by the prompt.
        """
        tgh = self.cfg.tgh
        if tgh.task_input == "oracle" and "task" in batch:
            return batch["task"]
        if tgh.task_input == "random":
            place = jnp.arange(1, batch["tokens"].shape[1] + 1)
            seed = jnp.sum(jnp.where(batch["question_mask"], batch["tokens"] * place, 0), axis=1)
            return jax.vmap(lambda s: jax.random.randint(jax.random.key(s), (), 0, tgh.groups))(seed)
        return jnp.argmax(logits, axis=-1)

    def aux_logits(self, encoded: EncodedVolume, cells: jax.Array | None = None) -> jax.Array:
        """Auxiliary finding logits (B, A): which labels the visual tokens state; no part of the paper.

        `cells` bool (B, V, R, C, A) confines each label to the cells where it is to be seen (default: all); a label
        none of whose cells is visible may be stated by every visible token.
        """
        longest = max(map(len, self.cfg.aux_labels))
        ids = np.array([[*label, *[-1] * (longest - len(label))] for label in self.cfg.aux_labels])
        words = jax.lax.stop_gradient(self.decoder.embeddings(jnp.maximum(ids, 0))) * (ids >= 0)[..., None]
        visible = jnp.broadcast_to(encoded.mask[..., None], (*encoded.mask.shape, len(ids)))
        confined = visible
        if cells is not None:
            confined = visible & cells_to_tokens(cells, self.cfg.flat)
            confined = jnp.where(jnp.any(confined, axis=1, keepdims=True), confined, visible)
        return self.aux_head(encoded.tokens, encoded.mask, confined, words.sum(axis=1))

    # ---- the decoder ----------------------------------------------------------------------------------------------

    def _sequence(self, batch: Batch, visual: jax.Array, visual_mask: jax.Array):
        """[chunk 1 ; visual tokens ; chunk 2], its mask, and the blocks of tokens that see each other, None without."""
        p = self.cfg.prefix_length
        text, valid = self.decoder.embeddings(batch["tokens"]), batch["token_mask"]
        visual, visual_mask, blocks = self._framed(visual, visual_mask)
        x = jnp.concatenate([text[:, :p], visual.astype(text.dtype), text[:, p:]], axis=1)
        valid = jnp.concatenate([valid[:, :p], visual_mask, valid[:, p:]], axis=1)
        if not self.cfg.decoder.image_blocks:
            return x, valid, None
        blocks = jnp.pad(blocks, (p, text.shape[1] - p), constant_values=-1)
        return x, valid, jnp.broadcast_to(blocks, valid.shape)

    def _framed(self, visual: jax.Array, mask: jax.Array):
        """Visual tokens with frames between views and a label after each, the mask, and the block of each position.

        A view is a block, as a picture of the base is; without frames all of them are one. Text has block -1, and is
        seen with the view that it belongs to.
        """
        rows, count, width = visual.shape
        cfg, size = self.cfg, self.cfg.view_side**2
        if cfg.volume.layout != "frames" or not count:
            return visual, mask, np.zeros(count, np.int32)
        views, seen = visual.reshape(rows, -1, size, width), mask.reshape(rows, -1, size)
        number = views.shape[1]

        def text(ids: np.ndarray):
            """ids (V, k), -1 for none, as tokens (B, V, k, W), their mask and their blocks."""
            tokens = self.decoder.embeddings(np.maximum(ids, 0)).astype(visual.dtype)
            shown = jnp.any(seen, axis=2, keepdims=True) & (ids >= 0)
            return jnp.broadcast_to(tokens, (rows, *tokens.shape)), shown, np.full(ids.shape, -1)

        frame = text(np.tile(np.array(cfg.frame, np.int32), (number, 1)))
        label = text(np.array(cfg.labels[:number] or [()] * number, np.int32))
        picture = views, seen, np.tile(np.arange(number)[:, None], size)
        tokens, shown, blocks = zip(frame, picture, label, strict=True)
        first = len(cfg.frame)  # none before the first view
        tokens = jnp.concatenate(tokens, axis=2).reshape(rows, -1, width)[:, first:]
        shown = jnp.concatenate(shown, axis=2).reshape(rows, -1)[:, first:]
        return tokens, shown, np.concatenate(blocks, axis=1).ravel()[first:]

    def text_logits(self, batch: Batch, visual: jax.Array, visual_mask: jax.Array) -> jax.Array:
        """float32 (B, T - prefix - 1, V): position j predicts tokens[:, prefix + 1 + j]."""
        return self.decoder.logits(self._text_hidden(batch, visual, visual_mask))

    def text_scores(self, batch: Batch, visual: jax.Array, visual_mask: jax.Array) -> Scores:
        """How tokens[:, prefix + 1:] score, (B, T - prefix - 1)."""
        hidden = self._text_hidden(batch, visual, visual_mask)
        return self.decoder.scores(hidden, batch["tokens"][:, self.cfg.prefix_length + 1 :])

    def _text_hidden(self, batch: Batch, visual: jax.Array, visual_mask: jax.Array) -> jax.Array:
        x, valid, blocks = self._sequence(batch, visual, visual_mask)
        hidden, _ = self.decoder(x, valid, x.shape[1], blocks=blocks)
        start = x.shape[1] - batch["tokens"].shape[1] + self.cfg.prefix_length
        return hidden[:, start:-1]

    def prefill(self, batch: Batch, visual: jax.Array, visual_mask: jax.Array, new_tokens: int):
        """Fills a cache with room for `new_tokens`; returns the logits (B, V) after each sample's last token and it."""
        x, valid, blocks = self._sequence(batch, visual, visual_mask)
        slots = x.shape[1] + new_tokens
        hidden, cache = self.decoder(x, valid, slots, empty_cache(self.cfg, x.shape[0], slots), blocks=blocks)
        last = jnp.max(jnp.where(valid, jnp.arange(x.shape[1]), 0), axis=1)
        return self.decoder.logits(hidden[jnp.arange(x.shape[0]), last]), cache

    def decode(self, token: jax.Array, cache: Cache, planned_length: int):
        """One step: token int (B,) -> logits (B, V) and the cache."""
        x = self.decoder.embeddings(token[:, None])
        hidden, cache = self.decoder(x, jnp.ones_like(token[:, None], bool), planned_length, cache)
        return self.decoder.logits(hidden[:, 0]), cache

    def blank(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Stand-ins for the visual tokens of a volume that is not looked at: no tower is run, nothing is visible."""
        size = batch["tokens"].shape[0], self.cfg.visual_tokens(batch["slices"].shape[1])
        return jnp.zeros((*size, self.cfg.decoder.width), jnp.dtype(self.cfg.dtype)), jnp.zeros(size, bool)
