"""The verdict: above the blind control only where the paired interval says so, and never without one."""

import numpy as np
import pytest

from tests.evaluation.test_protocols import closed
from tghmoe_jax.evaluation import comparison, files, outputs, statistics, verdict
from tghmoe_jax.evaluation.protocols import Prediction, score
from tghmoe_jax.samples.questions import Question

ORGANS = ("liver", "spleen", "left kidney", "bladder")


def run_of(right, blind, volumes=None, **control):
    """Closed questions about `volumes`, answered right or wrong (bool each), with the volume and without."""
    volumes = range(len(right)) if volumes is None else volumes
    run = {
        name: [
            closed(volume, "organ", ORGANS, "liver", "A. liver" if good else "B. spleen")
            for volume, good in zip(volumes, answers, strict=True)
        ]
        for name, answers in (("closed", right), ("control/blind_closed", blind))
        if answers is not None
    }
    return run | control


def judged(run):
    (found,) = verdict.verdicts(score(run), run)
    return found


def test_a_verdict_says_what_its_interval_says():
    """Over random runs: above if and only if the paired interval lies above 0 and the score's own above chance."""
    rng, states = np.random.default_rng(0), set()
    for _ in range(12):
        items, own, other = int(rng.integers(20, 60)), rng.uniform(), rng.uniform()
        run = run_of(rng.random(items) < own, rng.random(items) < other)
        found, metrics = judged(run), score(run)
        row = comparison.compare({"closed": run["control/blind_closed"]}, {"closed": run["closed"]})["closed/accuracy"]
        above = row["ci95"][0] > 0 and metrics["closed/accuracy_ci95"][0] > 0.25
        assert (found.state == verdict.ABOVE) == above
        assert found.text.startswith("above") == (row["ci95"][0] > 0)
        assert found.blind == row["a"] and found.chance == 0.25 and found.value == metrics["closed/accuracy"]
        assert f"{row['difference']:.3f}".lstrip("-") in found.text
        states.add(found.state)
    assert states == {verdict.ABOVE, verdict.NOT_ABOVE}


@pytest.mark.parametrize("volumes", [19, 2])
def test_too_few_volumes_give_no_verdict_however_many_items(volumes):
    items = 100
    found = judged(run_of([True] * items, [False] * items, [i % volumes for i in range(items)]))
    assert found.state == verdict.TOO_FEW and f"{volumes} volumes are too few" in found.text
    assert judged(run_of([True] * 20, [False] * 20)).state == verdict.ABOVE


def test_without_a_blind_control_nothing_is_claimed():
    found = judged(run_of([True] * 30, None))
    assert found.state == verdict.NOT_ASKED and found.text.startswith("unknown") and found.blind is None
    assert "configs/evaluate.py" in verdict.next_step([found], "runs/a", stage1=False)
    assert verdict.lines([], {}) and verdict.verdicts(score({}), {}) == []


def test_units_that_all_differ_alike_still_have_an_interval():
    found = judged(run_of([True] * 30, [False] * 30))
    low, high = statistics.wilson(30, 30)
    assert f"[{low:.3f}, {high:.3f}]" in found.text
    ones, zeros = (np.full(30, value) for value in (1.0, 0.0))
    back = statistics.difference_ci95((ones, ones), (zeros, ones), list(range(30)))
    assert back == [-high, -low]
    assert statistics.difference_ci95((ones, ones), (ones, ones), list(range(30))) == [0, 0]


def test_answers_that_name_every_letter_prove_nothing():
    """M3D's rule counts them as right; the strict one does not."""
    listed = [closed(i, "organ", ORGANS, "liver", "A. liver B. spleen C. left kidney D. bladder") for i in range(40)]
    found = judged(run_of([True] * 40, [False] * 40, closed=listed))
    assert found.value == 1 and found.state == verdict.NOT_ABOVE and "closed/accuracy_strict" in found.text


def test_what_beats_a_blind_control_below_chance_must_beat_chance_as_well():
    right = [i % 4 == 0 for i in range(60)]
    found = judged(run_of(right, [False] * 60))
    assert found.state == verdict.NOT_ABOVE and found.text.endswith("not above chance")


def test_five_lines_and_the_size_of_drawn_lesions():
    run = run_of([True] * 40, [False] * 40)
    metrics = score(run) | {verdict.LESIONS: [34.2, 83.6]}
    lines = verdict.lines(verdict.verdicts(metrics, run), metrics)
    assert [line.split()[0] for line in lines] == ["score", "chance", "blind", "verdict"]
    assert "(drawn anatomy; lesions of 34 to 84 mm)" in lines[0]
    assert verdict.LESIONS not in outputs.scores_of(metrics) and verdict.LESIONS not in outputs.table(metrics, run)
    assert verdict.drawn({}) == "" and "no lesions" in verdict.drawn({verdict.LESIONS: None})


def test_the_next_command_fits_the_verdict():
    steps = [
        verdict.next_step([judged(run_of(right, blind))], "runs/a", stage1)
        for right, blind, stage1 in (
            ([True] * 30, [False] * 30, True),
            ([True] * 30, [False] * 30, False),
            ([True] * 9, [False] * 9, True),
            ([True] * 30, [True] * 30, True),
        )
    ]
    assert "configs/stage2.py --config.init_from=runs/a" in steps[0] and "predict --checkpoint runs/a" in steps[1]
    assert "evaluate run runs/a --items" in steps[2] and "train longer" in steps[3]
    few = [judged(run_of([True] * 9, [False] * 9))]
    assert verdict.next_step(few, "runs/a", False, own=False).endswith("the same command with --config.eval.items=200")
    for own in (True, False):  # no command can ask more than there is
        said = verdict.next_step(few, "runs/a", False, all_asked=True, own=own)
        assert "add cases" in said and "python" not in said and "command" not in said


def test_reports_whose_findings_no_data_set_knows_are_judged_by_the_rules_for_english():
    question = Question("report", "report", "", "Describe the scan.", (), "There is a cyst in the right kidney.")
    run = {
        name: [Prediction.of(i, question, text) for i in range(24)]
        for name, text in (("report", question.answer), ("control/blind_report", "The lungs are clear."))
    }
    found = judged(run)
    assert found.score == "report/ladder_present" and (found.value, found.blind) == (1, 0)
    assert found.state == verdict.ABOVE and found.chance is None


def test_open_answers_alone_have_no_blind_control():
    question = Question("vqa", "open", "organ", "Which organ?", (), "liver")
    found = judged({"open": [Prediction.of(i, question, "liver") for i in range(24)]})
    assert found.score == "open/exact" and found.state == verdict.NOT_ASKED
    assert "predict" in verdict.next_step([found], "runs/a", stage1=False)


def test_a_file_with_a_blind_column_gets_the_verdict_of_its_run(tmp_path):
    run = run_of([True] * 30, [i < 10 for i in range(30)])
    outputs.write_predictions(tmp_path, run)
    again = files.read_run(tmp_path)
    assert judged(again) == judged(run)
