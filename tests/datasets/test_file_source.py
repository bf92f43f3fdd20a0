"""Data sets of files as samples: prepared and raw alike, each item once an epoch, broken ones replaced."""

import dataclasses
import functools
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tghmoe_jax import digests
from tghmoe_jax.bases.base import EMBEDDED
from tghmoe_jax.bases.phi3v import CHAT
from tghmoe_jax.datasets import file_source as module
from tghmoe_jax.datasets import prepared, preparing
from tghmoe_jax.datasets.file_source import TEST_REQUEST, FileSource
from tghmoe_jax.datasets.items import Dataset, Item
from tghmoe_jax.datasets.sources import make_source
from tghmoe_jax.drawn.phantom_wordings import UNSEEN
from tghmoe_jax.errors import UserError
from tghmoe_jax.samples import augment, pipeline
from tghmoe_jax.samples.prompts import REPORT_REQUESTS
from tghmoe_jax.samples.questions import ItemSource, Question
from tghmoe_jax.samples.tokenizer import Tokenizer
from tghmoe_jax.scans.volume import Volume

MIXTURE = (("report", 1), ("open", 1), ("closed", 2))
BASIC = {"name": "manifest", "manifest": "", "slices": 6, "size": 24, "channels": "windows3"}


def read(unit: str, key: str) -> Volume:
    """A volume that its key fixes; the key `bad` cannot be read."""
    if key == "bad":
        raise UserError("bad is not a volume: name another.")
    rng = np.random.default_rng(list(key.encode()))
    array = rng.uniform(-1100, 1900, (5, 30, 40)) if unit == "HU" else rng.random((8, 30, 30))
    spacing = (3.0, 1.0, 1.0) if unit == "HU" else None
    return Volume(array.astype(np.float32), unit, spacing, "LPS", None, ("drawn",))


def dataset(root: Path, name: str, count: int, unit: str = "HU", bad: int = 0) -> Dataset:
    """`count` training and four test volumes with a report, an open and two closed questions each."""
    items = []
    for i in range(count + 4):
        split = "train" if i < count else "test"
        key = "bad" if i < bad else f"{name}{i}"
        one = functools.partial(Item, key, split, f"case {name}{i}")
        items += [
            one("report", "report", "", f"Report {name}{i}."),
            one("vqa", "organ", f"Open {name}{i}?", "liver"),
            *(one("vqa", "edge", f"Closed {q} {name}{i}?", "yes", ("yes", "no")) for q in range(2)),
        ]
    return Dataset(name, root, tuple(items), (), functools.partial(read, unit))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(name, count, ...) prepares a hand-made data set and gives its `data` section; `raw` leaves it as it is."""

    def make(name="m", count=7, raw=False, **more):
        made = dataset(tmp_path, name, count, **more)
        root = tmp_path / f"{'raw' if raw else 'set'}-{name}"
        data = BASIC | {"root": str(root)}
        if raw:
            monkeypatch.setattr(module, "open_dataset", lambda data: made)
        else:
            preparing.prepare(data, root, say=lambda text: None, dataset=made)
        return data

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(EMBEDDED, CHAT)


def batches(source, tokenizer, **more) -> pipeline.TrainBatches:
    spec = pipeline.BatchSpec(
        rows=16, microbatches=2, devices=2, text_length=more.pop("text_length", 64), mixture=MIXTURE,
        tasks=("report", "vqa"),
    )  # fmt: skip
    return pipeline.TrainBatches(source, tokenizer, spec, 3, more.pop("columns", range(spec.columns)), **more)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("unit", ["HU", "unit-interval"])
@pytest.mark.parametrize("channels", ["windows3", "repeat:brain"])
def test_raw_and_prepared_give_the_same_samples(make, unit, channels):
    one, other = (FileSource(make(unit=unit, raw=raw) | {"channels": channels}, "train") for raw in (False, True))
    assert len(one) == len(other) == 7 and isinstance(one, ItemSource)
    for i in range(7):
        slices, mask = one.slices(i)
        assert slices.shape == (6, 24, 24, 3) and slices.dtype == np.uint8
        assert mask.tolist() == [True] * 5 + [unit != "HU"] and not slices[~mask].any()
        assert all(map(np.array_equal, (slices, mask), other.slices(i)))
        assert one.slice_spacing(i) == other.slice_spacing(i) == (3.0 if unit == "HU" else 1.0)
    ranges = one.input_ranges()
    assert ranges["slices"] == ([5, 5] if unit == "HU" else [6, 6]) and other.input_ranges() == {}
    assert ("hu" in ranges) == ("spacing_mm" in ranges) == (unit == "HU")


@pytest.mark.parametrize(
    "orientation, sides",
    [
        ("LPS", ("R", "L")), ("coronal slices of LPS", ("R", "L")), ("sagittal slices of LPS", ("A", "P")),
        ("as stored", None), ("sagittal slices of as stored", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("raw", [False, True])
def test_sides_are_named_only_where_the_orientation_is_stated(make, monkeypatch, raw, orientation, sides):
    known = read
    monkeypatch.setitem(globals(), "read", lambda *of: dataclasses.replace(known(*of), orientation=orientation))
    assert FileSource(make(count=1, raw=raw), "train").sides(0) == sides


@pytest.mark.parametrize("raw", [False, True])
def test_a_share_of_the_training_cases_is_part_of_every_larger_share(make, raw):
    data = make(raw=raw)
    used = [{key for _, key in FileSource(data | {"share": share}, "train").volumes} for share in (1e-6, 0.3, 0.5, 1.0)]
    assert [len(one) for one in used] == [1, 3, 4, 7] and all(a < b for a, b in itertools.pairwise(used))
    assert len(FileSource(data | {"share": 0.3}, "test")) == 4


def test_a_changed_voxel_or_word_changes_the_digest(make):
    data = make()
    one, other = FileSource(data, "train"), FileSource(data, "train")
    assert one.digest() == other.digest() != FileSource(data, "test").digest()
    other.rows[2]["sha256"] = "0" * 64
    assert one.digest() != other.digest()
    volume, item = one._items["open"][3]
    before, one._items["open"][3] = one.digest(), (volume, dataclasses.replace(item, answer="spleen"))
    assert one.digest() != before


def test_reports_are_asked_for_in_wordings_of_training_and_in_one_when_tested(make):
    data = make()
    rng = np.random.default_rng(0)
    train, test = FileSource(data, "train"), FileSource(data, "test")
    asked = {train.item("report", i % 7, rng)[1].question for i in range(200)}
    assert asked == set(REPORT_REQUESTS) and not asked & set(UNSEEN.requests)
    assert {test.item("report", i, rng)[1].question for i in range(4)} == {TEST_REQUEST}
    assert [test.item("closed", i, rng) for i in range(2)] == [
        (0, Question("vqa", "closed", "edge", f"Closed {q} m7?", ("yes", "no"), "yes")) for q in range(2)
    ]


def shown(one: pipeline.TrainBatches, steps: int) -> list[tuple[str, str]]:
    """(kind, name) of the first samples of a run in order."""
    rows = [q for step in range(steps) for _, q in one.rows(step)]
    return [(q.kind, q.answer if q.kind == "report" else q.question) for q in rows]


def test_an_epoch_visits_each_item_of_a_kind_once(make, tokenizer):
    one = batches(FileSource(make(count=8), "train"), tokenizer)
    rows = shown(one, 12)
    for kind, count in (("report", 8), ("open", 8), ("closed", 16)):
        order = [name for k, name in rows if k == kind]
        epochs = [order[i : i + count] for i in range(0, len(order) - count + 1, count)]
        assert len(epochs) >= 3 and all(len(set(epoch)) == count for epoch in epochs)
        assert len(set(map(tuple, epochs))) == len(epochs), "each epoch has an order of its own"


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batch_and_read_their_own_volumes_only(make, tokenizer, processes):
    data = make()
    whole = batches(FileSource(data, "train"), tokenizer).map(5)
    width, parts, read_in_all = 8 // processes, [], 0
    for process in range(processes):
        source = FileSource(data, "train")
        reader, seen = source._read[0], []
        source._read[0] = lambda key, reader=reader, seen=seen: seen.append(key) or reader(key)
        columns = range(process * width, (process + 1) * width)
        parts.append(batches(source, tokenizer, columns=columns).map(5))
        assert len(seen) <= 2 * width
        read_in_all += len(seen)
    assert read_in_all >= 7
    skipped = whole.pop("skipped")
    assert skipped == [] and same(whole, {key: np.concatenate([p[key] for p in parts], axis=1) for key in whole})


def test_binding_rows_stand_beside_any_volume_of_a_file_set(make, tokenizer):
    source = make_source(make(), "train", 0)
    spec = dataclasses.replace(batches(source, tokenizer).spec, mixture=(("closed", 1), ("binding", 1)))
    rows = pipeline.TrainBatches(source, tokenizer, spec, 3, range(spec.columns)).rows(0)
    assert [q.type for _, q in rows] == ["edge", "binding"] * 8
    assert len({index for index, q in rows if q.type == "binding"}) > 3
    batch = next(pipeline.train_iterator(source, tokenizer, spec, 3, 1))
    assert batch["skipped"] == [] and (batch["task"] == 1).all()


def test_weights_share_each_kind_among_data_sets(make, tokenizer):
    data = [make(name, count) for name, count in (("a", 5), ("b", 9))]
    both = BASIC | {"name": "manifest,manifest", "root": ",".join(one["root"] for one in data)}
    union = Counter((kind, name.rstrip("?.0123456789")[-1])
                    for kind, name in shown(batches(FileSource(both, "train"), tokenizer), 14))  # fmt: skip
    assert union["report", "a"] == union["open", "a"] == 5 * 4 and union["closed", "b"] == 9 * 8
    weighted = batches(FileSource(both | {"weights": (3, 1)}, "train"), tokenizer)
    rows = shown(weighted, 10)
    for kind in ("report", "open", "closed"):
        order = [name for k, name in rows if k == kind]
        of = [[name for name in order if name.rstrip("?.0123456789")[-1] == letter] for letter in "ab"]
        assert len(of[0]) == 3 * len(of[1])
        for names, count in zip(of, (5, 9), strict=True):
            count *= 2 if kind == "closed" else 1
            assert all(len(set(e)) == len(e) for e in (names[i : i + count] for i in range(0, len(names), count)))
    test = FileSource(both, "test")
    asked = [test.item("report", i, None)[1].answer for i in range(4)]
    assert [answer[7] for answer in asked] == ["a", "b", "a", "b"], "a test asks the sets in turns"


def test_a_restored_iterator_goes_on_with_worker_processes(make, tokenizer):
    source = FileSource(make(), "train")
    spec = batches(source, tokenizer).spec
    start = functools.partial(pipeline.train_iterator, source, tokenizer, spec, 3, 6)
    plain = list(start())
    first = start(workers=2)
    for wanted in plain[:3]:
        assert same(next(first), wanted)
    state = first.get_state()
    second = start(workers=2)
    second.set_state(state)
    assert all(map(same, itertools.islice(second, 3), plain[3:]))


# ------------------------------------------------------------------------------------------------------- bad records


def test_a_broken_volume_is_replaced_by_the_next_of_its_kind(make, tokenizer):
    data = make(raw=True, bad=1)
    source = FileSource(data, "train")
    one = batches(source, tokenizer)
    names = []
    for step in range(6):
        batch = one.map(step)
        names += batch["skipped"]
        wanted = one.rows(step)
        for slot, (index, _) in enumerate(wanted):
            index = index if source.key(index) != "bad" else one._asked(step, slot, 1)[0]
            if source.key(index) == "bad":
                continue  # two of one volume in a row
            assert np.array_equal(batch["slices"].reshape(-1, 6, 24, 24, 3)[slot], source.slices(index)[0])
        assert batch["task"].reshape(-1).tolist() == [0, 1, 1, 1] * 4
    assert set(names) == {("bad", "bad is not a volume: name another.")}
    again = batches(FileSource(data, "train"), tokenizer)
    assert same(again.map(4), one.map(4))


def test_a_text_that_is_too_long_is_skipped_like_a_broken_volume(make, tokenizer):
    source = FileSource(make(), "train")
    long = Item("m0", "train", "c", "report", "report", "", "word " * 200)
    source._items["report"][0] = (0, long)
    skipped = [one for step in range(4) for one in batches(source, tokenizer).map(step)["skipped"]]
    assert skipped and {name for name, _ in skipped} == {"m0"} and "text tokens" in skipped[0][1]
    spec = batches(source, tokenizer).spec
    with pytest.raises(UserError, match="--config.data.text_length=64"):
        pipeline.check_text(source, tokenizer, spec, 3)
    pipeline.check_text(source, tokenizer, spec, 3, bad=0.2)


def test_where_nothing_can_be_read_the_run_ends(make, tokenizer):
    source = FileSource(make(raw=True, bad=7), "train")
    with pytest.raises(UserError, match="items in a row cannot be used, the last because: bad is not a volume"):
        batches(source, tokenizer).map(0)


def test_bad_items_are_named_once_and_counted_up_to_the_bound():
    said = []
    bad = pipeline.BadItems(0.02, said.append)
    bad.note([("a", "why."), ("a", "why.")], 8)
    assert said == ["skipped a: why."]
    for _ in range(20):
        bad.note([], 8)
    bad.note([("b", "so.")], 8)
    assert said == ["skipped a: why.", "skipped b: so."] and (bad.bad, bad.seen) == (3, 179)
    with pytest.raises(UserError, match="4 of 188 items cannot be used, the last because: so; .*max_bad_fraction=0.02"):
        bad.note([("b", "so.")], 8)


@pytest.mark.parametrize("seed", range(12))
def test_a_changed_byte_of_a_shard_is_found(make, seed):
    data = make(count=3)
    folder = Path(data["root"])
    truth = {key: prepared.PreparedSet(folder).grid(key).values for key in prepared.PreparedSet(folder).rows}
    (file,) = folder.glob("volumes/*.array_record")
    content = bytearray(file.read_bytes())
    rng = np.random.default_rng(seed)
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    found, lost = prepared.PreparedSet(folder), 0
    for key, values in truth.items():
        try:
            assert np.array_equal(found.grid(key).values, values)
        except UserError as error:
            assert f"volume {key} in" in str(error) and "is damaged" in str(error)
            lost += 1
    assert lost <= len(truth)


def test_a_record_in_the_place_of_another_is_found(make):
    source = FileSource(make(), "train")
    source.rows[0]["place"], source.rows[1]["place"] = source.rows[1]["place"], source.rows[0]["place"]
    with pytest.raises(UserError, match="its checksum differs"):
        source.slices(0)


# -------------------------------------------------------------------------------------------------- leaks and flags


def test_leaks_are_dropped_on_the_side_that_is_named(make):
    data = make()
    folder = Path(data["root"])
    (folder / "leaks.csv").write_text(
        "kind,split_a,key_a,split_b,key_b,similarity\ncase,train,m1,test,m8,1.0000\n", encoding="utf-8"
    )
    digests.write(folder, digests.of_files(folder, digests.files(folder)))
    keys = {
        (drop, split): [key for _, key in FileSource(data | {"drop_leaks": drop}, split).volumes]
        for drop in ("none", "train", "test")
        for split in ("train", "test")
    }
    assert len(keys["none", "train"]) == 7 and len(keys["none", "test"]) == 4
    assert "m1" not in keys["train", "train"] and keys["train", "test"] == keys["none", "test"]
    assert "m8" not in keys["test", "test"] and keys["test", "train"] == keys["none", "train"]
    said = {
        (drop, split): FileSource(data | {"drop_leaks": drop}, split).left_out
        for drop in ("none", "train", "test")
        for split in ("train", "test")
    }
    for drop in ("train", "test"):
        kept, all_of = (len(keys[way, drop]) for way in (drop, "none"))
        assert f"{all_of - kept} volumes with " in said[drop, drop] and f"; {kept} volumes remain" in said[drop, drop]
    assert sum(map(bool, said.values())) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 32}, "--config.data.size=32"),
        ({"slices": 9}, "--config.data.slices=9"),
        ({"name": "m3d"}, "was prepared from the data set manifest"),
        ({"name": "manifest,m3d"}, "lists 2 data sets, data.root 1 folders"),
        ({"weights": (1, 2)}, "data.weights 2 numbers"),
        ({"weights": (0,)}, "holds a number below 1"),
        ({"drop_leaks": "all"}, "use none, train or test"),
    ],
)
def test_a_set_that_does_not_fit_its_flags_is_refused(make, changes, words):
    data = make()
    with pytest.raises(UserError) as error:
        FileSource(data | changes, "train")
    assert words in str(error.value)


def test_an_unfinished_set_a_missing_split_and_a_missing_kind_are_refused(make, tokenizer):
    data = make()
    with pytest.raises(UserError, match="no item of the split validation"):
        FileSource(data, "validation")
    source = FileSource(data, "train")
    source._counts["open"] = (0,)
    with pytest.raises(UserError, match="--config.data.mixture.open is above 0"):
        pipeline.train_iterator(source, tokenizer, batches(source, tokenizer).spec, 3, 6)
    (Path(data["root"]) / "card.json").unlink()
    with pytest.raises(UserError, match="holds no finished set"):
        FileSource(data, "train")


def test_leaks_and_lists_need_prepared_sets(make):
    data = make(raw=True)
    with pytest.raises(UserError, match="drop_leaks=test needs prepared sets"):
        FileSource(data | {"drop_leaks": "test"}, "train")
    with pytest.raises(UserError, match="a list of data sets needs prepared sets"):
        FileSource(data | {"name": "manifest,manifest", "root": f"{data['root']},x"}, "train")


# ------------------------------------------------------------------------------------------------------ augmentation


def test_augmentation_is_a_function_of_seed_step_and_slot(make, tokenizer):
    source = FileSource(make(), "train")
    plain = batches(source, tokenizer).map(2)
    one, again = (batches(source, tokenizer, augment=augment.Augment(0.1, 0.1)).map(2) for _ in range(2))
    assert same(one, again) and not np.array_equal(one["slices"], plain["slices"])
    assert all(np.array_equal(one[key], plain[key]) for key in plain if key != "slices")
    half = batches(source, tokenizer, augment=augment.Augment(0.1, 0.1), columns=range(4, 8)).map(2)
    assert np.array_equal(half["slices"], one["slices"][:, 4:])
    assert not one["slices"][~one["slice_mask"]].any(), "padding stays black"


def test_augmentation_moves_and_brightens_but_never_mirrors():
    slices = np.zeros((3, 20, 20, 3), np.uint8)
    slices[:, 4:8, 12:15] = 100  # on one side, in front
    mask, asked = np.array([True, True, False]), Question("vqa", "open", "organ", "", (), "left")
    edge = [
        Question("vqa", "closed", "edge", "", ("yes", "no"), "yes"),
        Question("report", "report", "report", "", (), "touches the edge"),
    ]
    for seed in range(50):
        moved = slices.copy()
        augment.Augment(shift=0.1)(moved, mask, asked, np.random.default_rng(seed))
        rows, columns = (np.flatnonzero(moved[0, ..., 0].any(axis=axis)) for axis in (1, 0))
        assert len(rows) == 4 and len(columns) == 3 and abs(rows[0] - 4) <= 2 and abs(columns[0] - 12) <= 2
        assert np.array_equal(moved[0], moved[1]) and np.array_equal(moved[2], slices[2])
        brighter = slices.copy()
        augment.Augment(intensity=0.1)(brighter, mask, asked, np.random.default_rng(seed))
        assert len(np.unique(brighter[:2])) == 2 and np.array_equal(brighter[0] > brighter[0, 0, 0], slices[0] > 0)
        for question in edge:
            kept = slices.copy()
            augment.Augment(shift=0.1)(kept, mask, question, np.random.default_rng(seed))
            assert np.array_equal(kept, slices)


@pytest.mark.parametrize("wrong", [{"intensity": 0.5}, {"shift": -0.1}])
def test_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match="--config.data.augment"):
        augment.Augment(**wrong)
