"""README and docs: their commands are accepted and their batches fit the devices; links lead somewhere; the reference
is made from the code. tests/test_pages.py runs the commands and builds the site."""

import math
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import reference
from tests.tiny_run import ROOT
from tghmoe_jax.samples import pipeline
from tghmoe_jax.training.command_line import parse
from tghmoe_jax.training.run_folder import check_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Options of other programs than `main`, with a value.
OTHERS = ("--to", "--topology", "--mesh", "--step", "--samples", "--mfu", "--workers", "--question")


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language or "", text) of every fenced block."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)


def lines_of(page: Path) -> list[str]:
    """Every line of its fenced blocks of commands, which name no language: whole, without its comment."""
    blocks = (text for language, text in blocks_of(page) if not language)
    lines = (line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines())
    return [command for line in lines if (command := line.partition("  #")[0].strip())]


SHOWN = list(dict.fromkeys(line for page in PAGES for line in lines_of(page)))


def commands() -> list[str]:
    """Every command that names an experiment."""
    return [line for line in SHOWN if "--config configs/" in line]


def arguments_of(command: str) -> list[str]:
    """What follows the program, from --config on, without options of other programs than `main`."""
    text = command[command.index("--config configs/") :].partition(" | ")[0].partition(" [")[0]
    return shlex.split(re.sub(rf"({'|'.join(OTHERS)})[= ]\S+|--json|--plan|\.\.\.", "", text))


def devices_of(command: str, mesh: dict[str, int]) -> int:
    """Those that the command speaks of: a pod of so many processes, a slice, a mesh that is given; else a laptop's."""
    if local := re.search(r"local_pod\.sh (\d+) (\d+)", command):
        return math.prod(map(int, local.groups()))
    if slurm := re.search(r"--nodes (\d+) --ntasks-per-node (\d+)", command):
        return math.prod(map(int, slurm.groups()))
    if slice_ := re.search(r"--topology \w+:([\dx]+)", command):
        return math.prod(map(int, slice_[1].split("x")))
    if re.search(r"pod=\w+-1\b", command):
        return 1
    return max(2, math.prod(mesh.values()))


def test_pages_show_commands_of_every_kind():
    shown = "\n".join(SHOWN)
    for program in (
        "tghmoe_jax.main",
        "tghmoe_jax.prepare",
        "tghmoe_jax.aot",
        "tghmoe_jax.predict",
        "local_pod.sh",
        "tpu_pod.sh",
        "sbatch",
    ):
        assert program in shown


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_resolves_and_its_batch_fits(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, _ = parse(["docs", *arguments_of(command)])
    if "tghmoe_jax.prepare" in command:
        return
    check_config(config)
    pipeline.BatchSpec(
        config.train.batch, config.train.accumulate, devices_of(command, config.mesh.to_dict()),
        config.data.text_length, pipeline.mixture_of(config.data.mixture), tuple(config.model.tasks),
    )  # fmt: skip


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize(
    "command",
    [line for line in SHOWN if re.match(r"python -m (tghmoe_jax|benchmarks)\.", line) and ".main " not in line],
)
def test_a_command_of_the_docs_has_flags_that_exist(command):
    module, *arguments = shlex.split(command.removeprefix("python -m "))
    _, rest = reference.parser_of(module).parse_known_args(arguments)
    assert all(one.startswith("--config") or one.startswith("configs/") for one in rest), rest


def test_the_readme_is_short_and_holds_its_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and max(map(len, text.splitlines())) <= 130
    for command in (
        "pip install -r requirements.txt && python -m tghmoe_jax.main --config configs/stage1.py",
        "pip install -r requirements-dev.txt && python -m pytest -q",
    ):
        assert f"\n```\n{command}\n```\n" in text
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (ROOT / picture).stat().st_size < 300_000


def test_every_key_has_its_comment_and_the_reference_is_up_to_date():
    assert [key for key, said in reference.keys().items() if not said] == []
    assert reference.PAGE.read_text() == reference.page(), "run python -m benchmarks.reference"


def test_pages_that_code_and_messages_name_exist():
    folders = ("tghmoe_jax", "configs", "launch", "benchmarks", "notebooks", "tests")
    files = [one for folder in folders for one in (ROOT / folder).rglob("*") if one.suffix in (".py", ".sh", ".ipynb")]
    for file in [*files, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt")]:
        for name in re.findall(r"docs/[\w-]+\.md", file.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{file.relative_to(ROOT)} names {name}"
