"""What a reader of the README and the pages types is run, shortened; the site is built and looks nowhere else.

Commands of full size, of other machines and of benchmarks are left to their own tests: tests/test_docs.py checks that
they are accepted.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny_run
from tests.scans import ct_fixtures as ct
from tests.test_docs import PAGES, ROOT, SHOWN, blocks_of, lines_of
from tghmoe_jax.datasets import leaks
from tghmoe_jax.drawn import sample

pytestmark = pytest.mark.slow

ELSEWHERE = re.compile(  # the last one is made by tests/conftest.py
    r"(pip|npm|mkdir|export|sbatch|launch/\S+|python launch/\S+|TGHMOE_\w+=\S+ python -m pytest) "
    + r"|python -m (benchmarks\.|tghmoe_jax\.drawn\.labelled)"
    + r"|.*(tghmoe_jax\.(aot|ablate|app|selfcheck|studies\.)|:phi3v|medgemma|runs/adapted)"
    + r"|.*(:bench|ablations|pretrain2d|data_m3d|labelmap|llava)"
    + r"|python -m tghmoe_jax\.main --config configs/stage[12]\.py$"
)
RUN_HERE: dict[str, list[str]] = {}  # {page: its commands that no page before it has}
for _page in PAGES:
    _known = {line for lines in RUN_HERE.values() for line in lines}
    if _lines := [line for line in lines_of(_page) if line not in _known and not ELSEWHERE.match(line)]:
        RUN_HERE[_page.name] = _lines


def label_table(file: Path, rows: list) -> None:
    file.write_text("\n".join(["case,nodule,effusion", *(",".join(map(str, row)) for row in rows)]) + "\n")


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_folder, tiny_stage1, tiny_stage2) -> Path:
    """A folder that has all that the commands name: scans, lists, runs, a base, predictions and labels."""
    desk = tmp_path_factory.mktemp("desk")
    for name, run in (("stage1", tiny_stage1), ("stage2", tiny_stage2)):
        shutil.copytree(run, desk / "runs" / name)
    shutil.copytree(desk / "runs" / "stage2", desk / "A")
    shutil.copytree(desk / "runs" / "stage2", desk / "B")
    shutil.copytree(tiny_folder / "base", desk / "HF_DIR")
    (desk / "runs" / "data").mkdir()
    (desk / "FOLDER").mkdir(), (desk / "scans").mkdir(), (desk / "data").mkdir()
    numbers = iter(range(1, 30))
    for file in ("scan", *(f"FOLDER/{n}" for n in range(2)), *(f"scans/{n:04d}" for n in range(1, 9))):
        sample.main(["--to", str(desk / f"{file}.nii.gz"), "--number", str(next(numbers))])
    ct.write_dicom(desk / "dicom_folder")
    asked = [f"FOLDER/{n}.nii.gz,{n},Which plane is this?,axial|coronal,coronal" for n in range(2)]
    (desk / "scans.csv").write_text("\n".join(["volume,id,question,choices,answer", *asked]) + "\n")
    (desk / "questions.txt").write_text("Which plane is this? Choices: A. axial B. coronal\n")
    for file in desk.glob("runs/stage2/eval/*/predictions_*.csv"):
        rows = list(csv.DictReader(file.open(newline="")))
        with (desk / "FOLDER" / file.name).open("w", newline="") as out:
            table = csv.DictWriter(out, [*rows[0], "Key"])  # as data sets of files have it, for --leaks
            table.writeheader(), table.writerows([row | {"Key": f"v{row['Volume']}"} for row in rows])
        shutil.copy(file, desk / file.name.replace("predictions_closed", "eval_close_vqa"))
    for name in ("a", "b", "predicted", "true"):
        label_table(desk / f"{name}.csv", [(f"c{n}", n % 2, n % 3 == 0 and 1 or 0) for n in range(6)])
    reports = [{"input_image_name": f"v{n}", "report": "There is a pleural effusion."} for n in range(3)]
    for name in ("reports", "true"):
        whole = {"name": "n", "type": "t", "generated_reports": reports, "version": {"major": 1, "minor": 0}}
        (desk / f"{name}.json").write_text(json.dumps(whole))
    (desk / "data" / "leaks.csv").write_text(",".join(leaks.COLUMNS) + "\n")
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(desk / "picture.png")
    return desk


def shortened(line: str, desk: Path) -> list[str]:
    """The command with the sizes of the tiny runs; evaluations by the steps that there are."""
    line = re.sub(r"\[.*?\]|--bert-model \S+", "", line).replace("shard-*.csv", "shard-1.csv")
    words = shlex.split(line.replace("runs/stage2-bench", "runs/stage2"))
    words = ["1/1" if word == "1/8" else word for word in words]
    if "tghmoe_jax.main" in words:
        at = words.index("--config") + 2
        short = [
            flag for flag in tiny_run.options(desk) if not re.match(r"--config\.(base|data\.(root|mixture))", flag)
        ]
        short += ["--config.train.steps=2", "--config.eval.items=4", "--config.checkpoint.every=2"]
        if "configs/evaluate.py" in words:
            short = [flag for flag in short if ".eval." in flag]
        words[at:at] = short
    for i, word in enumerate(words):
        if match := re.fullmatch(r"(runs/\S+/eval)/\d+", word):
            words[i] = str(next((desk / match[1]).iterdir()).relative_to(desk))
        words[i] = {"--config.data.slices=16": f"--config.data.slices={tiny_run.SLICES}",
                    "--config.data.size=64": f"--config.data.size={tiny_run.SIZE}"}.get(word, words[i])  # fmt: skip
    return words


def typed(words: list[str], desk: Path) -> subprocess.CompletedProcess:
    """The command's end, in the folder; what it would write anew is taken away before."""
    for flag in {"--to", "--routing", "--evidence"} & set(words):
        target = desk / words[words.index(flag) + 1]
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    return subprocess.run(
        words, cwd=desk, env=tiny_run.environment(), capture_output=True, text=True, timeout=600
    )  # fmt: skip


def test_every_command_is_run_here_or_named_as_tested_elsewhere():
    assert {line for lines in RUN_HERE.values() for line in lines} | {s for s in SHOWN if ELSEWHERE.match(s)} == set(
        SHOWN
    )
    assert {"README.md", "asking.md", "evaluation.md", "evidence.md", "own-data.md", "bases.md"} <= RUN_HERE.keys()


@pytest.mark.parametrize("name", RUN_HERE)
def test_the_commands_of_a_page_run(name, desk):
    (page,) = (page for page in PAGES if page.name == name)
    if name != "README.md" and not (desk / "sample.nii.gz").exists():  # which a command of the README makes
        sample.main(["--to", str(desk / "sample.nii.gz")])
    for block in (text for language, text in blocks_of(page) if language == "python"):
        if "reports.csv" in block:
            lines = [f"{n:04d}.nii.gz,p{n},None.,Normal.,Cough" for n in range(1, 9)]
            (desk / "reports.csv").write_text(
                "\n".join(["study,patient,findings,impression,indication", *lines]) + "\n"
            )
        done = subprocess.run([sys.executable, "-c", block], cwd=desk, env=tiny_run.environment(), capture_output=True)
        assert done.returncode == 0, (block, done.stderr.decode()[-2000:])
        if "reports.csv" in block:
            questions(desk)
    for line in RUN_HERE[name]:
        done = typed(shortened(line, desk), desk)
        assert done.returncode == 0, (line, done.stderr[-2000:])


def questions(desk: Path) -> None:
    """Closed and open questions of every scan beside its report, and a split of each case."""
    file = desk / "scans" / "manifest.jsonl"
    lines = []
    for n, line in enumerate(map(json.loads, file.read_text().splitlines())):
        own = {"volume": line["volume"], "case": line["case"], "split": ("train", "train", "validation", "test")[n % 4]}
        asked = {"question": "Is there a pleural effusion?", "answer": "No"}
        lines += [line | own, own | asked, own | asked | {"choices": ["Yes", "No"]}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_the_first_answer_is_the_one_that_the_readme_shows(tmp_path):
    text = (ROOT / "README.md").read_text()
    shown = re.sub(r"\n {12}scan of", " scan of", re.search(r"```text\n(.*?)```", text, re.DOTALL)[1])
    first, *said = (line for line in shown.splitlines() if line)
    drawn, asked = (line for line in lines_of(ROOT / "README.md")[:3] if line.startswith("python"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = []
    for line in (drawn, asked):
        words = [sys.executable, *shlex.split(line)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found.append([re.sub(r", [\d.]+ s$", "", one) for one in done.stdout.splitlines() if one])
    assert found[0] == [first]
    rounded = re.compile(r"\d+\.\d+")  # cores that round differently move the last digits
    for mine, theirs in zip(found[1], (re.sub(r", [\d.]+ s$", "", one) for one in said), strict=True):
        assert rounded.sub("#", mine) == rounded.sub("#", theirs)
        assert np.allclose(*([float(n) for n in rounded.findall(one)] for one in (mine, theirs)), atol=0.02)


def test_the_picture_of_the_readme_is_made(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.picture", "--to", tmp_path / "answer.png"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    made, kept = (Image.open(file) for file in (tmp_path / "answer.png", ROOT / "docs/images/answer.png"))
    assert made.size == kept.size and (tmp_path / "answer.png").stat().st_size < 300_000


def test_the_site_is_built_and_asks_no_other_host(tmp_path):
    """Strict: a broken link, an anchor that is not there or a page in no menu ends the build."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"], cwd=ROOT,
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {file.stem: file.read_text() for file in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in PAGES if page.parent.name == "docs"} | {"index"} <= pages.keys()
    for name, text in pages.items():
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text):
            assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag), (name, tag)
