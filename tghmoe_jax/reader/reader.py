"""Answers questions in batches of a few static shapes: what evaluation asks a model through.

Axis legend: B batch, O options.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tghmoe_jax.evaluation.routing_plot import Routing
from tghmoe_jax.models import generation
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.questions import Question, Source
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.sharding import arrays
from tghmoe_jax.training.step import variables

Asked = list[tuple[int, Question]]  # volumes and what is asked about them

BUCKET = 128  # the decoder's text is padded to multiples of it, each a program of its own


@dataclasses.dataclass(frozen=True)
class Request:
    """One question about volume `volume`; `options` are ranked; `group` forces an expert group (-1: predicted)."""

    volume: int
    question: Question
    options: tuple[str, ...] = ()
    group: int = -1
    visible: bool = True


@dataclasses.dataclass(frozen=True)
class Answer:
    """text generated ('' where only options were ranked); likelihoods (O,) per token; group used; expert load.

    load float32 (layers, G, E): (token, choice) pairs of this sample; task_probabilities (tasks,) or None.
    """

    text: str
    likelihoods: np.ndarray
    group: int
    load: np.ndarray
    task_probabilities: np.ndarray | None


class Reader:
    """A model with its tokeniser, ready to answer in batches of one number of rows."""

    def __init__(self, model: MLLM, tokenizer: Tokenizer, flat_params: dict, text_length: int, batch: int):
        self.model = generation.inference(model)
        self.tokenizer = tokenizer
        self.variables = variables(flat_params)
        self.text_length = text_length
        self.batch = batch
        self.checkpoint: dict[str, Any] | None = None  # what was read, for the manifest; None while training
        mesh = jax.sharding.get_abstract_mesh()
        rows = 1 if mesh.empty else mesh.size
        self.batch += -batch % rows

    def ask(self, source: Source, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        """Answers in order. Requests with options are ranked, the others generate up to `new_tokens` tokens.

        Long questions are asked together, after the others, so that short ones are not padded to their length.
        """
        lengths = [len(prompts.encode(self.tokenizer, r.question.prompt, None).tokens) for r in requests]
        order = sorted(range(len(requests)), key=lambda i: -(-lengths[i] // BUCKET))  # else as given: volume by volume
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            padded = places + [places[-1]] * (self.batch - len(places))
            found = self._ask(source, [requests[i] for i in padded], new_tokens)
            answers |= dict(zip(places, found, strict=False))
        return [answers[i] for i in range(len(requests))]

    def routings(self, source: Source, asked: Asked) -> list[Routing]:
        """How each question about its volume is routed, in order."""
        found = []
        for start in range(0, len(asked), self.batch):
            part = [Request(volume, question) for volume, question in asked[start : start + self.batch]]
            padded = part + [part[-1]] * (self.batch - len(part))
            batch = self._collate(source, padded)
            encoded = generation.encode(self.model, self.variables, batch, None)
            masks = [source.slices(request.volume)[1] for request in part]
            found += [routing_of(encoded, row, self.model.cfg, mask) for row, mask in enumerate(masks)]
        return found

    def _collate(self, source, requests):
        """What tower and router see: volumes, and prompts of the whole text length, so that they have one program."""
        rows = [(r.volume, r.question.prompt, None, r.question.task) for r in requests]
        batch = pipeline.collate(source, rows, self.tokenizer, self.text_length, self.model.cfg.tasks)
        batch["image_visible"] = np.array([r.visible for r in requests])
        return self._put(batch)

    def _text(self, requests, targets, others: int):
        """What the decoder reads beside `others` positions of visual and new tokens."""
        encoded = [prompts.encode(self.tokenizer, r.question.prompt, t) for r, t in zip(requests, targets, strict=True)]
        length = self._padded(max(len(e.tokens) for e in encoded), others)
        return self._put(prompts.batch(encoded, length, self.tokenizer.pad_id))

    def _padded(self, tokens: int, others: int) -> int:
        """Columns for a text of `tokens`: whole buckets, in the RoPE regime of the whole text length."""
        first_regime, length = self.model.cfg.decoder.original_positions, -(-tokens // BUCKET) * BUCKET
        if self.text_length + others > first_regime:
            length = max(length, first_regime + 1 - others)
        return min(length, self.text_length)

    def _put(self, tree):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            return tree
        return arrays.place(tree, jax.NamedSharding(mesh, jax.P(mesh.axis_names)))

    def _ask(self, source, requests: list[Request], new_tokens: int) -> list[Answer]:
        blind = not any(r.visible for r in requests)
        batch = self._collate(source, requests)
        forced = np.array([r.group for r in requests])
        group = self._put(forced) if (forced >= 0).all() else None
        count, shares, logits = len(requests), None, None
        if blind:
            visual, mask = generation.blank(self.model, self.variables, batch)
            used = np.zeros(count, int)
            load = np.zeros((count, 0, 0, 0))
        else:
            encoded = generation.encode(self.model, self.variables, batch, group)
            visual, mask, logits = encoded.tokens, encoded.mask, encoded.task_logits
            used = arrays.to_host(encoded.group)
            load = expert_load(encoded, self.model.cfg.tgh.groups)
        if logits is not None:
            logits = arrays.to_host(logits).astype(np.float64)
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
        likelihoods, texts = np.zeros((count, 0)), [""] * count
        if requests[0].options:
            columns = []
            for o in range(len(requests[0].options)):
                scored = self._text(requests, [r.options[o] for r in requests], visual.shape[1])
                columns.append(
                    arrays.to_host(generation.answer_likelihood(self.model, self.variables, scored, visual, mask))
                )
            likelihoods = np.stack(columns, axis=1)
        else:
            text = self._text(requests, [None] * count, visual.shape[1] + new_tokens)
            stops = tuple(self.tokenizer.stop_ids)
            ids = arrays.to_host(generation.generate(self.model, self.variables, text, visual, mask, new_tokens, stops))
            texts = [self.tokenizer.decode([int(i) for i in row if i >= 0]).strip() for row in ids]
        return [
            Answer(texts[i], likelihoods[i], int(used[i]), load[i], None if shares is None else shares[i])
            for i in range(count)
        ]


def expert_load(encoded, groups: int) -> np.ndarray:
    """float32 (B, layers, G, E): pairs a sample sent to each expert of its group; one-expert layers left out."""
    stats = [s for _, s in sorted(encoded.stats.items()) if s.load.shape[-1] > 1]
    used = arrays.to_host(encoded.group)
    if not stats:
        return np.zeros((len(used), 0, groups, 1), np.float32)
    per_sample = np.stack([arrays.to_host(s.sample_load) for s in stats], axis=1)  # (B, layers, E)
    size = stats[0].load.shape[0]
    load = np.zeros((*per_sample.shape[:2], size, per_sample.shape[-1]), np.float32)
    load[np.arange(len(used)), :, used % size] = per_sample
    return load


def routing_of(encoded, row: int, cfg, slice_mask: np.ndarray) -> Routing:
    """How sample `row` of an encoded batch was routed; slice_mask bool (N,) are its real slices."""
    layers = tuple(layer for layer, s in sorted(encoded.stats.items()) if s.load.shape[-1] > 1)
    pairs = expert_load(encoded, cfg.tgh.groups)[row].sum(axis=1)  # (layers, E)
    slabs, side, depth = cfg.slabs(len(slice_mask)), cfg.tower.grid, cfg.volume.patch_depth
    real = np.pad(slice_mask, (0, slabs * depth - len(slice_mask)))
    winner = np.zeros((len(layers), slabs, side, side), np.int32)
    for i, layer in enumerate(layers):  # (T,) of slabs with their class token -> patches
        first = arrays.to_host(encoded.stats[layer].winner)[row].reshape(slabs, -1)[:, int(cfg.tower.class_token) :]
        winner[i] = first.reshape(slabs, side, side)
    winner[:, ~real.reshape(slabs, depth).any(axis=1)] = -1
    load = pairs / np.maximum(pairs.sum(axis=-1, keepdims=True), 1)
    task = cfg.tasks[int(arrays.to_host(encoded.group)[row])] if cfg.tgh.groups > 1 else "shared"
    return Routing(task, None, layers, load, winner)
