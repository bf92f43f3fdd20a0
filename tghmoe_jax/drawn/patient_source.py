"""Drawn patients as a data source."""

import numpy as np

from tghmoe_jax.drawn import patients
from tghmoe_jax.drawn.cache import Drawing
from tghmoe_jax.drawn.drawn_source import DrawnSource
from tghmoe_jax.drawn.patient_text import AUX_NAMES, WORDINGS, aux_targets, make_question
from tghmoe_jax.drawn.patients import GENERATOR, PatientTruth
from tghmoe_jax.samples.questions import Kind, Question

DRAWING = Drawing("patients", __name__, GENERATOR, {"first": patients.draw})


class PatientSource(DrawnSource):
    """`samples.Source` over drawn patients, whose texts are fixed: a volume has six questions and one report."""

    drawing, wordings, aux_names, truth = DRAWING, WORDINGS, AUX_NAMES, PatientTruth

    def ask(self, truth: PatientTruth, kind: Kind, rng: np.random.Generator, type: str | None) -> Question:
        return make_question(truth, kind, rng, type, self.wording)

    def aux(self, index: int) -> np.ndarray:
        """float32 (A,) in 0..1, named by `aux_names`."""
        return aux_targets(self.truths[index])
