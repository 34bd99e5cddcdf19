"""Captions that are not true: swapped attributes and order, noise from the web."""
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from common.data.shapes.captions import (HARDNESSES, noisy_caption, swapped_attributes,
                                         swapped_order)
from common.data.shapes.scene import COLOURS, HELD_OUT
from common.data.shapes.words import is_true, statements
from tests.shapes.judge import held_out, many, odd, pair, pairs_in


def true_and_false(record):
    """The two texts with one article, after a check that both have the same words."""
    true, false = record["texts"]
    assert is_true(true, record["source"]) and not is_true(false, record["source"])
    assert not held_out(false)
    true, false = (re.sub(r"\ban\b", "a", text) for text in (true, false))
    assert true != false and sorted(true.split()) == sorted(false.split())
    return true, false


class TestSwappedAttributes:
    def test_the_second_caption_is_false_by_an_exchange_alone(self):
        kinds = Counter()
        said = {"colour": "|".join(COLOURS), "size": "small|large",
                "place": r"(at|in) the (top|bottom|left|right|centre| )+(?= and|$)"}
        for record in filter(None, [swapped_attributes(*given, None) for given in many(400, 2)]):
            true, false = true_and_false(record)
            assert statements(false)             # a sentence of the world, not gibberish
            kept = [re.sub(said[record["kind"]], "...", text) for text in (true, false)]
            assert kept[0] == kept[1] and "..." in kept[0]
            kinds[record["kind"]] += 1
        assert set(kinds) == set(said) and min(kinds.values()) > 60

    def test_where_no_exchange_is_false_there_is_no_record(self):
        red, blue = pair().items          # an exchange of colours would name a red star
        awkward = pair(items=(replace(red, x=0.4, y=0.5, size="small"),
                              replace(blue, x=0.6, y=0.5, shape="star")))
        assert [swapped_attributes(s, random.Random(0)) for s in (odd(), awkward)] == [None, None]


class TestSwappedOrder:
    @pytest.mark.parametrize("kind, kinds", [
        ("shuffled", {"shuffled"}), ("reversed", {"reversed", None}),
        (None, {"shuffled", "reversed"})])
    def test_the_second_caption_is_the_same_words_and_false(self, kind, kinds):
        found = Counter()
        for scene, rng in many(300, (1, 3)):
            record = swapped_order(scene, rng, kind, side=None) or {"kind": None}
            texts = true_and_false(record) if record["kind"] else ()
            if record["kind"] == "reversed":
                true, false = (re.split(" (left of|right of|above|below) ", text) for text in texts)
                assert true == false[::-1]
            found[record["kind"]] += 1
        assert set(found) == kinds and min(found.values()) > 40


class TestNoisyCaption:
    @pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
    def test_it_is_false_at_the_rate_and_true_of_another_scene(self, rate):
        kinds = Counter()
        for scene, rng in many(400, (1, 3)):
            record = noisy_caption(scene, rng, rate, side=None)
            caption, = record["texts"]
            assert is_true(caption, scene) is record["truth"] is (record["hardness"] is None)
            assert is_true(caption, record["described"]) and not held_out(caption)
            kinds[record["hardness"]] += 1
        assert abs(1 - kinds[None] / 400 - rate) < 0.08 and set(kinds) - {None} <= {*HARDNESSES}

    @pytest.mark.parametrize("hardness", HARDNESSES)
    def test_the_hardness_says_what_the_scenes_share(self, hardness):
        changed = Counter()
        for scene, rng in many(300, (1, 3)):
            there = noisy_caption(scene, rng, 1.0, hardness, side=None)["described"]
            assert not pairs_in(there) & HELD_OUT
            colours, shapes = (set(mine) & set(theirs) for mine, theirs in zip(
                zip(*pairs_in(scene)), zip(*pairs_in(there))))
            if hardness == "shares":
                assert len(colours) + len(shapes) == 1
                changed["shape" if colours else "colour"] += 1
            elif hardness == "differs":
                (n, a, b), = [(n, a, b) for n, (a, b) in enumerate(
                    zip(scene.items, there.items, strict=True)) if a != b]
                assert (a.colour == b.colour) != (a.shape == b.shape)
                assert replace(b, colour=a.colour, shape=a.shape) == a
                changed.update([n, "shape" if a.colour == b.colour else "colour"])
            assert len(there.items) == len(scene.items) or hardness == "shares"
            assert hardness != "differs" or replace(there, items=scene.items) == scene
        expected = {"shares": {"colour", "shape"}, "differs": {"colour", "shape", 0, 1, 2}}
        assert set(changed) == expected.get(hardness, set())
        assert min(changed.values(), default=99) > 20
