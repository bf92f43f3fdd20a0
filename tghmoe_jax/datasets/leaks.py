"""What two splits of a data set share: cases, volumes and texts, exactly or nearly.

A pair of splits with any of it lifts scores by memory instead of reading. Found are

    case          volumes of one case in two splits
    volume_exact  one content on the model's grid (or one key) in two splits
    volume_near   signatures that correlate by VOLUME_NEAR or more: another export, reconstruction or range of the scan
    text_exact    one text in two splits, letter case, spaces and punctuation aside
    text_near     texts whose shingles of SHINGLE words overlap by TEXT_NEAR (Jaccard) or more

Texts are reports, and other answers of LONG_ANSWER words or more; under FEW_WORDS words all texts are alike. A
signature is the volume averaged to a coarse grid, so mirrored or rotated copies are not found.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from tghmoe_jax.datasets.items import SPLITS, Item
from tghmoe_jax.errors import UserError
from tghmoe_jax.untrusted import from_cell

COLUMNS = ("kind", "split_a", "key_a", "split_b", "key_b", "similarity")
KINDS = ("case", "volume_exact", "volume_near", "text_exact", "text_near")
SIGNATURE = (8, 12, 12)  # slices, rows, columns of the coarse grid
# Measured: noise, brightness and contrast 0.997 or more, other slices or a crop of a few of them 0.998, a shift by two
# pixels of 128 0.995; two real scans of one region 0.78, the nearest of 40 phantoms 0.998.
VOLUME_NEAR = 0.995
TEXT_NEAR = 0.8
SHINGLE = 5
FEW_WORDS = 8
LONG_ANSWER = 20
_BLOCK = 4096  # rows of a block of correlations


@dataclasses.dataclass(frozen=True)
class Leak:
    """Volume `key_a` of an earlier split and `key_b` of a later one share something; similarity lies in 0..1.

    Of a group that shares one thing every member is named once, not every pair.
    """

    kind: str
    split_a: str
    key_a: str
    split_b: str
    key_b: str
    similarity: float


def signature(values: np.ndarray) -> np.ndarray:
    """int8 (8*12*12,) of a volume (N, S, S) of int16 HU or uint8 unit interval: coarse means around their mean."""
    coarse = np.clip(values, -1000, 1000) if values.dtype == np.int16 else values
    for axis, cells in enumerate(SIGNATURE):
        edges = np.linspace(0, coarse.shape[axis], cells + 1)
        parts = [range(int(low), max(int(np.ceil(high)), int(low) + 1)) for low, high in itertools.pairwise(edges)]
        means = [coarse.take(part, axis).mean(axis, dtype=np.float64) for part in parts]
        coarse = np.stack(means, axis)
    centred = coarse.ravel() - coarse.mean()
    peak = np.abs(centred).max()
    return np.rint(centred * (127 / peak)).astype(np.int8) if peak > 1e-6 else np.zeros(centred.size, np.int8)


def find_leaks(items: Sequence[Item], contents: Mapping[str, str], signatures: Mapping[str, np.ndarray]) -> list[Leak]:
    """Every leak between two splits. `contents` {volume key: hash}; `signatures` {volume key: int8 (K,)}."""
    # {split: {what is shared: its volumes}}; dictionaries rather than sets keep the order of the items
    by_case, by_content, by_text = ({split: defaultdict(dict) for split in SPLITS} for _ in range(3))
    volumes: dict[str, dict[str, None]] = {split: {} for split in SPLITS}
    for item in items:
        volumes[item.split][item.volume] = None
        by_case[item.split][item.case][item.volume] = None
        by_content[item.split][contents[item.volume]][item.volume] = None
        words = _words(item.answer) if item.task == "report" or len(item.answer.split()) >= LONG_ANSWER else ()
        if len(words) >= FEW_WORDS:
            by_text[item.split][" ".join(words)][item.volume] = None
    found = []
    for a, b in itertools.combinations(SPLITS, 2):
        found += _shared("case", a, by_case[a], b, by_case[b])
        found += _shared("volume_exact", a, by_content[a], b, by_content[b])
        found += _near_volumes(a, list(volumes[a]), b, list(volumes[b]), contents, signatures)
        found += _shared("text_exact", a, by_text[a], b, by_text[b])
        found += _near_texts(a, by_text[a], b, by_text[b])
    return found


def rows(leaks: Iterable[Leak]) -> list[tuple[str, ...]]:
    """The header and the rows of leaks.csv."""
    return [COLUMNS, *((*dataclasses.astuple(leak)[:-1], f"{leak.similarity:.4f}") for leak in leaks)]


def dropped(file: Path, drop: str) -> set[tuple[str, str]]:
    """(split, volume key) that `data.drop_leaks` = `drop` leaves out, as leaks.csv names them.

    `train`: training volumes that share something with validation or test. `test`: volumes of validation and test that
    share something with training.
    """
    if drop not in ("none", "train", "test"):
        raise UserError(f"--config.data.drop_leaks={drop} is unknown; use none, train or test.")
    if drop == "none":
        return set()
    try:
        listed = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"), newline=""))
        found = [{key: from_cell(text) for key, text in row.items()} for row in listed if row["split_a"] == "train"]
        side = "a" if drop == "train" else "b"
        return {(row[f"split_{side}"], row[f"key_{side}"]) for row in found}
    except (OSError, KeyError, ValueError, AttributeError, csv.Error) as error:
        raise UserError(f"{file} is missing or damaged; prepare the set again.") from error


# ---------------------------------------------------------------------------------------------------------- findings


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _named(kind: str, a: str, keys_a: Iterable[str], b: str, keys_b: Iterable[str], similarity: float) -> list[Leak]:
    """Each key once: all of `keys_a` beside the first of `keys_b`, the rest of those beside the first of `keys_a`."""
    keys_a, keys_b = list(keys_a), list(keys_b)
    pairs = [(key, keys_b[0]) for key in keys_a] + [(keys_a[0], key) for key in keys_b[1:]]
    return [Leak(kind, a, one, b, other, similarity) for one, other in pairs]


def _shared(kind: str, a: str, groups_a: Mapping, b: str, groups_b: Mapping) -> list[Leak]:
    both = [group for group in groups_a if group in groups_b]
    return [leak for group in both for leak in _named(kind, a, groups_a[group], b, groups_b[group], 1.0)]


def _near_volumes(a, keys_a, b, keys_b, contents, signatures) -> list[Leak]:
    """Each volume beside the nearest one of the other split; one content is `volume_exact`, not near."""
    if not keys_a or not keys_b:
        return []
    ids = {content: i for i, content in enumerate(dict.fromkeys(contents[key] for key in (*keys_a, *keys_b)))}
    ids_a, ids_b = (np.array([ids[contents[key]] for key in keys]) for keys in (keys_a, keys_b))
    pairs: dict[tuple[int, int], float] = {}
    best_b = np.full((2, len(keys_b)), -1.0)  # similarity, row of the nearest of a
    units_b = _units([signatures[key] for key in keys_b])
    for start in range(0, len(keys_a), _BLOCK):
        likeness = _units([signatures[key] for key in keys_a[start : start + _BLOCK]]) @ units_b.T
        likeness[ids_a[start : start + _BLOCK, None] == ids_b] = -1
        nearest = likeness.argmax(1)
        for row in np.flatnonzero(likeness.max(1) >= VOLUME_NEAR):
            pairs[start + int(row), int(nearest[row])] = float(likeness[row, nearest[row]])
        rows = likeness.argmax(0)
        value = likeness[rows, np.arange(len(keys_b))]
        best_b = np.where(value > best_b[0], [value, start + rows], best_b)
    for column in np.flatnonzero(best_b[0] >= VOLUME_NEAR):
        pairs[int(best_b[1, column]), int(column)] = float(best_b[0, column])
    return [Leak("volume_near", a, keys_a[i], b, keys_b[j], min(value, 1.0)) for (i, j), value in sorted(pairs.items())]


def _units(signatures: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (n, K) of length one each, or zero for a volume without contrast."""
    rows = np.stack(signatures).astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _near_texts(a: str, texts_a: Mapping, b: str, texts_b: Mapping) -> list[Leak]:
    """Candidates by MinHash, then the exact overlap of their shingles."""
    only_a, only_b = [t for t in texts_a if t not in texts_b], [t for t in texts_b if t not in texts_a]
    if not only_a or not only_b:
        return []
    index = MinHashLSH(threshold=0.5, num_perm=128)  # far below TEXT_NEAR, so that hardly a pair is missed
    for number, text in enumerate(only_a):
        index.insert(number, _minhash(text))
    found = []
    for text in only_b:
        own = _shingles(text)
        for number in sorted(index.query(_minhash(text))):
            other = _shingles(only_a[number])
            likeness = len(own & other) / len(own | other)
            if likeness >= TEXT_NEAR:
                found += _named("text_near", a, texts_a[only_a[number]], b, texts_b[text], likeness)
    return found


def _shingles(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def _minhash(text: str) -> MinHash:
    result = MinHash(num_perm=128, seed=1, hashfunc=_hash)
    result.update_batch([shingle.encode() for shingle in _shingles(text)])
    return result


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")
