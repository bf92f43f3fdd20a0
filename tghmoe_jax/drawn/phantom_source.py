"""The embedded phantom as a data source."""

import numpy as np

from tghmoe_jax.drawn import phantom, phantom2
from tghmoe_jax.drawn.cache import Drawing
from tghmoe_jax.drawn.drawn_source import DrawnSource
from tghmoe_jax.drawn.phantom import GENERATOR, Truth
from tghmoe_jax.drawn.phantom_adversarial import ADVERSARIAL
from tghmoe_jax.drawn.phantom_text import AUX_NAMES, aux_targets, make_question
from tghmoe_jax.drawn.phantom_wordings import SEEN, UNSEEN
from tghmoe_jax.samples.questions import TYPES, Kind, Question


def _third(seed: int, grid: tuple[int, int, int]) -> phantom.Phantom:
    from tghmoe_jax.drawn import phantom3  # which takes a second to import, and only this style needs it

    return phantom3.draw(seed, grid)


STYLES = {"first": phantom.draw, "second": phantom2.draw, "third": _third}  # training draws the first style only
WORDINGS = {"seen": SEEN, "unseen": UNSEEN, "second": phantom2.WORDING, **ADVERSARIAL}  # training asks in `seen` only
DRAWING = Drawing("phantom", __name__, GENERATOR, STYLES)


class PhantomSource(DrawnSource):
    """`samples.Source` over phantom volumes. Without a type all five types of questions are equally likely."""

    drawing, wordings, aux_names, types = DRAWING, WORDINGS, AUX_NAMES, TYPES

    def ask(self, truth: Truth, kind: Kind, rng: np.random.Generator, type: str | None) -> Question:
        return make_question(truth, kind, rng, type, self.wording)

    def aux(self, index: int) -> np.ndarray:
        """float32 (A,) in 0..1, named by `aux_names`."""
        return aux_targets(self.truths[index])
