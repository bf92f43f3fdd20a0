"""From the 2D base to the 3D TGH-MoE model, and from stage 1 to stage 2: one table of rules, no special modes.

Everything works on flat canonical dicts {"vision/block_0/attn/q/kernel": array}. A rule is chosen by name and shape, so
a dense base, a stage-1 run with one group and a stage-2 run with one group per task go through the same function.
Results are views of the source where numpy allows: eight copies of an expert cost no memory until they are placed.
Axis legend: p patch, d patch depth, C width, G task groups, E experts.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.models.config import ALLOWED

Flat = Mapping[str, np.ndarray]
Shape = tuple[int, ...]

LORA = r"decoder/block_\d+/.+/lora_[ab]"
# Leaves a 2D base does not have (model-spec 0, 4.4). Full match on canonical names.
NEW_FROM_BASE = (
    r"vision/block_\d+/(moe|task_ffn)/router/[xt]/kernel",
    r"vision/block_\d+/mix",
    r"vision/depth_pos",
    r"task_router/.+",
    r"aux_head/.+",
    LORA,
)
# Leaves that stage 2 adds to stage 1: the task head; with one group there is no decision to make.
NEW_FROM_STAGE1 = (r"task_router/(head|image_ln|image_proj)/.+", LORA)


def inflate_patch(kernel: np.ndarray, depth: int, mode: str) -> np.ndarray:
    """2D patch kernel (p, p, 3, C) -> 3D (d, p, p, 3, C), same dtype (model-spec 0, I25).

    `average`: W / d at every depth; `centre`: W at depth d // 2, else 0. Both give the 2D embedding on input that is
    constant along depth.
    """
    if mode not in ALLOWED["inflation"]:
        raise UserError(f"--config.model.inflation={mode} is unknown; use one of {', '.join(ALLOWED['inflation'])}.")
    kernel = np.asarray(kernel)
    if mode == "average":
        return np.broadcast_to((kernel / np.float32(depth)).astype(kernel.dtype), (depth, *kernel.shape))
    inflated = np.zeros((depth, *kernel.shape), kernel.dtype)
    inflated[depth // 2] = kernel
    return inflated


def bicubic(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resizes one axis as torch's bicubic interpolation does (a = -0.75, half-pixel centres, no antialiasing)."""
    count, a = x.shape[axis], -0.75
    place = (np.arange(size) + 0.5) * count / size - 0.5
    first = np.floor(place).astype(int)
    result = 0.0
    for tap in range(-1, 3):
        d = np.abs(place - (first + tap))
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weight = np.where(d <= 1, near, np.where(d < 2, far, 0))
        shape = [1] * x.ndim
        shape[axis] = size
        result = result + np.take(x, np.clip(first + tap, 0, count - 1), axis) * weight.reshape(shape)
    return result


def resize_positions(table: np.ndarray, shape: Shape) -> np.ndarray | None:
    """The position table of a square grid, (g^2, C) or with a class token in front, for another grid; same dtype.

    None where the shapes are not two such tables.
    """
    sides = [(math.isqrt(rows), rows - math.isqrt(rows) ** 2) for rows in (table.shape[0], shape[0])]
    (old, cls), (new, same) = sides
    if len(table.shape) != 2 or table.shape[1] != shape[1] or cls != same or cls > 1:
        return None
    table = np.asarray(table)
    grid = table[cls:].astype(np.float32).reshape(old, old, -1)
    grid = bicubic(bicubic(grid, new, 0), new, 1).astype(table.dtype).reshape(new * new, -1)
    return np.concatenate([table[:cls], grid])


def as_2d(flat: Flat) -> dict[str, np.ndarray]:
    """The 2D base inside a model of patch depth 1: without the leaves a base does not have, the depth axis dropped.

    Leaves that cannot be so undone (experts, deeper patches) stay as they are, for the exporter to name.
    """
    new = [re.compile(one) for one in NEW_FROM_BASE]
    result = {path: leaf for path, leaf in flat.items() if not any(one.fullmatch(path) for one in new)}
    kernel = result.get("vision/patch/kernel")
    if kernel is not None and len(kernel.shape) == 5 and kernel.shape[0] == 1:
        result["vision/patch/kernel"] = kernel[0]
    return result


def merge_lora(flat: Flat, rank: int, alpha: float) -> dict[str, np.ndarray]:
    """The same model without low-rank leaves: each is added to its kernel, W + (alpha / rank) A B, in float32."""
    merged = {path: leaf for path, leaf in flat.items() if not re.fullmatch(LORA, path)}
    for path, leaf in flat.items():
        if not path.endswith("/lora_a") or not re.fullmatch(LORA, path):
            continue
        kernel = path.replace("/lora_a", "/kernel")
        a, b = (np.asarray(one, np.float32) for one in (leaf, flat[path.replace("/lora_a", "/lora_b")]))
        update = np.tensordot(a, b, 1) * np.float32(alpha / rank)
        old = np.asarray(flat[kernel])
        merged[kernel] = (old.astype(np.float32) + update.reshape(old.shape)).astype(old.dtype)
    return merged


def per_group(leaf: np.ndarray, shape: Shape) -> np.ndarray | None:
    """(1, ...) -> (G, ...); None where the shapes do not allow it."""
    fits = len(leaf.shape) == len(shape) > 0 and leaf.shape[0] == 1 and leaf.shape[1:] == shape[1:]
    return np.broadcast_to(leaf, shape) if fits else None


def per_expert(leaf: np.ndarray, shape: Shape) -> np.ndarray | None:
    """(...) -> (G, E, ...); None where the shapes do not allow it."""
    return np.broadcast_to(leaf, shape) if leaf.shape == shape[2:] else None


def unchanged(leaf: np.ndarray, shape: Shape) -> np.ndarray | None:
    """The leaf itself; None where the shapes differ."""
    return leaf if leaf.shape == shape else None


# (what the report calls it, target regex, source name, rule). The first rule whose source exists and fits is used.
Rule = tuple[str, str, str, Callable[[np.ndarray, Shape], np.ndarray | None]]


def rules(inflation: str) -> list[Rule]:
    """How a leaf of the model may come from a leaf of its base or of the stage before."""

    def inflated(leaf: np.ndarray, shape: Shape) -> np.ndarray | None:
        return inflate_patch(leaf, shape[0], inflation) if leaf.shape == shape[1:] else None

    experts = r"(vision/block_\d+)/(?:moe|task_ffn)/experts/(.+)"
    return [
        ("reused", r".+", r"\g<0>", unchanged),
        ("inflated", r"vision/patch/kernel", r"\g<0>", inflated),
        ("interpolated", r"vision/pos", r"\g<0>", resize_positions),
        ("copied per task", r"vision/block_\d+/(?:moe|task_ffn)/(?:experts|router)/.+", r"\g<0>", per_group),
        ("upcycled", experts, r"\1/mlp/\2", per_expert),
    ]


@dataclasses.dataclass(frozen=True)
class Report:
    """Where every leaf came from. `leaves` {canonical name: kind} and `parameters` {kind: count}, of the model;
    `ignored` {name: count} of the source."""

    leaves: dict[str, str]
    parameters: dict[str, int]
    ignored: dict[str, int]

    def of(self, kind: str) -> list[str]:
        """Names of one kind: reused, inflated, copied per task, upcycled or new."""
        return [path for path, one in self.leaves.items() if one == kind]

    def __str__(self) -> str:
        """One line per kind: leaves, millions of parameters."""
        kinds = list(dict.fromkeys(self.leaves.values()))
        lines = [f"{kind:<16}{len(self.of(kind)):>6} leaves {self.parameters[kind] / 1e6:>12.3f} M" for kind in kinds]
        if self.ignored:
            lines.append(f"{'ignored':<16}{len(self.ignored):>6} leaves {sum(self.ignored.values()) / 1e6:>12.3f} M")
        return "\n".join(lines)


def assemble(
    shapes: Mapping[str, Shape],
    source: Flat,
    new: Iterable[str] = NEW_FROM_BASE,
    ignored: Iterable[str] = (),
    inflation: str = "average",
) -> tuple[dict[str, np.ndarray], Report]:
    """The leaves that a model of these canonical shapes takes from `source`, and where each came from.

    `new` and `ignored` are regexes (full match): leaves the model initialises itself where the source has none, and
    leaves of the source that the model leaves out. Every other leaf of the model must be found and every other leaf of
    the source used; all that fail are named in one `UserError`. dtypes are the source's.
    """
    table = rules(inflation)
    new, ignored = [re.compile(one) for one in new], [re.compile(one) for one in ignored]
    loaded, leaves, used, problems = {}, {}, set(), []
    for path, shape in shapes.items():
        misfit = None
        for kind, target, origin, rule in table:
            match = re.fullmatch(target, path)
            if not match or (name := match.expand(origin)) not in source:
                continue
            used.add(name)
            if (leaf := rule(source[name], tuple(shape))) is not None:
                loaded[path], leaves[path] = leaf, kind
                break
            misfit = misfit or f"{name} has shape {tuple(source[name].shape)}, not {tuple(shape)}"
        else:
            if misfit is None and any(one.fullmatch(path) for one in new):
                leaves[path] = "new"
            else:
                problems.append(misfit or f"missing {path}")
    left = [name for name in source if name not in used]
    problems += [f"unused {name}" for name in left if not any(one.fullmatch(name) for one in ignored)]
    if problems:
        raise UserError(
            f"The loaded weights do not fit the model ({len(problems)} problems: {'; '.join(problems)}); "
            "name a --config.base or --config.init_from of the same sizes, or correct --config.model."
        )
    parameters = dict.fromkeys(leaves.values(), 0)
    for path, kind in leaves.items():
        parameters[kind] += math.prod(shapes[path])
    return loaded, Report(leaves, parameters, {name: math.prod(source[name].shape) for name in left})
