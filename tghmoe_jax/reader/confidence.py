"""How sure a model is of its answers, and how often such answers were right on the validation split.

Axis legend: N answers, O options.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tghmoe_jax.evaluation import calibration, closed
from tghmoe_jax.evaluation.calibration import Calibration
from tghmoe_jax.evaluation.protocols import Prediction
from tghmoe_jax.reader.batches import Request
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.samples.questions import LETTERS, Question, Source
from tghmoe_jax.samples.tasks import COLUMNS


def likelihoods(reader: Reader, source: Source, requests: Sequence[Request], texts: Sequence[str]) -> np.ndarray:
    """Mean log-likelihoods a token: of lettered questions each option's, asked without showing them, float (N, O) with
    -inf where a question has fewer; of others each answer's own, (N, 1).

    The requests are of one kind.
    """
    if not requests:
        return np.zeros((0, 1))
    if COLUMNS[requests[0].question.kind].lettered:
        asked = [
            dataclasses.replace(one, question=one.question.without_choices(), options=one.question.choices)
            for one in requests
        ]
    else:
        asked = [dataclasses.replace(one, options=(text or " ",)) for one, text in zip(requests, texts, strict=True)]
    found = [answer.likelihoods for answer in reader.answer(source, asked, 0)]
    table = np.full((len(found), max(map(len, found))), -np.inf)
    for row, values in zip(table, found, strict=True):
        row[: len(values)] = values
    return table


def fit(kind: str, asked: Sequence[Question], texts: Sequence[str], found: np.ndarray) -> Calibration | None:
    """What the answers `texts` to validation questions of a kind say; None for too few."""
    answered = np.array([closed.named_option(text, q.choices) for q, text in zip(asked, texts, strict=True)])
    right = np.array([Prediction.of(0, *one).right for one in zip(asked, texts, strict=True)])
    truth = np.array([LETTERS.index(one.letter) for one in asked]) if COLUMNS[kind].lettered else None
    return calibration.fit(found, answered, right, truth)
