"""Evidence of an answer: how far its log-likelihood falls when visual tokens are hidden from the decoder.

Hidden tokens become the mean of the visible ones, so no position moves and the decoder still sees a scan. The tower
runs once; each hidden part is one row of the decoder. First every view (slab) is hidden, then every region of the
strongest. The strongest part is the one with the largest fall for the change that was made (see `strength`): tokens of
a lesion differ most from the mean, so even a decoder of shuffled weights would point at them by the fall alone. What
this is worth is measured by `studies/pointing.py`: see docs/evidence.md.

Axis legend: N rows, L visual tokens, V views, R region rows and columns of a view, O options.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tghmoe_jax.evaluation.evidence_plot import Box, Evidence
from tghmoe_jax.models import generation
from tghmoe_jax.models.config import Model
from tghmoe_jax.models.connector import cells_to_tokens
from tghmoe_jax.models.mllm import MLLM
from tghmoe_jax.samples import prompts
from tghmoe_jax.samples.questions import LETTERS, Question
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.scans.scan import Scan
from tghmoe_jax.scans.slices import voxel_edges

ROWS = 8  # of the decoder at once: one compiled program however many parts are hidden
REGIONS = 4  # along a side of a view, at most


@dataclasses.dataclass(frozen=True)
class Falls:
    """Falls in nats of what speaks for `answer`: its log-likelihood, or that of the chosen option against the best
    other one.

    whole: with all tokens hidden. views float32 (V,): with each view hidden. view: the strongest one; regions float32
    (R, R): with each of its regions hidden. view_changes and region_changes, of the same shapes: the squared
    distance by which hiding moves the visible tokens. rows: of the decoder that this took.
    """

    answer: str
    whole: float
    views: np.ndarray
    view: int
    regions: np.ndarray
    view_changes: np.ndarray
    region_changes: np.ndarray
    rows: int

    @property
    def region(self) -> tuple[int, int, int]:
        """The strongest region: view, row, column."""
        strengths = strength(self.regions, self.region_changes)
        return (self.view, *map(int, np.unravel_index(np.argmax(strengths), strengths.shape)))


def strength(falls: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Falls for the change that was made: divided by the cube of the distance; 0 where nothing changed.

    `changes` are squared distances. Of the powers from 0 to 6 the cube was chosen on validation questions: the least at
    which decoders of shuffled weights point no better than chance (docs/evidence.md).
    """
    return np.divide(falls, changes**1.5, out=np.zeros(np.shape(falls)), where=changes > 0)


def cells_along(cfg: Model) -> int:
    """Visual tokens along a side of a region."""
    return -(-cfg.view_side // REGIONS)


def region_voxels(cfg: Model) -> tuple[int, int, int]:
    """Voxels (slices, rows, columns) of the model's grid in one region."""
    depth, high, wide = cfg.cell
    return depth, high * cells_along(cfg), wide * cells_along(cfg)


def hidden_tokens(cfg: Model, slices: int) -> tuple[np.ndarray, np.ndarray]:
    """Which visual tokens each part covers: bool (V, L) of the views and (V, R, R, L) of their regions.

    A region covers its column's tokens of the global view too, which would tell what it hides. A view leaves the global
    view alone: that is the mean of all views.
    """
    views, side = cfg.views(slices), cfg.view_side
    window = np.arange(side) // cells_along(cfg)
    count = window[-1] + 1
    region = (np.arange(views)[:, None, None] * count + window[:, None]) * count + window  # (V, side, side)
    labels = region[..., None] == np.arange(views * count**2)
    regions = np.asarray(cells_to_tokens(jnp.asarray(labels)[None], cfg.flat))[0].T
    size = side * (side + (not cfg.flat))  # tokens of a view, newlines included
    own = np.arange(regions.shape[-1]) // size == np.arange(views)[:, None]
    return own, regions.reshape(views, count, count, -1)


def scorer(
    model: MLLM, variables, tokenizer: Tokenizer, question: Question, answer: str, mask: jax.Array, new_tokens: int,
    length: Callable[[int, int], int],
) -> Callable[[jax.Array], jax.Array]:  # fmt: skip
    """What `measure` needs of a question and the answer that was generated.

    Options are told apart by the first token in which they, with their letters, differ, after the prompt that shows
    them. length(tokens, others) gives the columns of a text next to `others` positions.
    """
    mask = jnp.broadcast_to(mask, (ROWS, mask.shape[1]))
    if not question.choices:
        encoded = prompts.encode(tokenizer, question.prompt, answer)
        size = len(encoded.tokens)
        text = prompts.batch([encoded] * ROWS, max(size, length(size, mask.shape[1])), tokenizer.pad_id)
        tokens = sum(encoded.loss_mask)
        return lambda seen: tokens * generation.answer_likelihood(model, variables, text, seen, mask)[:, None]
    lettered = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    encoded = [prompts.encode(tokenizer, question.prompt, one) for one in lettered]
    shared = next(i for i, ids in enumerate(zip(*(one.tokens for one in encoded), strict=False)) if len(set(ids)) > 1)
    ids = np.array([one.tokens[shared] for one in encoded])
    first = encoded[0]
    prompt = prompts.Encoded(
        first.tokens[:shared], first.prefix_len, first.question_mask[:shared], first.loss_mask[:shared]
    )
    text = prompts.batch([prompt] * ROWS, length(shared, mask.shape[1] + new_tokens), tokenizer.pad_id)
    return lambda seen: generation.next_likelihood(model, variables, text, seen, mask, ids, new_tokens)


def measure(
    score: Callable[[jax.Array], jax.Array], cfg: Model, slices: int, visual: jax.Array, mask: jax.Array,
    options: Sequence[str], answer: str,
) -> Falls:  # fmt: skip
    """The falls of one answer, whose visual tokens are `visual` (1, L, W) and `mask` (1, L).

    `score` gives of visual tokens (ROWS, L, W) the log-likelihoods (ROWS, O) of the options, or (ROWS, 1) of `answer`.
    """
    views, regions = hidden_tokens(cfg, slices)
    wide = jnp.asarray(visual, jnp.float32)
    mean = jnp.sum(wide * mask[..., None], axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask), 1)
    squares = np.asarray(jnp.sum((wide - mean) ** 2, axis=-1)[0] * mask[0], np.float64)  # (L,)
    mean, rows = mean.astype(visual.dtype), 0

    def scores(hidden: np.ndarray) -> np.ndarray:
        """hidden bool (N, L) -> (N, O)."""
        nonlocal rows
        found = []
        for start in range(0, len(hidden), ROWS):
            part = hidden[start : start + ROWS]
            part = np.pad(part, [(0, ROWS - len(part)), (0, 0)])
            found.append(np.asarray(score(jnp.where(part[..., None], mean, visual)), np.float64))
            rows += ROWS
        return np.concatenate(found)[: len(hidden)]

    plain = np.zeros((2, views.shape[1]), bool)
    plain[1] = True
    first = scores(np.concatenate([plain, views]))
    chosen = int(np.argmax(first[0]))

    def support(found: np.ndarray) -> np.ndarray:
        others = np.delete(found, chosen, axis=1)
        return found[:, chosen] - (others.max(axis=1) if others.size else 0)

    start, *hidden = support(first)
    whole, *of_views = start - np.array(hidden)
    of_views, changes = np.array(of_views, np.float32), views @ squares
    view = int(np.argmax(strength(of_views, changes)))
    parts = regions[view]
    of_regions = start - support(scores(parts.reshape(-1, parts.shape[-1])))
    return Falls(
        options[chosen] if options else answer, float(whole), of_views, view,
        of_regions.reshape(parts.shape[:2]).astype(np.float32), changes, parts @ squares, rows,
    )  # fmt: skip


def locate(falls: Falls, cfg: Model, scan: Scan) -> Evidence:
    """The same in the scan as it was read: voxels, and mm in the patient's frame where the source states one.

    Parts that cover no voxel (padding of a slice to a square) are left out.
    """
    volume, (count, size) = scan.volume, scan.prepared.slices.shape[:2]
    extent = np.array(region_voxels(cfg))

    def part(box: np.ndarray, fall: float, strength: float) -> Box | None:
        edges = voxel_edges(volume, count, size, box)
        if np.any(edges[:, 1] - edges[:, 0] <= 0):
            return None
        centre = size_mm = None
        if volume.affine is not None:
            middle = np.append(edges.mean(axis=1) - 0.5, 1.0)  # the centre of voxel 0 lies at 0
            centre = tuple(map(float, (volume.affine @ middle)[:3]))
            steps = np.linalg.norm(volume.affine[:3, :3], axis=0)
            size_mm = tuple(map(float, (edges[:, 1] - edges[:, 0]) * steps))
        share = float(fall / falls.whole) if falls.whole > 0 else None
        return Box(edges, float(fall), share, float(strength), centre, size_mm)

    def box(view: int, row: int, column: int) -> np.ndarray:
        return np.stack([low := np.array([view, row, column]) * extent, low + extent], axis=1)

    whole = np.array([[0, size], [0, size]])
    of_views, of_regions = strength(falls.views, falls.view_changes), strength(falls.regions, falls.region_changes)
    slabs = [part(np.stack([box(v, 0, 0)[0], *whole]), falls.views[v], one) for v, one in enumerate(of_views)]
    regions = [part(box(falls.view, *at), falls.regions[at], one) for at, one in np.ndenumerate(of_regions)]
    regions = sorted(filter(None, regions), key=lambda one: -one.strength)
    return Evidence(falls.answer, falls.whole, tuple(filter(None, slabs)), tuple(regions), falls.rows, volume)
