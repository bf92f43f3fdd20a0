"""How a phantom is asked about: wordings of training, wordings that training never holds, and what a style writes."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tghmoe_jax.drawn.phantom import Truth
from tghmoe_jax.drawn.phantom_report import report
from tghmoe_jax.samples.prompts import REPORT_REQUESTS


class Wording(NamedTuple):
    """One way of asking: templates of the question of each type, requests for a report, and what writes reports.

    `{lesion}` in a location question stands for the lesion's name.
    """

    questions: Mapping[str, tuple[str, ...]]
    requests: tuple[str, ...]
    report: Callable[[Truth, np.random.Generator], str] = report


SEEN = Wording(
    questions={
        "plane": (
            "In which plane is this CT shown?",
            "Which plane is this?",
            "What is the plane of this scan?",
            "What plane is the CT in?",
            "Which imaging plane is shown here?",
            "Name the plane of the image.",
            "This CT is in which plane?",
            "What orientation has this scan?",
            "Which way was the body cut?",
            "State the plane of the study.",
        ),
        "phase": (
            "In which contrast phase is this CT?",
            "Which phase is this?",
            "What is the contrast phase of this scan?",
            "What phase is the CT in?",
            "Which contrast phase is shown here?",
            "Name the phase of the image.",
            "This CT is in which phase?",
            "What is the timing of the contrast?",
            "State the phase of the study.",
            "What enhancement is seen after the injection?",
        ),
        "organ": (
            "Which organ is abnormal?",
            "Which organ has a lesion?",
            "In which organ is the lesion?",
            "Which organ is affected?",
            "What organ shows an abnormality?",
            "Name the abnormal organ.",
            "The abnormality is in which organ?",
            "Where is the disease?",
            "Tell me which structure is involved.",
            "State the organ that looks abnormal.",
        ),
        "abnormality": (
            "Which abnormality is seen?",
            "What is the lesion in this CT?",
            "Which lesion is present?",
            "What abnormality is shown here?",
            "Name the abnormality in the image.",
            "What lesion does this scan show?",
            "Which finding is present?",
            "What is wrong here?",
            "Tell me which pathology is seen in this study.",
            "Tell me the diagnosis.",
        ),
        "location": (
            "Where is the {lesion}?",
            "Where is the {lesion} located?",
            "What is the location of the {lesion}?",
            "In which part is the {lesion}?",
            "Name the location of the {lesion}.",
            "The {lesion} is in which part?",
            "Which place has the {lesion}?",
            "At which site is the {lesion}?",
            "State the position of the {lesion}.",
            "Describe the location of the {lesion}.",
            "Where can the {lesion} be seen?",
            "Tell me where the {lesion} is.",
        ),
    },
    requests=REPORT_REQUESTS,
)

# Never in training: the router's second score.
UNSEEN = Wording(
    questions={
        "plane": (
            "How are the slices of this study oriented?",
            "State the orientation of the slices.",
            "Along which plane was the body cut?",
        ),
        "phase": (
            "When after contrast injection was this acquired?",
            "Judge the timing of the contrast agent.",
            "What enhancement stage does the study show?",
        ),
        "organ": (
            "Where does the disease arise?",
            "Which structure looks pathological?",
            "What part of the anatomy is involved?",
        ),
        "abnormality": (
            "What is the diagnosis?",
            "Tell me what is wrong in this study.",
            "What pathology can be identified?",
        ),
        "location": (
            "At what site can the {lesion} be found?",
            "Localise the {lesion}.",
            "Describe the position of the {lesion}.",
        ),
    },
    requests=(
        "Summarise the study in a few sentences.",
        "Provide a caption for this volume.",
        "Could you draft a radiology text about this examination?",
        "Tell a colleague everything you observe here.",
        "Dictate your interpretation of the images.",
    ),
)
