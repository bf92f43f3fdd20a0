"""Asks a model the test questions, with every control, and scores the answers, its own or any system's.

    python -m tghmoe_jax.evaluate run RUN [--items N] [--to DIR]     a finished run (or `embedded`) on its test set
    python -m tghmoe_jax.evaluate run RUN --base DIR --protocol slices    the same items, asked of an unadapted 2D base
    python -m tghmoe_jax.evaluate score PREDICTIONS [--json]         prediction files of any system
    python -m tghmoe_jax.evaluate score --pred-labels A.csv --true-labels B.csv    F1, CRG, AUROC of label tables
    python -m tghmoe_jax.evaluate compare A B [--json]               two systems on the same items, paired intervals
    python -m tghmoe_jax.evaluate pack RUN [--to FOLDER]             predictions and scores in a folder for others

PREDICTIONS, A and B are CSV files (see evaluation/files.py) or folders of predictions_*.csv.
"""

import sys
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from tghmoe_jax import writing
from tghmoe_jax.bases.base import describe, load_config
from tghmoe_jax.datasets.prepared import read_parameters
from tghmoe_jax.datasets.sources import DRAWN, make_source
from tghmoe_jax.errors import CommandParser, UserError, command, run_command
from tghmoe_jax.evaluation import outputs, packing, router_tests, score_files
from tghmoe_jax.reader.examination import calibrate, examine, test_sources, true_loss
from tghmoe_jax.reader.opening import load_sharded
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.reader.slice_protocol import load_slice_reader
from tghmoe_jax.sharding.mesh import make_mesh
from tghmoe_jax.studies.hard_questions import hard_questions
from tghmoe_jax.training import compile_cache, heap, hosts, owner, run_folder, selection
from tghmoe_jax.training.loading import load_run

MOST_SLICES = 1024  # of a volume of a raw data set that a 2D base is asked about

# ---- a run that exists ----------------------------------------------------------------------------------------------


def open_mesh(config: ConfigDict, experts: int) -> jax.sharding.Mesh:
    """The config's mesh for groups of `experts` experts, made current. UserError where it does not fit the devices."""
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
    return evaluate_all(reader, config, epath.Path(workdir) / "eval" / str(loaded.step), progress, config.init_from)


def data_of(config: ConfigDict, run: dict[str, Any]) -> dict[str, Any]:
    """`data` of an evaluation: the run's own (its resolved config), and what `config.data` names instead."""
    named = {key: config.data[key] for key in ("name", "root", "manifest", "text_length") if config.data[key]}
    if config.data.drop_leaks != "none":
        named["drop_leaks"] = config.data.drop_leaks
    data = config.data.to_dict() | run["data"] | named  # a run of an earlier version lacks newer keys
    if data["name"] in DRAWN and "root" not in named:
        data["root"] = "runs/data"  # the caches of another machine are of no use
    return data


def evaluate_all(
    reader: Reader, config: ConfigDict, folder: epath.Path, progress=print, name: str = ""
) -> dict[str, Any]:
    """The scores of the run's own test set, into `folder`, and the other studies that the config asks for.

    Confidence means what the run stores, or else what `eval.calibration` validation items say; it goes to
    `folder`/calibration.json. `eval.transfer` items of each drawing style that is never trained on go to
    `folder`/second_style and `folder`/third_style, `eval.adversarial` items asked in each hard way to
    `folder`/adversarial.json. The run's own set comes last, so that its verdict ends what is printed. `name` is the
    run, for the command to run next.
    """
    stored = reader.run.calibration if reader.run else {}
    calibrated = stored or calibrate(reader, config, progress)
    if hosts.first() and calibrated:
        folder.mkdir(parents=True, exist_ok=True)
        outputs.write_json(folder / run_folder.CALIBRATION, {kind: one.to_json() for kind, one in calibrated.items()})
    if config.eval.transfer:
        other = ConfigDict(config.to_dict())
        other.eval["items"] = config.eval.transfer
        for style, wording in (("second", "second"), ("third", "seen")):  # the third has no wording of its own
            progress(f"the {style} drawing style, never trained on:")
            source = make_source(config.data, "test", config.eval.transfer, wording, style)
            examine(reader, source, source, other, folder / f"{style}_style", progress, calibrated)
    if config.eval.adversarial and reader.groups > 1:
        ways = hard_questions(reader, config, progress)
        if hosts.first():
            folder.mkdir(parents=True, exist_ok=True)
            outputs.write_json(folder / "adversarial.json", ways)
            writing.write(folder / "adversarial.txt", router_tests.table(ways) + "\n")
        progress(f"asked in hard ways: {folder / 'adversarial.txt'}")
    return examine(reader, *test_sources(config), config, folder, progress, calibrated, name)


def validate(reader: Reader, config: ConfigDict, folder: epath.Path, progress=print) -> dict[str, Any]:
    """The scores of the validation split without controls, and `loss`, the mean negative log-likelihood a token of its
    true answers: what the checkpoints of a run are chosen by."""
    source = make_source(config.data, "validation", config.eval["items"], "seen")
    own = ConfigDict(config.to_dict() | {"eval": config.eval.to_dict() | {"controls": ()}})
    metrics = examine(reader, source, source, own, folder, lambda text: None)
    metrics = {selection.LOSS: true_loss(reader, source, own)} | metrics
    if hosts.first():
        outputs.write_json(folder / "metrics.json", metrics)
    return metrics


# ---- the command ----------------------------------------------------------------------------------------------------


def run_again(source: str, items: int | None, to: str | None, base: str = "") -> dict[str, Any]:
    """Scores a finished run as its own config says, into `to` (default runs/evaluate-<name of the run>).

    With `items` only the protocols on the run's own test set are asked. With `base` they are asked of the 2D base in
    that folder, slice by slice (default of `to`: runs/evaluate-<name of the base>-slices).
    """
    folder = run_folder.find(source, "RUN")
    config = ConfigDict(run_folder.read_config(folder))
    if "eval" not in config or not config.data.get("slices"):
        raise UserError(f"RUN={source} saw no volumes or pictures, so there is nothing to evaluate; name another run.")
    root = config.data.get("root", "")
    if config.data.name not in DRAWN and not all(Path(one).is_dir() for one in str(root).split(",")):
        raise UserError(
            f"RUN={source} was trained on data in {root}, which is not there; use python -m tghmoe_jax.main --config "
            f"configs/evaluate.py --config.init_from={source} --config.data.root=DIR with the folder of its data."
        )
    if items is not None and items < 2:
        raise UserError(f"--items {items} is too small to shuffle volumes; give 2 or more.")
    name = f"{Path(base).resolve().name}-slices" if base else folder.resolve().name
    target = epath.Path(to or f"runs/evaluate-{name}")
    config.init_from = source
    config.data.update({"name": "", "root": "", "manifest": "", "text_length": 0})  # the run's own, as it has them
    config.mesh.update({"data": -1, "fsdp": 1, "expert": 1})
    if items:
        config.eval.update({"items": items, "transfer": 0, "adversarial": 0})
    config.eval.batch = min(config.eval.batch, config.eval["items"])  # a batch of few items is not padded to a full one
    with owner.Hold(target, "--to"):
        return ask_base(base, folder, config, target) if base else run(config, target)


def ask_base(base: str, folder: epath.PathLike, config: ConfigDict, target: epath.Path) -> dict[str, Any]:
    """The scores of a 2D base on the test items of the run in `folder`, by reader/slice_protocol.py."""
    data = ConfigDict(data_of(config, run_folder.read_config(folder)))
    data.channels = "medgemma"
    listed = "," in data.root  # a list holds prepared sets alone
    if data.name not in DRAWN and not listed and read_parameters(data.root) is None:  # raw: its own slices and size
        data.slices, data.size = MOST_SLICES, describe(load_config(base, "--base")).tower.image_size
    config = ConfigDict(config.to_dict() | {"data": data.to_dict()})
    config.eval.update({"transfer": 0, "adversarial": 0})
    reader = load_slice_reader(base, tuple(config.model.tasks), data.slices)
    metrics = evaluate_all(reader, config, target / "eval" / "0", print)
    print(f"next     python -m tghmoe_jax.evaluate compare {target} {folder}")
    return metrics


@command
def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code: 0 done, 2 an error of the user (one sentence on stderr)."""
    parser = CommandParser(prog="python -m tghmoe_jax.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    one = commands.add_parser("run", help="a finished run on its own test set, with every control")
    one.add_argument("run", help="folder of a run, or `embedded`")
    one.add_argument("--items", type=int, help="items of each kind; default that of the run's config")
    one.add_argument("--to", help="folder for the scores; default runs/evaluate-<name of the run>")
    score_files.add_parsers(commands)
    packing.add_parser(commands)
    one.add_argument("--base", default="", help="folder of a 2D base that answers the items of RUN instead")
    one.add_argument("--protocol", choices=("slices",), help="how --base gets a volume: as slices in one prompt")
    args = parser.parse_args(argv)
    if args.command == "run" and bool(args.base) != bool(args.protocol):
        parser.error("--base and --protocol slices belong together")
    if args.command == "run":
        compile_cache.keep()
        run_again(args.run, args.items, args.to, args.base)
    elif args.command == "pack":
        print(f"packed into {packing.pack(args.run, args.to)}")
    else:
        score_files.run(args)
    return 0


if __name__ == "__main__":
    heap.keep_freed_memory()
    sys.exit(run_command(main))
