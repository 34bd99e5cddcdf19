"""The shapes world: what is drawn, what is said of it, and what the judge holds to be true."""
import colorsys
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common.data.shapes import scene as scenes
from common.data.shapes.scene import (BACKGROUNDS, COLOURS, HELD_OUT, PAIRS, SHAPES, SIZES, STYLES,
                                      Item, Scene, describe, draw, listed, restyled, sample)
from common.data.shapes.words import (MARGIN, OPENINGS, is_true, matching, names_an_object,
                                      parse_phrase, phrase, relations, statements, where)
from common.data.shapes.world import Shapes

RED = Item("red", "circle", "large", 0.25, 0.3)
BLUE = Item("blue", "square", "small", 0.75, 0.5)
PAIR = Scene((RED, BLUE), "grey")


def many(n, objects=(1, 5), **dial):
    """n scenes, each with the rng that comes next."""
    for i in range(n):
        rng = random.Random(f"test/{i}")
        yield sample(rng, objects, **dial), rng


def pixels(scene, size=96):
    """The picture as integers, (size, size, 3)."""
    return np.asarray(draw(scene, size)).astype(int)


def ink(item, size=200, **look):
    """Where an item alone on white is drawn: boolean (size, size)."""
    picture = pixels(Scene((item,), **look), size)
    return np.abs(picture - BACKGROUNDS["white"]).sum(-1) > 60


# ---------------------------------------------------------------- the judge

def test_every_caption_is_true_of_its_scene():
    for distinct in (True, False):
        for scene, rng in many(1000, distinct=distinct):
            for length in ("short", "long", None):
                text = describe(scene, rng, length)
                assert is_true(text, scene) and names_an_object(text), text


def test_captions_name_every_object_once():
    for scene, rng in many(500):
        text = describe(scene, rng)
        for item in scene.items:
            assert text.count(f"{item.colour} {item.shape}") == 1
        assert len(re.findall("|".join(SHAPES), text)) == len(scene.items)


def test_captions_vary_and_the_long_ones_say_more():
    texts = [describe(PAIR, random.Random(i), "long") for i in range(200)]
    for word in ("large", "left of", "right of", "above", "below", "at the", "background"):
        assert any(word in t for t in texts), word
    short = {describe(PAIR, random.Random(i), "short") for i in range(200)}
    assert len(short) == 2 * len(set(OPENINGS))
    assert not any(w in t for t in short for w in ("large", "left", "background"))


@pytest.mark.parametrize("text, truth", [
    ("a red circle", True), ("A Red Circle.", True), ("red circle", True), ("a circle", True),
    ("a large red circle", True), ("a small red circle", False), ("a red square", False),
    ("a blue circle", False), ("a red object and a shape", True), ("a large object", True),
    ("a red circle and a blue square", True), ("a red circle and a blue ring", False),
    ("a blue square, a red circle", True), ("a red circle and a green star", False),
    ("a red circle at the top left", True), ("a red circle at the left", True),
    ("a red circle at the top", True), ("a red circle at the right", False),
    ("a red circle in the centre", False), ("a blue square at the right", True),
    ("a blue square at the bottom right", False), ("the red circle is at the top left", True),
    ("a red circle on a grey background", True), ("a red circle on a white background", False),
    ("a red circle on a red background", False),
    ("a red circle left of a blue square", True), ("a red circle right of a blue square", False),
    ("the red circle is to the left of the blue square", True),
    ("a red circle above a blue square", True), ("a red circle below a blue square", False),
    ("a blue square left of a red circle", False), ("a blue square right of a red circle", True),
    ("a red circle above a green star", False), ("a red circle left of a red circle", False),
    ("one red circle", True), ("two red circles", False), ("two objects", True),
    ("three objects", False), ("no green star", True), ("no red circle", False),
    ("there are two shapes", True), ("no objects", False), ("a photo of a red circle", True),
    ("there is a red circle", True), ("an image with a small blue square", True),
    # a relation joins two objects, so counted ones are not of the language
    ("no red circle left of a blue square", False), ("two red circles above a blue square", False),
    # neither is any of these
    ("", False), ("   ", False), ("and", False), (",", False), (".", False), ("a", False),
    ("red", False), ("the left", False), ("a dog", False), ("a red red circle", False),
    ("a circle red", False), ("a red circle and", False), ("a red circle and a dog", False),
    ("a red circle a blue square", False), ("left of a blue square", False),
    ("a red circle left of", False), ("a red circle left of a dog", False),
    ("a red circle at the middle", False), ("on a grey background", False),
    ("a red circle on a grey background and a blue square", False), ("\n\t\0 <image> 7", False)])
def test_the_judge(text, truth):
    assert is_true(text, PAIR) is truth


def test_the_judge_counts_exactly():
    three = Scene(tuple(replace(RED, x=x) for x in (0.2, 0.5, 0.8)) + (BLUE,))
    assert is_true("three red circles", three) and is_true("four objects", three)
    assert not is_true("two red circles", three) and not is_true("one red circle", three)
    assert is_true("two red circles", replace(three, items=three.items[1:]))
    crosses = Scene((replace(RED, shape="cross"), replace(BLUE, shape="cross")))
    assert is_true("two crosses", crosses) and not is_true("two squares", crosses)


def test_one_changed_word_makes_a_caption_false():
    """A colour, shape, size, place, relation or background that is not there is noticed."""
    changed = dict.fromkeys(("colour", "shape", "size", "where", "relation", "background"), 0)
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene, rng in many(3000, (1, 2)):
        text = describe(scene, rng, "long")
        colours, shapes = ({getattr(i, a) for i in scene.items} for a in ("colour", "shape"))
        item = scene.items[0]
        free = rng.choice(sorted(set(COLOURS) - colours)), rng.choice(sorted(set(SHAPES) - shapes))
        false = {"colour": re.sub(rf"\b{item.colour}\b", free[0], text),
                 "shape": re.sub(rf"\b{item.shape}\b", free[1], text)}
        said = f"{item.size} {item.colour}"
        false["size"] = text.replace(said, said.replace(*(("small", "large") if item.size == "small"
                                                          else ("large", "small"))))
        false["where"] = re.sub(rf"(at|in) the {where(item)}(?= and|,| on|$)",
                                "in the centre" if where(item) != "centre" else "at the top", text)
        false["relation"] = re.sub("left of|right of|above|below", lambda m: turned[m[0]], text)
        ground = next(b for b in BACKGROUNDS if b != scene.background)
        false["background"] = re.sub(r"\w+(?= background)", ground, text)
        for what, other in false.items():
            if other != text and not (what == "where" and len(scene.items) > 1):
                assert not is_true(other, scene), (what, text, other)
                changed[what] += 1
    assert min(changed.values()) > 100, changed


def test_statements_read_a_sentence():
    read = statements("A photo of a small red circle at the top left, two blue squares on a grey "
                      "background.")
    assert read == [("background", "grey"),
                    ("exists", (None, "small", "red", "circle"), "top left"),
                    ("exists", (2, None, "blue", "square"), None)]
    assert statements("a red circle above a star") == [
        ("relation", (None, None, "red", "circle"), "above", (None, None, None, "star"))]
    assert statements("what colour is the star?") is None
    assert parse_phrase("an orange thing") == (None, None, "orange", None)
    assert parse_phrase("two small red circles") == (2, "small", "red", "circle")


def test_what_names_an_object():
    assert names_an_object("a circle and a large blue star") and names_an_object("two red circles")
    assert names_an_object("a circle above a blue star")
    for text in ("a circle", "a red object", "a large thing", "no red circle", "nonsense", ""):
        assert not names_an_object(text), text


# ---------------------------------------------------------------- relations, places, words

def test_relations_are_antisymmetric_and_need_a_margin():
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene, _ in many(1000, 2):
        a, b = scene.items
        assert [mirror[r] for r in relations(a, b)] == relations(b, a)
        assert relations(a, a) == []
        dx, dy = a.x - b.x, a.y - b.y
        said = ["left of"] * (dx < -0.12) + ["right of"] * (dx > 0.12)
        assert relations(a, b) == said + ["above"] * (dy < -0.12) + ["below"] * (dy > 0.12)
    near = replace(RED, x=0.5 - MARGIN + 0.001, y=0.5)
    far = replace(RED, x=0.5 - MARGIN - 0.001, y=0.5)
    centre = replace(RED, x=0.5, y=0.5)
    assert relations(near, centre) == [] and relations(far, centre) == ["left of"]
    assert relations(replace(RED, x=0.5, y=0.1), centre) == ["above"]     # y grows downwards


@pytest.mark.parametrize("x, y, place", [
    (0.1, 0.1, "top left"), (0.5, 0.1, "top"), (0.9, 0.1, "top right"), (0.1, 0.5, "left"),
    (0.5, 0.5, "centre"), (0.9, 0.5, "right"), (0.1, 0.9, "bottom left"), (0.5, 0.9, "bottom"),
    (0.9, 0.9, "bottom right"), (0.34, 0.66, "centre"), (0.33, 0.67, "bottom left")])
def test_places(x, y, place):
    item = replace(RED, x=x, y=y)
    assert where(item) == place
    said = f"a red circle {'in' if place == 'centre' else 'at'} the {place}"
    for text in (said, said.replace("at the", "on the")):
        assert is_true(text, Scene((item,)))


def test_words():
    assert phrase(RED) == "a red circle" and phrase(RED, size=True) == "a large red circle"
    assert phrase(replace(RED, colour="orange")) == "an orange circle"
    assert phrase(replace(RED, colour="orange"), size=True) == "a large orange circle"
    assert phrase(RED, article="the") == "the red circle"
    assert phrase(RED, article="") == "red circle"
    assert listed(["x"]) == "x" and listed(["x", "y"]) == "x and y"
    assert listed(["x", "y", "z"]) == "x, y and z"
    assert matching(PAIR, size="small") == [BLUE] and matching(PAIR) == [RED, BLUE]
    assert matching(PAIR, colour="red", shape="square") == []


# ---------------------------------------------------------------- drawing

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", ("red", "cyan"))
def test_an_object_has_its_colour_at_its_place(shape, colour):
    for background, size in (("white", "large"), ("cream", "small")):
        item = Item(colour, shape, size, 0.3, 0.65, (5, -7, 3))
        picture = pixels(Scene((item,), background), 96)
        column = 0.3 + 0.75 * item.radius if shape == "ring" else 0.3
        row = 0.65
        inside = picture[int(row * 96), int(column * 96)]
        assert np.abs(inside - np.add(COLOURS[colour], item.tint)).max() <= 1
        assert tuple(picture[48, 90]) == BACKGROUNDS[background]
        if shape == "ring":               # hollow
            assert tuple(picture[int(0.65 * 96), int(0.3 * 96)]) == BACKGROUNDS[background]


# Points in units of the radius from the centre (x to the right, y down): inside, outside.
OUTLINES = {"circle": ([(0.68, 0.68), (0.94, 0)], [(0.75, 0.75)]),
            "square": ([(0.75, 0.75), (-0.75, -0.75)], [(0.9, 0)]),
            "triangle": ([(0, -0.8), (0.75, 0.62), (-0.75, 0.62)], [(0.6, -0.6), (0, 0.8)]),
            "star": ([(0, -0.98), (0.9, -0.3)], [(0.45, -0.6), (0, 0.6), (0.8, 0.2)]),
            "cross": ([(0.9, 0), (0, 0.9), (-0.9, 0.25)], [(0.5, 0.5), (-0.5, 0.5)]),
            "ring": ([(0.6, 0), (0, -0.9)], [(0, 0), (0.4, 0), (0.75, 0.75)])}


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines(shape):
    drawn = ink(Item("red", shape, "large", 0.5, 0.5), 400)
    inside, outside = OUTLINES[shape]
    r = SIZES["large"]

    def at(u, v):
        return drawn[int(400 * (0.5 + r * v)), int(400 * (0.5 + r * u))]

    assert all(at(u, v) for u, v in inside) and not any(at(u, v) for u, v in outside)


def test_the_box_is_what_is_drawn():
    for scene, _ in many(100, (1, 4)):
        for item in scene.items:
            rows, columns = np.nonzero(ink(item, 200))
            drawn = np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)) / 200
            assert np.abs(drawn - item.box).max() < 0.013, (item, drawn, item.box)
            assert 0 <= min(item.box) and max(item.box) <= 1
    for size, r in SIZES.items():
        box = Item("red", "circle", size, 0.5, 0.5).box
        assert box == pytest.approx((0.5 - r, 0.5 - r, 0.5 + r, 0.5 + r))


def test_objects_lie_inside_and_apart():
    for scene, _ in many(500, (2, 5)):
        for n, a in enumerate(scene.items):
            assert a.radius <= a.x <= 1 - a.radius and a.radius <= a.y <= 1 - a.radius
            for b in scene.items[:n]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
    assert scenes.place(random.Random(0), [0.45, 0.45]) is None


def test_equal_scenes_give_equal_pictures():
    for scene, _ in many(30, noise=0.05, clutter=3):
        np.random.seed(1)
        one = draw(scene, 40)
        np.random.seed(2)
        assert one.tobytes() == draw(replace(scene), 40).tobytes()
        assert one.size == (40, 40) and one.mode == "RGB"
        assert one.tobytes() != draw(replace(scene, grain=scene.grain + 1), 40).tobytes()
    assert draw(PAIR, 32).tobytes() != draw(replace(PAIR, items=PAIR.items[:1]), 32).tobytes()


def test_sampling_depends_on_the_rng_alone():
    first = [scene for scene, _ in many(50, noise=0.1, clutter=2)]
    random.seed(7)
    state = random.getstate()
    assert [scene for scene, _ in many(50, noise=0.1, clutter=2)] == first
    assert random.getstate() == state
    assert len(set(first)) == 50


# ---------------------------------------------------------------- styles and the dial

def test_styles_look_different_and_keep_the_truth():
    for scene, rng in many(60, (1, 3)):
        text = describe(scene, rng)
        looks = {style: draw(restyled(scene, style), 64) for style in STYLES}
        assert len({look.tobytes() for look in looks.values()}) == len(STYLES)
        for style in STYLES:
            other = restyled(scene, style)
            assert is_true(text, other) and other.items == scene.items and other.style == style
    assert restyled(scene, "plain") == scene
    with pytest.raises(ValueError, match="sketch.*outline"):
        restyled(scene, "sketch")


@pytest.mark.parametrize("colour", COLOURS)
def test_what_each_style_changes(colour):
    item = Item(colour, "square", "large", 0.5, 0.5)
    looks = {style: pixels(Scene((item,), style=style), 100) for style in STYLES}
    assert tuple(looks["plain"][55, 52]) == COLOURS[colour]
    assert tuple(looks["outline"][50, 50]) == BACKGROUNDS["white"]              # only its edge
    edge = int(100 * (0.5 + 0.8 * item.radius))
    assert np.abs(looks["outline"][50, edge] - COLOURS[colour]).max() < 60
    column = looks["texture"][35:65, 50]                                        # stripes
    assert np.ptp(column, axis=0).max() > 20
    assert (column == COLOURS[colour]).all(-1).any()
    hue, dull = (colorsys.rgb_to_hsv(*(looks[s][55, 52] / 255)) for s in ("plain", "palette"))
    turn = abs(hue[0] - dull[0])
    assert min(turn, 1 - turn) < 0.02 and dull[2] < hue[2]                      # darker, same hue


def test_the_dial_of_objects():
    assert {len(s.items) for s, _ in many(300, (1, 5))} == {1, 2, 3, 4, 5}
    assert all(len(s.items) == 3 for s, _ in many(50, 3))
    assert all(len({(i.colour, i.shape) for i in s.items}) == 5 for s, _ in many(100, 5))
    twins = [s for s, _ in many(300, 4, distinct=False)
             if len({(i.colour, i.shape) for i in s.items}) < 4]
    assert twins
    assert {i.size for s, _ in many(50, 5) for i in s.items} == {"small"}       # else no room
    assert {i.size for s, _ in many(50, 4) for i in s.items} == set(SIZES)
    for what in ("colour", "shape"):
        assert len({getattr(i, what) for s, _ in many(300) for i in s.items}) == len(
            COLOURS if what == "colour" else SHAPES)
    assert {s.background for s, _ in many(50)} == set(BACKGROUNDS)


def test_the_dial_of_noise_and_clutter():
    scene = sample(random.Random(3), 1)
    clean, rough = (pixels(replace(scene, noise=n, background="grey"), 64) for n in (0, 0.05))
    corner = [p[:6, :6] for p in (clean, rough)]
    everywhere = rough - clean
    assert corner[0].std() == 0 or scene.items[0].box[0] < 0.1
    assert 0.8 < everywhere.std() / (255 * 0.05) < 1.1
    crowded = sample(random.Random(3), 1, clutter=4)
    assert crowded.items == scene.items and len(crowded.clutter) == 4
    assert crowded.noise == 0 and sample(random.Random(3), 1, noise=0.1).noise == 0.1
    changed = (pixels(crowded, 96) != pixels(replace(crowded, clutter=()), 96)).any(-1)
    assert 0.005 < changed.mean() < 0.3
    item = replace(crowded.items[0], shape="square")
    covered = replace(crowded, items=(item,), clutter=((0, 0, 1, 1), (0, 1, 1, 0)))
    assert tuple(pixels(covered)[int(item.y * 96), int(item.x * 96)]) == tuple(
        np.add(COLOURS[item.colour], item.tint).clip(0, 255))      # strokes lie behind the objects


# ---------------------------------------------------------------- splits of the world

def test_held_out_pairs():
    assert len(HELD_OUT) == 6 and len({s for _, s in HELD_OUT}) == 6
    assert len(PAIRS) + len(HELD_OUT) == len(COLOURS) * len(SHAPES) and not HELD_OUT & set(PAIRS)
    assert not any((i.colour, i.shape) in HELD_OUT for s, _ in many(800, (1, 4)) for i in s.items)


def named(text):
    """The held-out pairs that a text names."""
    words = re.findall(r"\w+", text)
    return HELD_OUT & set(zip(words, words[1:]))


def test_splits_of_the_world():
    world = Shapes(objects=3)
    for index in range(150):
        record = world.record("train", index, random.Random(index))
        for r in (record, world.record("train", index), world.record("test", index)):
            assert not {(i.colour, i.shape) for i in r["source"].items} & HELD_OUT
            assert not any(map(named, r["texts"]))
            assert all(world.is_true(t, r["source"]) for t in r["texts"])
    assert not any(map(named, world.corpus()))
    tested = [world.scene("composition", i) for i in range(world.size("composition"))]
    pairs = [(s.items[0].colour, s.items[0].shape) for s in tested]
    assert set(pairs) == HELD_OUT and {pairs.count(p) for p in HELD_OUT} == {50}
    assert all(len(s.items) == 1 for s in tested)


def test_single_has_each_class_equally_often():
    world = Shapes()
    labels = [world.label(world.scene("single", i)) for i in range(world.size("single"))]
    assert sorted(set(labels)) == list(range(len(world.classes)))
    assert {labels.count(n) for n in set(labels)} == {24}
    first = world.scene("single", 0).items[0]
    assert world.all_classes[labels[0]] == phrase(first)
    assert len(world.all_classes) == 48 and world.all_classes[:42] == world.classes


def test_records_of_the_world():
    world = Shapes(objects=2, noise=0.02, clutter=1, image_size=40)
    one, other = world.record("test", 5), world.record("test", 6)
    assert one["images"][0].size == (40, 40) and one["source"] != other["source"]
    assert one["texts"] == world.record("test", 5)["texts"]
    assert one["source"].noise == 0.02 and len(one["source"].clutter) == 1
    assert world.scene("test", 5, random.Random(1)) == one["source"]         # no rng moves a test
    fresh = [world.scene("train", 5, random.Random(n)) for n in (1, 1, 2)]
    assert fresh[0] == fresh[1] != fresh[2]
    assert Shapes(style="outline").scene("test", 1).style == "outline"
    for index in range(60):
        plain, shifted = world.scene("single", index), world.scene("shifted", index)
        assert shifted.style in STYLES[1:] and restyled(shifted, "plain") == plain


def test_extracted_pictures_are_named_by_what_they_show(tmp_path):
    world = Shapes(image_size=20)
    assert world.extract(tmp_path / "new", count=7) == 7
    files = sorted((tmp_path / "new").iterdir())
    assert [f.name[:3] for f in files] == [f"{i:03d}" for i in range(7)]
    for index, file in enumerate(files):
        shown = file.stem[4:].replace("-", " ")
        assert world.is_true(shown, world.scene("test", index)), shown
        with Image.open(file) as picture:
            assert picture.size == (20, 20)
