"""The table and the plot of the scaling study, from cells made by hand."""

import json

import pytest

from benchmarks import scaling
from tghmoe_jax.studies.decisions import QUESTIONS


def cell(name: str, side: str, gap: float, volumes: int = 3200) -> dict:
    score = {"first": 0.5, "second": 0.5 + gap, "difference": gap, "ci95": [gap - 0.01, gap + 0.01], "p": 0.004}
    made = {"config": scaling.FLAGS | {"data.volumes": volumes}}
    verdict = f"... {getattr(QUESTIONS[name], side)}" if side else "... Undecided: by these runs, ..."
    return score | {"kinds": {"closed": score | {"score": "ranked_accuracy"}}, "verdict": verdict,
                    "seeds": [gap] * 3, "made": made}  # fmt: skip


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(scaling, "PLOT", tmp_path / "plot.png")
    monkeypatch.setattr(scaling.ablate, "main", lambda argv: pytest.fail("trained"))
    (tmp_path / "kept").mkdir()
    for volumes in scaling.VOLUMES:
        for name in scaling.SCALED:
            scaling.file_of(volumes, name).write_text(json.dumps(cell(name, "first", -0.1, volumes)))
    scaling.file_of(50, "base").write_text(json.dumps(cell("base", "", 0.0, 50)))
    for name, side in zip(scaling.MORE, ("second", "equal", "first"), strict=True):
        scaling.file_of(3200, name).write_text(json.dumps(cell(name, side, 0.1)))
    return tmp_path


def test_kept_cells_are_tabulated_and_plotted_and_not_run_again(kept, capsys):
    assert scaling.main([]) == 0
    said = capsys.readouterr().out.strip().split("\n")
    assert len(said) == 2 + len(scaling.cells()) == 2 + 15
    assert sum("the 2D base better" in line for line in said) == 3 and sum("undecided" in line for line in said) == 1
    assert "| 3200 | `tasks` |" in said[-1] and said[-1].endswith("| a model for each task better |")
    assert (
        "+0.100 [+0.090, +0.110]" in said[-1] and (kept / "kept" / "table.md").read_text().strip().split("\n") == said
    )
    assert (kept / "plot.png").stat().st_size > 10_000


def test_a_missing_cell_is_one_question_at_one_number_of_volumes(kept, monkeypatch):
    scaling.file_of(200, "slices").unlink()
    asked = []

    def run(argv):
        asked.append(argv)
        (kept / "runs" / "200").mkdir(parents=True)
        (kept / "runs" / "200" / "slices.json").write_text(json.dumps(cell("slices", "second", 0.1, 200)))
        return 0

    monkeypatch.setattr(scaling.ablate, "main", run)
    assert scaling.main([f"--workdir={kept / 'runs'}"]) == 0
    (argv,) = asked
    assert {"--question=slices", "--seeds=3", "--config.data.volumes=200", "--config.data.name=patients"} <= set(argv)
    assert json.loads(scaling.file_of(200, "slices").read_text())["difference"] == 0.1
    monkeypatch.setattr(scaling.ablate, "main", lambda argv: 2)
    scaling.file_of(200, "slices").unlink()
    with pytest.raises(SystemExit, match="2"):
        scaling.main([f"--workdir={kept / 'runs'}"])


def test_a_cell_of_other_settings_is_refused(kept):
    scaling.file_of(50, "base").write_text(json.dumps(cell("base", "first", -0.1, 60)))
    with pytest.raises(ValueError, match="50-base.json was made by other settings"):
        scaling.main(["--table"])


def test_a_cell_that_the_study_does_not_have_is_refused(kept, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--volumes", "50", "--only", "tasks"])
    assert "tasks is asked at 3200 volumes alone" in capsys.readouterr().err
