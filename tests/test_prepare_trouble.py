"""`python -m tghmoe_jax.prepare` under trouble: one sentence, and the same command goes on to the very same files."""

import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from benchmarks import damage
from tests import tiny_run
from tests.prepare_runs import KILLED_AT_FILE, SHARD, arguments, contents, rows, started, write_scans
from tghmoe_jax import prepare, verify
from tghmoe_jax.datasets import prepared, preparing
from tghmoe_jax.datasets import workers as pool
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.errors import UserError

FULL = "run the command again: what is prepared stays.\n"
NO_ROOM = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, {resource.RLIM_INFINITY}))"
# A terminal sends Ctrl-C to every process of a command; workers may still be on their way up.
CTRL_C = """
import concurrent.futures, os, signal
from tghmoe_jax.datasets import prepared
place, name = {place}
done = getattr(place, name)
def interrupted(*args):
    result = done(*args)
    os.killpg(0, signal.SIGINT)
    return result
setattr(place, name, interrupted)
"""
SUBMIT, SHARDED = "concurrent.futures.ProcessPoolExecutor, 'submit'", "prepared, 'write_shard'"


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepared, "SHARD", SHARD)


@pytest.fixture
def finished(scans, tmp_path):
    """finished(folder): the same command finds its way to the files of an unbroken run."""
    assert prepare.main(arguments(scans, tmp_path / "unbroken", "--workers=1")) == 0

    def finished(folder: Path) -> None:
        assert prepare.main(arguments(scans, folder, "--workers=1")) == 0
        assert contents(folder) == contents(tmp_path / "unbroken")

    return finished


def ended(scans: Path, folder: Path, *more: str, code: str = "") -> tuple[int, str]:
    """The exit code of the command in a process of its own, and what it said of its trouble."""
    process = started(scans, folder, *more, code=code)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def test_killed_before_the_first_file_has_its_name(scans, finished, tmp_path):
    code, _ = ended(scans, tmp_path / "set", "--workers=1", code=KILLED_AT_FILE.format(at=1, before=True))
    assert code == -signal.SIGKILL and not (tmp_path / "set" / "prepare.json").exists()
    assert list((tmp_path / "set").glob(".prepare.json.*.part"))
    finished(tmp_path / "set")


def test_files_of_desktops_and_disks_are_in_nobodys_way(scans, finished, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / ".DS_Store").write_bytes(b"")
    code, _ = ended(scans, folder, "--workers=1", code=KILLED_AT_FILE.format(at=9, before=False))
    assert code == -signal.SIGKILL and list((folder / preparing.WORK).iterdir())
    for place in (folder, folder / "volumes", folder / preparing.WORK):
        for name in (".nfs00000000001b", ".DS_Store", "._00000003"):
            (place / name).write_bytes(b"")
    finished(folder)
    assert not (folder / preparing.WORK).exists()


def test_a_folder_of_others_is_not_written_into(scans, tmp_path, capsys):
    for number, name in enumerate((".work/00000000", "volumes/scan.nii", "notes.txt")):
        file = tmp_path / str(number) / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        assert prepare.main(arguments(scans, tmp_path / str(number))) == 2
        assert "holds other files" in capsys.readouterr().err
        assert [path for path in (tmp_path / str(number)).rglob("*") if path.is_file()] == [file]


def test_a_full_disk_is_one_sentence_and_costs_nothing_that_is_written(scans, finished, tmp_path, capsys, monkeypatch):
    """Full at the first file, when there is room again at the second of what is left, and so on to the end."""
    folder, attempts, written, sync = tmp_path / "set", 0, 0, os.fsync

    def full(file: int) -> None:
        nonlocal written
        written += 1
        if written > attempts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    while (code := prepare.main(arguments(scans, folder, "--workers=1"))) == 2:
        err = capsys.readouterr().err
        assert err == f"error: {folder} cannot be written (No space left on device); fix that and {FULL}"
        assert not list(folder.rglob("*.part"))
        attempts, written = attempts + 1, 0
    assert code == 0 and attempts > 7
    monkeypatch.setattr(os, "fsync", sync)
    finished(folder)


def test_a_disk_that_is_full_while_a_shard_is_packed(scans, finished, tmp_path):
    """By the writer of shards itself: a volume takes 6 kB, a shard of five 20 kB."""
    code, err = ended(scans, tmp_path / "set", "--workers=1", code=NO_ROOM)
    assert code == 2 and err == f"error: {tmp_path / 'set'} cannot be written (File too large); fix that and {FULL}"
    assert not list((tmp_path / "set" / "volumes").iterdir())
    finished(tmp_path / "set")


@pytest.mark.parametrize(
    "place, workers", [(SUBMIT, 2), pytest.param(SHARDED, 2, marks=pytest.mark.slow), (SHARDED, 1)]
)
def test_ctrl_c_is_one_sentence_and_costs_nothing(scans, finished, tmp_path, place, workers):
    code, err = ended(scans, tmp_path / "set", f"--workers={workers}", code=CTRL_C.format(place=place))
    assert code == 130
    assert err == "stopped: what is prepared stays, and the same command resumes it.\n"
    finished(tmp_path / "set")


@pytest.mark.slow
def test_two_hundred_volumes_with_five_bad_ones_two_kills_and_a_full_disk(tmp_path):
    """The set is byte for byte the one of an unbroken run, and lists the five bad ones and no other."""
    raw, folder = tmp_path / "raw", tmp_path / "set"
    raw.mkdir()
    bad = (3, 57, 58, 119, 199)
    write_scans(raw, 200, bad)
    values = np.random.default_rng(1).random((1, 8, 32, 32), np.float32)
    np.save(raw / "58.npy", values)
    (raw / "58.npy").write_bytes((raw / "58.npy").read_bytes()[:5000])  # cut short
    (raw / "57.npy").unlink()  # absent
    np.save(raw / "119.npy", np.where(values > 0.99, np.nan, values))
    np.save(raw / "199.npy", np.full_like(values, 0.5))  # blank
    assert ended(raw, tmp_path / "unbroken", "--workers=1") == (0, "")
    for workers, at in ((1, 100), (2, 30)):
        code, _ = ended(raw, folder, f"--workers={workers}", code=KILLED_AT_FILE.format(at=at, before=True))
        assert code == -signal.SIGKILL
    code, err = ended(raw, folder, "--workers=2", code=NO_ROOM)
    assert code == 2 and "cannot be written (File too large)" in err and err.count("\n") == 1
    waiting = [file for file in (folder / preparing.WORK).iterdir() if re.fullmatch(r"\d{8}", file.name)]
    packed = [prepared.read_lines(file, prepared.ROW) for file in (folder / "volumes").glob("*.jsonl")]
    left = 200 - len(waiting) - sum(map(len, packed))
    assert ended(raw, folder, "--workers=2") == (0, "")
    assert contents(folder) == contents(tmp_path / "unbroken")
    assert [row["where"] for row in rows(folder / "rejected.csv")] == [f"{number}.npy" for number in bad]
    assert json.loads((folder / "durations.json").read_text())["volumes_of_this_run"] == left < 150


def _out_of_memory(key: str):
    raise MemoryError


def test_memory_that_runs_out_is_no_fault_of_the_volume(tmp_path):
    item = Item("0.npy", "train", "case", "vqa", "question", "Which side?", "left")
    dataset = Dataset("manifest", tmp_path, (item,), (), _out_of_memory)
    data = {"name": "manifest", "root": "", "manifest": "", "slices": 8, "size": 24}
    with pytest.raises(UserError, match="memory ran out at 0.npy; run the command again with fewer --workers"):
        preparing.prepare(data, tmp_path / "set", dataset=dataset)
    assert not list((tmp_path / "set" / preparing.WORK).iterdir())


@pytest.mark.parametrize("workers", [1, 8])
def test_the_time_left_is_right_from_the_first_report_on(workers, monkeypatch):
    """A thousand volumes of two seconds each, by workers that need a minute to start."""
    now, said = 100.0, []
    monkeypatch.setattr(pool.time, "monotonic", lambda: now)
    progress = pool.Progress(1200, 200, workers, said.append)
    begun = now = now + 60
    for number in range(1000):
        now = begun + 2 * (number // workers + 1)
        progress.add(rejected=False, took=2.0)
    for line in said[1:]:
        done, left = int(line.split(" of ")[0]), line.split(", ")[-1].removesuffix(" left").split(":")
        seconds = sum(int(part) * unit for part, unit in zip(left, (3600, 60, 1), strict=True))
        assert abs(seconds - 2 * (1200 - done) / workers) <= 0.1 * 2 * 1000 / workers, line
    assert len(said) > 20


@pytest.fixture(scope="module")
def unbroken(scans, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "SHARD", SHARD)
        assert prepare.main(arguments(scans, folder, "--workers=1")) == 0
    return folder


NAMES = ("prepare.json", "items.jsonl", "card.json", "leaks.csv", "digests.json", *(
    f"volumes/00001{suffix}" for suffix in (".jsonl", ".array_record", ".npy")
))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["flip", "delete"])
def test_a_damaged_set_is_refused_and_the_same_command_makes_it_whole(scans, unbroken, tmp_path, name, kind, capsys):
    folder = Path(shutil.copytree(unbroken, tmp_path / "set"))
    damage.spoil(folder / name, kind, np.random.default_rng(2))
    read_later = kind == "flip" and name.endswith((".array_record", ".npy"))
    if not read_later:
        with pytest.raises(UserError, match=str(folder)) as error:
            prepared.PreparedSet(folder)
        assert "prepare" in str(error.value) and "\n" not in str(error.value)
    assert verify.main([str(folder)]) == 2 and ": damaged: " in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.glob("volumes/00000.*")}
    assert prepare.main(arguments(scans, folder, "--workers=1")) == 0
    assert contents(folder) == contents(unbroken)
    if name != "digests.json":
        assert before == {path: path.stat().st_mtime_ns for path in before}, "what is whole is not made again"


def test_the_sentence_of_a_damaged_set_holds_the_command(unbroken, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(unbroken, tmp_path / "my set"))
    file = folder / "volumes" / "00002.array_record"
    file.write_bytes(bytes(len(file.read_bytes())))
    found = prepared.PreparedSet(folder)
    with pytest.raises(UserError, match="is damaged .volume .* in volumes/00002.array_record: ") as error:
        [found.grid(key) for key in found.rows]
    command = shlex.split(str(error.value).partition(" run python -m tghmoe_jax.prepare ")[2])
    monkeypatch.chdir(tiny_run.ROOT)
    assert prepare.main([*command, "--workers=1"]) == 0 and contents(folder) == contents(unbroken)


def test_a_file_too_many_in_a_set_is_named_and_kept(scans, unbroken, tmp_path, capsys):
    folder = Path(shutil.copytree(unbroken, tmp_path / "set"))
    (folder / "volumes" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="volumes/notes.txt does not belong there"):
        prepared.PreparedSet(folder)
    assert prepare.main(arguments(scans, folder)) == 2
    assert "volumes/notes.txt does not belong there; move it elsewhere." in capsys.readouterr().err
    assert (folder / "volumes" / "notes.txt").read_text() == "mine"
