"""Makes docs/reference.md from the code: commands with their flags, experiments, config keys and files.

    python -m benchmarks.reference             writes it
    python -m benchmarks.reference --check     exit code 1 where it is not up to date

Commands come from their parsers, keys from the comments of configs/common.py, files from their docstrings.
"""

import argparse
import ast
import importlib
import inspect
import sys
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from tghmoe_jax import errors
from tghmoe_jax.__main__ import COMMANDS
from tghmoe_jax.training import command_line

ROOT = Path(__file__).resolve().parent.parent
common = importlib.import_module("configs.common")  # commands and configs are read, as text and by what they offer
PAGE = ROOT / "docs" / "reference.md"
TOOLS = ("drawn.sample", "drawn.train_tokenizer", "studies.pointing")  # commands that `tghmoe` does not list
INTRO = """# Reference

This page is made from the code by `python -m benchmarks.reference`, and a test compares them. Do not edit it.

`tghmoe NAME ...` and `python -m tghmoe_jax.NAME ...` are the same command, and `tghmoe train` is
`python -m tghmoe_jax.main`. Commands with a dot in their names, such as `drawn.sample`, have the second form only.
"""


KEYS = """Every key is a flag of `train`: `--config.data.slices=32`. Presets and experiments change the defaults, and a
run prints the values that it uses.
"""


class Found(BaseException):
    """Carries the parser of a command out of it."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a command makes for itself; the command is ended when it is about to read its arguments."""

    def caught(self, *_, **__):
        raise Found(self)

    kept = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = caught
    try:
        called = importlib.import_module(module)
        if hasattr(called, "__path__"):  # a package is run by its __main__
            called = importlib.import_module(f"{module}.__main__")
        called = getattr(called, "main", None) or called.run
        called([]) if inspect.signature(called).parameters else called()
    except Found as found:
        return found.parser
    finally:
        argparse.ArgumentParser.parse_known_args = kept
    raise RuntimeError(f"{module} reads no arguments")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "".join("| " + " | ".join(" ".join(str(cell).split()) for cell in line) + " |\n" for line in lines)


def plain(text: str) -> str:
    """Text of a cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Code of a cell, where GitHub and MkDocs read a bar in two ways."""
    return f"<code>{plain(text).replace(bar, '&#124;')}</code>" if (bar := "\\|") in plain(text) else f"`{text}`"


def flags_of(parser: argparse.ArgumentParser) -> list[list[str]]:
    """[flag, what] of every argument but --help and subcommands."""
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest).upper()
        named = action.metavar or action.dest.upper()
        named = named if isinstance(named, str) else " ".join(named)  # a flag of several values names each
        takes = "" if action.nargs == 0 or not action.option_strings else f" {named}"
        if action.choices:
            takes = " " + "|".join(map(str, action.choices))
        rows.append([code(name + takes), plain(action.help or "")])
    return rows


def command(name: str, module: str, what: str) -> str:
    """One command: its line, and its flags."""
    text = f"### {name}\n\n`python -m tghmoe_jax.{module}`: {what}.\n\n"
    if module == "main":
        given = command_line.define_flags(["x"])
        rows = [[code(f"--{one}"), given[one].help] for one in ("config", "workdir", "debug")]
        rows += [
            [code(f"--{one}"), plain(said)] for one, said in importlib.import_module("tghmoe_jax.main")._PLACE.items()
        ]
        return text + table(("flag", "what"), rows) + "\n"
    parser = parser_of(f"tghmoe_jax.{module}")
    text += table(("flag", "what"), rows) + "\n" if (rows := flags_of(parser)) else ""
    for group in (action for action in parser._actions if isinstance(action, argparse._SubParsersAction)):
        said = {choice.dest: choice.help for choice in group._choices_actions}
        for one, below in group.choices.items():
            text += f"**{name} {one}**: {said[one]}\n\n" + table(("flag", "what"), flags_of(below)) + "\n"
    return text


def comments(file: Path) -> dict[int, str]:
    """{line: the comment at its end}."""
    with open(file, "rb") as handle:
        tokens = [token for token in tokenize.tokenize(handle.readline) if token.type == tokenize.COMMENT]
    return {token.start[0]: token.string.lstrip("# ") for token in tokens}


def keys() -> dict[str, str]:
    """{key: its comment} of `get_config`, as `data.mixture.open`. A key without one has an empty text."""
    file = Path(common.__file__)
    said, found = comments(file), {}
    tree = next(n for n in ast.parse(file.read_text()).body if getattr(n, "name", "") == "get_config")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0]).replace("['", ".").replace("']", "")
            if name.startswith("c."):
                found[name[2:]] = said.get(node.lineno, "")
    return {key: found.get(key, "") for key in flat(common.get_config())}


def flat(config: Mapping, prefix: str = "") -> dict[str, object]:
    """{dotted key: value}; an empty section is a value."""
    found = {}
    for key in config:
        value, name = config[key], f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, ConfigDict) and len(value) else {name: value}
    return found


def config_keys() -> str:
    """A table for each section."""
    said, values = keys(), flat(common.get_config())
    sections: dict[str, list] = {}
    for key, value in values.items():
        shown = "" if isinstance(value, ConfigDict) else code(repr(value))
        section = key.partition(".")[0] if "." in key else "top"
        sections.setdefault(section, []).append([code(key), shown, plain(said[key])])
    head = ("key", "embedded default", "what")
    return "\n".join(
        f"### {'Without a section' if name == 'top' else name}\n\n{table(head, rows)}"
        for name, rows in sections.items()
    )


def first_sentence(file: Path) -> str:
    """What a source file says it is for: the first line of its docstring, or of its comment at the top."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
        return said.split("\n\n")[0].partition(": `python")[0].replace("\n", " ")
    lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")]
    return lines[0] if lines else ""


def source_files() -> str:
    """A table for each folder of source."""
    text = ""
    for folder in ("tghmoe_jax", "configs", "launch", "benchmarks"):
        files = sorted(one for one in (ROOT / folder).rglob("*") if one.suffix in (".py", ".sh", ".sbatch", ".yaml"))
        places: dict[str, list] = {}
        for file in files:
            if said := first_sentence(file):
                place = file.parent.relative_to(ROOT).as_posix()
                places.setdefault(place, []).append([code(file.name), plain(said)])
        for place, rows in places.items():
            text += f"### {place}\n\n{table(('file', 'what'), rows)}\n"
    return text


def page() -> str:
    """The whole page."""
    parts = [INTRO, "## Commands\n"]
    parts += [command(name, module, what) for name, (module, what) in COMMANDS.items()]
    for name in TOOLS:
        file = ROOT / "tghmoe_jax" / f"{name.replace('.', '/')}.py"
        parts.append(command(name, name, first_sentence(file).rstrip(".")))
    experiments = sorted(ROOT.glob("configs/[!c]*.py"))
    rows = [[code(f"--config {one.stem}"), first_sentence(one)] for one in experiments]
    parts += ["## Experiments\n", table(("flag", "what"), rows)]
    parts += ["## Config keys\n", KEYS, config_keys()]
    parts += ["## Files\n", source_files()]
    return "\n".join(parts).replace("\n\n\n", "\n\n").rstrip() + "\n"


@errors.command
def main(argv: list[str]) -> int:
    parser = errors.CommandParser(prog="python -m benchmarks.reference", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    made, check = page(), parser.parse_args(argv).check
    if check and PAGE.read_text(encoding="utf-8") != made:
        print("docs/reference.md is not up to date: run python -m benchmarks.reference", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
