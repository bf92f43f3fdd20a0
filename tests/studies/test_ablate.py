"""Ablation rows: each trains and is scored, shared stages are trained once, and the table says what the runs say."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import ablations, stage2
from tests import tiny_run
from tghmoe_jax import ablate as command
from tghmoe_jax import train
from tghmoe_jax.bases import phi3v
from tghmoe_jax.bases.base import EMBEDDED, save_base, tokenizer_of
from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import statistics
from tghmoe_jax.models import leaf_names
from tghmoe_jax.samples.tokenizer import FILES
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.studies import ablate
from tghmoe_jax.training import program, run_folder
from tghmoe_jax.weights import adapt

# As deep as the embedded base, since the rows name its layers.
BASE = tiny_run.BASE | {"vision_config": tiny_run.BASE["vision_config"] | {"num_hidden_layers": 6}}
STEPS = 2


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """What shrinks every row."""
    folder = tmp_path_factory.mktemp("ablate")
    rng = np.random.default_rng(0)
    shapes = phi3v.FAMILY.shapes(BASE)
    save_base(folder / "base", {n: rng.normal(0, 0.15, s).astype(np.float32) for n, s in shapes.items()}, BASE)
    for name in FILES:
        shutil.copyfile(EMBEDDED / name, folder / "base" / name)
    sizes = {
        "base": folder / "base", "data.root": folder / "data", "data.volumes": 16, "data.size": tiny_run.SIZE,
        "model.tgh.hidden": 8, "model.depth_rope.rotary_dim": 8, "train.batch": 16, "train.accumulate": 1,
        "train.steps": STEPS, "optimizer.name": "adamw",  # compiles faster
        "eval.items": 4, "eval.batch": 4, "eval.new_tokens": 2, "eval.answer_tokens": 2,
    }  # fmt: skip
    return [f"--config.{key}={value}" for key, value in sizes.items()]


@pytest.fixture(scope="module")
def small(tmp_path_factory, flags) -> ablate.Ablation:
    return ablate.Ablation.of(ablations.__file__, tmp_path_factory.mktemp("ablations"), flags)


TRAINED = ("full", "guidance=none", "baseline=m3d")  # two stages, a stage 2 of its own, and the outside baseline


@pytest.fixture(scope="module")
def rows(small, flags) -> ablate.Ablation:
    """Three rows of one seed, by the command itself."""
    command = [sys.executable, "-m", "tghmoe_jax.ablate", f"--config={small.file}", f"--workdir={small.workdir}"]
    done = subprocess.run(
        [*command, f"--rows={','.join(TRAINED)}", "--seeds=1", *flags], env=tiny_run.environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return small


def shapes_of(config, origin):
    """The shapes of a row's parameters, once everything about it has been checked but its numbers."""
    tokenizer = tokenizer_of(origin.tokenizer, origin.config)
    source = make_source(config.data, "train", config.data.volumes)
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = program.batch_spec(config, mesh)
    model = program.build_model(config, origin.config, source.aux_names, tokenizer, spec.task_shares)
    built = program.build(config, model, spec, mesh)
    found, _, _ = train.assemble(origin, built.shapes, config.model.inflation)
    assert any(built.trains.values()) and (found or config.fresh)
    return built.shapes


@pytest.mark.parametrize("row", ablations.ROWS)
def test_every_row_has_a_model_that_takes_its_base_and_then_its_stage_1(row, small):
    first = small.resolve(row, 1, 0)
    origin = train.load_origin(first)
    shapes = shapes_of(first, origin)
    if ablations.ROWS[row].last_stage == 2:
        wanted = leaf_names.canonical_shapes({path: shape.shape for path, shape in shapes.items()})
        stage1 = {name: np.broadcast_to(np.float32(0), shape) for name, shape in wanted.items()}
        shapes_of(small.resolve(row, 2, 0), dataclasses.replace(origin, params=stage1, new=adapt.NEW_FROM_STAGE1))


def test_finished_runs_are_tabulated_and_never_trained_again(
    tiny_folder, tiny_stage1, tiny_stage2, tmp_path, monkeypatch
):
    argv = ["--rows=full", "--seeds=1", f"--workdir={tmp_path}", f"--config={ablations.__file__}"]
    argv += tiny_run.options(tiny_folder)
    table = ablate.Ablation.of(ablations.__file__, tmp_path, argv[4:])
    shutil.copytree(tiny_stage1, table.first_run("full", 0))
    shutil.copytree(tiny_stage2, table.last_run("full", 0))
    monkeypatch.setattr(ablate.train, "run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(ablate.evaluate, "run_again", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    for _ in range(2):  # the second time from what is kept of the runs
        assert command.main(argv) == 0
        full, wrong = json.loads((tmp_path / "table.json").read_text())
        shutil.rmtree(table.last_run("full", 0), ignore_errors=True)
    metrics = tiny_run.metrics(tiny_stage2)
    assert (full["row"], full["closed"]) == ("full", metrics["closed/accuracy_strict"]) and full["minutes"] > 0
    assert (
        wrong["row"] == ablate.WRONG_GROUP and wrong["closed"] == metrics["control/wrong_group_closed_accuracy_strict"]
    )
    assert wrong["score_difference"] == pytest.approx(wrong["score"] - full["score"]) and "verdict" not in wrong
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + 2
    assert command.main([*argv, "--config.eval.seed=5"]) == 2  # the result was made by another config


@pytest.mark.slow
@pytest.mark.parametrize("row", TRAINED)
def test_a_row_trains_and_is_scored(row, rows):
    last = rows.last_run(row, 0)
    steps = STEPS if row != "baseline=m3d" else rows.resolve(row, 1, 0).train.steps
    assert (last / "checkpoints" / str(steps)).is_dir()
    values = ablate.values_of(rows.result(row, 0))
    assert all(0 <= value <= 1 for value in values.values())
    assert run_folder.read_manifest(last)["parameters"]["total"] > 0


@pytest.mark.slow
def test_only_the_controls_of_the_config_are_asked(rows):
    def asked(row):
        metrics = rows.result(row, 0)["metrics"]
        return {key for key in metrics if key.startswith("control/") and metrics[key] is not None}

    assert asked("full") and all("wrong_group" in key for key in asked("full")), asked("full")
    assert not asked("guidance=none")


@pytest.mark.slow
def test_rows_that_share_stage_1_share_its_run_and_nothing_is_trained_twice(rows, monkeypatch):
    small = rows
    assert len({small.first_run(row, 0) for row in ("full", "guidance=image", "stages=stopped")}) == 1
    assert len({small.first_run(*one) for one in (("full", 0), ("full", 1), ("init=random", 0))}) == 3
    monkeypatch.setattr(ablate.train, "run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(ablate.evaluate, "run_again", lambda *_: pytest.fail("asked again"))
    small.run("full", 0)


@pytest.mark.slow
def test_a_kept_result_needs_its_runs_no_more(rows, flags, tmp_path):
    """... so that a table is made elsewhere, from small files alone."""
    shutil.copytree(rows.workdir / "results", tmp_path / "results")
    assert sum(file.stat().st_size for file in (tmp_path / "results").iterdir()) < len(rows.rows) * 50_000
    moved = ablate.Ablation.of(ablations.__file__, tmp_path, flags)
    moved.run("full", 0)
    assert ablate.summary(moved, list(moved.rows), None) == ablate.summary(rows, list(rows.rows), None)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.slow
def test_a_result_of_another_config_is_refused(rows, flags, capsys):
    """... or a table would pair runs that were trained or asked differently."""
    argv = ["--rows=full", "--seeds=1", f"--workdir={rows.workdir}", f"--config={rows.file}", *flags]
    for extra in (["--table"], []):
        assert command.main([*argv, "--config.eval.items=5", *extra]) == 2
        assert "full-seed0.json was made with another config, which differs in eval.items" in capsys.readouterr().err
    assert command.main([*argv, "--config.eval.batch=2", "--config.data.root=elsewhere", "--table"]) == 0
    bare = rows.workdir.parent / "bare"
    (bare / "results").mkdir(parents=True)
    (bare / "results" / "full-seed0.json").write_text("{}")
    assert command.main(["--rows=full", "--seeds=1", f"--workdir={bare}", f"--config={rows.file}", "--table"]) == 2
    assert "does not name the config it was made with" in capsys.readouterr().err


def test_the_results_of_the_docs_still_give_the_table_of_the_docs(tmp_path):
    """Their configs are those of the version that made them."""
    docs = tiny_run.ROOT / "docs" / "ablations"
    shutil.copytree(docs / "results", tmp_path / "results")
    assert command.main([f"--config={ablations.__file__}", f"--workdir={tmp_path}", "--table"]) == 0
    found, kept = (json.loads((folder / "table.json").read_text()) for folder in (tmp_path, docs))
    assert [row["row"] for row in found] == [row["row"] for row in kept]
    for one, other in zip(found, kept, strict=True):
        for key, value in other.items():
            assert one[key] == pytest.approx(value), (one["row"], key)


def test_every_row_takes_the_same_steps_batch_order_and_questions():
    same = ("data.", "eval.", "loss.", "optimizer.", "train.seed", "train.batch")

    def flat(row, stage):
        return run_folder.flatten(ablations.get_config(f"{row},stage={stage},seed=3"))

    def equal(values):  # `full` alone is asked a control as well, which answers a copy of the same questions
        return {k: v for k, v in values.items() if k.startswith(same) and k != "eval.controls"}

    full = [flat("full", stage) for stage in (1, 2)]
    for row, what in ablations.ROWS.items():
        stages = [flat(row, stage) for stage in range(1, ablations.ROWS[row].last_stage + 1)]
        wanted = ablations.STEPS if what.stages == "stopped" else 2 * ablations.STEPS
        assert sum(one["train.steps"] for one in stages) == wanted
        assert [list(one["eval.controls"]) for one in stages] == (
            [[], ["wrong_group"]] if row == "full" else [[]] * len(stages)
        )
        for own, reference in zip(stages, full, strict=False):
            assert equal(own) == equal(reference)


@pytest.mark.slow
def test_the_table_pairs_seeds_with_the_full_recipe(rows, flags, capsys):
    small = rows
    argv = ["--rows=guidance=none", "--seeds=1", f"--workdir={small.workdir}", f"--config={small.file}", "--table"]
    argv += flags
    assert command.main(argv) == 0
    records = {one["row"]: one for one in json.loads((small.workdir / "table.json").read_text())}
    assert list(records) == ["full", "guidance=wrong", "guidance=none"]
    none, full = (ablate.values_of(small.result(row, 0)) for row in ("guidance=none", "full"))
    assert records["guidance=none"]["score_difference"] == pytest.approx(none["score"] - full["score"])
    assert records["guidance=none"]["score_difference_ci95"] is None  # one seed has no spread
    shown = capsys.readouterr().out
    assert all(f"| `{row}` |" in shown for row in records)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rows=guidance=smell"], "unknown"),
        (["--rows="], "--rows is empty"),
        (["--seeds=0"], "too small"),
        (["--config.train.steps"], "no value"),
        (["--config=nowhere.py"], "does not exist"),
        (["--workdir=README.md", "--table"], "cannot be created"),
        (["--config=configs/common.py"], "no ROWS"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argv, said, capsys, monkeypatch):
    monkeypatch.chdir(tiny_run.ROOT)
    assert command.main(argv) == 2
    assert said in capsys.readouterr().err


def test_two_rows_at_once_or_a_stage_that_a_row_lacks_is_an_error():
    for arg in ("guidance=image,depth=none", "guidance=smell", "stages=one,stage=2"):
        with pytest.raises(ValueError, match="is n"):
            ablations.get_config(arg)


def test_random_initialisation_leaves_the_rest_of_the_base_in_place(small):
    config, whole = (small.resolve(row, 1, 0) for row in ("init=random", "full"))
    kept, base = train.load_origin(config).params, train.load_origin(whole).params
    assert {name for name in base if name not in kept} == {name for name in base if name.startswith("vision/")}
    config.fresh = ("vision/(",)
    with pytest.raises(UserError, match="not a regex"):
        train.load_origin(config)


@pytest.mark.parametrize(
    ("difference", "interval", "verdict"),
    [
        (-0.03, (-0.05, -0.01), "full better"),
        (-0.015, (-0.029, -0.001), "not shown"),  # too small to count, and may be larger
        (-0.03, (-0.07, 0.01), "not shown"),
        (0.03, (0.01, 0.05), "row better"),
        (0.001, (-0.015, 0.017), "none that counts"),
        (-0.01, (-0.019, -0.001), "none that counts"),
    ],
)
def test_a_verdict_follows_the_rule_of_the_docs(difference, interval, verdict):
    assert ablate.verdict(difference, interval) == verdict


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_the_t_interval_is_that_of_the_textbook():
    """Student's own sleep data (1908), differences of ten patients: mean 1.58, 95 % interval 0.70 to 2.46."""
    slept = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert statistics.student_ci95(slept) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert statistics.student_ci95([0.1]) is None


def test_seeds_that_differ_widen_the_interval_of_a_row():
    rng = np.random.default_rng(0)
    items, ones = np.arange(200), np.ones((4, 200))
    alike = np.tile(rng.random(200) < 0.5, (4, 1)).astype(float)
    apart = np.stack([rng.random(200) < share for share in (0.3, 0.45, 0.55, 0.7)]).astype(float)
    (lowest, highest), (low, high) = (statistics.nested_ci95(rows, ones, items) for rows in (apart, alike))
    assert highest - lowest > 1.5 * (high - low)
    assert low < alike.mean() < high


def test_parameters_of_a_run_that_are_to_be_fresh_are_left_out(tiny_stage1):
    config = stage2.get_config()
    config.init_from = str(tiny_stage1)
    whole = train.load_origin(config).params
    config.fresh = (r"aux_head/.+",)
    part = train.load_origin(config)
    assert whole.keys() - part.params.keys() == {name for name in whole if name.startswith("aux_head/")} != set()
    assert config.fresh[0] in part.new
