"""Gives the commands hostile files, and checks what they print, write and refuse.

    python -m benchmarks.hostile [--values 360] [--seed 0]

Three parts: values of the wrong kind in config.json, manifest.json and model/config.json of a run and of an exported
model; texts that are formulas, escape sequences or Markdown, wherever a text of a file comes out again; links where the
commands write. Possible outcomes:

    refused      exit code 2 and one sentence
    harmless     exit code 0, and everything below holds
    CHANGED      a file outside the named folder is not what it was
    RAW          a control character on the terminal, a formula in a table, a stranger's heading or link in a card
    LOST         a text is not read back as it was, or its scores differ
    TRACEBACK    anything else
"""

import argparse
import collections
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

from benchmarks.damage import table
from tghmoe_jax import convert, digests, evaluate, predict, prepare, train, verify
from tghmoe_jax.bases.base import EMBEDDED
from tghmoe_jax.errors import command
from tghmoe_jax.evaluation import files
from tghmoe_jax.training import checkpoints, run_folder
from tghmoe_jax.training.command_line import parse
from tghmoe_jax.training.loading import load_run
from tghmoe_jax.training.step import TrainState
from tghmoe_jax.weights import storage

BAD = ("CHANGED", "RAW", "LOST", "TRACEBACK")
FILES = ("config.json", "manifest.json", "model/config.json")
STEP = 2
ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, str]
# Newlines and tabs are the program's own, or stand for themselves in a report.
_RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def run(main: Callable[[list[str]], int], *argv: object) -> tuple[int | str, str]:
    """Exit code, or the exception, and all that was printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main([str(one) for one in argv])
        except SystemExit as error:
            code = error.code or 0
        except Exception as error:  # what a user would see as a traceback
            code = f"{type(error).__name__}: {error}"
    return code, said.getvalue()


@command
def train_as_main(argv: list[str]) -> int:
    return train.run(*parse(argv))


def judged(code: int | str, said: str) -> str:
    """The outcome by exit code and terminal alone."""
    errors = [line for line in said.splitlines() if line.startswith("error: ") or ": damaged: " in line]
    if code not in (0, 2) or len(errors) != (code == 2) or "Traceback" in said:
        return "TRACEBACK"
    return "RAW" if _RAW.search(said) else "refused" if code else "harmless"


def record(what: str, kind: str, outcome: str, said: object) -> Record:
    return {"what": what, "kind": kind, "outcome": outcome, "said": str(said)}


# ---- a run and an exported model -------------------------------------------------------------------------------------


def write_run(folder: Path) -> Path:
    """A finished run with the parameters of the embedded reader, as a training leaves it."""
    whole = load_run("embedded", "--checkpoint")
    described = {key: whole.manifest[key] for key in ("git", "base", "domain", "input_ranges", "scores")}
    config = ConfigDict(whole.config)
    config.train.steps = STEP
    files_of_base = run_folder.model_folder(run_folder.EMBEDDED)
    run_folder.write_description(
        folder, config, run_folder.read_base_config(run_folder.EMBEDDED), files_of_base, "", described
    )
    params = {path: jnp.asarray(leaf) for path, leaf in whole.params.items()}
    store = checkpoints.Checkpoints(folder, keep=1)
    iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
    store.save(TrainState(jnp.int32(STEP), {}, params, optax.adam(0.0).init({"none": jnp.zeros(1)})), iterator)
    store.close()
    return folder


def scan(folder: Path) -> Path:
    """A small volume of a unit interval."""
    values = np.random.default_rng(0).random((16, 64, 64), np.float32)
    np.save(folder / "scan.npy", values, allow_pickle=False)
    return folder / "scan.npy"


# ---- values of the wrong kind ----------------------------------------------------------------------------------------

# Texts, numbers, lists and objects where another kind is due, and sizes that no machine has.
WRONG = (
    None, True, -1, 0.5, 10_000_000, 1 << 200, float("nan"), float("inf"), "", "16", "\x1b[31mred", "\ud800", [], [[]],
    ["x"], [1, "x", None], {}, {"x": 1}, {"layers": {"x": []}},
)  # fmt: skip
WHOLE = ("200,000 brackets", "no JSON", "a list", "half a file", "UTF-16", "huge")  # of a file


def places(value: object, above: tuple = ()) -> Iterator[tuple]:
    """The path of every value of a JSON file, sections too."""
    for key, one in value.items() if isinstance(value, dict) else ():
        yield (*above, key)
        yield from places(one, (*above, key))


def spoiled(text: str, kind: str) -> bytes:
    """A whole file of the wrong kind."""
    return {
        "200,000 brackets": b"[" * 200_000, "no JSON": b"\x00\xff", "a list": f"[{text}]".encode(),
        "half a file": text[: len(text) // 2].encode(), "UTF-16": text.encode("utf-16"),
        "huge": text.encode() + b" " * (1 << 25),
    }[kind]  # fmt: skip


def commands(file: str, folder: Path, volume: Path, out: Path) -> dict[str, Callable[[], tuple[int | str, str]]]:
    """What reads such a file of a run, cheap enough to be done hundreds of times."""
    asked = ("--volume", volume, "--question", "Which plane is this?", "--new-tokens", 2)
    acts = {
        "predict": lambda: run(predict.main, "--checkpoint", folder, *asked),
        "convert": lambda: run(convert.main, "--from", folder, "--to", out, "--export"),
        "verify": lambda: run(verify.main, folder),
    }
    flags = ("main", f"--config={ROOT / 'configs' / 'stage2.py'}", f"--workdir={folder}")
    of_config = {  # refused once the config is read
        "train": lambda: run(train_as_main, *flags),
        "evaluate": lambda: run(evaluate.main, "run", folder, "--items", 1),
    }
    return acts | (of_config if file == "config.json" else {})


def wrong_values(count: int, seed: int, folder: Path) -> list[Record]:
    """Values, files and commands go round; the digests of the exported model are made to fit, as a stranger can."""
    rng, found, volume = np.random.default_rng(seed), [], scan(folder)
    whole = {"run": write_run(folder / "run"), "model": Path(shutil.copytree(run_folder.EMBEDDED, folder / "model"))}
    plans = []
    for kept, name in ((kept, name) for kept in whole for name in FILES):
        value = json.loads((whole[kept] / name).read_text())
        # Of long lists that hardly anything reads, packages and scores, the list alone.
        own = [path for path in places(value) if path[0] not in ("packages", "scores") or len(path) == 1]
        own += [(kind,) for kind in WHOLE]
        rng.shuffle(own)
        plans.append([(kept, name, tuple(path)) for path in own])
    for number in range(count):
        own = plans[number % len(plans)]
        kept, name, path = own[number // len(plans) % len(own)]
        place = whole[kept] / name
        before, wrong = place.read_bytes(), WRONG[int(rng.integers(len(WRONG)))]
        if path[0] in WHOLE:
            place.write_bytes(spoiled(before.decode(), path[0]))
        else:
            value = json.loads(before)
            section = value
            for key in path[:-1]:
                section = section[key]
            section[path[-1]] = wrong
            place.write_text(json.dumps(value))
        if kept == "model":
            digests.write(whole[kept], digests.of_files(whole[kept], digests.files(whole[kept])))
        acts = commands(name, whole[kept], volume, folder / "out")
        act = list(acts)[number // len(plans) % len(acts)]
        code, said = acts[act]()
        place.write_bytes(before)
        shutil.rmtree(folder / "out", ignore_errors=True)
        kind = f"{act} of a {kept}"
        found.append(record(name, kind, judged(code, said), f"{'.'.join(path)} = {wrong!r}: {code} {said[-300:]}"))
    return found


# ---- texts -----------------------------------------------------------------------------------------------------------

TEXTS = (
    # formulas, as a spreadsheet finds them, and what begins like one of ours
    "=1+1", "=cmd|'/C calc'!A0", "+1+1", "-2+3", "- no nodule", "@SUM(1+1)", "\t=1+1", "\r=1+1", " =1+1", "'=1+1",
    "''=1", "'", "'tis a scan", "\uff1d1+1", "=HYPERLINK(\"http://x.y\")", "-3.5", '","=1+1","', "a\n=1+1", "+",
    # the terminal
    "\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x9b31mred", "done\rfailed", "ab\x08\x08cd", "\x00", "\u202eevil", "a\u2028b",
    "\u2066left\u2069", "\x7f", "\x1b]8;;http://x.y\x1b\\link\x1b]8;;\x1b\\",
    # pages
    "# Approved for clinical use", "x\n\n# Approved for clinical use", "x\n---\nlicense: mit\n---", "[click](http://x.y)",
    "![x](http://x.y/z.png)", "<script>alert(1)</script>", "<h1>Approved</h1>", "http://x.y/z", "x\nApproved\n======",
    "| a | b |\n|---|---|",
)  # fmt: skip


def card_outcome(card: str, honest: str) -> str:
    """Whether a card has the headings, rows and tags of an honest one and no link."""
    shape = lambda text: [re.match(r"#+ |\||- \*?\*?|-+$|=+$|$|", line)[0] for line in text.split("\n")]  # noqa: E731
    plain = re.sub(r"\\.", "", card)
    if _RAW.search(card) or shape(card) != shape(honest) or re.search(r"[<>]|\]\(|https?:|www\.", plain):
        return "RAW"
    return "harmless"


def in_card(text: str, model: Path, out: Path) -> tuple[str, str]:
    """The card of a model whose manifest says the text wherever it may say one."""
    manifest = json.loads((model / "manifest.json").read_text())
    own = dict.fromkeys(("name", "domain", "dtype", "files"), text) | {"git": {"commit": text}}
    scores = {f"{text}{i}/{Path(name).name}": one for i, (name, one) in enumerate(manifest["scores"].items())}
    changed = run_folder.sealed(manifest | own | {"base": {"base": text, "init_from": text}, "scores": scores})
    kept = (model / "manifest.json").read_text()
    (model / "manifest.json").write_text(json.dumps(changed))
    digests.write(model, digests.of_files(model, digests.files(model)))
    code, said = run(convert.main, "--from", model, "--to", out, "--export")
    (model / "manifest.json").write_text(kept)
    if (outcome := judged(code, said)) != "harmless":
        return outcome, said
    honest = (model / "README.md").read_text()
    return card_outcome((out / "README.md").read_text(), honest), (out / "README.md").read_text()[:900]


def in_tables(text: str, folder: Path, out: Path) -> tuple[str, str]:
    """Scores of predictions that say the text, written again and scored again."""
    folder.mkdir()
    head = ["Question Type", "Question", "Answer", "Answer Choice", "Pred", "Key", "Case"]
    rows = [["plane", "Q? Choices: A. x B. y", "x", "A", "A. x", "scan", "case"] for _ in range(4)]
    for column in (1, 2, 4, 5, 6):
        rows[0][column] = f"{text}{rows[0][column]}" if column == 1 else text
    rows[1][0] = text
    with open(folder / "predictions_closed.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    code, said = run(evaluate.main, "score", folder, "--to", out)
    again, second = run(evaluate.main, "score", out, "--to", out.with_name("again"))
    if (outcome := judged(code, said)) != "harmless" or again != 0:
        return (outcome if code == again else "LOST"), said
    cells = [row for row in csv.reader(io.StringIO((out / "predictions_closed.csv").read_text(), newline=""))]
    if any(_FORMULA.match(cell) for row in cells for cell in row if not re.fullmatch(r"-?\d+(\.\d+)?", cell)):
        return "RAW", str(cells)
    tables = [files.read_run(one)["closed"] for one in (folder, out, out.with_name("again"))]
    texts = [[(one.question, one.answer, one.output, one.type, one.key) for one in ones] for ones in tables]
    same = all(one == texts[0] for one in texts) and said == second
    return ("harmless" if same else "LOST"), said


def in_tensors(text: str, folder: Path, out: Path) -> tuple[str, str]:
    """What is said of a base with a tensor of that name, and of an architecture of it."""
    shutil.copytree(EMBEDDED, folder)
    kept = {name: tensor.load() for name, tensor in storage.read_tensors(folder).items()}
    storage.write_tensors(folder, kept | {text: np.zeros(1, np.float32)})
    first = run(convert.main, "--from", folder, "--to", out)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [text], "model_type": text}))
    second = run(convert.main, "--from", folder, "--to", out)
    return next((judged(*one) for one in (first, second) if judged(*one) != "refused"), "refused"), f"{first} {second}"


def in_manifest(text: str, folder: Path, out: Path) -> tuple[str, str]:
    """What a check says of a user's manifest with the text in every key, and what a prepared set of it holds."""
    folder.mkdir()
    volume = scan(folder).name
    line = {
        "volume": volume,
        "question": f"Q {text}",
        "answer": f"{text}a",
        "type": text,
        "case": text,
        "split": "train",
    }
    lines = [line, line | {"type": "plane", "case": "a", "question": "Q"}, line | {"volume": text}, line | {text: text}]
    (folder / "m.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    checked = run(prepare.main, "--check", folder / "m.jsonl")
    (folder / "m.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines[:2]))
    flags = ("name=manifest", f"root={folder}", "manifest=m.jsonl", "slices=8", "size=16")
    made = run(
        prepare.main, f"--config={ROOT / 'configs' / 'data_manifest.py'}", "--to", out, "--workers=1",
        *(f"--config.data.{flag}" for flag in flags),
    )  # fmt: skip
    said = f"{checked} {made}"
    if checked[0] != 2 or _RAW.search(checked[1]):
        return ("RAW" if checked[0] == 2 else "TRACEBACK"), said
    if (outcome := judged(*made)) == "harmless":
        rows = [row for file in out.glob("*.csv") for row in csv.reader(io.StringIO(file.read_text(), newline=""))]
        outcome = "RAW" if any(_FORMULA.match(cell) for row in rows for cell in row) else outcome
        named = [line for line in (out / "card.md").read_text().split("\n") if line.startswith("#")]
        outcome = outcome if len(named) == 1 else "RAW"
    return outcome, said


def hostile_texts(count: int, folder: Path) -> list[Record]:
    """Each text in a card, in tables, among tensors and in a manifest."""
    model, found = Path(shutil.copytree(run_folder.EMBEDDED, folder / "model")), []
    honest = folder / "honest"
    run(convert.main, "--from", model, "--to", honest, "--export")
    acts = {"card": in_card, "tables": in_tables, "tensors": in_tensors, "manifest": in_manifest}
    for number, text in enumerate(TEXTS[:count]):
        for what, act in acts.items():
            own = folder / f"{what}-{number}"
            outcome, said = act(text, honest if what == "card" else own, own.with_name(own.name + "-out"))
            found.append(record(what, "text", outcome, f"{text!r}: {said[-900:]}"))
            for left in folder.glob(f"{what}-{number}*"):
                shutil.rmtree(left)
        shutil.rmtree(folder / "again", ignore_errors=True)
    return found


# ---- links -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """{path: digest of the file, or where a link leads}."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


_OF_RUN = (
    "config.json", "manifest.json", "params.txt", "model", "model/config.json", "checkpoints", f"checkpoints/{STEP}",
    "metrics.jsonl", "bad_steps.jsonl", "eval", "damaged", ".owner.json",
)  # fmt: skip
# {command and entry: the entry that is a link}
LAYOUTS = {
    **{f"train {name}": name for name in _OF_RUN},
    "convert model": "model", "convert model.safetensors": "model.safetensors", "convert README.md": "README.md",
    "score predictions_closed.csv": "predictions_closed.csv", "score metrics.json": "metrics.json",
    "prepare volumes": "volumes", "prepare .lock": ".lock", "predict routing.png": "routing.png",
    "predict routing.png.part": "routing.png.part",
}  # fmt: skip


def link_layouts(count: int, folder: Path) -> list[Record]:
    """A link where a command writes, to a run of a stranger; nothing there may change, or be continued."""
    other, found = write_run(folder / "other"), []
    trained = ("main", f"--config={ROOT / 'configs' / 'stage2.py'}", f"--config.train.steps={STEP}")
    (other / "config.json").write_text(json.dumps(parse([*trained])[0].to_dict()))  # as if it were the run to go on
    for name in ("metrics.jsonl", "bad_steps.jsonl", "README.md", "model.safetensors", "metrics.json", ".lock",
                 "predictions_closed.csv", "routing.png", "routing.png.part", ".owner.json"):  # fmt: skip
        (other / name).write_text('{"step": 1}\n' if name.endswith("jsonl") else "{}\n")
    for name in ("eval", "damaged", "volumes"):
        (other / name).mkdir()
    (folder / "p.csv").write_text(
        "Question Type,Question,Answer,Answer Choice,Pred\nplane,Q? Choices: A. x B. y,x,A,A\n"
    )
    (folder / "m.jsonl").write_text(json.dumps({"volume": "scan.npy", "question": "Q", "answer": "a"}) + "\n")
    volume, before = scan(folder), contents(other)
    for number, (title, name) in enumerate(list(LAYOUTS.items())[:count]):
        own = folder / f"own-{number}"
        what = title.split()[0]
        if what == "train":
            shutil.copytree(other, own)
            (own / "model.safetensors").unlink()  # else it were no run
            shutil.rmtree(own / name) if (own / name).is_dir() else (own / name).unlink()
        else:
            own.mkdir()
        (own / name).symlink_to(other / name)
        asked = ("--volume", volume, "--question", "Q?", "--new-tokens", 2)
        flags = ("name=manifest", f"root={folder}", "manifest=m.jsonl", "slices=8", "size=16")
        acts = {
            "train": (train_as_main, *trained, f"--workdir={own}"),
            "convert": (convert.main, "--from", "embedded", "--to", own, "--export"),
            "score": (evaluate.main, "score", folder / "p.csv", "--to", own),
            "prepare": (prepare.main, f"--config={ROOT / 'configs' / 'data_manifest.py'}", "--to", own, "--workers=1",
                        *(f"--config.data.{flag}" for flag in flags)),
            "predict": (predict.main, *asked, "--routing", own / "routing.png"),
        }  # fmt: skip
        code, said = run(*acts[what])
        outcome = judged(code, said)
        if outcome == "refused" and what != "predict" and "holds the link" not in said:
            outcome = "LOST"
        outcome = "CHANGED" if contents(other) != before else outcome
        if what == "predict" and not os.path.lexists(own / name):
            outcome = "CHANGED"
        found.append(record(what, "link", outcome, f"{title}: {code} {said[-300:]}"))
    return found


# ---- the campaign ----------------------------------------------------------------------------------------------------


def campaign(values: int, texts: int, links: int, seed: int, folder: Path, progress=print) -> list[Record]:
    """One record a case: {what, kind, outcome, said}."""
    logging.set_verbosity(logging.ERROR)
    for name in ("values", "texts", "links"):
        (folder / name).mkdir()
    found = wrong_values(values, seed, folder / "values") if values else []
    found += hostile_texts(texts, folder / "texts") if texts else []
    found += link_layouts(links, folder / "links") if links else []
    for one in found:
        if one["outcome"] in BAD:
            progress(f"{one['outcome']}: {one['what']}, {one['kind']}: {one['said']!a}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--values", type=int, default=360)
    parser.add_argument("--texts", type=int, default=len(TEXTS))
    parser.add_argument("--links", type=int, default=len(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(args.values, args.texts, args.links, args.seed, Path(folder))
    print(table(found))
    print(dict(collections.Counter(one["outcome"] for one in found)))
    return int(any(one["outcome"] in BAD for one in found))


if __name__ == "__main__":
    sys.exit(main())
