"""The commands `evaluate score` and `evaluate compare`: prediction files of any system in, tables and files out."""

import argparse
import json
from pathlib import Path

from tghmoe_jax import writing
from tghmoe_jax.datasets import leaks
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import bert, comparison, files, labels, outputs, protocols, provenance, verdict, vlm3d
from tghmoe_jax.evaluation.protocols import Prediction, Run
from tghmoe_jax.samples.tasks import KINDS


def add_parsers(commands) -> None:
    """Adds the options of both commands."""
    score = commands.add_parser("score", help="prediction files of any system")
    score.add_argument(
        "predictions", nargs="?", help="CSV file, folder of predictions_*.csv, or VLM3D's JSON of reports"
    )
    score.add_argument("--vlm3d", metavar="JSON", help="also write reports, or label scores, in VLM3D's form")
    score.add_argument(
        "--to", metavar="DIR", help="also write scores.txt, scores of every sample, metrics.json, manifest.json"
    )
    score.add_argument("--pred-labels", help="instead: CSV, a case and its labels (0 to 1) per row, or VLM3D's JSON")
    score.add_argument("--true-labels", help="CSV of the same cases and their true labels, 0 or 1")
    compare = commands.add_parser("compare", help="two systems on the same items")
    compare.add_argument("a", help="CSV file, folder of predictions_*.csv, or run (its newest evaluation is used)")
    compare.add_argument("b", help="the same items, answered by another system")
    for sub in (score, compare):
        sub.add_argument("--truth", metavar="JSON", help="the true reports, if predictions are a JSON of reports")
        sub.add_argument("--leaks", metavar="CSV", help="leaks.csv of the prepared set: leaked volumes are left out")
        sub.add_argument("--bert-model", metavar="DIR", help="folder of a model for BERTScore, such as roberta-large")
        sub.add_argument("--bert-layers", type=int, help=f"its layer; default {bert.LAYERS}, that of roberta-large")
        sub.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Carries out either command and prints the result. UserError for wrong flags or files."""
    if args.command == "compare":
        (a, b), _ = _read(args, args.a, args.b)
        result = comparison.compare(a, b)
        print(json.dumps(result, indent=1) if args.json else f"A  {args.a}\nB  {args.b}\n\n{comparison.table(result)}")
    elif args.pred_labels or args.true_labels:
        if args.predictions or not (args.pred_labels and args.true_labels):
            raise UserError("--pred-labels and --true-labels belong together, without predictions; give both.")
        if args.leaks or args.bert_model or args.to or args.truth:
            raise UserError("--leaks, --bert-model, --truth and --to do not apply to label tables; leave them out.")
        scored = labels.score(args.pred_labels, args.true_labels)
        if args.vlm3d:
            _write_vlm3d(args.vlm3d, vlm3d.probabilities_file(*labels.read(args.pred_labels, "--pred-labels", True)))
        print(json.dumps(scored, indent=1) if args.json else labels.table(scored))
    elif not args.predictions:
        raise UserError("name predictions to score, or --pred-labels and --true-labels.")
    else:
        _score(args)


def _write_vlm3d(path: str, content: dict[str, object]) -> None:
    if Path(path).exists():
        raise UserError(f"--vlm3d {path} exists; name a new file.")
    outputs.write_json(path, content)


def _score(args: argparse.Namespace) -> None:
    if args.to:
        folder, sources = Path(args.to), files.listed(args.predictions)
        if folder.resolve() in {file.resolve().parent for file in sources}:
            raise UserError(f"--to {folder} holds the predictions themselves; name another folder.")
        if (folder / "report.html").exists():
            raise UserError(f"--to {folder} holds the scores that `run` or a training left; name another folder.")
        digests = {file.name: provenance.digest(file) for file in sources}
    (found,), removed = _read(args, args.predictions)
    metrics = protocols.score(found)
    known = {key: value for key, value in metrics.items() if value is not None}
    if args.vlm3d:
        if "report" not in found:
            raise UserError(f"--vlm3d needs reports and {args.predictions} holds none; leave it out.")
        _write_vlm3d(args.vlm3d, vlm3d.reports_file(found["report"]))
    if args.to:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--to {folder} cannot be created ({error.strerror}); name another folder.") from error
        model = _bert_model(args)
        outputs.write_predictions(folder, found)
        outputs.write_json(folder / "metrics.json", metrics)
        writing.write(folder / "scores.txt", _told(known, found) + "\n")
        manifest = provenance.manifest(
            found, predictions=digests,
            leaks=None if args.leaks is None else {"sha256": provenance.digest(args.leaks), **removed},
            bert=None if model is None else {"sha256": model.digest, "layer": model.layers},
        )  # fmt: skip
        outputs.write_json(folder / "manifest.json", manifest)
    if args.json:
        leaked = {} if args.leaks is None else {f"leaked_{name}": count for name, count in removed.items()}
        print(json.dumps(known | leaked, indent=1))
        return
    if args.leaks:
        print("leaked items removed: " + ", ".join(f"{kind} {count}" for kind, count in removed["removed"].items()))
        print(f"leaked volumes found: {removed['volumes_found']} of the {removed['volumes']} in {args.leaks}")
        if removed["volumes"] and not removed["volumes_found"]:
            print("no leaked volume occurs: either they were left out before, or the column Key holds other names")
    if args.truth is None:  # not of a JSON file
        silent, untrue = files.left_out(args.predictions)
        for count, why in ((silent, "with a reason instead of an answer"), (untrue, "without a true answer")):
            if count:
                print(f"not scored: {count} {'row' if count == 1 else 'rows'} {why}")
    print(_told(known, found))


def _told(metrics: dict[str, object], run: Run) -> str:
    """The table, and the verdict where it can be seen: at the end."""
    return "\n".join([outputs.table(metrics, run), "", *verdict.lines(verdict.verdicts(metrics, run), metrics)])


def _read(args: argparse.Namespace, *paths: str) -> tuple[list[Run], dict[str, object]]:
    """The runs at `paths` without leaked items and with BERTScores, as asked, and what --leaks did to the first.

    That is {"removed": items by kind, "volumes": leaked ones of the table, "volumes_found": those of them in the run}.
    """
    model = _bert_model(args)
    truth = None if args.truth is None else Path(args.truth)
    runs = [vlm3d.read_run(Path(p), truth) if p.endswith(".json") else files.read_run(p) for p in paths]
    if truth is not None and not all(path.endswith(".json") for path in paths):
        raise UserError("--truth belongs to a JSON file of reports; a CSV file holds its own truth.")
    kinds = [kind for kind in KINDS if kind in runs[0]]
    removed: dict[str, object] = {}
    if args.leaks is not None:
        leaked = {key for _, key in leaks.dropped(Path(args.leaks), "test")}
        found = leaked & {one.key for ones in runs[0].values() for one in ones}
        kept = [_without(run, leaked, path) for run, path in zip(runs, paths, strict=True)]
        counts = {kind: len(runs[0][kind]) - len(kept[0].get(kind, ())) for kind in kinds}
        removed = {"removed": counts, "volumes": len(leaked), "volumes_found": len(found)}
        runs = kept
    if model is not None:
        runs = list(bert.add(dict(enumerate(runs)), model).values())
    return runs, removed


def _without(run: Run, leaked: set[str], path: str) -> dict[str, list[Prediction]]:
    """The run without items whose volume shares something with training."""
    if any(not one.key for ones in run.values() for one in ones):
        raise UserError(
            f"--leaks cannot be applied to {path}: its rows name no volume; add a column Key (or Image Path)."
        )
    kept = {kind: [one for one in ones if one.key not in leaked] for kind, ones in run.items()}
    if not any(kept.values()):
        raise UserError(f"--leaks removes every item of {path}; nothing is left to score.")
    return {kind: ones for kind, ones in kept.items() if ones}


def _bert_model(args: argparse.Namespace) -> bert.BertModel | None:
    if args.bert_model is None:
        if args.bert_layers is not None:
            raise UserError("--bert-layers belongs to --bert-model; name the model's folder.")
        return None
    return bert.BertModel(Path(args.bert_model), bert.LAYERS if args.bert_layers is None else args.bert_layers)
