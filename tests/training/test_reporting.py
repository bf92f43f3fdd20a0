"""The run log: one record a step through kills and resumes, honest numbers, and the tables printed before step one."""

import io
import json
import types

import ml_dtypes
import numpy as np
import pytest

from tghmoe_jax.training.reporting import (
    ParameterRow,
    RunLog,
    clock_text,
    deterministic,
    manifest,
    parameter_table,
    read_metrics,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def train(workdir, steps, start=0, total=10, **options):
    """Records `steps` steps of half a second each after `start` and returns what was printed."""
    stream, clock = options.pop("stream", io.StringIO()), Clock()
    with RunLog(workdir, total, start_step=start, stream=stream, clock=clock, tensorboard=False, **options) as log:
        for step in range(start + 1, start + steps + 1):
            clock.now += 0.5
            log.record(step, {"loss": np.float32(1) / step, "loss/lm": 0.5})
    return stream.getvalue()


def test_every_record_is_on_disk_before_the_next_step(tmp_path):
    log = RunLog(tmp_path, 3, stream=io.StringIO(), tensorboard=False)
    log.record(1, {"loss": 2.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    log.close()
    log.close()


def test_timing_stands_apart_from_what_the_seed_decides(tmp_path):
    train(tmp_path, 2, samples_per_step=4)
    record = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert deterministic(record) == {"step": 2, "loss": 0.5, "loss/lm": 0.5}
    assert record["rate"] == 2.0
    assert record["timing"] == {"samples_per_second": 8.0, "step_seconds": 0.5, "elapsed_seconds": 1.0}


def test_a_resumed_run_leaves_exactly_the_records_of_an_unbroken_one(tmp_path):
    train(tmp_path / "unbroken", 10)
    train(tmp_path / "killed", 7)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # cut short by the kill
    train(tmp_path / "killed", 6, start=4)
    unbroken, killed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("unbroken", "killed"))
    assert list(map(deterministic, killed)) == list(map(deterministic, unbroken))
    assert not list((tmp_path / "killed").glob("*.part"))


def test_a_run_started_again_from_nothing_leaves_no_old_record(tmp_path):
    train(tmp_path, 5)
    train(tmp_path, 2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_floats_keep_every_bit_and_the_file_stays_json(tmp_path):
    values = {
        "loss": np.float32(0.1),
        "double": 0.1,
        "count": np.int64(3),
        "load": np.array([0.25, 0.75], np.float32),
        "bad": float("nan"),
        "worse": np.array([np.inf, 1.0]),
        "half": ml_dtypes.bfloat16(0.1),
        "mixed": [1, None, [np.float32(2)]],
    }
    with RunLog(tmp_path, 1, stream=io.StringIO(), tensorboard=False) as log:
        log.record(1, values)

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert np.float32(record["loss"]) == np.float32(0.1) and record["loss"] == float(np.float32(0.1))
    assert record["double"] == 0.1 and record["count"] == 3 and record["load"] == [0.25, 0.75]
    assert record["bad"] == "nan" and record["worse"] == ["inf", 1.0]
    assert record["half"] == 0.10009765625 and record["mixed"] == [1, None, [2.0]]


def test_a_step_is_recorded_once_and_in_order(tmp_path):
    with RunLog(tmp_path, 3, start_step=1, stream=io.StringIO(), tensorboard=False) as log:
        with pytest.raises(ValueError, match="step 1"):
            log.record(1, {"loss": 1.0})
        with pytest.raises(ValueError, match="belong to the log"):
            log.record(2, {"rate": 1.0})


def test_other_processes_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", 3, enabled=False)
    log.record(1, {"loss": 1.0})
    log.say("text")
    log.scalars(1, {"score": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_terminal_gets_one_line_rewritten(tmp_path):
    printed = train(tmp_path, 10, stream=Terminal())
    assert printed.count("\n") == 1 and printed.endswith("\n")
    (_, first, second), last = printed.split("\r\x1b[2K")[:3], printed.split("\r\x1b[2K")[-1]
    assert first == "step 1/10  loss 1.0000  0:00 with compiling  ETA after the next"
    assert second == "step 2/10  loss 0.5000  2.00 steps/s  ETA 0:04"
    assert last == "step 10/10  loss 0.1000  2.00 steps/s  took 0:05\n"


def test_a_log_file_gets_a_line_every_few_seconds(tmp_path):
    lines = train(tmp_path, 10, every_seconds=2).splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "9/10", "10/10"]


def test_the_first_step_which_compiles_does_not_spoil_the_estimate(tmp_path):
    stream, clock = Terminal(), Clock()
    with RunLog(tmp_path, 100, stream=stream, clock=clock, tensorboard=False) as log:
        for step in range(1, 3):
            clock.now += 60.0 if step == 1 else 2.0
            log.record(step, {"loss": 1.0})
    first, second = stream.getvalue().split("\r\x1b[2K")[1:]
    assert "1:00 with compiling  ETA after the next" in first
    assert "2.00 s/step  ETA 3:16" in second


@pytest.mark.parametrize("peak", [0.0, 4e12])
def test_useful_flops_are_stated_and_their_share_of_a_known_peak(tmp_path, peak):
    """Two seconds a step, however late they are recorded."""
    stream = io.StringIO()
    options = {"flops_per_step": 2e12, "peak": peak, "tensorboard": False, "stream": stream, "clock": lambda: 0.0}
    with RunLog(tmp_path, 4, **options) as log:
        for step in range(1, 5):
            log.record(step, {"loss": 1.0}, 2.0 * step)
    timings = [record["timing"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [one["step_seconds"] for one in timings] == [2.0] * 4
    assert [one["tflops_per_second"] for one in timings] == [1.0] * 4
    assert [one.get("mfu") for one in timings] == [0.25 if peak else None] * 4
    assert ("MFU 25.0%" in stream.getvalue()) == bool(peak)


def test_one_slow_step_does_not_spoil_the_estimate(tmp_path):
    stream, clock = Terminal(), Clock()
    with RunLog(tmp_path, 100, stream=stream, clock=clock, tensorboard=False) as log:
        for step in range(1, 21):
            clock.now += 60.0 if step == 20 else 2.0  # e.g. a slow disk
            log.record(step, {"loss": 1.0})
    assert "2.00 s/step  ETA 2:40" in stream.getvalue().split("\r")[-1]


def test_messages_do_not_run_into_the_progress_line(tmp_path):
    stream = Terminal()
    with RunLog(tmp_path, 9, stream=stream, tensorboard=False) as log:
        log.record(1, {"loss": 1.0})
        log.say("evaluating")
    assert "\nevaluating\n" in stream.getvalue()


def test_tensorboard_files_are_written(tmp_path):
    with RunLog(tmp_path, 1, stream=io.StringIO()) as log:
        log.record(1, {"loss": np.float32(1.5), "load": np.ones(2)})
        log.scalars(1, {"closed/accuracy": 0.5, "open/meteor": None})
    (events,) = tmp_path.glob("events.*")
    assert b"closed/accuracy" in events.read_bytes() and b"loss" in events.read_bytes()


def test_clock_text():
    assert [clock_text(seconds) for seconds in (0, 59.6, 61, 3_661)] == ["0:00", "1:00", "1:01", "1:01:01"]


def test_parameter_table_counts_every_leaf_and_folds_equal_blocks():
    rows = [ParameterRow(f"vision/block_{i}/mlp/fc1/kernel", (96, 384), "trained", "fsdp") for i in (0, 1, 2, 5)]
    rows += [ParameterRow("vision/block_3/mlp/fc1/kernel", (96, 384), "frozen"), ParameterRow("scale", (), "new")]
    table = parameter_table(rows)
    lines = table.splitlines()
    assert lines[1] == "vision/block_{0-2,5}/mlp/fc1/kernel  4 of 96 x 384   0.147456  trained  fsdp"
    assert lines[2].split()[-2:] == ["0.036864", "frozen"]
    totals = {line.split()[0]: line.split()[1] for line in table.split("\n\n")[1].splitlines()}
    assert totals == {"trained": "0.147456", "new": "0.000001", "frozen": "0.036864", "total": "0.184321"}


def test_parameter_table_is_exact_at_full_scale():
    assert "4,146.621440 M" in parameter_table([ParameterRow("all", (4_146_621_440,), "trained")])


def test_manifest_names_what_ran_and_is_json():
    device = types.SimpleNamespace(platform="cpu", device_kind="cpu", process_index=0)
    made = manifest(seeds={"train": 0}, data={"name": "phantom"}, devices=[device, device])
    assert json.loads(json.dumps(made)) == made
    assert made["packages"]["jax"] and made["python"].startswith("3.")
    assert made["devices"] == {"cpu:cpu": 2} and made["processes"] == 1 and made["seeds"] == {"train": 0}
