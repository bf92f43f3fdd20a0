"""What steps report is fetched for several of them at once: none is lost, none is late where it counts."""

import jax
import numpy as np
import pytest

from tests.training.test_guard import LEAVES, scalars
from tghmoe_jax.errors import Diverged
from tghmoe_jax.training import guard, step
from tghmoe_jax.training.step import Reports


def on_device(number: int, bad: bool = False) -> dict[str, jax.Array]:
    return jax.device_put(scalars(float(number), int(bad), (bad, 0, 0)))


@pytest.fixture
def fetches(monkeypatch) -> list[int]:
    """How many steps each transfer brought; a clock that stands still."""
    found, get = [], jax.device_get
    monkeypatch.setattr(step.jax, "device_get", lambda tree: found.append(len(tree)) or get(tree))
    monkeypatch.setattr(step.time, "perf_counter", lambda: 0.0)
    return found


def test_every_step_comes_once_and_in_order_ten_at_a_time(fetches):
    taken = []
    reports = Reports(lambda number, values, ended: taken.append((number, float(values["loss"]))))
    due = [reports.add(number, on_device(number)) for number in range(1, 26)]
    assert fetches == [10, 10] and [i for i, one in enumerate(due, start=1) if one] == [11, 21]
    assert [number for number, _ in taken] == list(range(1, 21))
    reports.fetch_all()
    reports.fetch_all()
    assert taken == [(number, float(number)) for number in range(1, 26)] and fetches == [10, 10, 5]


def test_slow_steps_are_shown_when_they_end(monkeypatch, fetches):
    clock = iter(np.arange(0, 1000, 1.5))
    monkeypatch.setattr(step.time, "perf_counter", lambda: float(next(clock)))
    taken = []
    reports = Reports(lambda number, values, ended: taken.append((number, ended)))
    for number in range(1, 5):
        reports.add(number, on_device(number))
        assert [one for one, _ in taken] == list(range(1, number))
    assert all(late > early for (_, early), (_, late) in zip(taken, taken[1:], strict=False))


def test_the_host_is_one_step_ahead_at_most(monkeypatch, fetches):
    waited = []
    monkeypatch.setattr(step.jax, "block_until_ready", lambda values: waited.append(int(values["loss"])))
    reports = Reports(lambda *args: None)
    for number in range(1, 6):
        reports.add(number, on_device(number))
        assert waited == list(range(1, number))


def test_bad_steps_in_a_row_end_the_run_before_anything_is_saved(tmp_path, fetches):
    """... whatever the fetches cut in two."""
    items = lambda number: [{"volume": f"volume {number}", "task": "vqa", "question": "?"}]  # noqa: E731
    watch = guard.Guard(tmp_path, 4, LEAVES, items, lambda text: None)
    reports = Reports(lambda number, values, ended: watch.note(number, values))
    for number in range(1, 13):  # 9 to 11 are noted when 12 begins
        reports.add(number, on_device(number, bad=number >= 9))
    assert watch.in_a_row == 2
    with pytest.raises(Diverged, match="4 steps in a row up to step 12 .* with the volumes volume 12"):
        reports.fetch_all()
    lines = (tmp_path / guard.FILE).read_text().splitlines()
    assert [f'"volume {number}"' in line for number, line in enumerate(lines, start=9)] == [True] * 4
