"""Changes of a training sample that leave every answer true: brightness, contrast, and a small shift within the plane.

There are no flips and no rotations: they would exchange left and right, front and back, or the plane. A volume is not
shifted where the question or answer is about the edge of the scan.
"""

import dataclasses
import re

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import Question

MOST = {"intensity": 0.2, "shift": 0.1}


@dataclasses.dataclass(frozen=True)
class Augment:
    """intensity: largest change of gain (a share) and of brightness (a share of 255); shift: a share of the side."""

    intensity: float = 0.0
    shift: float = 0.0

    def __post_init__(self):
        for name, most in MOST.items():
            if not 0 <= getattr(self, name) <= most:
                raise UserError(
                    f"--config.data.augment.{name}={getattr(self, name)} is out of range; give 0 (none) to {most}."
                )

    def __call__(self, slices: np.ndarray, mask: np.ndarray, asked: Question, rng: np.random.Generator) -> None:
        """Changes slices uint8 (D, S, S, 3) in place, where `mask` bool (D,) holds. What is shifted in is black."""
        gain, brightness = 1 + self.intensity * rng.uniform(-1, 1), 255 * self.intensity * rng.uniform(-1, 1)
        reach = round(self.shift * slices.shape[1])
        edge = asked.type == "edge" or re.search(r"\bedge\b", asked.answer)
        down, right = (0, 0) if edge else rng.integers(-reach, reach + 1, 2)
        real = slices[mask]
        if self.intensity:
            levels = np.arange(256)
            table = np.rint(np.clip((levels - 127.5) * gain + 127.5 + brightness, 0, 255)).astype(np.uint8)
            real = table[real]
        if down or right:
            moved = np.zeros_like(real)
            (to_y, from_y), (to_x, from_x) = _overlap(down), _overlap(right)
            moved[:, to_y, to_x] = real[:, from_y, from_x]
            real = moved
        slices[mask] = real


def _overlap(move: int) -> tuple[slice, slice]:
    """Where pixels come to lie and where they come from."""
    if move >= 0:
        return slice(move, None), slice(None, -move or None)
    return slice(None, move), slice(-move, None)
