"""The machinery of a porting table: how tensors of a checkpoint become Flax leaves and back, with strict accounting.

A family (`phi3v`, `llava`) gives rows (checkpoint name, canonical path, canonical shape, op) and the sizes that the
letters of the shapes stand for. Arrays keep their dtype; nothing is cast, so export(import(x)) is x bit for bit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.weights.storage import Lazy

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """How a torch tensor becomes a Flax leaf of a given shape, and back."""

    torch_shape: Callable[[Shape], Shape]
    to_flax: Callable[[np.ndarray, Shape], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


# Torch keeps (out, in); Flax (in, out), with the head axes split.
COPY = Op(lambda s: s, lambda t, s: t, lambda a: a)
T = Op(lambda s: s[::-1], lambda t, s: t.T, lambda a: a.T)
HWIO = Op(lambda s: (s[3], s[2], s[0], s[1]), lambda t, s: t.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
HQ = Op(lambda s: (s[1] * s[2], s[0]), lambda t, s: t.T.reshape(s), lambda a: a.reshape(len(a), -1).T)
HO = Op(lambda s: (s[2], s[0] * s[1]), lambda t, s: t.T.reshape(s), lambda a: a.reshape(-1, a.shape[2]).T)
FLAT = Op(lambda s: (math.prod(s),), lambda t, s: t.reshape(s), lambda a: a.reshape(-1))
SUB = Op(lambda s: (1, 1, 1, *s), lambda t, s: t.reshape(s), lambda a: a.reshape(1, 1, 1, -1))
GLB = Op(lambda s: (1, 1, *s), lambda t, s: t.reshape(s), lambda a: a.reshape(1, 1, -1))

# (checkpoint name, canonical path, canonical shape, op). `|` in path and shape: consecutive rows of one fused tensor.
Row = tuple[str, str, str, Op]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint tensor: its name and torch shape, and the canonical leaves that its rows become."""

    name: str
    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]
    op: Op

    @property
    def rows(self) -> list[int]:
        """Rows of the torch tensor that each leaf takes."""
        return [self.op.torch_shape(shape)[0] for shape in self.shapes]

    @property
    def torch_shape(self) -> Shape:
        """Shape in the checkpoint."""
        return (sum(self.rows), *self.op.torch_shape(self.shapes[0])[1:])

    def to_flax(self, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, leaf); views where numpy allows, and `Lazy` leaves of a tensor that is not in memory."""
        start = 0
        for path, shape, rows in zip(self.paths, self.shapes, self.rows, strict=True):
            part = slice(start, start + rows) if len(self.paths) > 1 else ...
            make = functools.partial(self._leaf, tensor, part, shape)
            yield path, make() if isinstance(tensor, np.ndarray) else Lazy(shape, np.dtype(tensor.dtype), make)
            start += rows

    def _leaf(self, tensor, part, shape: Shape) -> np.ndarray:
        return self.op.to_flax(np.asarray(tensor)[part], shape)

    def to_torch(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """The checkpoint tensor from its leaves; `Lazy` where they are."""
        if all(isinstance(leaves[path], np.ndarray) for path in self.paths):
            return self._tensor(leaves)
        own = {path: leaves[path] for path in self.paths}
        return Lazy(self.torch_shape, np.dtype(own[self.paths[0]].dtype), functools.partial(self._tensor, own))

    def _tensor(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        parts = [self.op.to_torch(np.asarray(leaves[path])) for path in self.paths]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def entries(rows: Sequence[Row], size: Mapping[str, int], layers: Mapping[str, int]) -> list[Entry]:
    """A table with its sizes filled in: every tensor of the checkpoint with its shapes, in table order.

    `size` gives the letters of the shapes, `layers` how often the rows that start with a prefix repeat (`{i}`).
    """
    found = []
    for name, path, shape, op in rows:
        shapes = tuple(tuple(size[letter] for letter in part.split()) for part in shape.split("|"))
        repeats = next((range(count) for prefix, count in layers.items() if name.startswith(prefix)), [0])
        for i in repeats:
            found.append(Entry(name.format(i=i), expand(path.format(i=i)), shapes, op))
    return found


def expand(path: str) -> tuple[str, ...]:
    """`a/q|k|v/kernel` -> (`a/q/kernel`, `a/k/kernel`, `a/v/kernel`)."""
    parts = path.split("/")
    choice = next((i for i, part in enumerate(parts) if "|" in part), 0)
    return tuple("/".join([*parts[:choice], one, *parts[choice + 1 :]]) for one in parts[choice].split("|"))


def shapes_of(table: Sequence[Entry]) -> dict[str, Shape]:
    """{canonical path: shape} of the 2D model."""
    return {path: shape for entry in table for path, shape in zip(entry.paths, entry.shapes, strict=True)}


def to_flax(
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Entry],
    renamed: Callable[[str], str | None],
    aliases: Mapping[str, str],
) -> dict[str, np.ndarray]:
    """Checkpoint tensors (arrays or lazy ones) -> flat canonical dict, dtypes kept.

    `renamed` gives the table's name of a key, None for one that is ignored; `aliases` {name: name of the table} are
    doubles that some files carry and that must hold the same bits. Every key must be consumed exactly once or be
    ignored, every leaf written exactly once; otherwise one `UserError` names all unknown, doubled, missing and wrongly
    shaped keys.
    """
    due = {entry.name: entry for entry in table}
    keys: dict[str, str] = {}
    problems, doubles = [], []
    for key in tensors:
        name = renamed(key)
        if name is None:
            continue
        if name in aliases:
            doubles.append((key, aliases[name]))
        elif name not in due:
            problems.append(f"unknown {key}")
        elif name in keys:
            problems.append(f"{key} doubles {keys[name]}")
        else:
            keys[name] = key
            if (shape := tuple(tensors[key].shape)) != due[name].torch_shape:
                problems.append(f"{key} has shape {shape}, not {due[name].torch_shape}")
    problems += [f"missing {name}" for name in due if name not in keys]
    for key, name in doubles:
        if name in keys and not same_bits(tensors[key], tensors[keys[name]]):
            problems.append(f"{key} differs from {keys[name]}")
    if problems:
        raise UserError(
            f"The checkpoint does not match its config.json ({len(problems)} problems: {'; '.join(problems)}); "
            "use the complete checkpoint and the config.json that belongs to it."
        )
    flat = {}
    for name, entry in due.items():
        flat.update(entry.to_flax(tensors[keys[name]]))
    return flat


def same_bits(a, b) -> bool:
    """Whether two tensors are equal bit for bit (NaNs included)."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def to_checkpoint(flat: Mapping[str, np.ndarray], table: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Flat canonical dict of the 2D model -> {checkpoint name: array}; the inverse of `to_flax`."""
    due = shapes_of(table)
    problems = [f"unknown {path}" for path in flat if path not in due]
    problems += [f"missing {path}" for path in due if path not in flat]
    problems += [
        f"{path} has shape {tuple(flat[path].shape)}, not {shape}"
        for path, shape in due.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    if problems:
        raise UserError(
            f"These parameters are not the 2D model that config.json describes ({len(problems)} problems: "
            f"{'; '.join(problems)}); export the 2D base, or correct config.json."
        )
    return {entry.name: entry.to_torch(flat) for entry in table}
