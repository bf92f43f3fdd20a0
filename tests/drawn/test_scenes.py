import collections
import pickle

import numpy as np
import pytest

from tghmoe_jax.drawn import binding, scenes_text
from tghmoe_jax.drawn.scenes import AUX_NAMES, SPLITS, ScenesSource
from tghmoe_jax.drawn.scenes_draw import DOT, TEXTURES
from tghmoe_jax.drawn.scenes_layout import COLOURS, COUNTS, PLACES
from tghmoe_jax.drawn.scenes_text import CAPTION_REQUESTS, CAPTION_WORDS, QUESTIONS, SCENE_TYPES
from tghmoe_jax.errors import UserError

SOURCE = ScenesSource("train", 100_000)
HELD_OUT = ScenesSource("test", 100_000)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_pictures_are_pure_functions_of_split_seed_and_index():
    again = pickle.loads(pickle.dumps(ScenesSource("train", 10)))
    for i in range(5):
        picture, mask = SOURCE.slices(i)
        assert picture.shape == (1, 64, 64, 3) and picture.dtype == np.uint8 and mask.tolist() == [True]
        np.testing.assert_array_equal(picture, again.slices(i)[0])
        assert SOURCE.question(i, "closed", rng(i)) == again.question(i, "closed", rng(i))
    first = {ScenesSource(split, 10, seed).slices(0)[0].tobytes() for split in SPLITS for seed in (0, 1)}
    assert len(first) == 6


def test_text_alone_has_no_slice_and_the_same_questions():
    text = ScenesSource("train", 100_000, pictures=False)
    picture, mask = text.slices(3)
    assert picture.shape == (0, 64, 64, 3) and mask.shape == (0,)
    assert text.question(3, "closed", rng(3)) == SOURCE.question(3, "closed", rng(3))


def test_other_sizes_show_the_same_scene():
    small, large = (ScenesSource("train", 10, size=s).slices(3)[0][0].astype(float) for s in (32, 64))
    shrunk = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), shrunk.ravel())[0, 1] > 0.7


def test_pixels_agree_with_the_stated_colour_at_the_middle_of_solid_shapes():
    checked = 0
    for i in range(150):
        picture = SOURCE.slices(i)[0][0].astype(float)
        for item in SOURCE.scene(i).items:
            if item.shape in ("disc", "square", "diamond") and not item.mark and item.radius > 5:
                row, column = (round(c) for c in item.centre)
                seen = picture[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
                assert np.abs(seen - item.levels).max() < 75, (i, item)
                checked += 1
    assert checked > 20


def test_shapes_of_a_scene_do_not_touch_and_lie_in_the_picture():
    for i in range(300):
        items = SOURCE.scene(i).items
        assert len({item.place for item in items}) == len(items) in (1, 2, 3, 4)
        for a in items:
            assert all(a.radius <= c <= 63 - a.radius + 1 for c in a.centre)
            for b in items:
                assert a is b or np.hypot(*np.subtract(a.centre, b.centre)) > a.radius + b.radius


@pytest.mark.parametrize("type", SCENE_TYPES)
@pytest.mark.parametrize("source", [SOURCE, ScenesSource("test", 100_000, wording="unseen")], ids=["seen", "unseen"])
def test_every_picture_answers_every_type_with_four_options_of_which_one_is_true(type, source):
    for i in range(150):
        q = source.question(i, "closed", rng(i), type)
        assert (q.task, q.kind, q.type) == ("vqa", "closed", type)
        assert len(q.choices) == len(set(q.choices)) == 4 and q.choices.count(q.answer) == 1
        assert q.target == f"{q.letter}. {q.answer}"
        opened = source.question(i, "open", rng(i), type)
        assert opened.choices == () and opened.target == opened.answer and opened.question == q.question


def test_answers_agree_with_the_scene():
    for i in range(300):
        scene, generator = HELD_OUT.scene(i), rng(i)
        by_place = {item.place: item for item in scene.items}
        assert HELD_OUT.question(i, "open", generator, "count").answer == COUNTS[len(scene.items) - 1]
        assert HELD_OUT.question(i, "open", generator, "texture").answer == scene.look.texture
        shape = HELD_OUT.question(i, "open", generator, "shape")
        place = next((p for p in sorted(PLACES, key=len, reverse=True) if f"{p} shape" in shape.question), None)
        if place:
            assert by_place[place].shape == shape.answer
        where = HELD_OUT.question(i, "open", generator, "place")
        named = [item for item in scene.items if f"the {item.shape}" in where.question]
        assert not named or where.answer in {item.place for item in named}
        inside = HELD_OUT.question(i, "open", generator, "inside")
        if inside.answer in ("none", "nothing"):
            asked = {item.mark.kind for item in scene.items if item.mark and item.mark.kind in inside.question}
            assert not asked
        else:
            assert any(
                item.mark and inside.answer in (item.shape, item.mark.kind, item.mark.side) for item in scene.items
            )


def test_a_question_names_one_item_only():
    for i in range(300):
        scene = SOURCE.scene(i)
        for item in scene.items:
            text = scenes_text._described(scene, item, rng(i), "")
            fits = [
                o
                for o in scene.items
                if text in (o.shape, f"{o.colour} shape", f"{o.place} shape", f"shape in the {o.place}")
            ]
            assert fits == [item]


@pytest.mark.parametrize("type", SCENE_TYPES)
def test_text_alone_does_not_tell_the_answer(type):
    """A table of how often each option is true, by the form of the question, fitted on half and tested on the other."""
    count, asked = 900, []
    form = scenes_text._ASKERS[type]
    for i in range(2 * count):
        generator = rng((7, i))
        name, _, answer, others = form(SOURCE.scene(i + 50_000 if i < count else i), generator)
        asked.append((name, answer, [answer, *others]))
    table = collections.defaultdict(lambda: [0.5, 2.0])
    for name, answer, options in asked[:count]:
        for option in options:
            table[name, option][0] += option == answer
            table[name, option][1] += 1
    right = 0.0
    for name, answer, options in asked[count:]:
        shares = [table[name, o][0] / table[name, o][1] for o in options]
        best = [o for o, s in zip(options, shares, strict=True) if s == max(shares)]
        right += (answer in best) / len(best)
    assert right / count < 0.31  # chance 0.25, standard error 0.015


def test_letters_are_balanced_for_every_number_of_options():
    letters = collections.defaultdict(collections.Counter)
    for i in range(2400):
        q = SOURCE.question(i, "closed", rng(i))
        letters[len(q.choices)][q.letter] += 1
    assert set(letters) == {2, 3, 4}
    for options, count in letters.items():
        assert set(count) == set("ABCD"[:options]) and min(count.values()) > 0.75 * count.total() / options


def test_captions_state_what_is_there():
    for i in range(300):
        scene, q = SOURCE.scene(i), SOURCE.question(i, "report", rng(i), "report")
        assert (q.task, q.kind, q.type) == ("report", "report", "report") and q.question in CAPTION_REQUESTS["seen"]
        text = q.answer.lower()
        assert scene.look.texture in text and not any(t in text for t in TEXTURES if t != scene.look.texture)
        assert COUNTS[len(scene.items) - 1] in text
        assert len(text.split()) <= CAPTION_WORDS
        shown = {item.colour for item in scene.items} | {
            m for item in scene.items if item.mark for m in item.mark.kind.split()
        }
        assert not any(colour in text.split() for colour in COLOURS if colour not in shown)


def test_binding_states_its_answer_among_four_options():
    phrases = set()
    for i in range(300):
        q = binding.ask(rng(i), wording="unseen", easy=0)
        assert q.answer in q.question and len(set(q.choices)) == 4 and q.answer in q.choices
        phrases.update(q.choices)
    assert len(phrases) > 200 and {"axial", "striped"} <= phrases


def test_an_item_question_finds_its_shape_by_name_and_asks_for_all_of_it():
    for i in range(300):
        scene = SOURCE.scene(i)
        q = SOURCE.question(i, "open", rng(i), "item")
        item = next(
            item for item in scene.items if q.answer == f"{item.size} {item.colour} {item.shape} in the {item.place}"
        )
        assert f"the {item.shape}" in q.question or f"the {item.colour} shape" in q.question
        assert item.place not in q.question and not q.choices


def test_only_training_draws_from_more_types_and_item_questions_are_never_closed():
    hard = {split: ScenesSource(split, 1000, more_types=("place",) * 8) for split in ("train", "test")}
    drawn = {
        (split, kind): [source.question(i, kind, rng(i)).type for i in range(400)]
        for split, source in hard.items()
        for kind in ("open", "closed")
    }
    assert drawn["train", "closed"].count("place") > 180 and "item" not in drawn["train", "closed"]
    assert drawn["train", "open"].count("item") > 80
    for kind in ("open", "closed"):
        assert drawn["test", kind].count("place") < 90 and "item" not in drawn["test", kind]


def test_unseen_wordings_never_occur_in_training():
    for forms in (*QUESTIONS.values(), CAPTION_REQUESTS):
        assert not set(forms["seen"]) & set(forms["unseen"]) and forms["unseen"]


def test_auxiliary_labels_hold_for_the_scene():
    assert SOURCE.aux_names == AUX_NAMES and len(set(AUX_NAMES)) == len(AUX_NAMES)
    for i in range(100):
        labels, scene = SOURCE.aux(i), SOURCE.scene(i)
        assert labels.shape == (len(AUX_NAMES),) and labels.dtype == np.float32
        true = {name for name, value in zip(AUX_NAMES, labels, strict=True) if value}
        assert {f"place:{item.place}:{item.shape}" for item in scene.items} <= true
        assert sum(name.startswith("count:") for name in true) == 1
        assert ("mark:mark" in true) == any(item.mark for item in scene.items)
        assert (f"shape:{DOT}" in true) == any(item.size == "tiny" for item in scene.items)


def test_auxiliary_labels_of_a_shape_are_read_off_the_cells_it_touches():
    for i in range(100):
        scene, cells = SOURCE.scene(i), SOURCE.aux_cells(i, (1, 16, 16))
        assert cells.shape == (1, 4, 4, len(AUX_NAMES))
        assert cells[..., AUX_NAMES.index(f"texture:{scene.look.texture}")].all(), "the background is everywhere"
        absent = SOURCE.aux(i) == 0
        assert cells[..., absent].all(), "what is absent is absent everywhere"
        for item in scene.items:
            where = cells[0, ..., AUX_NAMES.index(f"place:{item.place}:{item.shape}")]
            row, column = (int(x) // 16 for x in item.centre)
            assert where[row, column] and where.sum() <= (2 * item.radius // 16 + 2) ** 2


def test_strata_and_findings_are_empty_of_ct():
    assert (
        SOURCE.group(0) == "scene"
        and SOURCE.findings(0) == frozenset()
        and SOURCE.input_ranges() == {}
        and len(SOURCE) == 100_000
    )


def test_bad_arguments_are_named():
    for arguments in (
        {"split": "dev", "count": 1},
        {"split": "train", "count": 0},
        {"split": "train", "count": 1, "wording": "x"},
    ):
        with pytest.raises(UserError):
            ScenesSource(**arguments)
    with pytest.raises(IndexError):
        SOURCE.slices(100_000)
