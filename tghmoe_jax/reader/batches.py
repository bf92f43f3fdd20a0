"""A model that answers requests about volumes in batches: it encodes, routes, ranks and generates.

Axis legend: B batch, O options.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from tghmoe_jax.bases.family import Views
from tghmoe_jax.evaluation.routing_plot import RoutingMap
from tghmoe_jax.models import generation
from tghmoe_jax.models.config import Decoder
from tghmoe_jax.models.mllm import MLLM, EncodedVolume, variables
from tghmoe_jax.reader import evidence, programs
from tghmoe_jax.reader.answer import Answer, no_load
from tghmoe_jax.reader.routing import expert_load, probabilities, routing_of
from tghmoe_jax.samples import pipeline, prompts
from tghmoe_jax.samples.questions import Question, Source
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.sharding import arrays
from tghmoe_jax.training import memory
from tghmoe_jax.training.loading import LoadedRun

Asked = list[tuple[int, Question]]  # volumes and what is asked about them

BUCKET = 128  # the decoder's text is padded to multiples of it; each length is a compiled program
PICTURE_BUCKET = 32  # the same for questions about pictures


@dataclasses.dataclass(frozen=True)
class Request:
    """One question about volume `volume` of a source.

    With `options` these are ranked and nothing is generated. `group` forces an expert group (None: the router's).
    Where it is not `visible`, the tower is not run and the decoder sees no visual token. `routing` asks for the expert
    of each patch, `evidence` for what of the volume the generated answer rests on.
    """

    volume: int
    question: Question
    options: tuple[str, ...] = ()
    group: int | None = None
    visible: bool = True
    routing: bool = False
    evidence: bool = False


@dataclasses.dataclass(frozen=True)
class PictureViews:
    """A picture of a 2D base, as a source of one volume whose slices are its views."""

    views: np.ndarray
    crops: tuple[int, int] | None

    def slices(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Views float32 (V, S, S, 3) in 0..1 and a mask bool (V,) of ones."""
        return self.views, np.ones(len(self.views), bool)


class BatchReader:
    """A model with its tokeniser, ready to answer in batches of `batch` rows.

    `text_length`: tokens of the longest text; 0 for a 2D base, whose texts have no common length. `run` is what was
    read from disk, which single scans need; `views_of` is how a 2D base cuts a picture, and `volume_views` how it is
    shown the slices and mask of a volume (reader/slice_protocol.py); `name` stands in for a run's.
    """

    def __init__(
        self, model: MLLM, tokenizer: Tokenizer, params: dict, text_length: int, batch: int = 1,
        run: LoadedRun | None = None, views_of: Views | None = None, volume_views: Callable | None = None,
        name: str = "",
    ):  # fmt: skip
        self.model = generation.inference(model)
        self.tasks, self.groups = model.cfg.tasks, model.cfg.tgh.groups
        self.tokenizer, self.variables = tokenizer, variables(params)
        self.text_length, self.run, self.name = text_length, run, name
        self.views_of, self.volume_views = views_of, volume_views
        self._seen: tuple[Source, list, EncodedVolume] | None = None  # see `_tower`
        self._programs: dict[str, tuple[Callable, Callable]] = {}  # see `programs.prepare`
        mesh = jax.sharding.get_abstract_mesh()
        self.batch = batch + (-batch % (1 if mesh.empty else mesh.size))

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """What was read, for a manifest of scores; None while training."""
        if self.run is None:
            return {"name": self.name} if self.name else None
        return {"name": self.run.name, "digest": self.run.digest, "step": self.run.step}

    # ---- many requests ---------------------------------------------------------------------------------------------

    def answer(self, source: Source, requests: Sequence[Request], new_tokens: int) -> list[Answer]:
        """Answers in order. Requests with options are ranked, the others generate up to `new_tokens` tokens.

        Blind requests, forced groups and numbers of options are never mixed in a batch. Long questions are asked
        together, after the others, so that short ones are not padded to their length.
        """

        def kind(request: Request) -> tuple:
            tokens = len(prompts.encode(self.tokenizer, request.question.prompt, None).tokens)
            return request.visible, request.group is not None, len(request.options), -(-tokens // BUCKET)

        kinds = [kind(request) for request in requests]
        answers: dict[int, Answer] = {}
        for one in sorted(set(kinds)):
            places = [i for i, own in enumerate(kinds) if own == one]  # as given: volume by volume
            for part in self._batches(places):
                for place, found in zip(
                    part, self._answer_batch(source, [requests[i] for i in part], new_tokens), strict=True
                ):
                    answers.setdefault(place, found)  # rows that fill up the batch repeat its last place
        return [answers[i] for i in range(len(requests))]

    def route(self, source: Source, asked: Asked) -> np.ndarray:
        """The task router's probabilities float64 (len(asked), tasks) for each question about its volume."""
        found = []
        for part in self._batches(list(range(len(asked)))):
            batch = self._collate(source, [Request(*asked[i]) for i in part])
            found.append(probabilities(generation.route(self.model, self.variables, batch)))
        return np.concatenate(found)[: len(asked)] if found else np.zeros((0, len(self.tasks)))

    def routings(self, source: Source, asked: Asked) -> list[RoutingMap]:
        """How each question about its volume is routed, in order."""
        found = []
        for part in self._batches(list(range(len(asked)))):
            batch = self._collate(source, [Request(*asked[i]) for i in part])
            encoded = self._call("encode", generation.encode, batch, None)
            found += [routing_of(encoded, row, self.model.cfg, source.slices(asked[i][0])[1])
                      for row, i in enumerate(part)]  # fmt: skip
        return found[: len(asked)]

    def _batches(self, places: list[int]) -> Iterable[list[int]]:
        """`places` in batches of one size, the last one filled up with its last place."""
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            yield part + [part[-1]] * (self.batch - len(part))

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def _answer_batch(self, source: Source, requests: list[Request], new_tokens: int) -> list[Answer]:
        """Of requests of one kind (see `answer`), as many as a batch has rows."""
        first = requests[0]
        if self.views_of:
            visual, mask = self._encode_picture(source, requests)
            beside = [{} for _ in requests]
        else:
            visual, mask, beside = self._encode(source, requests)
        if first.options:
            columns = []
            for o in range(len(first.options)):
                scored = self._text(requests, [r.options[o] for r in requests], visual.shape[1])
                columns.append(self._call("rank", generation.answer_likelihood, scored, visual, mask))
            likelihoods = np.stack([arrays.to_host(column) for column in columns], axis=1)
            return [
                Answer(options=r.options, likelihoods=row, **more)
                for r, row, more in zip(requests, likelihoods, beside, strict=True)
            ]
        text = self._text(requests, [None] * len(requests), visual.shape[1] + new_tokens)
        ids = arrays.to_host(self._generate(text, visual, mask, new_tokens))
        rows = [[int(i) for i in row if i >= 0] for row in ids]
        texts = [self.tokenizer.decode(row).strip() for row in rows]
        for i, request in enumerate(requests):
            if request.evidence:
                beside[i]["falls"] = self._falls(source, request, texts[i], visual[i][None], mask[i][None], new_tokens)
        return [
            Answer(text=text, cut=len(row) == new_tokens, **more)
            for text, row, more in zip(texts, rows, beside, strict=True)
        ]

    def _falls(self, source: Source, request: Request, text: str, visual, mask, new_tokens: int) -> evidence.Falls:
        """What the answer `text` to one request rests on, from its visual tokens (1, L, W) and their mask (1, L)."""
        self.watch("evidence")
        cfg, question = self.model.cfg, request.question

        def length(tokens: int, others: int) -> int:
            return padded_length(cfg.decoder, tokens, others, self.text_length)

        score = evidence.scorer(self.model, self.variables, self.tokenizer, question, text, mask, new_tokens, length)
        slices = len(source.slices(request.volume)[1])
        return evidence.measure(score, cfg, slices, visual, mask, question.choices, text)

    def _generate(self, text: dict, visual: jax.Array, mask: jax.Array, new_tokens: int) -> jax.Array:
        stops = tuple(sorted(self.tokenizer.stop_ids))
        return self._call("decode", generation.generate, text, visual, mask, new_tokens, stops)

    def watch(self, step: str) -> None:
        """Called before each step, `encode`, `decode`, `rank` or `evidence`; who shows progress replaces it, and ends
        an answer by raising."""

    def forget(self) -> None:
        """Lets go of the last scan and its visual tokens, which are kept for the next question about it."""
        self._seen = None

    def _call(self, step: str, function, *arguments):
        """function(model, variables, *arguments). The memory that a new program needs is looked at before it runs."""
        self.watch(step)
        shapes = jax.tree.map(lambda leaf: getattr(leaf, "shape", leaf), arguments)
        if (key := f"{step} {shapes}") not in self._programs:
            program, given = programs.prepare(function, self.model, self.variables, arguments)
            alone = jax.sharding.get_mesh().empty  # `predict`, whose user has other flags
            memory.fitting("answer" if alone else step, program, *given(self.variables, arguments))
            self._programs[key] = program, given
        program, given = self._programs[key]
        return program(*given(self.variables, arguments))

    def _encode(self, source: Source, requests: list[Request]) -> tuple[jax.Array, jax.Array, list[dict[str, Any]]]:
        """Visual tokens, their mask, and what an Answer holds of the routing of each row."""
        batch = self._collate(source, requests)
        if not requests[0].visible:
            visual, mask = generation.blank(self.model, self.variables, batch)
            return visual, mask, [{"load": no_load()} for _ in requests]
        forced = requests[0].group is not None
        group = self._put(np.array([r.group for r in requests], np.int32)) if forced else None
        encoded = self._tower(source, requests, batch, group)
        used, load = arrays.to_host(encoded.group), expert_load(encoded, self.groups)
        rows = []
        for i, request in enumerate(requests):
            task = self.tasks[int(used[i])] if self.groups > 1 else request.question.task
            rows.append({"group": int(used[i]), "task": task, "load": load[i]})
            if request.routing:
                slice_mask = source.slices(request.volume)[1]
                rows[-1]["routing"] = routing_of(encoded, i, self.model.cfg, slice_mask)
        if encoded.task_logits is not None:
            for row, shares in zip(rows, probabilities(encoded.task_logits), strict=True):
                row["task_probabilities"] = self._named(shares)
        return encoded.tokens, encoded.mask, rows

    def _tower(self, source: Source, requests: list[Request], batch: dict, group: jax.Array | None) -> EncodedVolume:
        """The encoded batch: that of the call before where it saw the same volumes with the same groups, in a tower
        that reads nothing else of a prompt."""
        tgh = self.model.cfg.tgh
        by_prompt = group is None and self.groups > 1
        if by_prompt or (tgh.layers and tgh.experts > 1 and tgh.token_input != "image"):
            return self._call("encode", generation.encode, batch, group)
        seen = [(request.volume, request.group) for request in requests]
        if self._seen is None or self._seen[0] is not source or self._seen[1] != seen:
            self._seen = None  # room for the next
            self._seen = source, seen, self._call("encode", generation.encode, batch, group)
        elif self._seen[2].task_logits is not None:
            logits = generation.route(self.model, self.variables, batch)
            return self._seen[2]._replace(task_logits=logits)
        return self._seen[2]

    def _encode_picture(self, source: PictureViews | Source, requests: list[Request]) -> tuple[jax.Array, jax.Array]:
        """Visual tokens of the views of a picture or a volume and their mask, in a row for each request about it."""
        slices, crops = [source.slices(r.volume) for r in requests], None
        if isinstance(source, PictureViews):
            crops = source.crops
        else:
            slices = [self.volume_views(*one) for one in slices]
        views, mask = (np.stack(parts) for parts in zip(*slices, strict=True))
        batch = self._put({"slices": views, "slice_mask": mask})
        visual, mask = self._call("encode", generation.encode_picture, batch, crops)
        return visual, mask & self._put(np.array([r.visible for r in requests]))[:, None]

    def _collate(self, source: Source, requests: list[Request]) -> dict[str, Any]:
        """What tower and router see: volumes, and prompts of the whole text length, so that they have one program."""
        rows = [(r.volume, r.question.prompt, None, r.question.task) for r in requests]
        batch = pipeline.collate(source, rows, self.tokenizer, self.text_length, self.tasks)
        batch["image_visible"] = np.array([r.visible for r in requests])
        return self._put(batch)

    def _text(self, requests: list[Request], targets: list[str | None], others: int) -> dict[str, Any]:
        """The text that the decoder reads, next to `others` positions of visual and new tokens."""
        encoded = [prompts.encode(self.tokenizer, r.question.prompt, t) for r, t in zip(requests, targets, strict=True)]
        longest = max(len(e.tokens) for e in encoded)
        length = padded_length(self.model.cfg.decoder, longest, others, self.text_length)
        return self._put(prompts.batch(encoded, length, self.tokenizer.pad_id))

    def _put(self, tree):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            return tree
        return arrays.place(tree, jax.NamedSharding(mesh, jax.P(mesh.axis_names)))

    def _named(self, shares: np.ndarray) -> dict[str, float]:
        return {task: float(share) for task, share in zip(self.tasks, shares, strict=True)}


def padded_length(decoder: Decoder, tokens: int, others: int, text_length: int) -> int:
    """Columns for a text of `tokens` tokens and `others` further positions: whole buckets, so that texts of similar
    length share a compiled program.

    Padding never changes the RoPE regime: a run's is that of its whole text length; that of a picture, whose texts have
    no common length (`text_length` 0), follows its own, and padding never passes the last position.
    """
    if text_length:
        length = -(-tokens // BUCKET) * BUCKET
        if text_length + others > decoder.original_positions:
            length = max(length, decoder.original_positions + 1 - others)
        return min(length, text_length)
    within = tokens + others <= decoder.original_positions
    most = decoder.original_positions if within else decoder.max_positions
    return min(-(-tokens // PICTURE_BUCKET) * PICTURE_BUCKET, most - others)
