"""Referring phrases with their boxes, and letters to be read."""
import random
import re
from dataclasses import replace

import numpy as np

from common.data.shapes import grounding
from common.data.shapes.scene import SIZES, Item, Scene, draw
from tests.shapes.judge import ask_and_answer, many, one, picture_of


def test_referring():
    for scene, rng in many(60, (1, 4)):
        for kind in ("ground", "name"):
            record = grounding.referring(scene, rng, kind)
            question, answer = ask_and_answer(record)
            item = one(record["phrase"], scene)
            assert record["item"] == item and record["kind"] == kind
            assert picture_of(record).tobytes() == draw(scene, 32).tobytes()
            alone = Scene((replace(item, tint=(0, 0, 0)),))
            drawn = np.abs(np.asarray(draw(alone, 250)).astype(int) - 250).sum(-1) > 60
            rows, columns = np.nonzero(drawn)
            extent = 4 * np.array((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            (box,), text = record["boxes"], answer if kind == "ground" else question
            assert all(type(v) is int and 0 <= v < 1000 for v in box)
            assert box[0] < box[2] and box[1] < box[3]
            assert np.abs(extent - box).max() < 16, (item, extent, box)
            assert grounding.box_text(box) in text
            assert tuple(int(v) for v in re.findall(r"\d+", text)) == box
            if kind == "ground":
                assert question == f"give the box of the {record['phrase']}."
            else:
                assert answer.split()[1:] == [item.colour, item.shape]
    assert grounding.box_of(Item("red", "circle", "small", 0.5, 0.5)) == tuple(
        int(1000 * v) for v in (0.5 - SIZES["small"],) * 2 + (0.5 + SIZES["small"],) * 2)
    assert max(grounding.box_of(Item("red", "circle", "large", 1 - SIZES["large"], 0.5))) == 999
    assert grounding.box_text((120, 340, 355, 575)) == "(120,340),(355,575)"


def test_glyphs_can_be_read():
    for seed in range(60):
        rng = random.Random(seed)
        length, dot = rng.randint(1, 6), rng.randint(1, 3)
        record = grounding.glyphs(rng, length, 200, dot)
        picture = np.asarray(picture_of(record).convert("L")).astype(int)
        assert picture.shape == (200, 200)
        paper = np.bincount(picture.ravel()).argmax()
        dots = np.abs(picture - paper) > 60
        x1, y1, x2, y2 = (-(-v * 200 // 1000) for v in record["boxes"][0])
        read = ""
        for n in range(length):
            left = x1 + 6 * n * dot
            cell = dots[y1:y1 + 7 * dot:dot, left:left + 5 * dot:dot]
            bits = bytes(int(sum(1 << r for r in range(7) if cell[r, c])) for c in range(5))
            read += {v: k for k, v in grounding.GLYPHS.items()}[bits]
        assert read == ask_and_answer(record)[1] and len(read) == length
        dots[y1:y2 + 1, x1:x2 + 1] = False
        assert not dots.any()                 # nothing but the letters, and inside the box


def test_glyphs_are_distinct_and_small():
    assert len(grounding.GLYPHS) == 36 and len(set(grounding.GLYPHS.values())) == 36
    assert all(len(dots) == 5 and max(dots) < 128 for dots in grounding.GLYPHS.values())
    record = grounding.glyphs(random.Random(0))
    ink = np.asarray(picture_of(record).convert("L")).astype(int)
    assert picture_of(record).size == (224, 224)
    assert 0 < (ink != np.bincount(ink.ravel()).argmax()).mean() < 0.01
    # "T" has a bar on top and a stem; an upside-down or mirrored font would not
    assert [grounding.GLYPHS["T"][0], grounding.GLYPHS["T"][2]] == [1, 127]
    assert grounding.GLYPHS["L"] == bytes((127, 64, 64, 64, 64))
    assert all(grounding.GLYPHS[c] == grounding.GLYPHS[c][::-1] for c in "AHIMOTUVWXY8")  # mirrored
    for dots in map(grounding.GLYPHS.get, "NHIOX"):                 # turned by half a turn
        assert list(dots) == [int(f"{column:07b}"[::-1], 2) for column in dots[::-1]]
