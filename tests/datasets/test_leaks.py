"""What two splits share is found, exactly and nearly, and nothing else is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tghmoe_jax.datasets import leaks, prepared
from tghmoe_jax.datasets.items import Item
from tghmoe_jax.drawn import phantom
from tghmoe_jax.errors import UserError

REPORT = "The liver shows a cyst of ten mm in its right lobe and the kidneys are of normal size without any stone."


def item(volume, split, case=None, answer="left", task="vqa", **more) -> Item:
    return Item(volume, split, case or volume, task, "organ", "", answer, **more)


def found(items, contents=None, signatures=None) -> set[tuple[str, str, str]]:
    """{(kind, key_a, key_b)}; without more said, all volumes differ."""
    keys = list(dict.fromkeys(one.volume for one in items))
    rng = np.random.default_rng(0)
    drawn = {key: rng.integers(-127, 128, np.prod(leaks.SIGNATURE)).astype(np.int8) for key in keys}
    rows = leaks.find_leaks(items, {key: key for key in keys} | (contents or {}), drawn | (signatures or {}))
    assert all(0 <= row.similarity <= 1 and row.split_a != row.split_b for row in rows)
    return {(row.kind, row.key_a, row.key_b) for row in rows}


def test_nothing_is_shared_by_different_volumes_texts_and_cases():
    items = [item("a", "train", answer=REPORT, task="report"), item("b", "test", answer="No finding.", task="report")]
    assert found(items) == set()


def test_within_one_split_everything_may_be_shared():
    items = [item(name, "train", "one", REPORT, "report") for name in "ab"]
    assert found(items, {"a": "x", "b": "x"}) == set()


def test_a_case_in_two_splits_names_each_of_its_volumes():
    items = [item("a", "train", "one"), item("b", "train", "one"), item("c", "test", "one"), item("d", "test", "two")]
    assert found(items) == {("case", "a", "c"), ("case", "b", "c")}


def test_one_content_or_one_key_in_two_splits_is_exact():
    items = [item("a", "train"), item("b", "validation"), item("c", "train"), item("c", "test")]
    assert found(items, {"a": "x", "b": "x"}) == {
        ("volume_exact", "a", "b"), ("volume_exact", "c", "c"), ("case", "c", "c")
    }  # fmt: skip


def test_texts_are_compared_without_case_spaces_and_stops_and_by_their_shingles():
    long = " ".join(f"word{i}" for i in range(60))
    items = [
        item("a", "train", answer=REPORT, task="report"),
        item("b", "test", answer=REPORT.upper().replace(" ", "  ") + "!", task="report"),
        item("c", "validation", answer=long, task="report"),
        item("d", "test", answer=long.replace("word30", "other"), task="report"),
        item("e", "train", answer="A cyst in it."),
        item("f", "test", answer="A cyst in it."),
        item("g", "train", answer="No stone is seen.", task="report"),
        item("h", "test", answer="No stone is seen.", task="report"),
    ]
    assert found(items) == {("text_exact", "a", "b"), ("text_near", "c", "d")}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)), max_size=12))
def test_a_volume_is_named_just_when_it_shares_a_case_with_another_split(rows):
    """Against all pairs by hand."""
    splits = ("train", "validation", "test")
    items = [item(f"{i}", splits[split], f"case {case}") for i, (_, split, case) in enumerate(rows)]
    pairs = [(a, b) for a, b in itertools.permutations(items, 2) if a.case == b.case and a.split != b.split]
    named = {key for kind, *keys in found(items) if kind == "case" for key in keys}
    assert named == {a.volume for a, _ in pairs}


@pytest.fixture(scope="module")
def volumes():
    """int16 phantoms of eight patients."""
    return [phantom.draw(seed, (16, 64, 64)).hu for seed in range(8)]


def likeness(a, b) -> float:
    one, other = leaks._units([leaks.signature(a), leaks.signature(b)])
    return float(one @ other)


def test_a_changed_copy_is_near_and_another_patient_is_not(volumes):
    rng = np.random.default_rng(0)
    for i, hu in enumerate(volumes):
        noisy = (hu + rng.normal(0, 30, hu.shape)).astype(np.int16)
        brighter = np.clip(hu * 1.05 + 20, -1024, 3000).astype(np.int16)
        for copy in (noisy, brighter):
            assert likeness(hu, copy) >= leaks.VOLUME_NEAR
        assert all(likeness(hu, other) < leaks.VOLUME_NEAR for other in volumes[:i])
    items = [item(f"{i}", "train") for i in range(8)] + [item("copy", "test")]
    signatures = {f"{i}": leaks.signature(hu) for i, hu in enumerate(volumes)}
    signatures["copy"] = leaks.signature(volumes[3] + np.int16(25))
    assert found(items, signatures=signatures) == {("volume_near", "3", "copy")}


def test_blocks_change_nothing(volumes, monkeypatch):
    items = [item(f"{i}", "train") for i in range(8)] + [item(f"{i}c", "test") for i in range(8)]
    signatures = {f"{i}": leaks.signature(hu) for i, hu in enumerate(volumes)}
    signatures |= {f"{i}c": leaks.signature(hu + np.int16(25)) for i, hu in enumerate(volumes)}
    whole = found(items, signatures=signatures)
    monkeypatch.setattr(leaks, "_BLOCK", 3)
    assert found(items, signatures=signatures) == whole >= {("volume_near", f"{i}", f"{i}c") for i in range(8)}


def test_a_volume_without_contrast_is_near_to_nothing():
    flat = leaks.signature(np.full((4, 16, 16), 100, np.int16))
    assert not flat.any()
    assert found([item("a", "train"), item("b", "test")], signatures={"a": flat, "b": flat}) == set()


def test_what_is_dropped_is_the_side_that_is_named(tmp_path):
    rows = [
        leaks.Leak("case", "train", "a", "test", "b", 1.0),
        leaks.Leak("case", "validation", "c", "test", "d", 1.0),
        leaks.Leak("text_near", "train", 'e,"x"', "validation", "c", 0.9),
    ]
    (tmp_path / "leaks.csv").write_bytes(prepared.table(leaks.rows(rows)))
    dropped = {side: leaks.dropped(tmp_path / "leaks.csv", side) for side in ("none", "train", "test")}
    assert dropped == {
        "none": set(), "train": {("train", "a"), ("train", 'e,"x"')}, "test": {("test", "b"), ("validation", "c")}
    }  # fmt: skip
    with pytest.raises(UserError, match="drop_leaks=both"):
        leaks.dropped(tmp_path / "leaks.csv", "both")
    with pytest.raises(UserError, match="missing or damaged"):
        leaks.dropped(tmp_path / "absent.csv", "train")
