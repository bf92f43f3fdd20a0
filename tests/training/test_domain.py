"""The domain of a run: what it has seen, and what the runs that it was started from have seen."""

import json

import pytest

from configs import common
from tghmoe_jax.errors import UserError
from tghmoe_jax.training import domain

BATCH = 16


def run(folder, data: str, origin: dict, steps: int):
    """A run of `steps` steps on a data set, as it describes itself; its domain, and what it hands to its children."""
    manifest = {"domain": data, "step": steps} | origin
    config = common.get_config().to_dict()
    config["data"]["name"], config["train"]["batch"] = data, BATCH
    folder.mkdir()
    for name, content in (("manifest.json", manifest), ("config.json", config)):
        (folder / name).write_text(json.dumps(content))
    return domain.of(manifest, config, steps), domain.inherited(folder, steps)


def test_a_line_of_runs_keeps_its_drawn_origin_until_it_has_seen_enough_real_samples(tmp_path):
    steps = domain.ENOUGH // BATCH // 2
    first, origin = run(tmp_path / "a", "phantom", {}, 10 * steps)
    assert (first, origin) == ("phantom", {"origin": {"domain": "phantom", "real_samples": 0}})
    second, origin = run(tmp_path / "b", "m3d", origin, steps)
    assert (second, origin["origin"]["real_samples"]) == ("phantom+m3d", BATCH * steps)
    third, left = run(tmp_path / "c", "ct_rate", origin, steps)  # a few samples short
    assert third == "phantom+ct_rate" and left
    assert run(tmp_path / "d", "ct_rate", origin, steps + 1) == ("ct_rate", {})
    assert run(tmp_path / "e", "m3d", {}, 1) == ("m3d", {}), "a run from a base of real pictures has no such origin"
    drawn = run(tmp_path / "f", "phantom", origin, 1)
    assert drawn == run(tmp_path / "g", "phantom", {}, 1), "drawn data after real ones are drawn data"


@pytest.mark.parametrize(("name", "refused"), [("phantom", True), ("scenes+m3d", True), ("m3d,ct_rate", False)])
def test_reports_are_refused_while_a_run_has_seen_too_few_patients(name, refused):
    assert domain.synthetic(name) is refused
    if not refused:
        return domain.refuse_report("run", name, "--report")
    with pytest.raises(UserError, match=r"--report is refused because the checkpoint run has seen drawn") as error:
        domain.refuse_report("run", name, "--report")
    assert ("fewer than 10,000 samples of m3d" in str(error.value)) == ("+" in name)


def test_a_report_is_asked_for_by_its_flag_its_task_or_in_words():
    assert domain.asks_report(None, (), None) == "--report"
    assert domain.asks_report("Which plane is this?", (), "report") == "--task report"
    for question in ("Write a report for this CT.", "Describe this CT.", "What are the findings?"):
        assert domain.asks_report(question, (), None).startswith("--question asks for a report")
        assert not domain.asks_report(question, ("yes", "no"), None), "an option is chosen, not a text written"
    assert not domain.asks_report("Which plane is this?", (), None)
