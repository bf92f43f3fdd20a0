"""Compares the files of runs, models and data with the digests that were written with them.

    python -m tghmoe_jax.verify PATH...     runs, their checkpoints, exported models, `embedded`, prepared sets,
                                            drawn caches, or a folder of such caches or sets

One line for each checkpoint, model, set or cache. Exit codes: 0 nothing is damaged; 2 something is, or a PATH is none
of these.
"""

import re
import sys

from etils import epath

from tghmoe_jax import digests
from tghmoe_jax.bases import base
from tghmoe_jax.datasets import prepared
from tghmoe_jax.errors import CommandParser, UserError, command, run_command
from tghmoe_jax.training import exported, run_folder, stored

_CACHE = re.compile(r"(phantom|patients)-[0-9a-f]{16}")


def verify(path: str) -> list[tuple[epath.Path, list[str], str]]:
    """(folder, what is wrong, what else is to be said) of what lies at `path`, or of each checkpoint or cache there."""
    if path == "embedded":
        return [(epath.Path(one), *_look(epath.Path(one))) for one in (run_folder.EMBEDDED, base.EMBEDDED)]
    folder = epath.Path(run_folder.place(path, "PATH"))
    if (folder / stored.FOLDER).is_dir():
        found = [folder / stored.FOLDER / str(step) for step in stored.steps(folder / stored.FOLDER)]
    elif _known(folder):
        found = [folder]
    else:
        found = sorted(one for one in folder.iterdir() if _known(one)) if folder.is_dir() else []
    if not found:
        raise UserError(
            f"{path} is neither a run with checkpoints, a checkpoint, an exported model, a prepared set nor a folder "
            "of drawn caches; name one."
        )
    result = [(one, *_look(one)) for one in found]
    try:  # what a run says of itself has no digests but the seal of its manifest
        run_folder.read_manifest(folder)
    except UserError as error:
        result.append((folder, [str(error)], ""))
    return result


def _known(folder: epath.Path) -> bool:
    return (
        folder.parent.name == stored.FOLDER
        or exported.is_exported(folder)
        or (folder / digests.FILE).exists()
        or (folder / "prepare.json").is_file()
        or bool(_CACHE.fullmatch(folder.name))
    )


def _look(folder: epath.Path) -> tuple[list[str], str]:
    if folder.parent.name == stored.FOLDER:
        wrong = stored.undeclared(folder)
    elif (folder / "prepare.json").is_file() and not (folder / digests.FILE).exists():
        wrong = prepared.problems(folder)
    elif _CACHE.fullmatch(folder.name) or folder == epath.Path(base.EMBEDDED):
        wrong = [] if (folder / digests.FILE).exists() else [f"{digests.FILE} is missing"]
    else:
        wrong = [f"{digests.FILE} is missing"] if run_folder.lacks_digests(folder) else []
    if not wrong and not (folder / digests.FILE).exists():
        return [], "no digests (an earlier version wrote it): damage may go unnoticed"
    wrong = wrong or digests.problems(folder)
    return wrong, "" if wrong else f"whole, {len(digests.files(folder))} files"


@command
def main(argv: list[str]) -> int:
    parser = CommandParser(prog="python -m tghmoe_jax.verify", description=__doc__.split("\n")[0], allow_abbrev=False)
    what = "a run, a checkpoint, an exported model, `embedded`, a prepared set, drawn caches"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=what)
    results = [one for path in parser.parse_args(argv).paths for one in verify(path)]
    for folder, wrong, note in results:
        print(f"{folder}: {'damaged: ' + ', '.join(wrong) if wrong else note}")
    return 2 if any(wrong for _, wrong, _ in results) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
