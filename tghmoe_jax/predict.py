"""One scan, one question, one answer; or the answers about all scans of a list (docs/asking.md).

    python -m tghmoe_jax.predict --volume scan.nii.gz --question "Which plane is this?"
    python -m tghmoe_jax.predict --checkpoint runs/stage2 --volume dicom_folder --report --json --routing routing.png
    python -m tghmoe_jax.predict --list scans.csv --questions questions.txt --to answers.csv
    python -m tghmoe_jax.predict --volume scan.nii.gz --question "Which side?" --choices "left|right" --evidence out.png
    python -m tghmoe_jax.predict --base HF_DIR --image picture.png --question "What is shown?"    a 2D base, unadapted

In Python: `tghmoe_jax.load("runs/stage2").ask("scan.nii.gz", "Which plane is this?")`. Where no checkpoint is named,
the reader embedded in the package answers, with a warning.

Exit codes: 0 done, 2 something the user can fix (one sentence on stderr; --debug adds the traceback). Answers, JSON
and pictures name no patient and no file. Axis legend: M MoE layers, E experts, T tokens.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the C++ logs of XLA would drown the answer

from tghmoe_jax.errors import CommandParser, UserError, command, run_command
from tghmoe_jax.evaluation import DISCLAIMER
from tghmoe_jax.reader import many
from tghmoe_jax.reader.opening import load, load_picture_reader, refuse_report
from tghmoe_jax.training import compile_cache
from tghmoe_jax.training.domain import asks_report


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, checked as far as it can be without the run or the scan."""
    parser = CommandParser(
        prog="python -m tghmoe_jax.predict", allow_abbrev=False, description="Ask a trained run about one CT scan.",
        epilog=DISCLAIMER,
    )  # fmt: skip
    add = parser.add_argument
    add("--checkpoint", metavar="RUN", help="folder of a run; default the embedded reader, trained on phantoms")
    add("--volume", metavar="PATH", help="NIfTI, NRRD, MetaImage or .npy file, DICOM folder or file")
    add("--base", metavar="DIR", help="ask a 2D base model about --image instead, to check it; `embedded` is one")
    add("--image", metavar="FILE", help="picture for --base")
    add("--question", metavar="TEXT", help="what to ask")
    add("--choices", action="append", default=[], metavar="A|B|C|D", help="2 to 4 options, or one per flag")
    add("--report", action="store_true", help="write a report instead of answering a question")
    add("--task", metavar="TASK", help="force the experts of a task, report or vqa, instead of the router's choice")
    add("--routing", metavar="PNG", help="picture of the expert load and of the first expert of each patch")
    add("--min-accuracy", type=float, metavar="SHARE", help="answer only if such answers were right this often")
    add("--evidence", metavar="PNG", help="picture of the part on which the answer depends; also printed in mm")
    add("--json", action="store_true", help="print one JSON object")
    add("--series", type=int, metavar="N", help="which series of a DICOM folder, counting from 1")
    add("--assume-hu", action="store_true", help="read values that do not look like HU as HU, with a warning")
    add("--new-tokens", type=int, metavar="N", help="length limit of the answer; default as in the run's evaluation")
    add(
        "--allow-out-of-domain",
        action="store_true",
        help="allow reports and confidences of a model that saw no patient",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    many.add_flags(add)
    args = parser.parse_args(argv)
    many.check_flags(args)
    listed = args.list or args.merge
    if args.base or args.image:
        of_scans = (
            "checkpoint", "volume", "report", "choices", "task", "routing", "evidence", "series", "assume_hu",
            "min_accuracy",
        )  # fmt: skip
        if not (args.base and args.image and args.question):
            raise UserError("--base DIR, --image FILE and --question TEXT belong together; give all three.")
        if wrong := [name.replace("_", "-") for name in of_scans if getattr(args, name)]:
            raise UserError(f"--{wrong[0]} belongs to --volume; leave it out with --base and --image.")
    elif not (args.volume or listed):
        raise UserError("--volume is missing; name a scan, or a picture with --image and --base.")
    if not listed and args.report == (args.question is not None):
        raise UserError("give either --question TEXT or --report.")
    args.choices = [option for part in args.choices for option in part.split("|")]
    if args.report and args.choices:
        raise UserError("--choices belongs to --question; leave it out with --report.")
    if args.report and args.min_accuracy is not None:
        raise UserError("--min-accuracy belongs to --question: a report is not right or wrong; leave it out.")
    if args.report and args.task not in (None, "report"):
        raise UserError(f"--task {args.task} contradicts --report; leave one of them out.")
    if args.new_tokens is not None and args.new_tokens < 1:
        raise UserError(f"--new-tokens {args.new_tokens} must be 1 or more.")
    if args.series is not None and args.series < 1:
        raise UserError(f"--series {args.series} must be 1 or more; series count from 1.")
    for flag, name in (("--routing", args.routing), ("--evidence", args.evidence)):
        if name is None:
            continue
        picture = Path(name)
        if picture.suffix.lower() != ".png":
            raise UserError(f"{flag} {name} must name a .png file.")
        if os.path.lexists(picture):
            raise UserError(f"{flag} {name} exists and is never overwritten; name a new file.")
        if not picture.parent.is_dir() or not os.access(picture.parent, os.W_OK):
            raise UserError(f"{flag} {name} is not in a writable folder; create the folder first.")
    return args


def run(args: argparse.Namespace) -> str:
    """Answers what the command line asks; returns what to print."""
    begun = time.perf_counter()
    if args.list or args.merge:
        return many.run(args)
    if args.base:
        answer = load_picture_reader(args.base).ask(args.image, args.question, new_tokens=args.new_tokens)
        seconds = round(time.perf_counter() - begun, 2)
        record = {"text": answer.text, "warnings": answer.warnings, "base": str(args.base)}
        record |= {"disclaimer": DISCLAIMER, "seconds": seconds}
        return json.dumps(record, indent=1) if args.json else str(answer)
    asks = asks_report(args.question, args.choices, args.task)
    if asks and not args.allow_out_of_domain:
        refuse_report(args.checkpoint or "embedded", asks)
    reader = load(args.checkpoint or "embedded")
    options = {
        "series": args.series, "assume_hu": args.assume_hu, "new_tokens": args.new_tokens,
        "allow_out_of_domain": args.allow_out_of_domain, "evidence": args.evidence is not None,
    }  # fmt: skip
    if args.report:
        answer = reader.report(args.volume, **options)
    else:
        options |= {"task": args.task, "min_accuracy": args.min_accuracy}
        answer = reader.ask(args.volume, args.question, args.choices, **options)
    if args.routing:
        answer.draw_routing(args.routing)
    if args.evidence:
        answer.draw_evidence(args.evidence)
    if not args.json and (pictures := [path for path in (args.routing, args.evidence) if path]):
        print(f"wrote {' and '.join(pictures)}", file=sys.stderr)
    answer = dataclasses.replace(answer, seconds=round(time.perf_counter() - begun, 2))
    return json.dumps(answer.to_json(), indent=1, allow_nan=False) if args.json else str(answer)


@command
def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code."""
    args = parse(argv)
    compile_cache.keep()
    print(run(args))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
