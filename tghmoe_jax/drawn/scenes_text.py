"""Questions and captions about a scene.

What keeps a question from being answerable without its picture: the options are drawn so that, given the question's
words, each option shown is true about equally often, and the letters are shuffled.
"""

import numpy as np

from tghmoe_jax.drawn.chance import pick, shuffled
from tghmoe_jax.drawn.scenes_draw import DOT, MARKS, SHAPES, SOLID, TEXTURES, SceneItem
from tghmoe_jax.drawn.scenes_layout import COLOURS, COUNTS, GREYS, PLACES, SIDES, SIZES, Scene, extremes, level_name
from tghmoe_jax.drawn.wordings import TEXTS
from tghmoe_jax.samples.questions import Question

SCENE_TYPES = ("shape", "colour", "place", "count", "size", "brightness", "texture", "inside")
# Training also asks the hard types again and, openly, for all that is known of one shape. Every word of such
# an answer depends on finding the right shape, so that this teaches a small decoder to look a shape up by its name.
HARD_TYPES = ("place", "inside") * 2 + ("size", "brightness")
OPEN_TYPES = ("item",) * 7
NOTHING, NONE = "nothing", "none"
# Odds of a wrong option. The likelier an answer is true in a random scene, the more often it must be shown where it
# is false.
SHAPE_ODDS = {shape: 7.0 if shape in SOLID else 1.0 for shape in SHAPES}
_GREY_COLOURS = ("black", "grey", "white")
COLOUR_ODDS = {colour: 1.0 for colour in COLOURS} | {"black": 2.5, "grey": 3.4, "white": 2.3}
PLACE_ODDS = {
    place: 0.7 if place == "middle centre" else 1.0 if {"middle", "centre"} & set(place.split()) else 1.4
    for place in PLACES
}
SIZE_PICK = {"tiny": 2.2, "small": 2.2, "medium": 0.85, "large": 1.1}  # which size of a picture is asked about

# By wording: `seen` for training, `unseen` never in training.
QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = TEXTS["scenes"]["questions"]
CAPTION_REQUESTS: dict[str, tuple[str, ...]] = TEXTS["scenes"]["captions"]
CAPTION_WORDS = 28  # words and full stops of a caption


def ask(scene: Scene, kind: str, rng: np.random.Generator, type: str, wording: str) -> Question:
    """A question of one of SCENE_TYPES, or an open one of OPEN_TYPES; every type has an answer in every scene."""
    name, slots, answer, options = _ASKERS[type](scene, rng)
    text = pick(rng, QUESTIONS[name][wording]).format(**slots)
    if kind == "open":
        return Question("vqa", "open", type, text, (), answer)
    return Question("vqa", "closed", type, text, shuffled(rng, [answer, *options]), answer)


def _shape(scene: Scene, rng: np.random.Generator):
    item = pick(rng, [i for i in scene.items if i.shape != DOT])
    return "shape", {"x": _described(scene, item, rng, "shape")}, item.shape, _others(rng, SHAPE_ODDS, item.shape)


def _colour(scene: Scene, rng: np.random.Generator):
    item = pick(rng, [i for i in scene.items if i.colour not in _GREY_COLOURS] or scene.items)
    return "colour", {"x": _described(scene, item, rng, "colour")}, item.colour, _others(rng, COLOUR_ODDS, item.colour)


def _place(scene: Scene, rng: np.random.Generator):
    item = pick(rng, _named(scene))
    return "place", {"x": _described(scene, item, rng, "place")}, item.place, _others(rng, PLACE_ODDS, item.place)


def _count(scene: Scene, rng: np.random.Generator):
    answer = COUNTS[len(scene.items) - 1]
    return "count", {}, answer, _others(rng, COUNTS, answer)


def _size(scene: Scene, rng: np.random.Generator):
    sizes = sorted({i.size for i in scene.items}, key=list(SIZES).index)
    chances = np.array([SIZE_PICK[s] for s in sizes])
    size = sizes[rng.choice(len(sizes), p=chances / chances.sum())]
    item = pick(rng, [i for i in scene.items if i.size == size])
    # Not by its shape's name: only the tiny are called dots.
    return "size", {"x": _described(scene, item, rng, "shape")}, size, _others(rng, tuple(SIZES), size)


def _brightness(scene: Scene, rng: np.random.Generator):
    grey = [i for i in scene.items if level_name(i)]
    middling = [i for i in grey if level_name(i).endswith("grey")]
    forms = extremes(scene.items)
    if not forms or middling and rng.random() < 0.65 or grey and rng.random() < 0.1:
        item = pick(rng, middling or grey)
        answer = level_name(item)
        return "level", {"x": _described(scene, item, rng, "colour")}, answer, _others(rng, tuple(GREYS), answer)
    form = pick(rng, list(forms))
    answer = forms[form].shape
    return form, {}, answer, _others(rng, SHAPE_ODDS, answer, {i.shape for i in scene.items})


def _texture(scene: Scene, rng: np.random.Generator):
    return "texture", {}, scene.look.texture, _others(rng, TEXTURES, scene.look.texture)


def _inside(scene: Scene, rng: np.random.Generator):
    solid = [i for i in scene.items if i.shape in SOLID and i.size in ("medium", "large")]
    marked, empty = [i for i in solid if i.mark], [i for i in solid if not i.mark]
    kinds = [i.mark.kind for i in marked]
    single = [i for i in scene.unique_shapes() if i.mark and kinds.count(i.mark.kind) == 1]
    absent = [k for k in MARKS if k not in kinds]
    present = {i.shape for i in scene.items}
    # Shares at which "none" and "nothing" are true about as often as any other answer that is shown.
    chances = {"holder": 0.48 * bool(single), "content": 0.30, "side": 0.22}
    if not marked:
        chances = {"holder": 0.38, "content": 0.22, "side": 0.40 * bool(solid)}
    form = list(chances)[rng.choice(3, p=np.array(list(chances.values())) / sum(chances.values()))]
    if form == "holder":
        item = pick(rng, single) if marked else None
        kind, answer = (item.mark.kind, item.shape) if item else (pick(rng, absent), NONE)
        others = _others(rng, SOLID, answer, present)
        return "holder", {"k": kind}, answer, [NONE, *others[:2]] if item else others
    if form == "content":
        unmarked = [i for i in scene.items if not i.mark and i.shape != DOT]
        item = pick(rng, unmarked if not marked or empty and rng.random() < 0.1 else marked)
        answer = item.mark.kind if item.mark else NOTHING
        # Not by its shape's name: a ring or a bar never holds anything.
        return "content", {"x": _described(scene, item, rng, "shape")}, answer, _others(rng, (*MARKS, NOTHING), answer)
    item = pick(rng, marked or solid)
    kind, answer = (item.mark.kind, item.mark.side) if item.mark else (pick(rng, absent), NONE)
    return "side", {"x": _described(scene, item, rng, ""), "k": kind}, answer, _others(rng, (*SIDES, NONE), answer)


def _item(scene: Scene, rng: np.random.Generator):
    item = pick(rng, _named(scene))
    answer = f"{item.size} {item.colour} {item.shape} in the {item.place}"
    return "item", {"x": _described(scene, item, rng, "place")}, answer, ()


_ASKERS = {
    "item": _item,
    "shape": _shape,
    "colour": _colour,
    "place": _place,
    "count": _count,
    "size": _size,
    "brightness": _brightness,
    "texture": _texture,
    "inside": _inside,
}


def _named(scene: Scene) -> list[SceneItem]:
    """Items that can be named without their place; the first item always can."""
    by_shape, by_colour = scene.unique_shapes(), scene.unique_colours()
    return [i for i in scene.items if any(i is j for j in (*by_shape, *by_colour))]


def _described(scene: Scene, item: SceneItem, rng: np.random.Generator, asked: str) -> str:
    """A phrase that fits this item only and does not name what is asked."""
    ways = []
    if asked != "shape" and any(item is i for i in scene.unique_shapes()):
        ways += [item.shape] * 2
    if asked != "colour" and any(item is i for i in scene.unique_colours()):
        ways.append(f"{item.colour} shape")
    if asked != "place":
        ways.append(f"{item.place} shape")
    return pick(rng, ways)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One to four short sentences: number and background, then the shapes in reading order, as many as fit."""
    count = COUNTS[len(scene.items) - 1]
    plural = "shape" if len(scene.items) == 1 else "shapes"
    style = rng.integers(3)
    sentences = [
        f"{count} {plural} on a {scene.look.texture} background.",
        f"The background is {scene.look.texture}, with {count} {plural}.",
        f"{scene.look.texture} background, {count} {plural}.",
    ][style : style + 1]
    for item in sorted(scene.items, key=lambda i: PLACES.index(i.place)):
        name = " ".join(w for w in ("" if item.size in ("medium", "tiny") else item.size, item.colour, item.shape) if w)
        article = "an" if name[0] in "aeiou" else "a"
        place = f"in the {item.place}"
        forms = (f"{article} {name} is {place}", f"there is {article} {name} {place}", f"{article} {name} {place}")
        sentence = forms[style]
        if item.mark:
            sentence += f", with a {item.mark.kind} in its {item.mark.side}"
        sentences.append(sentence + ".")
    if not any(i.mark for i in scene.items) and rng.random() < 0.5:
        sentences.insert(1, "No spot is seen.")
    text, room = [], CAPTION_WORDS
    for sentence in sentences:
        room -= len(sentence.split()) + sentence.count(",") + 1
        if room < 0:
            break
        text.append(sentence[0].upper() + sentence[1:])
    return " ".join(text)


def _others(rng: np.random.Generator, odds, answer: str, near=()) -> list[str]:
    """Three wrong options, drawn by their odds (all alike for a plain sequence); those of `near` often come first."""
    rest = [o for o in odds if o != answer]
    order = rng.exponential(size=len(rest))
    if isinstance(odds, dict):
        order /= [odds[o] for o in rest]
    if near and rng.random() < 0.6:
        order += [1e3 * (o not in near) for o in rest]
    return [rest[i] for i in np.argsort(order)[:3]]
