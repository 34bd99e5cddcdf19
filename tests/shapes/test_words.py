"""The language of the shapes world: phrases, sentences, and which of them are true."""
import random
import re
from dataclasses import replace

import pytest

from common.data.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Item, Scene
from common.data.shapes.words import (MARGIN, OPENINGS, describe, is_true, listed, matching,
                                      names_an_object, names_held_out, parse_phrase, phrase,
                                      references, relations, statements, things, where)
from tests.shapes.judge import ODD, TWO, many, one

RED = Item("red", "circle", "large", 0.25, 0.3)
BLUE = Item("blue", "square", "small", 0.75, 0.5)
PAIR = Scene((RED, BLUE), "grey")


def test_every_caption_is_true_of_its_scene():
    for scene, rng in many(1000):
        for length in ("short", "long", "full", None):
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
    assert RED.name == "red circle"
    assert listed(["x"]) == "x" and listed(["x", "y"]) == "x and y"
    assert listed(["x", "y", "z"]) == "x, y and z"
    assert matching(PAIR, size="small") == [BLUE] and matching(PAIR) == [RED, BLUE]
    assert matching(PAIR, colour="red", shape="square") == []


def test_references_fit_one_object():
    for scene, _ in many(400, (1, 5)):
        for item in scene.items:
            for hide in (None, "size", "colour", "shape"):
                for x in references(scene, item, hide):
                    assert one(x, scene) == item
                    assert not hide or getattr(item, hide) not in x.split()
    assert references(TWO, TWO.items[0], "colour") == [
        "large object", "circle", "large circle", "object at the top left"]
    assert "object" in references(ODD, ODD.items[0])
    near = Scene((TWO.items[0], replace(TWO.items[1], x=0.5, y=0.1)))       # "top" fits both
    assert "object at the top" not in references(near, near.items[1])


def test_held_out_pairs_are_noticed_in_a_text():
    assert names_held_out("two red stars") and names_held_out("A red star.")
    assert not names_held_out("a red circle and a blue star")


def test_things_are_pairs_colours_and_shapes():
    found = things([("orange", "ring"), ("red", "star")])
    assert [form for form, *_ in found] == 2 * ["pair"] + 8 * ["colour"] + 6 * ["shape"]
    for form, words, attributes in found:
        said = [*attributes.values()] + ["object"] * (form == "colour")
        assert words == f"{'an' if said[0] == 'orange' else 'a'} {' '.join(said)}"
    assert {*map(str, found)} >= {"('colour', 'an orange object', {'colour': 'orange'})",
                                  "('pair', 'a red star', {'colour': 'red', 'shape': 'star'})"}
