"""Many scans: answers are those of one scan at a time, in the order of the list, whatever interrupts the command."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny_run
from tests.prepare_runs import KILLED_AT_FILE
from tests.scans import ct_fixtures as ct
from tests.test_predict import write_run
from tghmoe_jax import evaluate, predict
from tghmoe_jax.datasets import workers
from tghmoe_jax.datasets.scan_list import read_list
from tghmoe_jax.evaluation import DISCLAIMER, answer_file
from tghmoe_jax.models import generation
from tghmoe_jax.reader import many
from tghmoe_jax.reader.opening import load

SCANS, BAD, BATCH = 7, (1, 4), 2
QUESTIONS = ("Which plane is this? Choices: A. axial B. coronal", "What is shown?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, seven scans of which two are bad, a list with ids, and questions."""
    folder = tmp_path_factory.mktemp("many")
    write_run(folder / "run", "phantom", 2)
    return write_scans(folder)


def write_scans(folder, scans: int = SCANS, bad=BAD):
    rng, rows = np.random.default_rng(0), ["volume,id"]
    for i in range(scans):
        np.save(folder / f"{ct.SECRET}{i}.npy", rng.random((1, 12, 32, 32), np.float32))
        rows.append(f"{ct.SECRET}{i}.npy,scan {i}")
    for i in bad:
        (folder / f"{ct.SECRET}{i}.npy").write_bytes(b"no array")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    (folder / "questions.txt").write_text("\n".join(QUESTIONS) + "\n")
    return folder


@pytest.fixture(scope="module")
def reader(folder):
    return load(folder / "run", BATCH)


def answer(reader, folder, to, shard=(1, 1), asked=QUESTIONS, **options):
    """What the command does once its flags are read, with volumes read in this process."""
    root, scans = read_list(folder / "list.csv")
    questions = [many.vqa(*many.split_choices(text)) for text in asked]
    asker = many.Asker(reader, scans, questions, **options)
    return many.answer_list(asker, root, scans, to, shard, 0, say=lambda text: None)


@pytest.fixture(scope="module")
def whole(reader, folder):
    """The file of a run that nothing interrupted."""
    assert answer(reader, folder, folder / "whole.csv") == (SCANS, len(BAD))
    return folder / "whole.csv"


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_answers_are_those_of_one_scan_at_a_time(whole, folder):
    rows, alone = rows_of(whole), load(folder / "run")
    expected = [(i, q) for i in range(SCANS) for q in (QUESTIONS if i not in BAD else [""])]
    assert [(int(row["Volume"]), row["Question"]) for row in rows] == expected
    assert [row["Key"] for row in rows] == [f"scan {i}" for i, _ in expected]
    for row in rows:
        i = int(row["Volume"])
        assert row["Disclaimer"] == DISCLAIMER and ct.SECRET not in "".join(row.values())
        if i in BAD:
            assert row["Not Answered"].startswith(f"scan {i} ") and not row["Pred"]
            continue
        one = alone.ask(folder / f"{ct.SECRET}{i}.npy", *many.split_choices(row["Question"]))
        assert (row["Pred"], row["Control blind"]) == (one.text, one.blind_text)
        assert row["Warnings"] == "; ".join(one.warnings) and row["Task Predicted"] == one.task
        if row["Kind"] == "closed":
            likelihoods = [float(value) for value in row["Likelihoods"].split("; ")]
            np.testing.assert_allclose(likelihoods, np.exp(one.likelihoods), rtol=1e-4, atol=2e-6)
            assert row["Ranked"] == "AB"[int(np.argmax(one.likelihoods))]
    assert len({row["Likelihoods"] for row in rows}) > 2, "else any order would do"


@pytest.mark.parametrize("parts, tail", [(0, b""), (1, b'"question","Which pl'), (3, b"\n"), (4, b"x" * 99)])
def test_an_interrupted_file_is_finished_to_the_same_bytes(reader, folder, whole, tmp_path, monkeypatch, parts, tail):
    """Killed behind some parts, in the middle of a row or of a character; nothing finished is asked again."""
    to, append = tmp_path / "a.csv", answer_file.AnswerFile.append

    def dying(self, text):
        if self.parts_done == parts:
            raise KeyboardInterrupt
        append(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(answer_file.AnswerFile, "append", dying)
        if parts < 4:
            with pytest.raises(KeyboardInterrupt):
                answer(reader, folder, to)
        else:
            answer(reader, folder, to)
    with open(to, "ab") as file:
        file.write(tail)
    assert answer(reader, folder, to)[0] == max(SCANS - parts * BATCH, 0)
    assert to.read_bytes() == whole.read_bytes()
    assert answer_file.sidecar(to).read_bytes() == answer_file.sidecar(whole).read_bytes()


@pytest.fixture
def begun(whole, tmp_path):
    """A copy of a file of answers and of what lies beside it."""
    for file in (whole, answer_file.sidecar(whole)):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / whole.name


def test_answers_of_anything_else_are_not_gone_on_with(reader, folder, begun, monkeypatch):
    def refused(message, **options):
        before = begun.read_bytes()
        with pytest.raises(many.UserError, match=message):
            answer(reader, folder, begun, **options)
        assert begun.read_bytes() == before

    refused("another options", task="vqa")
    refused("another shard", shard=(1, 2))
    refused("another questions", asked=QUESTIONS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(type(reader), "checkpoint", {"name": "another"})
        refused("another checkpoint")
    begun.write_bytes(begun.read_bytes().replace(b"scan 0", b"scan 9"))
    refused("was changed since it was written")
    answer_file.sidecar(begun).write_text("{}")
    refused("is damaged or of another version")
    answer_file.sidecar(begun).unlink()
    refused("exists already")


@pytest.fixture(scope="module")
def shards(reader, folder):
    """The list in three shards; the first has two of four parts."""
    files = [folder / f"shard-{i}.csv" for i in (1, 2, 3)]
    asked = [answer(reader, folder, file, (i, 3))[0] for i, file in enumerate(files, 1)]
    assert asked == [3, 2, 2]
    return files


def test_shards_merge_to_the_file_of_one_run(shards, whole, tmp_path, capsys):
    to = tmp_path / "all.csv"
    assert predict.main(["--merge", *map(str, reversed(shards)), "--to", str(to)]) == 0
    assert f"{2 * SCANS - len(BAD)} rows of 3 files" in capsys.readouterr().out
    for end in ("", ".json"):
        assert to.with_name(to.name + end).read_bytes() == whole.with_name(whole.name + end).read_bytes()


def test_what_is_not_all_of_one_list_is_not_merged(shards, whole, tmp_path):
    first, second, third = shards
    cut, to = tmp_path / "cut.csv", tmp_path / "all.csv"
    cut.write_bytes(third.read_bytes()[:-1])
    shutil.copy(answer_file.sidecar(third), answer_file.sidecar(cut))
    left = tmp_path / "left.csv"
    shutil.copy(third, left)
    facts = json.loads(answer_file.sidecar(third).read_text())
    answer_file.sidecar(left).write_text(json.dumps(facts | {"parts_done": 0}))
    other = tmp_path / "other.csv"
    shutil.copy(third, other)
    answer_file.sidecar(other).write_text(json.dumps(facts | {"list": "another"}))
    for files, message in [
        ([first, second], "shard 3/3 is missing"), ([first, second, second], "give each shard once"),
        ([first, second, whole], "is shard 1/1 beside 1/3"), ([first, second, cut], "was changed"),
        ([first, second, left], "is not finished"), ([first, second, other], "differ in list"),
        ([first, second, tmp_path / "none.csv"], "none.csv.json is missing"),
    ]:  # fmt: skip
        with pytest.raises(many.UserError, match=message):
            answer_file.merge(files, to)
        assert not to.exists()


def test_the_answers_are_scored_as_any_prediction_file(reader, folder, tmp_path, capsys):
    """... where true answers are known: closed and open questions in one file; what is left out is counted."""
    lines = ["volume,id,case,question,choices,answer"]
    for i in range(4):
        name, case = f"{ct.SECRET}{i}.npy,scan {i}", f"{ct.SECRET} {i // 2}"
        lines += [f"{name},{case},Which side?,left|right,left", f"{name},{case},What is shown?,,a liver"]
        lines += [f"{name},{case},Which plane?,,"] * (i == 0)
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    root, scans = read_list(tmp_path / "list.csv", folder)
    to = tmp_path / "answers.csv"
    assert many.answer_list(many.Asker(reader, scans, ()), root, scans, to, workers=0, say=print) == (4, 1)
    assert ct.SECRET not in to.read_text()
    capsys.readouterr()
    assert evaluate.main(["score", str(to), "--to", str(tmp_path / "scores"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    right = [row["Pred"].startswith("A.") or "A." in row["Pred"] for row in rows_of(to) if row["Kind"] == "closed"]
    assert metrics["closed/accuracy"] == pytest.approx(np.mean(right)) and "open/bleu1" in metrics
    assert "closed/ranked_accuracy" in metrics and "control/blind_closed_accuracy" in metrics
    assert evaluate.main(["score", str(to)]) == 0
    said = capsys.readouterr().out
    assert "not scored: 1 row with a reason instead of an answer" in said and "1 row without a true answer" in said


def test_answers_without_truth_are_not_scored(whole, capsys):
    assert evaluate.main(["score", str(whole)]) == 2
    assert "holds no true answer" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--list", "l.csv"], "--to must name the .csv"), (["--volume", "a", "--to", "b.csv"], "--to does not belong"),
    (["--list", "l.csv", "--to", "a.csv", "--volume", "b"], "--volume does not belong to --list"),
    (["--list", "l.csv", "--to", "a.csv", "--json"], "--json does not belong to --list"),
    (["--list", "l.csv", "--to", "a.csv", "--shard", "0/2"], "--shard 0/2 must be I/N"),
    (["--list", "l.csv", "--to", "a.csv", "--shard", "3/2"], "--shard 3/2 must be I/N"),
    (["--list", "l.csv", "--to", "none/a.csv"], "is in no folder"),
    (["--list", "l.csv", "--to", "a.csv", "--workers", "0"], "--workers 0 must be 1 or more"),
    (["--list", "l.csv", "--to", "a.csv", "--report", "--question", "?"], "give one of --questions"),
    (["--merge", "a.csv", "--to", "b.csv", "--questions", "q"], "--questions does not belong to --merge"),
    (["--merge", "a.csv", "--list", "l.csv"], "are two commands"),
    (["--list", "l.csv", "--to", "a.csv"], "3 scans of --list have no question"),
    (["--list", "l.csv", "--to", "a.csv", "--questions", "q.txt"], "q.txt:2: the same question"),
    (["--list", "l.csv", "--to", "a.csv", "--questions", "bad.txt"], "bad.txt:1: the choices are not understood"),
    (["--list", "l.csv", "--to", "a.csv", "--questions", "none.txt"], "none.txt does not exist"),
    (["--list", "l.csv", "--to", "a.csv", "--min-accuracy", "0.9"], "--min-accuracy does not belong to --list"),
    (["--list", "l.csv", "--to", "a.csv", "--evidence", "e.png"], "--evidence does not belong to --list"),
    (["--list", "l.csv", "--to", "a.csv", "--report"], "--report is refused because the checkpoint"),
    (["--list", "l.csv", "--to", "a.csv", "--question", "word " * 60], "shorten the text"),
    (["--list", "l.csv", "--to", "a.csv", "--question", "?", "--task", "none"], "--task none is unknown"),
    (["--list", "l.csv", "--to", "a.csv", "--question", "?", "--task", "report"], "report is refused because"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_sentence(reader, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(many, "load", lambda *_: reader)
    (tmp_path / "l.csv").write_text("volume\na\nb\nc\n")
    (tmp_path / "q.txt").write_text("What?\nWhat?\n")
    (tmp_path / "bad.txt").write_text("What? Choices: left or right\n")
    assert predict.main(flags) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.slow
def test_a_tower_that_reads_no_prompt_sees_a_volume_once(folder, tmp_path, monkeypatch):
    """... for all questions about it, and their answers are those of a tower that sees it again."""
    reader, calls = load(write_run(tmp_path / "plain", "phantom", 1, ()), BATCH), []
    call = type(reader)._call
    monkeypatch.setattr(type(reader), "_call", lambda self, step, *more: calls.append(step) or call(self, step, *more))
    answer(reader, folder, tmp_path / "a.csv", asked=QUESTIONS)
    shared = calls.count("encode")
    monkeypatch.setattr(type(reader), "_tower", lambda self, _, __, batch, group: generation.encode(
        self.model, self.variables, batch, group))  # fmt: skip
    answer(reader, folder, tmp_path / "b.csv", asked=QUESTIONS)
    assert shared == 4, "one for each part of two scans"
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def die_at(fatal: int, number: int) -> int:
    if number == fatal:
        import os

        os._exit(9)
    return number


@pytest.mark.slow
def test_a_scan_that_kills_its_reader_is_one_row_and_never_the_end():
    todo = [(i,) for i in range(6)]
    found = workers.in_order(die_at, (3,), todo, 2, 4, lambda number: f"{number} died")
    assert list(found) == [0, 1, 2, "3 died", 4, 5]


@pytest.mark.slow
def test_the_command_killed_three_times_writes_the_same_bytes(folder, tmp_path):
    """By files that get their name: before and after the note of a part; and in the middle of its rows."""
    flags = ["--checkpoint", folder / "run", "--list", folder / "list.csv", "--questions", folder / "questions.txt"]
    in_a_row = """
import os, signal
from tghmoe_jax.evaluation import answer_file
def torn(self, text):
    self._file.write(text.encode()[:99]); self._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
answer_file.AnswerFile._write = torn
"""

    def ended(to, code=""):
        program = f"{code}\nimport sys\nfrom tghmoe_jax.predict import main\nsys.exit(main())"
        arguments = [sys.executable, "-c", program, *flags, "--to", to, "--batch", "2"]
        return subprocess.run(
            list(map(str, arguments)), env=tiny_run.environment(), capture_output=True, text=True, timeout=900
        )

    def files(to):
        return [to.read_bytes(), answer_file.sidecar(to).read_bytes()]

    whole, to = tmp_path / "whole.csv", tmp_path / "a.csv"
    done = ended(whole)
    assert done.returncode == 0 and f"{SCANS} scans asked about in this run, 2 of them" in done.stdout, done.stderr
    for code in (KILLED_AT_FILE.format(at=3, before=True), in_a_row, KILLED_AT_FILE.format(at=1, before=False)):
        assert ended(to, code).returncode == -9
        assert files(to) != files(whole)
    done = ended(to)
    assert done.returncode == 0 and "of 7 volumes" in done.stderr, done.stderr
    assert files(to) == files(whole)
    assert "0 scans asked about" in ended(to).stdout and files(to) == files(whole)
