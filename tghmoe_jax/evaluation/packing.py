"""`evaluate pack RUN`: the predictions of an evaluation and all that is needed to score them again, in one folder.

    predictions_*.csv  items.jsonl  scores.json  metrics.json  manifest.json  config.json  README.md  SHA256SUMS

It holds the names of volumes and cases that the predictions hold, and no other: pictures stay behind, and of paths of
this machine the last part is left.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tghmoe_jax import writing
from tghmoe_jax.datasets.index_files import read_json
from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation import DISCLAIMER, files, outputs, protocols, provenance
from tghmoe_jax.samples.tasks import KINDS
from tghmoe_jax.untrusted import markdown

_MOST_BYTES = 1 << 26  # of a JSON file of a run


def add_parser(commands) -> None:
    """Adds the options of the command."""
    pack = commands.add_parser("pack", help="predictions, scores and a card in one folder that others can score")
    pack.add_argument("run", help="folder of a run, or of predictions_*.csv")
    pack.add_argument("--to", metavar="FOLDER", help="a new folder; default runs/pack-<name of RUN>")


def pack(run: str, to: str | None = None) -> Path:
    """Packs the predictions of a run and returns the folder. UserError where it exists or nothing is to be packed."""
    source = files.listed(run)[0].parent
    target = Path(to or f"runs/pack-{Path(run).resolve().name}")
    if target.exists():
        raise UserError(f"--to {target} exists; name a new folder.")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed command left
    try:
        part.mkdir(parents=True)
        for file in files.listed(source):
            shutil.copyfile(file, part / file.name)
        _describe(part, source, Path(run))
        part.rename(target)
    except OSError as error:
        raise UserError(f"--to {target} cannot be written ({error.strerror}); name another folder.") from error
    return target


def _describe(folder: Path, source: Path, run: Path) -> None:
    """Writes all but the predictions, which lie in `folder` already."""
    read = files.read_run(folder)
    scores = {key: value for key, value in protocols.score(read).items() if value is not None}
    kept = {"metrics.json": source, "manifest.json": source, "config.json": run}
    found = {
        name: _cleaned(read_json(place / name, _MOST_BYTES)) for name, place in kept.items() if (place / name).is_file()
    }
    for name, content in found.items():
        outputs.write_json(folder / name, content)
    outputs.write_json(folder / "scores.json", scores)
    manifest = found.get("manifest.json") or {}
    items = _items(read, "test" if "checkpoint" in manifest else None)  # a run is asked its test split
    writing.write(folder / "items.jsonl", "".join(f"{json.dumps(one)}\n" for one in items))
    writing.write(folder / "README.md", _card(run, read, scores, found))
    names = sorted(path.name for path in folder.iterdir())
    writing.write(folder / "SHA256SUMS", "".join(f"{provenance.digest(folder / name)}  {name}\n" for name in names))


def _items(run: protocols.Run, split: str | None) -> list[dict[str, Any]]:
    """What was asked: of each item its kind, volume, names, split, and the digest of question and true answer."""
    return [
        {
            "kind": kind, "volume": one.index, "case": one.case, "key": one.key or None, "type": one.type,
            "split": split,
            "sha256": hashlib.sha256("\0".join((one.prompt, one.letter, one.answer)).encode()).hexdigest(),
        }
        for kind in KINDS
        for one in run.get(kind, ())
    ]  # fmt: skip


def _cleaned(value: Any) -> Any:
    """A JSON value in which texts that are paths of a machine, or lists of them, have their last part alone."""
    if isinstance(value, dict):
        return {key: _cleaned(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    if not isinstance(value, str):
        return value
    parts = value.split(",")
    return ",".join(
        part.rstrip("/\\").replace("\\", "/").rpartition("/")[2] if _absolute(part.strip()) else part for part in parts
    )


def _absolute(text: str) -> bool:
    return text.startswith(("/", "~", "\\\\")) or "://" in text or text[1:3] in (":\\", ":/")


def _card(run: Path, read: protocols.Run, scores: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{len(read[kind])} {kind}" for kind in KINDS if kind in read)
    manifest, metrics = found.get("manifest.json") or {}, found.get("metrics.json") or {}
    facts = [f"- items: {counts}; each with the digest of its question and true answer in `items.jsonl`"]
    for name in ("data", "checkpoint", "tghmoe_jax"):
        if manifest.get(name):
            facts.append(f"- {name}: {markdown(json.dumps(manifest[name]))}")
    differ = [key for key, value in scores.items() if not _same(value, metrics.get(key))]
    if differ:
        facts.append(
            f"- `metrics.json` of the run has other values, for instance of an older version: {', '.join(differ)}"
        )
    return f"""# Predictions of {markdown(run.resolve().name)}

{DISCLAIMER}

{chr(10).join(facts)}

Score them again, and check that nothing was changed:

```
python -m tghmoe_jax.evaluate score . --json      # prints scores.json
sha256sum -c SHA256SUMS
```

`scores.json` is computed from the predictions in this folder. `metrics.json` is what the run itself wrote: it has
scores that need the model too, such as the load of the experts. `manifest.json` and `config.json` say how it was made;
paths are cut to their last part. Questions and true answers are those of the data set, whose licence applies to them.
The names of volumes and cases are the data set's: see that they identify nobody before you pass this folder on.

```
{outputs.table(scores, read)}
```
"""


def _same(value: Any, other: Any) -> bool:
    """Whether two scores agree; intervals, and what the run did not score, are not compared."""
    if isinstance(value, list) or other is None:
        return True
    return math.isclose(value, other, abs_tol=1e-9)
