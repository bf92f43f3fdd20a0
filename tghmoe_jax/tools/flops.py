"""Floating-point operations of the model, counted from its sizes (a multiply and an add are two).

XLA's own count knows a scanned layer once and a custom call not at all. Two numbers are kept apart: `useful`, the
matrix products that the mathematics asks for (visible query-key pairs, chosen experts, no recomputation), by which MFU
is defined; and `executed`, what the compiled step does: masked parts of attention blocks that are computed all the
same, padding to blocks, slots of a fixed capacity, and what rematerialisation repeats.

Elementwise work (norms, activations, softmax, the optimiser) is in neither.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax.numpy as jnp

from tghmoe_jax.models import leaf_names
from tghmoe_jax.models.config import Model
from tghmoe_jax.models.decoder import score_chunk
from tghmoe_jax.models.vit3d import block_specs
from tghmoe_jax.ops.attention import SPLASH_LEAST, cudnn_takes
from tghmoe_jax.ops.choices import splash_blocks

# Matrix products of the backward pass over those of the forward pass. The splash kernels make the scores twice more
# (4 products for dk and dv, 3 for dq, against 2); the blocked backend runs its forward pass again.
_ATTENTION_BACKWARD = {"plain": 2.0, "blocked": 3.0, "cudnn": 2.5, "splash": 3.5}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs, useful and executed (see the module)."""

    useful: float = 0.0
    executed: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.useful + other.useful, self.executed + other.executed)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.useful * times, self.executed * times)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Forward FLOPs of one weight or one attention; `place` orders parts as they are executed."""

    place: int
    forward: Flops
    trains: bool = False
    attention: str = ""  # its backend; '' for a product with a weight
    experts: bool = False
    rematerialised: bool = True


_PATCH, _CONNECTOR, _DECODER, _HEAD = -1, 10_000, 20_000, 30_000


def train_sample(
    cfg: Model, shapes: Mapping, trains: Mapping[str, bool], slices: int, text: int, backend: str, spread: bool = False
) -> Flops:
    """One training sample, forward and backward: `slices` slices and `text` text tokens.

    shapes and trains {leaf path: array or shape, whether it trains}; backend: the attention's, `splash` on TPU and
    `cudnn` on GPU; spread: tokens travel to experts of other devices.
    """
    parts = _parts(cfg, shapes, trains, slices, text, backend, spread)
    first = min((p.place for p in parts if p.trains), default=math.inf)
    total = Flops()
    for part in parts:
        total += part.forward
        if part.attention:
            if part.place >= first:
                times = _ATTENTION_BACKWARD[part.attention]
                total += Flops(2 * part.forward.useful, times * part.forward.executed)
        else:
            total += part.forward * (part.trains + (part.place > first))
        again = cfg.remat == "full" or part.place == _HEAD or (cfg.remat == "dots" and (part.attention or part.experts))
        if again and part.rematerialised and part.place >= first:
            total += Flops(0, part.forward.executed)
    return total


def forward_sample(cfg: Model, shapes: Mapping, slices: int, text: int, backend: str, spread: bool = False) -> Flops:
    """One teacher-forced forward pass; arguments as of `train_sample`."""
    return sum((p.forward for p in _parts(cfg, shapes, {}, slices, text, backend, spread)), Flops())


def decode_token(cfg: Model, shapes: Mapping, cached: int) -> Flops:
    """One new token of one sample with `cached` keys: every decoder weight once and attention over the cache."""
    weights = sum(
        2.0 * math.prod(shape)
        for name, shape in _canonical(shapes).items()
        if name.startswith("decoder/") and name.endswith("kernel")
    )
    d = cfg.decoder
    weights += 2.0 * d.vocab * d.width if d.tied else 0
    flops = weights + 4.0 * cached * d.heads * d.head_size * d.layers
    return Flops(flops, flops)


def parameters(cfg: Model, shapes: Mapping, trains: Mapping[str, bool]) -> dict[str, int]:
    """Numbers of parameters: total, trained, and active for one token (of the experts only the chosen ones)."""
    total = trained = 0
    active = 0.0
    for path, leaf in shapes.items():
        size = math.prod(getattr(leaf, "shape", leaf))
        total += size
        trained += size if trains[path] else 0
        active += size * _share(cfg, leaf_names.canonical_names(path)[0])
    return {"total": total, "trained": trained, "active": round(active)}


# ---- parts -----------------------------------------------------------------------------------------------------------


def _canonical(shapes: Mapping) -> dict[str, tuple[int, ...]]:
    return leaf_names.canonical_shapes({path: tuple(getattr(leaf, "shape", leaf)) for path, leaf in shapes.items()})


def _share(cfg: Model, name: str) -> float:
    """The part of a leaf that one token uses: its own group's, and of that its chosen experts'."""
    found = re.match(r"vision/block_(\d+)/(moe|task_ffn)/(\w+)/", name)
    if not found:
        return 1.0
    spec = block_specs(cfg)[int(found[1])]
    groups, experts, top_k = spec.token if found[2] == "moe" else spec.task
    if cfg.tgh.task_input == "none":  # all groups
        groups = 1
    return top_k / (groups * experts) if found[3] == "experts" else 1 / groups


def _slots(cfg: Model, share: float, spread: bool) -> float:
    """Rows that experts compute over the rows routed to them, of which each takes the part `share` (ops/transport.py).

    The tiles of a ragged product are not counted.
    """
    if spread:
        return cfg.tgh.capacity_factor if cfg.tgh.transport == "all_to_all" else 1.0
    return {"ragged": 1.0, "capacity": cfg.tgh.capacity_factor, "dense": 1 / share}[cfg.tgh.dispatch]


def _parts(cfg: Model, shapes, trains, slices: int, text: int, backend: str, spread: bool) -> list[_Part]:
    tower, slabs = cfg.tower, cfg.slabs(slices)
    tokens = slabs * tower.tokens
    visual = cfg.visual_tokens(slices)
    positions = cfg.image_positions(slices) + text
    predicted = text - cfg.prefix_length - 1
    of_canonical = {name: trains.get(path, False) for path in shapes for name in leaf_names.canonical_names(path)}
    parts = []

    def weight(place, name, shape, rows, remat=True):
        share = _share(cfg, name)
        flops = 2.0 * math.prod(shape) * rows * share
        experts = "/experts/" in name
        extra = _slots(cfg, share, spread) if experts else 1.0
        parts.append(_Part(place, Flops(flops, flops * extra), of_canonical[name], "", experts, remat))

    for name, shape in _canonical(shapes).items():
        block = re.match(r"(vision|decoder)/block_(\d+)/", name)
        if name == "vision/patch/kernel":
            weight(_PATCH, name, shape, slabs * tower.grid**2, remat=False)
        elif block and block[1] == "vision":
            place = int(block[2])
            if place < tower.executed and name.endswith("/kernel"):
                weight(place, name, shape, 1 if name.endswith("router/t/kernel") else tokens)
        elif block and (name.endswith("/kernel") or name.endswith(("lora_a", "lora_b"))):
            weight(_DECODER + int(block[2]), name, shape, positions)
        elif name.startswith("connector/") and name.endswith("/kernel"):
            weight(_CONNECTOR, name, shape, visual, remat=False)
        elif name == "decoder/lm_head/kernel" or (name == "decoder/embed/embedding" and cfg.decoder.tied):
            weight(_HEAD, name, shape, predicted, remat=predicted > score_chunk(cfg.decoder.vocab))

    width = 4.0 * tower.width  # of a query-key pair: its score and its part of the sum
    for place, spec in enumerate(block_specs(cfg)):
        parts.append(_attention(place, width, *vision_pairs(cfg, spec.attn, slabs, backend)))
    d = cfg.decoder
    for i, layer in enumerate(d.blocks):  # image blocks add a view's own later tokens, which are not counted
        masked, used = bool(d.image_blocks or layer.window), backend  # masked: a mask of all pairs
        if not cudnn_takes(jnp.bfloat16, d.head_size) if backend == "cudnn" else masked:
            used = "blocked"
        useful, executed, used = attention_pairs(positions, positions, used, causal=True, reach=layer.window)
        executed = positions * positions if masked else executed
        parts.append(_attention(_DECODER + i, 4.0 * d.heads * d.head_size, useful, executed, used))
    return parts


def _attention(place: int, flops_a_pair: float, useful: float, executed: float, backend: str) -> _Part:
    return _Part(place, Flops(useful * flops_a_pair, executed * flops_a_pair), attention=backend)


def vision_pairs(cfg: Model, kind: str, slabs: int, backend: str) -> tuple[float, float, str]:
    tokens = cfg.tower.tokens
    if backend == "cudnn" and kind == "window":
        backend = "blocked"
    if kind == "2d":
        useful, executed, used = attention_pairs(tokens, tokens, backend)
        return useful * slabs, executed * slabs, used
    window = (tokens, cfg.volume.attn3d_window) if kind == "window" else None
    return attention_pairs(slabs * tokens, slabs * tokens, backend, window=window)


def attention_pairs(
    queries: int, keys: int, backend: str, causal: bool = False, window: tuple[int, int] | None = None, reach: int = 0
) -> tuple[float, float, str]:
    """Query-key pairs that are visible, pairs that are computed, and the backend that computes them.

    `window` is (tokens of a slice, slices to each side); `reach` the causal window in tokens, 0 for all.
    """
    if backend in ("splash", "cudnn") and min(queries, keys) < SPLASH_LEAST:
        backend = "plain"

    def seen(first: int, last: int) -> tuple[int, int]:
        """First and last key that the queries first..last see."""
        if causal:
            return max(0, first - reach + 1) if reach else 0, min(last, keys - 1)
        if window:
            tokens, sides = window
            low, high = (first // tokens - sides) * tokens, (last // tokens + sides + 1) * tokens - 1
            return max(low, 0), min(high, keys - 1)
        return 0, keys - 1

    useful = sum(high - low + 1 for low, high in (seen(i, i) for i in range(queries)))
    if backend == "cudnn" and causal and not reach:
        return useful, useful, backend  # but for its tiles of 128, of which it leaves out those that nobody sees
    if backend != "splash":
        return useful, queries * keys, backend
    (bq, q_length), (bk, _) = splash_blocks(queries), splash_blocks(keys)
    blocks = 0
    for start in range(0, q_length, bq):
        low, high = seen(min(start, queries - 1), min(start + bq, queries) - 1)
        blocks += high // bk - low // bk + 1
    return useful, blocks * bq * bk, backend
