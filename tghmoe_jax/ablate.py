"""Trains and compares: the rows of an ablation, or the two sides of a question about your own data.

    python -m tghmoe_jax.ablate [--rows full,guidance=image] [--seeds N] [--workdir runs/ablations] [--config.KEY=VALUE]
    python -m tghmoe_jax.ablate --config configs/stage1.py --question slices [--plan] [--seeds N] [--config.KEY=VALUE]

A killed command resumes where it stopped. The first form writes the table of what is finished to <workdir>/table.md and
table.json after every row; `--table` only rewrites it. Two commands may share a workdir if rows with the same first
stage are left to one of them. The second form says what the experiment can see and costs (`--plan`: that alone), and
leaves its verdict in <workdir>/<question>.txt and .json; the questions of one config share a workdir and its runs
(docs/deciding.md).
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tghmoe_jax import writing
from tghmoe_jax.errors import CommandParser, UserError, command, run_command
from tghmoe_jax.evaluation import paired_seeds
from tghmoe_jax.sharding.mesh import simulate_devices
from tghmoe_jax.studies import ablate, deciding
from tghmoe_jax.training import compile_cache, heap


def chosen(known: Iterable[str], names: str) -> list[str]:
    """The rows of a comma-separated list, in the order of the table. UserError names an unknown one."""
    wanted = list(known) if names == "all" else [name for name in names.split(",") if name]
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"--rows {unknown[0]} is unknown; use all or some of {', '.join(known)}.")
    if not wanted:
        raise UserError(f"--rows is empty; use all or some of {', '.join(known)}.")
    return [name for name in known if name in wanted]


@command
def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code: 0 done, 2 an error of the user (one sentence on stderr)."""
    parser = CommandParser(prog="python -m tghmoe_jax.ablate", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", default="all", help="comma-separated rows of the config file; default all")
    parser.add_argument("--seeds", type=int, help="seeds of every row, default as it says; of a question, default 3")
    parser.add_argument("--workdir", help="folder of the runs; default runs/ablations, of a question runs/decisions")
    parser.add_argument("--config", help="the rows, default configs/ablations.py; --config.KEY=VALUE changes all")
    parser.add_argument("--table", action="store_true", help="train nothing; tabulate the finished runs")
    parser.add_argument("--question", choices=deciding.QUESTIONS, help="ask this about the data of --config instead")
    parser.add_argument("--plan", action="store_true", help="of a question: say what it can see and costs, no more")
    flags = [one for one in argv if one.startswith("--config.")]
    args = parser.parse_args([one for one in argv if one not in flags])
    if args.question and (args.rows != "all" or args.table):
        parser.error("--question takes neither --rows nor --table")
    if args.question and not args.config:
        parser.error("--question needs --config, an experiment that trains on your data, such as configs/stage1.py")
    if args.plan and not args.question:
        parser.error("--plan belongs to --question")
    if args.seeds is not None and args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} is too small; give 1 or more.")
    if bare := [one for one in flags if "=" not in one]:
        raise UserError(f"{bare[0]} has no value; write {bare[0]}=VALUE.")
    workdir = Path(args.workdir or ("runs/decisions" if args.question else "runs/ablations"))
    if not args.question:
        table = ablate.Ablation.of(args.config or "configs/ablations.py", workdir, flags)
        rows = chosen(table.rows, args.rows)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be created ({error.strerror}); name another.") from error
    writing.refuse_links(workdir, os.listdir(workdir), "--workdir")
    if args.table:
        ablate.write_table(table, rows, args.seeds)
        return 0
    simulate_devices()
    compile_cache.keep()
    if args.question:
        experiment = deciding.Experiment(args.question, args.config, workdir, tuple(flags))
        return deciding.decide(experiment, args.seeds or paired_seeds.LEAST_SEEDS, args.plan)
    for seed in range(args.seeds or max(table.rows[row].seeds for row in rows)):
        for row in (row for row in rows if seed < (args.seeds or table.rows[row].seeds)):
            table.run(row, seed)
            ablate.write_table(table, rows, args.seeds)
    return 0


if __name__ == "__main__":
    heap.keep_freed_memory()
    sys.exit(run_command(main))
