"""Measures whether evidence is meaningful: how often the strongest region touches the only lesion of a phantom.

    python -m tghmoe_jax.studies.pointing --to runs/pointing                about 12 minutes on two cores

Asked are closed questions about the lesion (its organ, its kind, its place) of test volumes with exactly one lesion, in
both drawing styles, and again with every array of the decoder's weights shuffled, anew for each batch: a method that
points as well then shows the scan, not the model. Continues where it was stopped. Writes items and pointing.json into
--to, prints a table.
"""

import copy
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from tghmoe_jax import writing
from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.errors import CommandParser, UserError, command, run_command
from tghmoe_jax.evaluation import outputs, statistics
from tghmoe_jax.reader import evidence
from tghmoe_jax.reader.batches import Asked, Request
from tghmoe_jax.reader.opening import load
from tghmoe_jax.reader.reader import Reader
from tghmoe_jax.samples.questions import Source, touched
from tghmoe_jax.training import compile_cache

TYPES = ("organ", "abnormality", "location")  # questions about a lesion
CONDITIONS = (("first", "trained"), ("first", "shuffled"), ("second", "trained"), ("second", "shuffled"))
BATCH = 16


def lesion_questions(source: Source, count: int, seed: int) -> Asked:
    """The first `count` closed questions about volumes with exactly one lesion, one of each type a volume."""
    alone = [i for i, truth in enumerate(source.truths) if len(truth.lesions) == 1]
    wanted = [(volume, number) for volume in alone for number in range(len(TYPES))][:count]
    return [
        (i, source.question(i, "closed", np.random.default_rng([seed, 9, i, number]), TYPES[number]))
        for i, number in wanted
    ]


def shuffled(reader: Reader, seed: int) -> Reader:
    """The same reader with the entries of each array of its decoder permuted."""
    rng, other = np.random.default_rng(seed), copy.copy(reader)
    params = dict(reader.variables["params"])
    mixed = jax.tree.map(lambda leaf: rng.permutation(np.asarray(leaf).ravel()).reshape(leaf.shape), params["decoder"])
    other.variables = reader.variables | {"params": params | {"decoder": jax.device_put(mixed)}}
    return other


def point(reader: Reader, source: Source, asked: Asked, new_tokens: int) -> Iterator[dict]:
    """For each question whether it was answered right, and whether what its answer rests on touches the lesion.

    The expert group is forced, so that shuffled weights change what the decoder does and no more.
    """
    cfg = reader.model.cfg
    group = cfg.tasks.index("vqa") if cfg.tgh.groups > 1 else 0
    requests = [Request(volume, question, group=group, evidence=True) for volume, question in asked]
    for (volume, question), answer in zip(asked, reader.answer(source, requests, new_tokens), strict=True):
        lesion, truth, shape = source.truths[volume].lesions[0], source.truths[volume], source.volumes.shape[1:]
        half = lesion.size_mm / 2 / np.array(truth.spacing_mm)
        hit = touched(shape, evidence.region_voxels(cfg), lesion.centre, half)
        slabs = hit.any(axis=(1, 2))
        yield {
            "volume": volume, "type": question.type, "text": answer.text, "answer": answer.falls.answer,
            "right": answer.text.startswith(f"{question.letter}."), "hit": bool(hit[answer.falls.region]),
            "chance": float(hit.mean()), "slab_hit": bool(slabs[answer.falls.view]),
            "slab_chance": float(slabs.mean()), "fall": answer.falls.whole,
        }  # fmt: skip


def score(rows: list[dict]) -> dict[str, object]:
    """Shares with 95 % intervals over volumes."""
    units = [row["volume"] for row in rows]

    def share(name: str, part: list[dict] = rows) -> dict[str, object]:
        values = np.array([[float(row[name])] for row in part])
        ci95 = statistics.ratio_ci95(values, np.ones_like(values), [row["volume"] for row in part])
        return {"value": float(values.mean()), "ci95": ci95}

    if not rows:
        return {"items": 0}
    found = {"items": len(rows), "volumes": len(set(units))}
    found |= {name: share(name) for name in ("hit", "chance", "slab_hit", "slab_chance")}
    kinds = {kind: [row for row in rows if row["type"] == kind] for kind in TYPES}
    return found | {"by_type": {kind: share("hit", part) for kind, part in kinds.items() if part}}


def summarise(found: dict[tuple[str, str], list[dict]]) -> dict[str, object]:
    """{style: {weights: scores}}: trained ones for right and wrong answers apart, shuffled ones for the items that the
    trained model got right."""
    scores = {}
    for (style, weights), rows in found.items():
        own = found[style, "trained"]
        good = [row["right"] for row in own]
        kept = scores.setdefault(style, {}).setdefault(weights, {})
        kept["right"] = score([row for row, right in zip(rows, good, strict=True) if right])
        if weights == "trained":
            kept["wrong"] = score([row for row, right in zip(rows, good, strict=True) if not right])
    return scores


def table(scores: dict) -> str:
    """A line for each style, weights and outcome."""

    def cell(one: dict) -> str:
        ci95 = "" if one["ci95"] is None else " [{:.1f}, {:.1f}]".format(*(100 * v for v in one["ci95"]))
        return f"{100 * one['value']:.1f}{ci95}"

    lines = ["| style | decoder | answers | items | region touches, % | chance | slab touches, % | chance |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for style, by_weights in scores.items():
        for weights, outcomes in by_weights.items():
            for outcome, one in outcomes.items():
                cells = (
                    [cell(one[name]) for name in ("hit", "chance", "slab_hit", "slab_chance")] if one["items"] else []
                )
                chances = [text.split(" ")[0] if i % 2 else text for i, text in enumerate(cells)]
                lines.append("| " + " | ".join([style, weights, outcome, str(one["items"]), *chances]) + " |")
    return "\n".join(lines)


@command
def main(argv: list[str]) -> int:
    """Runs the study and returns the exit code."""
    parser = CommandParser(prog="python -m tghmoe_jax.studies.pointing", allow_abbrev=False, description=__doc__)
    parser.add_argument("--checkpoint", metavar="RUN", default="embedded", help="a run that was trained on phantoms")
    parser.add_argument("--items", type=int, default=570, help="questions of each style")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="folder for items and pointing.json")
    parser.add_argument("--data", metavar="FOLDER", default="data", help="folder for the synthetic volumes")
    args = parser.parse_args(argv)
    reader = load(args.checkpoint)
    config = reader.run.config
    if config["data"]["name"] != "phantom":
        raise UserError(f"--checkpoint {args.checkpoint} was not trained on phantoms, whose lesions are known.")
    if args.items < 2:
        raise UserError(f"--items {args.items} must be 2 or more.")
    compile_cache.keep()
    reader.batch, seed, folder = BATCH, config["eval"]["seed"], Path(args.to)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for style, weights in CONDITIONS:
        data = {**config["data"], "root": args.data}
        source = make_source(data, "test", args.items + 30, style=style)  # 35 in 100 have one lesion
        asked = lesion_questions(source, args.items, seed)
        file, begun = folder / f"{style}_{weights}.jsonl", time.perf_counter()
        done = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = [json.loads(line) for line in done]
        while len(rows) < len(asked):
            one = reader if weights == "trained" else shuffled(reader, seed + len(rows))
            part = list(point(one, source, asked[len(rows) : len(rows) + BATCH], config["eval"]["answer_tokens"]))
            rows += part
            writing.write(file, "".join(json.dumps(row) + "\n" for row in rows))
        found[style, weights] = rows
        print(f"{style} style, {weights} decoder: {len(rows)} items, {time.perf_counter() - begun:.0f} s", flush=True)
    scores = summarise(found)
    outputs.write_json(folder / "pointing.json", {"checkpoint": reader.checkpoint, "seed": seed, "scores": scores})
    print(table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
