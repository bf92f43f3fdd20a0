"""Compares the files of runs, checkpoints and exported models with the digests that were written with them.

    python -m tghmoe_jax.verify PATH...     runs, their checkpoints, exported models, or `embedded`

One line for each checkpoint or model. Exit codes: 0 nothing is damaged; 2 something is, or a PATH is none of these.
"""

import sys

from etils import epath

from tghmoe_jax.errors import CommandParser, UserError, command, run_command
from tghmoe_jax.training import checkpoints, digests, exported, run_folder


def verify(path: str) -> list[tuple[epath.Path, list[str], str]]:
    """(folder, what is wrong, what else is to be said) of each checkpoint of a run, or of the one thing at `path`."""
    folder = run_folder.EMBEDDED if path == "embedded" else run_folder.place(path, "PATH")
    folder = epath.Path(folder)
    if (folder / checkpoints.FOLDER).is_dir():
        found = [folder / checkpoints.FOLDER / str(step) for step in checkpoints.steps(folder / checkpoints.FOLDER)]
    elif folder.parent.name == checkpoints.FOLDER or exported.is_exported(folder) or (folder / digests.FILE).exists():
        found = [folder]
    else:
        found = []
    if not found:
        raise UserError(f"{path} is neither a run with checkpoints, a checkpoint nor an exported model; name one.")
    result = [(one, *_look(one)) for one in found]
    try:  # what a run says of itself has no digests but the seal of its manifest
        run_folder.read_manifest(folder)
    except UserError as error:
        result.append((folder, [str(error)], ""))
    return result


def _look(folder: epath.Path) -> tuple[list[str], str]:
    if folder.parent.name == checkpoints.FOLDER:
        wrong = checkpoints.undeclared(folder)
    else:
        wrong = [f"{digests.FILE} is missing"] if run_folder.lacks_digests(folder) else []
    if not wrong and not (folder / digests.FILE).exists():
        return [], "no digests (an earlier version wrote it): damage may go unnoticed"
    wrong = wrong or digests.problems(folder)
    return wrong, "" if wrong else f"whole, {len(digests.files(folder))} files"


@command
def main(argv: list[str]) -> int:
    parser = CommandParser(prog="python -m tghmoe_jax.verify", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a run, a checkpoint, an exported model, `embedded`")
    results = [one for path in parser.parse_args(argv).paths for one in verify(path)]
    for folder, wrong, note in results:
        print(f"{folder}: {'damaged: ' + ', '.join(wrong) if wrong else note}")
    return 2 if any(wrong for _, wrong, _ in results) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
