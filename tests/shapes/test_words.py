"""The language of the shapes world: phrases, sentences, and which of them are true."""
import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from common.data.shapes.scene import BACKGROUNDS, HELD_OUT, PAIRS, SHAPES, sample
from common.data.shapes.words import (OPENINGS, at, describe, is_true, listed, matching, nameable,
                                      names_an_object, names_held_out, parse_phrase, phrase,
                                      references, relations, statements, things, vague, where)
from tests.shapes.judge import NUMBERS, fitting, many, odd, one, pair

# Sentences on `pair`.
TRUE = """a red circle. A Red Circle. red circle. a circle. a large red circle. a large object.
    a red object and a shape. a red circle and a blue square. a blue square, a red circle.
    a red circle at the top left. a red circle at the left. a red circle on the top.
    a blue square at the right. the red circle is at the top left.
    a red circle on a grey background. a red circle left of a blue square.
    the red circle is to the left of the blue square. a red circle above a blue square.
    a blue square right of a red circle. one red circle. two objects. no green star.
    there are two shapes. a photo of a red circle. there is a red circle.
    an image with a small blue square. this is a red thing. we see a blue square. i see a circle"""
FALSE = """a small red circle. a red square. a blue circle. a red circle and a blue ring.
    a red circle and a green star. a green star and a red circle. a red circle at the right.
    a red circle in the centre. a blue square at the bottom right.
    a red circle on a white background. a red circle on a red background.
    a red circle right of a blue square. a red circle below a blue square.
    a blue square left of a red circle. a red circle above a green star.
    a red circle left of a red circle. two red circles. three objects. no red circle. no objects"""
# A relation joins two single objects; the others are no sentences either.
NONSENSE = """no red circle left of a blue square. two red circles above a blue square.
    a red circle left of a blue square and a circle. and. ,. . a. red. the left. a dog.
    a red red circle. a circle red. a red circle and. a red circle and a dog.
    a red circle a blue square. left of a blue square. a red circle left of.
    a red circle left of a dog. a red circle at the middle. on a grey background and a circle.
    a red circle on a grey background and a blue square. what colour is the circle?.
    \t\0 <image> 7"""


class TestIsTrue:
    @pytest.mark.parametrize("texts", ["TRUE", "FALSE", "NONSENSE"])
    def test_sentences_on_a_scene(self, texts):
        for text in re.split(r"\.\s+", globals()[texts]):
            assert is_true(text, pair()) is (texts == "TRUE"), text
            assert (statements(text) is None) is (texts == "NONSENSE") or not text, text
        assert not is_true("on a grey background", pair())

    def test_random_sentences_agree_with_the_objects(self):
        truths = Counter()
        for scene, rng in many(1500):
            wrong = rng.choice(sample(rng, 2).items)
            item, other = (rng.choice([*scene.items, wrong]) for _ in "ab")
            a, b = ("the " + " ".join(filter(None, [i.size * rng.randrange(2), i.colour * rng.randrange(2),
                                                   rng.choice([i.shape, "object"])])) for i in (item, other))
            n, ground = rng.randrange(4), rng.choice(list(BACKGROUNDS))
            relation = rng.choice(["left of", "right of", "above", "below"])
            gaps = [{"l": y.x - x.x, "r": x.x - y.x, "a": y.y - x.y, "b": x.y - y.y}[relation[0]]
                    for x in fitting(a, scene) for y in fitting(b, scene)]
            plural = re.sub("crosss", "crosses", a.removeprefix("the ") + "s")
            for kind, text, truth in (
                    ("place", f"{a} {at(item)}", bool(fitting(f"{a} {at(item)}", scene))),
                    ("relation", f"{a} {relation} {b}", any(gap > 0.12 for gap in gaps)),
                    ("background", f"{a} on a {ground} background",
                     bool(fitting(a, scene)) and ground == scene.background),
                    ("count", f"{('no', *NUMBERS[1:])[n]} {plural if n != 1 else plural}",
                     len(fitting(a, scene)) == n),
                    ("list", f"{a}, {b}", bool(fitting(a, scene) and fitting(b, scene)))):
                assert is_true(text, scene) is truth, (text, scene)
                truths[kind, truth] += 1
        assert len(truths) == 10 and min(truths.values()) > 100, truths


class TestStatements:
    def test_a_sentence_becomes_phrases_with_their_places_and_relations(self):
        assert statements("A photo of a small red circle at the top left, two blue squares on a "
                          "grey background.") == [
            ("background", "grey"), ("exists", (None, "small", "red", "circle"), "top left"),
            ("exists", (2, None, "blue", "square"), None)]
        assert statements("a red circle above a star") == [
            ("relation", (None, None, "red", "circle"), "above", (None, None, None, "star"))]
        assert parse_phrase("an orange thing") == (None, None, "orange", None)
        assert parse_phrase("two small red crosses") == (2, "small", "red", "cross")

    def test_what_names_an_object_by_colour_and_shape(self):
        for text in ("a circle and a large blue star", "two red circles", "a circle above a blue star"):
            assert names_an_object(text), text
        for text in ("a circle", "a red object", "a large thing", "no red circle", "nonsense", ""):
            assert not names_an_object(text), text

    def test_what_names_a_held_out_pair(self):
        assert all(map(names_held_out, ("two red stars", "A Red Star.", "purple crosses")))
        assert not names_held_out("a red circle and a blue star")


class TestDescribe:
    @pytest.mark.parametrize("length", ["short", "long", "full", None])
    def test_it_is_true_and_names_every_object_once(self, length):
        for scene, rng in many(500):
            text = describe(scene, rng, length)
            assert is_true(text, scene) and names_an_object(text), text
            assert all(text.count(item.name) == 1 for item in scene.items)
            assert len(re.findall("|".join(SHAPES), text)) == len(scene.items)
            if length == "full":
                assert all(f"{phrase(item, size=True)} {at(item)}" in text for item in scene.items)
                assert f"{scene.background} background" in text

    def test_the_long_ones_say_more(self):
        short, long, either = ({describe(pair(), random.Random(i), length) for i in range(300)}
                               for length in ("short", "long", None))
        assert len(short) == 2 * len(set(OPENINGS)) and either & short and either - short <= long
        said = ("large", "left of", "right of", "above", "below", "at the", "background")
        assert not any(word in text for text in short for word in said)
        assert all(any(word in text for text in long) for word in said)
        assert vague(pair()) == "two objects on a grey background"


class TestPhrases:
    def test_articles_lists_and_matching_items(self):
        red, blue = pair().items
        assert phrase(red) == "a red circle" and phrase(red, size=True) == "a large red circle"
        orange = replace(red, colour="orange")
        assert phrase(orange) == "an orange circle" and phrase(orange, True) == "a large orange circle"
        assert list(map(listed, ("x", "xy", "xyz"))) == ["x", "x and y", "x, y and z"]
        assert matching(pair(), size="small") == [blue] and matching(pair()) == [red, blue]
        assert matching(pair(), colour="red", shape="square") == []

    def test_where_divides_the_picture_in_thirds(self):
        rows, columns = (((first, 0.33), ("", 0.34), ("", 0.66), (last, 0.67))
                         for first, last in (("top", "bottom"), ("left", "right")))
        for (row, y), (column, x) in itertools.product(rows, columns):
            item = replace(pair().items[0], x=x, y=y)
            assert where(item) == (f"{row} {column}".strip() or "centre")
            assert at(item) == f"{'at' if row or column else 'in'} the {where(item)}"

    def test_relations_need_a_margin(self):
        red, blue = pair().items
        for x, y, held in ((0.63, 0.5, []), (0.62, 0.5, ["left of"]), (0.88, 0.61, ["right of"]),
                           (0.75, 0.63, ["below"]), (0.1, 0.1, ["left of", "above"])):
            assert relations(replace(red, x=x, y=y), blue) == held

    def test_references_fit_one_object(self):
        for scene, _ in many(400, (1, 5)):
            for item, hide in itertools.product(scene.items, (None, "size", "colour", "shape")):
                for said in references(scene, item, hide):
                    assert one(said, scene) == item
                    assert not hide or getattr(item, hide) not in said.split()
        red, blue = pair().items
        assert set(references(pair(), red, "colour")) == {
            "large object", "circle", "large circle", "object at the top left"}
        assert "object" in references(odd(), *odd().items)
        near = pair(items=(red, replace(blue, x=0.5, y=0.1)))               # "top" fits both
        assert "object at the top" not in references(near, near.items[1])

    def test_things_are_pairs_colours_and_shapes(self):
        found = things([("orange", "ring"), ("red", "star")])
        assert [form for form, *_ in found] == 2 * ["pair"] + 8 * ["colour"] + 6 * ["shape"]
        for form, words, attributes in found:
            said = [*attributes.values()] + ["object"] * (form == "colour")
            assert words == f"{'an' if said[0] == 'orange' else 'a'} {' '.join(said)}"
        assert found[0][2] == {"colour": "orange", "shape": "ring"}
        assert nameable(pair()) == PAIRS and set(nameable(odd())) == {*PAIRS, *HELD_OUT}
