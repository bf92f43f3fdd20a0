"""Reads a data set of files once, resamples its volumes and stores them in shards, with a leak report and a data card.

    python -m tghmoe_jax.prepare --config configs/data_m3d.py --config.data.root=DIR [--workers N] [--to DIR]
    python -m tghmoe_jax.prepare --check manifest.jsonl [--root DIR]      is a manifest ready to be prepared?

The result (default runs/data/<name>-<slices>x<size>) is what `--config.data.root` of a training names. A run that was
killed or stopped is resumed by the same command. Exit codes: 0 done, 2 an error that the user can fix (one sentence on
stderr; --debug adds the traceback), 130 stopped by Ctrl-C.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers are processes

from tghmoe_jax.datasets import manifest, preparing
from tghmoe_jax.errors import CommandParser, Stopped, UserError, command, run_command
from tghmoe_jax.training.command_line import parse


@command
def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser(prog="python -m tghmoe_jax.prepare", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="experiment file, e.g. configs/data_m3d.py; --config.KEY=VALUE sets a key")
    parser.add_argument("--to", help="folder of the prepared set; default runs/data/<name>-<slices>x<size>")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default one a core")
    parser.add_argument("--check", help="a manifest to check instead")
    parser.add_argument("--root", help="with --check: the folder of its volumes; default that of the manifest")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, rest = parser.parse_known_args(argv)
    if args.check:
        return check(args.check, args.root)
    if not args.config:
        raise UserError("--config is missing; name a data set, for example --config configs/data_m3d.py.")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} is too small; give 1 or more.")
    config, _ = parse(["prepare", f"--config={args.config}", *rest])
    data = config.data
    for key in ("slices", "size"):
        if data[key] < 1:
            raise UserError(f"--config.data.{key}={data[key]} is too small; give 1 or more.")
    if "://" in (args.to or ""):
        raise UserError(f"--to {args.to} is not on a disk; prepare the set on one and copy it there.")
    if "," in (args.to or ""):
        raise UserError(f"--to {args.to} holds a comma, which separates the folders of data.root; name another folder.")
    folder = Path(args.to or f"runs/data/{data.name}-{data.slices}x{data.size}")
    try:
        card = preparing.prepare(data, folder, args.workers, lambda text: print(text, flush=True))
    except (KeyboardInterrupt, Stopped) as stopped:
        print("stopped: what is prepared stays, and the same command resumes it.", file=sys.stderr)
        return getattr(stopped, "code", 130)
    leaks = sum(card["leaks"].values())
    print(
        f"{folder}: {sum(card['volumes'].values())} volumes ({card.get('with_warnings', 0)} with warnings), "
        f"{card['rejected']} rejected, {leaks} {'leak' if leaks == 1 else 'leaks'} between splits; see card.md, "
        "rejected.csv, warnings.csv and leaks.csv there"
    )
    return 0


def check(file: str, root: str | None) -> int:
    """Prints what is wrong with a manifest, a sentence a line; returns 0 where nothing is, else 2."""
    report = manifest.check_manifest(file, root)
    print(report.text())
    return 2 if report.problems else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
