"""The data set that a config names."""

import math
from collections.abc import Callable, Mapping

from tghmoe_jax.datasets.file_source import FileSource, aux_names_of
from tghmoe_jax.datasets.registry import DATASETS
from tghmoe_jax.drawn import binding
from tghmoe_jax.drawn.patient_source import PatientSource
from tghmoe_jax.drawn.phantom_adversarial import ADVERSARIAL
from tghmoe_jax.drawn.phantom_report import parse_findings
from tghmoe_jax.drawn.phantom_source import PhantomSource
from tghmoe_jax.drawn.scenes import ScenesSource
from tghmoe_jax.drawn.scenes_text import HARD_TYPES
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples.questions import Source

DRAWN_CT = {"phantom": PhantomSource, "patients": PatientSource}
DRAWN = DRAWN_CT | {"scenes": ScenesSource}  # data sets that are made, not read
HARD_WORDINGS = tuple(ADVERSARIAL)  # of a phantom: ways of asking that training never holds


def make_source(data: Mapping, split: str, count: int, wording: str = "seen", style: str = "first") -> Source:
    """`count` volumes of a split (`train`, `validation`, `test`) of `data.name`; of training, `data.share` of them.

    `style` is how a phantom is drawn; no other data set has more than one. A data set of files gives all the volumes it
    has (of training, those of `data.share` of its cases), in its own words. UserError for an unknown name.
    """
    if split == "train":
        count = math.ceil(count * data.get("share", 1.0))
    if data["name"] in DRAWN_CT:
        grid, channels = (data["slices"], data["size"], data["size"]), data["channels"]
        source = DRAWN_CT[data["name"]]
        return source(data["root"], split, count, grid=grid, channels=channels, wording=wording, style=style)
    if data["name"] == "scenes":
        return ScenesSource(
            split, count, size=data["size"], wording=wording, pictures=data["slices"] > 0, more_types=HARD_TYPES
        )
    if set(name.strip() for name in data["name"].split(",")) <= set(DATASETS):
        return FileSource(data, split, {"binding": binding.ask})
    raise UserError(
        f"--config.data.name={data['name']} is unknown; use {', '.join(DRAWN)} or a list of {', '.join(DATASETS)}."
    )


def aux_names(data: Mapping) -> tuple[str, ...]:
    """The auxiliary labels of the data set that a config's `data` section names, before a volume is drawn or read."""
    return DRAWN[data["name"]].aux_names if data["name"] in DRAWN else aux_names_of(data)


def finding_parser(name: str) -> Callable[[str], frozenset[tuple[str, str, str]]] | None:
    """Report text -> the (lesion, organ, side) triples it states as present; None where a data set has no parser."""
    return parse_findings if name in DRAWN_CT else None
