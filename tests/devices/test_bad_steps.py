"""A step with a NaN or Inf anywhere changes no bit of parameters and moments, on 1, 2 and 8 devices."""

import json

import pytest

from tests.devices import bad_steps
from tests.devices.conftest import run_module


@pytest.fixture(scope="module")
def found():
    return json.loads(run_module("tests.devices.bad_steps", "1", "2", "8"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2", "8"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(found, devices):
    *faults, last = found[devices]
    assert [(one["where"], one["value"]) for one in faults] == [
        (where, str(value)) for where in bad_steps.WHERE for value in bad_steps.VALUES
    ]
    for number, one in enumerate(faults, start=2):
        assert one["same"] and one["bad"] == 1 and one["step"] == number, one
        if one["where"] == "batch":  # what the fault reaches
            assert 1 < one["leaves"] < one["of"], one
        else:  # clipping spreads a NaN to every update
            alone = one["where"] == "gradient" and one["value"] != "nan"
            assert one["leaves"] == (1 if alone else one["of"]), one
    assert last == {"healthy": True, "equal": True}, "the next step is the step of a run without the faults"
