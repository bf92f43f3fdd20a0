"""The table and the plot of the scaling study, from trainings made by hand."""

import json

import numpy as np
import pytest

from benchmarks import scaling
from tghmoe_jax.evaluation.paired_seeds import Graded
from tghmoe_jax.samples.questions import FAMILIES
from tghmoe_jax.studies.deciding import Experiment

TYPES = [types[0] for types in FAMILIES.values()] * 10


def graded(right: dict[str, float]) -> dict[str, Graded]:
    """Closed questions of all families in turn, of each family this share right; and reports that are all alike."""
    rights = [place // 4 < 10 * right.get(family, right.get("all", 0.0)) for place, family in
              zip(range(40), list(FAMILIES) * 10, strict=True)]  # fmt: skip
    closed = np.stack([np.array(rights, float), np.ones(40)], -1)
    report = Graded({"finding_f1": np.array([[1.0, 2.0]] * 40)}, [(i,) for i in range(40)], [""] * 40, "r")
    return {"closed": Graded({"ranked_accuracy": closed}, [(i,) for i in range(40)], TYPES, "c"), "report": report}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Nothing kept, and trainings that answer by what their arm is: `trained` lists them."""
    trained = []
    monkeypatch.setattr(scaling, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(scaling, "PLOTS", tmp_path)
    monkeypatch.setattr(scaling, "guessing", lambda study: 0.3)
    for name in ("simulate_devices", "compile_cache.keep", "ablate.minutes_of"):
        monkeypatch.setattr(f"benchmarks.scaling.{name}", lambda *_: 1.5)
    monkeypatch.setattr(Experiment, "run", lambda self, arm, seed: trained.append((self.workdir.name, arm.name, seed)))
    rights = {"as_configured": {"all": 0.6}, "random_tower": {"all": 0.4}, "single_slices": {"all": 0.6, "depth": 0.1}}

    def answered(one, arm, seed):
        if arm.shows == "disordered":
            return graded({"all": 0.6, "depth": 0.3})
        return graded(rights.get(arm.name, {"all": 0.5}))

    monkeypatch.setattr(scaling, "answers", answered)
    return tmp_path, trained


def test_all_trainings_are_kept_tabulated_and_plotted_and_none_is_made_twice(place, capsys):
    folder, trained = place
    assert scaling.main([f"--workdir={folder}"]) == 0
    first, *said = capsys.readouterr().out.strip().split("\n")
    assert first == "files of answers that are kept: 87"
    assert (
        len(said) == 2 + len(scaling.cells()) + 1 + 2 + 5 == 28
        and (folder / "scaling-patients.png").stat().st_size > 10_000
    )
    assert (folder / "kept" / "patients" / "table.md").read_text().strip().split("\n") == said
    # The recipe is one training of all questions; three sides at four numbers of volumes, two specialists, twice the
    # steps, two ways of showing, two stages, one stage and one group, three seeds each. The contrasts whose gates are
    # met ask five of them more: the recipe, single slices, one dense FFN, two stages and one stage.
    assert len(list((folder / "kept" / "patients").glob("*.json"))) == 3 * (4 * (1 + 3) + 2 + 1 + 2 + 3 + 5)
    files = (folder / "kept" / "patients").glob("*.json")
    assert not [file for file in files if str(folder) in file.read_text()]  # no path of the machine
    (order,) = (line for line in said if "`order`" in line)
    assert "| 3 | the scan 0.600, its slices in random order 0.525 | -0.075 [" in order
    assert "| +0.000 | +0.000 | -0.300 | +0.000 |" in order
    assert all("random vision tower 0.400 | -0.200 [" in line for line in said if "| `base` |" in line)
    (tasks,) = (line for line in said if "`tasks`" in line)
    assert "a model for each task 0.500 | -0.100 [" in tasks
    before = len(trained)
    assert scaling.main([f"--workdir={folder}"]) == 0 and len(trained) == before
    assert capsys.readouterr().out.strip().split("\n")[1:] == said


def test_one_training_can_be_made_again_beside_what_is_kept(place, capsys):
    folder, trained = place
    asked = [f"--workdir={folder}", "--volumes=50", "--only=base", "--seeds=0"]
    assert scaling.main(asked) == 0
    assert trained == [("50", "as_configured", 0), ("50", "random_tower", 0)]
    assert (
        "| 50 | `base` | 1 | the 2D base 0.600, a random vision tower 0.400 | -0.200 | - |" in capsys.readouterr().out
    )
    assert scaling.main([*asked, "--remake"]) == 0 and len(trained) == 4
    assert "50-random_tower-seed0 closed: 0.400, kept 0.400" in capsys.readouterr().out


def test_answers_of_other_settings_are_refused(place):
    folder, _ = place
    assert scaling.main([f"--workdir={folder}", "--volumes=50", "--only=base", "--seeds=0"]) == 0
    file = folder / "kept" / "patients" / "50-as_configured-seed0.json"
    record = json.loads(file.read_text())
    record["made"]["config"]["train.steps"] = 60
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="50-as_configured-seed0.json was made by other settings"):
        scaling.main(["--table", f"--workdir={folder}"])


def test_a_cell_that_the_study_does_not_have_is_refused(place, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--volumes", "50", "--only", "tasks"])
    assert "tasks: asked at 3200 volumes alone" in capsys.readouterr().err


def test_each_claim_ends_by_its_gate_and_then_by_its_contrast(place, monkeypatch, capsys):
    """With planted gates and differences: Holm's rule refuses the second smallest p value, which alone would pass."""
    folder, _ = place
    shares = {"random_tower": {50: 0.2, 200: 0.3, 3200: 0.4}, "dense": {3200: 0.5}, "single_slices": {3200: 0.5},
              "twice_the_steps": {3200: 0.5}, "only_vqa": {3200: 0.7}, "one_stage": {3200: 0.7}}  # fmt: skip

    def answered(one, arm, seed):
        share = shares.get(arm.name, {}).get(int(one.workdir.name), 0.6)
        return graded({"all": share, "depth": 0.3} if arm.shows == "disordered" else {"all": share})

    monkeypatch.setattr(scaling, "answers", answered)
    assert scaling.main([f"--workdir={folder}"]) == 0
    ends = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.strip().split("\n")[-5:]}
    weights, slices, experts, prompt, stages = ends.values()
    assert "| 0.10 | +0.200 | `base` at 200 | -0.300 [" in weights and weights.endswith("| **holds** |")
    assert "| 0.10 | +0.300 | `slices` at 3,200 | -0.100 [" in slices and slices.endswith("| **not shown** |")
    assert float(slices.split("|")[7]) < 0.05
    assert "| 0.10 | +0.300 | `experts` at 3,200 | -0.100 [" in experts and experts.endswith("| **not shown** |")
    assert "| 0.03 | +0.100 | `groups` at 3,200 | +0.000 [" in prompt and prompt.endswith("| **not shown** |")
    assert "| < 0.02 | -0.100 | `stages` at 3,200 | +0.100 [" in stages and stages.endswith("| **not shown** |")


def test_a_contrast_is_asked_more_items_than_its_gate(place, monkeypatch, capsys):
    """The gate of `experts` rests on few items, as the table does; its verdict rests on many."""
    folder, trained = place

    def answered(one, arm, seed):
        many = "--config.eval.items=2000" in one.flags
        found = graded({"all": 0.2 if many and arm.name == "dense" else 0.6})
        return {kind: found[kind] for kind in one.kinds or found}

    monkeypatch.setattr(scaling, "answers", answered)
    asked = [f"--workdir={folder}", "--volumes=3200", "--only=experts"]
    for seed in (0, 1):
        assert scaling.main([*asked, f"--seeds={seed}"]) == 0
        assert "not measured yet" in capsys.readouterr().out.strip().split("\n")[-3]
    assert len(trained) == 4  # the gate waits for its last seed
    assert scaling.main(asked) == 0
    said = capsys.readouterr().out.strip().split("\n")
    (cell,) = (line for line in said if "| `experts` |" in line)
    assert "experts 0.600, one dense FFN 0.600 | +0.000" in cell
    assert "| +0.300 | `experts` at 3,200 | -0.400 [" in said[-3] and said[-3].endswith("| **holds** |")
    files = (folder / "kept" / "patients").glob("*.json")
    kinds = {file.stem: {*json.loads(file.read_text())["answers"]} for file in files}
    assert kinds["3200-dense-2000_items-seed1"] == {"closed"} and kinds["3200-dense-seed1"] == {"closed", "report"}


def test_a_claim_whose_gate_failed_is_not_tested(place, capsys):
    folder, _ = place
    assert scaling.main([f"--workdir={folder}"]) == 0
    weights, _, _, prompt, _ = capsys.readouterr().out.strip().split("\n")[-5:]
    assert "| 0.10 | +0.000 | `base` at 200 | - | - | **untestable here**: the gate failed |" in weights
    assert "| 0.03 | -0.100 | `groups` at 3,200 | - | - | **untestable here**: the gate failed |" in prompt


def test_a_gate_waits_for_all_seeds_once_the_first_has_met_it(place, monkeypatch, capsys):
    """The first seed may end a claim; once it has met the gate, two seeds of three decide nothing."""
    folder, _ = place
    monkeypatch.setattr(
        scaling, "answers",
        lambda one, arm, seed: graded({"all": (0.9 if seed == 0 else 0.1) if arm.name == "only_vqa" else 0.5}),
    )  # fmt: skip
    for seeds, end in (("0", "not measured yet"), ("1", "not measured yet"), ("2", "the gate failed")):
        assert scaling.main([f"--workdir={folder}", "--volumes", "3200", "--only", "tasks", "--seeds", seeds]) == 0
        assert end in capsys.readouterr().out.strip().split("\n")[-2]


def test_guessing_is_the_mean_of_the_shares_of_each_options(monkeypatch, tmp_path):
    """Of the phantom, whose closed questions have four options."""
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    study = scaling.STUDIES["phantom"]
    monkeypatch.setattr(scaling.Study, "fixed", lambda self, volumes, items: {
        "eval.items": 12, "data.name": self.name, "data.volumes": volumes, "data.root": str(tmp_path)})  # fmt: skip
    assert scaling.guessing(study) == 0.25


def test_the_studies_share_no_seed_with_the_runs_that_they_were_planned_by():
    first = {int(file.stem.rpartition("seed")[2]) for file in (scaling.KEPT / "results").glob("*seed*.json")}
    assert len(first) >= 5 and not first & {*scaling.STUDIES["phantom"].seeds}


def test_a_seed_that_the_study_does_not_have_is_refused(place, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--study", "phantom", "--seeds", "0"])
    assert "the study phantom has the seeds (5, 6, 7)" in capsys.readouterr().err
