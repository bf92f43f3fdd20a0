"""The data set that a config names."""

from collections.abc import Callable, Mapping

from tghmoe_jax.data.phantom_report import parse_findings
from tghmoe_jax.data.phantom_source import PhantomSource
from tghmoe_jax.data.samples import Source
from tghmoe_jax.data.scenes import ScenesSource
from tghmoe_jax.data.scenes_text import HARD_TYPES
from tghmoe_jax.errors import UserError

DRAWN = ("phantom", "scenes")  # made by each process for itself, from a seed


def make_source(data: Mapping, split: str, count: int, wording: str = "seen", style: str = "first") -> Source:
    """`count` volumes of a split (`train`, `validation`, `test`) of `data.name`. UserError for an unknown name.

    `style` is how a phantom is drawn; no other data set has styles.
    """
    if data["name"] == "phantom":
        grid = (data["slices"], data["size"], data["size"])
        channels = data["channels"]
        return PhantomSource(data["root"], split, count, grid=grid, channels=channels, wording=wording, style=style)
    if data["name"] == "scenes":
        return ScenesSource(
            split, count, size=data["size"], wording=wording, pictures=data["slices"] > 0, more_types=HARD_TYPES
        )
    raise UserError(f"--config.data.name={data['name']} cannot be read yet; use phantom or scenes.")


def finding_parser(name: str) -> Callable[[str], frozenset[tuple[str, str, str]]]:
    """Report text -> the (lesion, organ, side) triples it states as present; none where a data set has no parser."""
    return parse_findings if name == "phantom" else lambda text: frozenset()
