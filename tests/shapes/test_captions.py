"""Captions that are not true: swapped attributes and order, noise from the web."""
import random
import re
from collections import Counter
from dataclasses import replace

from common.data.shapes.captions import (HARDNESSES, noisy_caption, swapped_attributes,
                                         swapped_order)
from common.data.shapes.scene import HELD_OUT, Scene, draw
from common.data.shapes.words import is_true, statements
from tests.shapes.judge import ODD, TWO, held_out, many


def test_swapped_attributes_are_false():
    kinds = Counter()
    for scene, rng in many(600, (2, 4)):
        record = swapped_attributes(scene, rng, side=None)
        if record is None:
            continue
        true, false = record["texts"]
        assert is_true(true, scene) and not is_true(false, scene)
        assert not held_out(false), false
        assert statements(false)       # a sentence of the world, not gibberish
        bare = [sorted(re.sub(r"\b(an?|at|in) ", "", text).split()) for text in (true, false)]
        assert bare[0] == bare[1] and true != false
        kinds[record["kind"]] += 1
    assert set(kinds) == {"colour", "size", "place"} and min(kinds.values()) > 100
    assert swapped_attributes(ODD, random.Random(0)) is None
    swapped = {tuple(swapped_attributes(TWO, random.Random(n), side=None)["texts"])
               for n in range(40)}
    assert ("a red circle and a blue square", "a blue circle and a red square") in swapped
    # exchanging colours would name a red star here
    awkward = Scene((replace(TWO.items[0], x=0.4, y=0.5, size="small"),
                     replace(TWO.items[1], shape="star", x=0.6, y=0.5)))
    assert swapped_attributes(awkward, random.Random(0)) is None


def test_swapped_order_is_false():
    kinds = Counter()
    for scene, rng in many(600, (1, 3)):
        for kind in ("reversed", "shuffled", None):
            record = swapped_order(scene, rng, kind, side=None)
            if record is None:
                assert kind == "reversed"
                continue
            true, false = record["texts"]
            assert is_true(true, scene) and not is_true(false, scene) and not held_out(false)
            bare = [sorted({"an": "a"}.get(w, w) for w in t.split()) for t in (true, false)]
            assert bare[0] == bare[1]
            if record["kind"] == "reversed":
                relation = r"left of|right of|above|below"
                assert re.split(f" ({relation}) ", true) == re.split(f" ({relation}) ", false)[::-1]
            kinds[record["kind"], kind] += 1
    assert len(kinds) == 4 and min(kinds.values()) > 100


def test_noisy_captions():
    for rate in (0.0, 0.3, 1.0):
        noisy = 0
        for scene, rng in many(500, (1, 3)):
            record = noisy_caption(scene, rng, rate, side=None)
            caption, = record["texts"]
            assert is_true(caption, scene) is record["truth"]
            assert is_true(caption, record["described"]) and not held_out(caption)
            assert (record["hardness"] is None) is record["truth"]
            noisy += not record["truth"]
        assert abs(noisy / 500 - rate) < 0.07


def test_hardnesses_of_noise():
    for hardness in HARDNESSES:
        changed = Counter()
        for scene, rng in many(300, (1, 3)):
            record = noisy_caption(scene, rng, 1.0, hardness, side=None)
            here, there = ([(i.colour, i.shape) for i in s.items]
                           for s in (scene, record["described"]))
            assert record["hardness"] == hardness and not set(there) & HELD_OUT
            shared = [set(a) & set(b) for a, b in zip(zip(*here), zip(*there))]
            if hardness == "shares":
                assert len(shared[0]) + len(shared[1]) == 1
                changed["colour" if shared[0] else "shape"] += 1
            if hardness == "differs":
                pairs = [(a, b) for a, b in zip(scene.items, record["described"].items) if a != b]
                (a, b), = pairs
                assert (a.colour == b.colour) != (a.shape == b.shape)
                assert replace(b, colour=a.colour, shape=a.shape) == a
                assert record["described"].background == scene.background
                changed["colour" if a.colour != b.colour else "shape"] += 1
        assert hardness == "random" or min(changed["colour"], changed["shape"]) > 60


def test_a_record_has_the_picture_of_its_scene():
    for record in (swapped_attributes(TWO, random.Random(0), 40), noisy_caption(
            TWO, random.Random(0), 1.0, side=40), swapped_order(TWO, random.Random(0), side=40)):
        picture, = record["images"]
        assert picture.tobytes() == draw(TWO, 40).tobytes() and record["source"] == TWO
