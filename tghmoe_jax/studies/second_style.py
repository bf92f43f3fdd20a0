"""Transfer: the same questions about phantoms of a second drawing style, on which nothing is ever trained."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.reader.examination import examine
from tghmoe_jax.reader.reader import Reader


def second_style(reader: Reader, config: ConfigDict, folder: epath.Path, progress=print) -> dict[str, Any]:
    """Scores of `eval.transfer` items, written into `folder`."""
    progress("the second drawing style, never trained on:")
    other = ConfigDict(config.to_dict())
    other.eval["items"] = config.eval.transfer
    source = make_source(config.data, "test", config.eval.transfer, "second", "second")
    return examine(reader, source, source, other, folder, progress)
