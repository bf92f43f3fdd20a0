"""Asks a model the test questions, with every control, and scores the answers, its own or any system's.

    python -m tghmoe_jax.evaluate run RUN [--items N] [--to DIR]     a finished run (or `embedded`) on its test set
    python -m tghmoe_jax.evaluate score PREDICTIONS [--json]         prediction files of any system
    python -m tghmoe_jax.evaluate score --pred-labels A.csv --true-labels B.csv    clinical F1 of label tables
    python -m tghmoe_jax.evaluate compare A B [--json]               two systems on the same items, paired intervals

PREDICTIONS, A and B are CSV files (see evaluation/files.py) or folders of predictions_*.csv.
"""

import sys
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from tghmoe_jax.datasets.sources import DRAWN
from tghmoe_jax.errors import CommandParser, UserError, command
from tghmoe_jax.evaluation import outputs, protocols, router_tests, score_files
from tghmoe_jax.reader.examination import examine, test_sources
from tghmoe_jax.reader.opening import load_sharded
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.sharding.mesh import keep_freed_memory, make_mesh
from tghmoe_jax.studies.hard_questions import hard_questions
from tghmoe_jax.studies.second_style import second_style
from tghmoe_jax.training import compile_cache, hosts, owner, run_folder
from tghmoe_jax.training.loading import load_run

# ---- a run that exists ----------------------------------------------------------------------------------------------


def open_mesh(config: ConfigDict, experts: int) -> jax.sharding.Mesh:
    """The mesh of the config for groups of so many experts, made current. UserError where it does not fit the devices.
    """
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.expert, experts=experts)
    except ValueError as error:
        raise UserError(f"--config.mesh: {error}; change mesh.data, mesh.fsdp or mesh.expert.") from error
    jax.set_mesh(mesh)
    return mesh


def run(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """mode=evaluate: scores the latest checkpoint of `config.init_from`, into workdir/eval/<step>.

    Its test set and the longest question are the run's own, unless `config.data` names others.
    """
    loaded = load_run(config.init_from, "--config.init_from")
    mesh = open_mesh(config, loaded.model.cfg.tgh.experts)
    config = ConfigDict(config.to_dict() | {"data": data_of(config, loaded.config)})
    run_folder.check_config(config)
    reader = load_sharded(loaded, config.data.text_length, config.eval.batch, mesh)
    progress = print if hosts.first() else lambda text: None
    return evaluate_all(reader, config, epath.Path(workdir) / "eval" / str(loaded.step), progress)


def data_of(config: ConfigDict, run: dict[str, Any]) -> dict[str, Any]:
    """`data` of an evaluation: the run's own (its resolved config), and what `config.data` names instead."""
    named = {key: config.data[key] for key in ("name", "root", "manifest", "text_length") if config.data[key]}
    if config.data.drop_leaks != "none":
        named["drop_leaks"] = config.data.drop_leaks
    data = config.data.to_dict() | run["data"] | named  # a run of an earlier version lacks newer keys
    if data["name"] in DRAWN and "root" not in named:
        data["root"] = "runs/data"  # the caches of another machine are of no use
    return data


def evaluate_all(reader: Reader, config: ConfigDict, folder: epath.Path, progress=print) -> dict[str, Any]:
    """The scores of the run's own test set, into `folder`, and the other studies that the config asks for.

    `eval.transfer` items of the second drawing style go to `folder`/second_style, `eval.adversarial` items asked in
    each hard way to `folder`/adversarial.json.
    """
    metrics = examine(reader, *test_sources(config), config, folder, progress)
    if config.eval.transfer:
        second_style(reader, config, folder / "second_style", progress)
    if config.eval.adversarial and reader.groups > 1:
        ways = hard_questions(reader, config, progress)
        if hosts.first():
            outputs.write_json(folder / "adversarial.json", ways)
        progress(router_tests.table(ways))
    return metrics


# ---- the command ----------------------------------------------------------------------------------------------------


def run_again(source: str, items: int | None, to: str | None) -> dict[str, Any]:
    """Scores a finished run as its own config says, into `to` (default runs/evaluate-<name of the run>).

    With `items` only the protocols on the run's own test set are asked.
    """
    folder = run_folder.find(source, "RUN")
    config = ConfigDict(run_folder.read_config(folder))
    if "eval" not in config or not config.data.get("slices"):
        raise UserError(f"RUN={source} saw no volumes or pictures, so there is nothing to evaluate; name another run.")
    if items is not None and items < 2:
        raise UserError(f"--items {items} is too small to shuffle volumes; give 2 or more.")
    target = epath.Path(to or f"runs/evaluate-{folder.resolve().name}")
    config.init_from = source
    config.data.update({"name": "", "root": "", "manifest": "", "text_length": 0})  # the run's own, as it has them
    config.data.drop_leaks = config.data.get("drop_leaks", "none")  # runs of earlier versions have neither
    config.data.workers = config.data.get("workers", 0)
    config.max_bad_fraction = config.get("max_bad_fraction", 0.0)
    config.mesh.update({"data": -1, "fsdp": 1, "expert": 1})
    for key in ("transfer", "adversarial"):  # runs of earlier versions have none of these
        config.eval[key] = 0 if items else config.eval.get(key, 0)
    config.eval["items"] = items or config.eval["items"]
    config.eval.controls = config.eval.get("controls", protocols.CONTROLS)
    config.eval.batch = min(config.eval.batch, config.eval["items"])  # a batch of few items is not padded to a full one
    with owner.Hold(target, "--to"):
        return run(config, target)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 2 an error of the user (one sentence on stderr)."""
    parser = CommandParser(prog="python -m tghmoe_jax.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    one = commands.add_parser("run", help="a finished run on its own test set, with every control")
    one.add_argument("run", help="folder of a run, or `embedded`")
    one.add_argument("--items", type=int, help="items of each protocol; default as the run's config says")
    one.add_argument("--to", help="folder for the scores; default runs/evaluate-<name of the run>")
    score_files.add_parsers(commands)
    try:
        args = parser.parse_args(argv)
        if args.command == "run":
            keep_freed_memory()
            compile_cache.keep()
            run_again(args.run, args.items, args.to)
        else:
            score_files.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
