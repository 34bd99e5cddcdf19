"""The language of the shapes world: phrases, sentences, and which of them are true."""
import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from common.data.shapes.scene import BACKGROUNDS, HELD_OUT, PAIRS, SHAPES, sample
from common.data.shapes.words import (OPENINGS, at, describe, is_true, listed, nameable,
                                      names_an_object, names_held_out, phrase, references,
                                      relations, vague, where)
from tests.shapes.judge import NUMBERS, fitting, many, odd, one, pair

# Sentences on `pair`: true ones, false ones, and what is no sentence. A relation joins two objects.
SENTENCES = {
    True: """a red circle. A Red Circle. red circle. a large object. a red object and a shape.
    a red circle and a blue square. a blue square, a red circle. a red circle at the top left.
    a red circle at the left. a red circle on the top. the red circle is at the top left.
    a red circle left of a blue square. the red circle is to the left of the blue square.
    there are two shapes. a photo of a red circle. there is a red circle. no green star.
    an object and an object.
    an image with a small blue square. this is a red thing. we see a blue square. i see a circle""",
    False: """a small red circle. a blue circle. a red circle and a blue ring. two red circles.
    a green star and a red circle. a red circle on a red background. a red circle in the centre.
    a red circle right of a blue square. a red circle left of a red circle. no objects.
    a red circle and a red circle. an object, an object and an object""",
    None: """no red circle left of a blue square. two red circles above a blue square. and. ,. red.
    a red circle left of a blue square and a circle. the left. a dog. a red red circle. a. a circle
    red. a red circle and. a red circle and a dog. a red circle a blue square. left of a square.
    a red circle left of. a red circle left of a dog. a red circle at the middle. on a grey
    background. a red circle on a grey background and a blue square. what colour is the circle?.
    \t\0 <image> 7"""}


class TestIsTrue:
    @pytest.mark.parametrize("truth", SENTENCES)
    def test_sentences_on_a_scene(self, truth):
        for text in re.split(r"\.\s+", SENTENCES[truth]):
            assert is_true(text, pair()) is is_true(f" {text}. ", pair()) is bool(truth), text
        assert not is_true("", pair())

    def test_random_sentences_agree_with_the_objects(self):
        truths = Counter()
        for scene, rng in many(1500):
            items = [*scene.items, *sample(rng, 1).items]
            a, b = (rng.choice([item.size + " ", ""]) + rng.choice([item.colour + " ", ""])
                    + rng.choice([item.shape, "object"]) for item in rng.choices(items, k=2))
            there, others = fitting(a, scene), fitting(b, scene)
            n, ground = rng.randrange(4), rng.choice(list(BACKGROUNDS))
            place, relation = at(items[-1]), rng.choice(["left of", "right of", "above", "below"])
            gaps = [{"l": y.x - x.x, "r": x.x - y.x, "a": y.y - x.y, "b": x.y - y.y}[relation[0]]
                    for x in there for y in others]
            plural = f"{a}s".replace("crosss", "crosses")
            for text, truth in ((f"the {a} {place}", fitting(f"{a} {place}", scene)),
                                (f"the {a} {relation} the {b}", max(gaps, default=0) > 0.12),
                                (f"a {a} on a {ground} background",
                                 there and ground == scene.background),
                                (f"{('no', *NUMBERS[1:])[n]} {plural}", len(there) == n),
                                (f"{a}, the {b}", len(there) > (a == b) and others)):
                assert is_true(text, scene) is bool(truth), (text, scene)
                truths[bool(truth)] += 1
        assert min(truths.values()) > 2000, truths

    def test_what_names_an_object_by_colour_and_shape(self):
        for text in ("a circle and a large blue star", "two red rings", "a star above a blue star"):
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
        assert len(short) == 2 * len(set(OPENINGS))
        assert either & short and either - short and either <= short | long
        said = ("large", "left of", "right of", "above", "below", "at the", "background")
        assert not any(word in text for text in short for word in said)
        assert all(any(word in text for text in long) for word in said)
        assert vague(pair()) == "two objects on a grey background"


class TestPhrases:
    def test_articles_and_lists(self):
        orange = replace(pair().items[0], colour="orange")
        assert phrase(orange) == "an orange circle"
        assert phrase(orange, size=True) == "a large orange circle"
        assert list(map(listed, ("x", "xy", "xyz"))) == ["x", "x and y", "x, y and z"]

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
        assert set(references(pair(), pair().items[0], "colour")) == {
            "large object", "circle", "large circle", "object at the top left"}
        assert nameable(pair()) == PAIRS and set(nameable(odd())) == {*PAIRS, *HELD_OUT}
