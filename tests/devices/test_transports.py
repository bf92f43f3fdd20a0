"""Every transport between devices gives what all experts on one device give, in values and gradients."""

import json

import pytest

from tests.devices.conftest import run_module

CASES = ("all_to_all", "gather", "ragged", "ragged, megablox")


@pytest.fixture(scope="module")
def report():
    """What tests/devices/experts_on_devices.py prints."""
    return json.loads(run_module("tests.devices.experts_on_devices").splitlines()[-1])


@pytest.mark.parametrize("axes", ["expert", "group_expert"])
@pytest.mark.parametrize("case", CASES)
def test_a_transport_equals_all_experts_on_one_device(report, axes, case):
    """On 4 devices of one axis, and on 2 x 4 of two; y and the gradients by tokens, gates and each device's weights."""
    found = report[f"{axes}: {case}"]
    assert found["dropped"] == 0 and report[f"{axes}: least"] > 1
    assert set(found["distance"]) == {"y", "x", "gate", "fc1", "fc1_bias", "fc2", "fc2_bias"}
    assert max(found["distance"].values()) < 1e-4, found


@pytest.mark.parametrize("axes", ["expert", "group_expert"])
@pytest.mark.parametrize("case", ["all_to_all", "ragged"])
def test_what_finds_no_room_is_counted_and_leaves_the_rest_alone(report, axes, case):
    found = report[f"{axes}: {case}, full"]
    assert 0 < found["dropped"] < found["pairs"] / 2 and found["finite"]
    assert found["whole"] > 0.5  # tokens none of whose pairs was dropped


def test_without_a_task_input_every_group_is_reached_wherever_it_lies(report):
    """The mean over all groups and its gradients are those of one device, with unequal shares of the tasks too."""
    assert len(report["every group"]) == 8
    for name, found in report["every group"].items():
        assert found["dropped"] == 0 and max(found["distance"]) < 1e-4, (name, found)


def test_tokens_are_exchanged_only_among_the_devices_of_their_expert_axis(report):
    """Of the compiled layer: never between the parts of `data` and `fsdp`."""
    assert report["partners"]["(2, 1, 4)"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert report["partners"]["(2, 2, 2)"] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_where_groups_have_an_axis_routed_tokens_stay_among_the_devices_of_their_group(report):
    """8 devices for 2 groups of 4 experts: samples are dealt between 0..3 and 4..7, tokens are routed within each."""
    routed, dealt = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert report["partners"]["(1, 1, 8)"] == sorted(routed + dealt)
