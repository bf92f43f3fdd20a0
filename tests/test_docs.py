"""README and docs: the commands that they show resolve and their batches fit the devices; links lead somewhere."""

import math
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny_run import ROOT
from tghmoe_jax.samples import pipeline
from tghmoe_jax.training.command_line import parse
from tghmoe_jax.training.run_folder import check_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Options of other programs than `main`, with a value.
OTHERS = ("--to", "--topology", "--mesh", "--step", "--samples", "--mfu", "--workers")


def commands() -> list[str]:
    """Every command of a fenced block that names an experiment, on one line, without its comment."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [line.partition("  #")[0].strip() for line in lines if "--config configs/" in line]
    return list(dict.fromkeys(found))


def arguments_of(command: str) -> list[str]:
    """What follows the program, from --config on, without options of other programs than `main`."""
    text = command[command.index("--config configs/") :].partition(" | ")[0].partition(" [")[0]
    return shlex.split(re.sub(rf"({'|'.join(OTHERS)})[= ]\S+|--json|\.\.\.", "", text))


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
    shown = "\n".join(commands())
    for program in ("tghmoe_jax.main", "tghmoe_jax.prepare", "tghmoe_jax.aot", "local_pod.sh", "tpu_pod.sh", "sbatch"):
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
