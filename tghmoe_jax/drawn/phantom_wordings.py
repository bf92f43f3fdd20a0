"""How a phantom is asked about in training and in tests, and how its reports are written."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tghmoe_jax.drawn.phantom import Truth
from tghmoe_jax.drawn.phantom_report import report
from tghmoe_jax.drawn.wordings import TEXTS
from tghmoe_jax.samples.prompts import REPORT_REQUESTS


class Wording(NamedTuple):
    """One way of asking: templates of the question of each type, requests for a report, and what writes reports.

    `{lesion}` in a location question stands for the lesion's name.
    """

    questions: Mapping[str, tuple[str, ...]]
    requests: tuple[str, ...]
    report: Callable[[Truth, np.random.Generator], str] = report


SEEN = Wording(TEXTS["seen"]["questions"], REPORT_REQUESTS)
UNSEEN = Wording(**TEXTS["unseen"])  # never in training: the router's second score
