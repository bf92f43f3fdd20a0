"""Confidence: what is fitted on one half of generated answers holds on the other."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tghmoe_jax.evaluation import calibration


def options(seed: int, items: int, temperature: float, count: int = 4):
    """Log-likelihoods (N, O) whose softmax at `temperature` is the chance that each option is right, and the truth."""
    rng = np.random.default_rng(seed)
    likelihoods = rng.standard_normal((items, count)) * 3 * temperature
    shares = calibration.option_shares(likelihoods, temperature)
    truth = np.array([rng.choice(count, p=row) for row in shares])
    return likelihoods, likelihoods.argmax(1), truth


@pytest.mark.parametrize("temperature", [0.05, 1.0, 7.0])
def test_the_temperature_of_generated_options_is_found(temperature):
    likelihoods, _, truth = options(0, 4000, temperature)
    assert calibration.temperature_of(likelihoods, truth) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("items", [100, 2000])
@pytest.mark.parametrize("kind", ["closed", "open"])
def test_confidence_of_other_answers_is_their_share_of_right_ones(kind, items):
    def drawn(seed, number):
        if kind == "closed":
            likelihoods, answered, truth = options(seed, number, 0.3)
            return likelihoods, answered, answered == truth, truth
        rng = np.random.default_rng(seed)
        likelihoods = -rng.exponential(1.0, (number, 1))
        right = rng.random(number) < 1 / (1 + np.exp(-(3 * likelihoods[:, 0] + 2)))
        return likelihoods, np.zeros(number, int), right, None

    fitted = calibration.fit(*drawn(1, items))
    likelihoods, answered, right, _ = drawn(2, 4000)
    confidence = fitted.confidence(likelihoods, answered)
    assert calibration.calibration_error(confidence, right) < (0.04 if items == 2000 else 0.12)
    assert bool(fitted.steps) == (items == 2000)
    assert calibration.area_under_risk(confidence, right) < (~right).mean()
    kept = calibration.Calibration.of(json.loads(json.dumps(fitted.to_json())))
    assert kept == fitted
    np.testing.assert_array_equal(kept.confidence(likelihoods, answered), confidence)


def test_an_answer_that_is_not_the_likeliest_option_is_less_sure():
    fitted = calibration.Calibration(100, temperature=0.5)
    likelihoods = np.log([0.7, 0.2, 0.1])
    sure, unsure, none = (float(fitted.confidence(likelihoods, i)) for i in range(3))
    assert sure > unsure > none and sure + unsure + none == pytest.approx(1)
    assert fitted.confidence(np.array([-1.0, -np.inf, -2.0]), 1) == 0


def test_few_answers_are_no_calibration_and_answers_without_an_error_never_certain():
    likelihoods, answered, _ = options(0, 300, 0.3)
    assert calibration.fit(likelihoods[:19], answered[:19], np.ones(19, bool), answered[:19]) is None
    for items in (20, 300):
        found = calibration.fit(likelihoods[:items, :1], answered[:items], np.ones(items, bool))
        assert (found.confidence(likelihoods[:, :1]) < 1).all()


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.4, 0.40001, 0.8, 1.0]), st.booleans()), min_size=1, max_size=60))
def test_bins_hold_every_answer_once_and_thresholds_keep_their_word(answers):
    confidence, right = np.array([c for c, _ in answers]), np.array([r for _, r in answers])
    fitted = calibration.Calibration(len(right), temperature=1.0, bins=calibration.bins_of(confidence, right))
    assert sum(items for _, items, _ in fitted.bins) == len(right)
    assert sum(hits for *_, hits in fitted.bins) == right.sum()
    for one in confidence:
        hits, items = fitted.validated(one)
        assert 0 <= hits <= items > 0
    for accuracy in (0.3, 0.9):
        least = fitted.threshold(accuracy)
        kept = [right[confidence >= c] for c, *_ in fitted.bins]
        shares = [(one.sum() + 0.5) / (len(one) + 1) for one in kept]
        assert (least is None) == all(share < accuracy for share in shares)
        assert least is None or shares[[c for c, *_ in fitted.bins].index(least)] >= accuracy
    coverage, risk = calibration.risk_coverage(confidence, right)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx((~right).mean())
    for c, r in zip(np.sort(confidence)[::-1], risk, strict=True):
        assert r == pytest.approx((~right[confidence >= c]).mean())


def test_calibration_error_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(200), rng.random(200) < 0.6
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration.calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration.calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0}, {"temperature": float("nan")}, {"items": "many"}, {"steps": [[0.5, 0.2], [0.4, 0.3]]},
        {"bins": [[0.1, 3, 5]]}, {"bins": [[0.1, 3]]}, {"steps": 3}, {"unknown": 1},
    ],
)  # fmt: skip
def test_a_record_that_is_no_calibration_is_refused(changes):
    record = calibration.Calibration(30, temperature=0.5, bins=((0.1, 30, 20),)).to_json()
    assert calibration.Calibration.of(record).validated(0.7) == (20, 30)
    with pytest.raises((ValueError, TypeError)):
        calibration.Calibration.of(record | changes)
