"""Bootstrap intervals and derangements."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tghmoe_jax.evaluation.statistics import (
    derangement,
    derangement_across,
    derangement_within,
    mean_of_ratios,
    nested_ci95,
    ratio_ci95,
)


def mean_ci95(values, **known):
    """The interval of a plain mean."""
    values = np.asarray(values, float).reshape(-1, 1)
    return ratio_ci95(values, np.ones_like(values), **known)


def test_interval_of_a_proportion_is_near_the_normal_one():
    values = np.repeat([0.0, 1.0], 200)
    low, high = mean_ci95(values, seed=1)
    half = 1.96 * 0.5 / np.sqrt(400)
    assert low == pytest.approx(0.5 - half, abs=0.012)
    assert high == pytest.approx(0.5 + half, abs=0.012)


def test_interval_is_a_function_of_its_seed():
    values = np.random.default_rng(0).random(50)
    assert mean_ci95(values, seed=3) == mean_ci95(values, seed=3)
    assert mean_ci95(values, seed=3) != mean_ci95(values, seed=4)


def test_interval_equals_a_plain_loop_over_resamples():
    values = np.random.default_rng(0).random(7)
    weights = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=100)
    means = [np.repeat(values, row).mean() for row in weights]
    assert mean_ci95(values, seed=5, resamples=100) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_copies_of_a_sample_in_one_unit_do_not_narrow_the_interval():
    values = np.random.default_rng(2).integers(0, 2, 40).astype(float)
    alone = mean_ci95(values, units=range(40), seed=1)
    copied = mean_ci95(np.repeat(values, 5), units=np.repeat(np.arange(40), 5).tolist(), seed=1)
    assert copied == pytest.approx(alone)


def test_interval_of_micro_f1_pools_before_dividing():
    hit, extra, missed = np.array([[3, 0, 1, 2], [0, 1, 0, 0], [1, 2, 0, 0]], float)
    low, high = ratio_ci95((2 * hit)[:, None], (2 * hit + extra + missed)[:, None], seed=0)
    assert 0 <= low < 12 / 16 < high <= 1


def test_interval_is_not_available_without_two_units():
    assert mean_ci95([]) is None
    assert mean_ci95([1.0]) is None
    assert mean_ci95([1.0, 0.0], units=["one", "one"]) is None
    assert ratio_ci95(np.zeros((4, 1)), np.zeros((4, 1))) is None


def test_resamples_without_a_denominator_are_left_out():
    # Only one of three reports says anything: most resamples without it have no F1.
    assert ratio_ci95([[2], [0], [0]], [[2], [0], [0]]) == pytest.approx((1 / (1 + 1.959964**2), 1.0))  # Wilson of one


def test_macro_mean_skips_absent_parts():
    assert mean_of_ratios(np.array([1.0, 0.0]), np.array([2.0, 0.0])) == 0.5
    assert np.isnan(mean_of_ratios(np.zeros(2), np.zeros(2)))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_derangement_is_a_permutation_without_fixed_point(n, seed):
    order = derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert (order != np.arange(n)).all()
    assert (order == derangement(n, seed)).all()


def test_derangement_draws_all_of_them():
    assert {tuple(derangement(4, seed)) for seed in range(300)} == {
        (1, 0, 3, 2), (1, 2, 3, 0), (1, 3, 0, 2), (2, 0, 3, 1), (2, 3, 0, 1),
        (2, 3, 1, 0), (3, 0, 1, 2), (3, 2, 0, 1), (3, 2, 1, 0),
    }  # fmt: skip


def test_derangement_of_nothing_and_of_one():
    assert derangement(0, 0).size == 0
    with pytest.raises(ValueError, match="at least two"):
        derangement(1, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(0, 2**32 - 1))
def test_derangement_within_stays_in_its_group_and_flags_those_alone(groups, seed):
    order, moved = derangement_within(groups, seed)
    assert sorted(order) == list(range(len(groups)))
    for index, (other, exchanged) in enumerate(zip(order, moved, strict=True)):
        assert groups[other] == groups[index]
        assert (other != index) == exchanged == (groups.count(groups[index]) > 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=30), st.integers(0, 2**32 - 1))
def test_derangement_across_leaves_its_group_unless_the_group_is_more_than_half(groups, seed):
    order, moved = derangement_across(groups, seed)
    assert sorted(order) == list(range(len(groups)))
    for index, (other, exchanged) in enumerate(zip(order, moved, strict=True)):
        assert exchanged == (groups[other] != groups[index])
        assert exchanged or groups.count(groups[index]) > len(groups) / 2
    assert (order == derangement_across(groups, seed)[0]).all()


def test_derangement_across_draws_different_partners():
    assert len({tuple(derangement_across("aabbcc", seed)[0]) for seed in range(50)}) > 5


@pytest.mark.parametrize("units", [2, 20, 1000])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_an_interval_where_all_units_agree_has_the_width_of_wilsons(score, units):
    low, high = mean_ci95(np.full(3 * units, score), units=[i // 3 for i in range(3 * units)])
    free = 1.96**2 / (units + 1.96**2)  # Wilson's bound with no unit, or every unit, right
    assert (low, high) == pytest.approx((0, free) if score == 0 else (1 - free, 1), abs=1e-4)
    repeats = np.full((2, units), score)
    assert nested_ci95(repeats, np.ones((2, units)), range(units)) == pytest.approx((low, high))


def test_units_that_a_score_does_not_rest_on_do_not_narrow_its_interval():
    top, bottom = np.array([[2.0], [2.0], [0.0], [0.0]]), np.array([[2.0], [2.0], [0.0], [0.0]])
    assert ratio_ci95(top, bottom) == ratio_ci95(top[:2], bottom[:2])
    assert ratio_ci95(np.zeros((5, 1)), np.ones((5, 1)), most=10.0)[1] == pytest.approx(
        10 * ratio_ci95(np.zeros((5, 1)), np.ones((5, 1)))[1]
    )
