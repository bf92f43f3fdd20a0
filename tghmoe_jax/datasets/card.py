"""The data card of a prepared set: what it holds, in numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tghmoe_jax import untrusted
from tghmoe_jax.datasets.items import SPLITS, Item

KIND = {"volumes": {str: int}, "rejected": int, "leaks": {str: int}}  # what is printed of a card (see `untrusted`)


def card(
    name: str, parameters: Mapping[str, Any], items: Sequence[Item], rows: Mapping[str, Mapping], rejected: int,
    doubts: Sequence[tuple[str, str]], leaked: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    """Counts by split, ranges over volumes. `rows` are the index rows of `prepared`; lengths in mm, HU of the grid.

    `doubts` are (volume, warning) of the readers; the word before the colon of a warning is its kind.
    """
    spacing = np.array([row["source_spacing_mm"] for row in rows.values() if row["source_spacing_mm"]])
    hu = np.array([row["hu_range"] for row in rows.values() if row["hu_range"]])

    def counted(field: str) -> dict[str, int]:
        return dict(sorted(Counter(row[field] or "none" for row in rows.values()).items()))

    return {
        "name": name,
        "slices": parameters["data.slices"],
        "size": parameters["data.size"],
        "volumes": {split: len({i.volume for i in items if i.split == split}) for split in SPLITS},
        "cases": {split: len({i.case for i in items if i.split == split}) for split in SPLITS},
        "items": {split: dict(Counter(i.kind for i in items if i.split == split)) for split in SPLITS},
        "types": dict(sorted(Counter(i.type for i in items).items())),
        "rejected": rejected,
        "with_warnings": len({volume for volume, _ in doubts}),
        "warnings": dict(sorted(Counter(warning.partition(":")[0] for _, warning in doubts).items())),
        "leaks": dict(leaked),
        "unit": counted("unit"),
        "orientation": counted("orientation"),
        "window": counted("window"),
        "source_slices": spread([row["source_shape"][0] for row in rows.values()]),
        "source_spacing_mm": {axis: spread(spacing[:, i]) for i, axis in enumerate("zyx")} if len(spacing) else None,
        "without_spacing": len(rows) - len(spacing),
        "hu": {"lowest": spread(hu[:, 0]), "highest": spread(hu[:, 1])} if len(hu) else None,
        "words_an_answer": {
            kind: spread([len(i.answer.split()) for i in items if i.kind == kind])
            for kind in dict.fromkeys(i.kind for i in items)
        },
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    low, middle, high = np.percentile(values, [0, 50, 100])
    return {"min": round(float(low), 3), "median": round(float(middle), 3), "max": round(float(high), 3)}


def markdown(card: Mapping[str, Any]) -> str:
    """The card as a page."""
    text = [
        f"# Data card: {untrusted.markdown(card['name'])}", "",
        f"Volumes of at most {card['slices']} slices of {card['size']} x {card['size']} pixels. {card['rejected']} "
        f"items or volumes were left out (rejected.csv), {card['with_warnings']} volumes were read with a warning "
        "(warnings.csv); what splits share is in leaks.csv; how long it took in "
        "durations.json. Not for clinical use.", "",
        "| split | volumes | cases | items |", "|---|---|---|---|",
        *(
            f"| {split} | {card['volumes'][split]} | {card['cases'][split]} | "
            f"{', '.join(f'{count} {kind}' for kind, count in card['items'][split].items()) or '-'} |"
            for split in SPLITS
        ), "",
        "| | min | median | max |", "|---|---|---|---|",
    ]  # fmt: skip
    named = {"slices of the source": card["source_slices"]}
    named |= {f"spacing {axis} in mm": one for axis, one in (card["source_spacing_mm"] or {}).items()}
    named |= {f"{end} HU": one for end, one in (card["hu"] or {}).items()}
    named |= {f"words, {kind}": one for kind, one in card["words_an_answer"].items()}
    text += [f"| {name} | {one['min']:g} | {one['median']:g} | {one['max']:g} |" for name, one in named.items()]
    text += [""]
    for name in ("unit", "orientation", "window", "warnings", "types", "leaks"):
        listed = ", ".join(f"{untrusted.markdown(key)} {count}" for key, count in card[name].items()) or "none"
        text.append(f"- {name}: {listed}")
    return "\n".join([*text, f"- volumes without spacing: {card['without_spacing']}", ""])
