"""The description of a family of 2D models: one value, registered in `bases/base.py`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tghmoe_jax.models.config import Base
from tghmoe_jax.samples.chat import ChatTemplate
from tghmoe_jax.weights import porting
from tghmoe_jax.weights.porting import Entry, Shape

Flat = dict[str, Any]  # a config.json in the project's flat form: the decoder's keys, and `vision_config`
# A picture and a side in pixels -> its views, float32 (V, S, S, 3) in 0..1, and (rows, columns) of crops or None.
Views = Callable[[Image.Image, int], tuple[np.ndarray, tuple[int, int] | None]]


def no_facts(tensors: Mapping, config: Mapping) -> Flat:
    """For a family whose files have one set of names."""
    return {}


def no_doubles(config: Mapping) -> dict[str, str]:
    """For a family whose files hold every tensor once."""
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of 2D model.

    architectures and model_types: its names in config.json; the first ones are written. mark: a regex for a tensor
    name that only it has, which is `mark_is`. flatten: config.json -> flat form (UserError for what cannot be
    computed). describe: flat form -> Base. table: flat form -> every tensor of the checkpoint, under the names that are
    written. renamed: a name as some file has it -> the table's, None for one to ignore. aliases: {name: the table's}
    of doubles. learnt: what the tensor names add to the flat form. views_of: the folder of a base and the flat form ->
    how it cuts a picture into views (UserError for settings that make no sense). chat: flat form -> how its models are
    spoken to.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    mark: str
    mark_is: str
    flatten: Callable[[Mapping], Flat]
    describe: Callable[[Mapping], Base]
    table: Callable[[Mapping], list[Entry]]
    renamed: Callable[[str], str | None]
    views_of: Callable[[Path, Mapping], Views]
    chat: Callable[[Mapping], ChatTemplate]
    aliases: Callable[[Mapping], dict[str, str]] = no_doubles
    learnt: Callable[[Mapping, Mapping], Flat] = no_facts

    def shapes(self, config: Mapping) -> dict[str, Shape]:
        """{canonical path: shape} of the 2D model."""
        return porting.shapes_of(self.table(config))

    def to_flax(self, tensors: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
        """Checkpoint tensors -> flat canonical dict (see `porting.to_flax`)."""
        config = dict(config) | self.learnt(tensors, config)
        return porting.to_flax(tensors, self.table(config), self.renamed, self.aliases(config))

    def to_checkpoint(self, flat: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
        """Flat canonical dict of the 2D model -> {checkpoint name: array}; the inverse of `to_flax`."""
        return porting.to_checkpoint(flat, self.table(config))
