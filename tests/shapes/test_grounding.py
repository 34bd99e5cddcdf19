"""Referring phrases with their boxes, and letters to be read."""
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from common.data.shapes.grounding import GLYPHS, glyphs, grounded, referring
from common.data.tokenizer import BOX, BOX_END, REF, REF_END
from tests.shapes.judge import ask_and_answer, many, one, pair, shows


class TestReferring:
    def test_the_phrase_fits_one_item_and_the_box_is_around_it(self):
        kinds = set()
        for scene, rng in many(120, (1, 4)):
            record = referring(scene, rng, side=9)
            question, answer = ask_and_answer(record)
            item, (box,) = one(record["phrase"], scene), record["boxes"]
            assert record["item"] == item and shows(record, [scene], 9)
            assert box == tuple(min(999, int(1000 * v)) for v in item.box)
            text = "({},{}),({},{})".format(*box)
            if record["kind"] == "ground":
                assert (question, answer) == (f"give the box of the {record['phrase']}.", text)
            else:
                assert question == f"which object is in the box {text}?"
                assert re.fullmatch(f"an? {item.colour} {item.shape}", answer)
            kinds.add(record["kind"])
        assert kinds == {"ground", "name"} == {
            referring(scene, rng, kind)["kind"] for kind in kinds for scene, rng in many(5)}
        edge = pair(items=(replace(pair().items[0], x=0.8, y=0.3),))
        assert max(referring(edge, random.Random(0))["boxes"][0]) == 999


def box_of(item):
    return "({},{}),({},{})".format(*(min(999, int(1000 * v)) for v in item.box))


def coarse(text):
    """A box's text with its numbers to the nearest ten."""
    return re.sub(r"\d+", lambda found: str(min(990, round(int(found[0]), -1))), text)


class TestGrounded:
    def test_ids_of_special_tokens_surround_phrases_and_boxes(self):
        for scene, rng in many(120, (1, 4)):
            record = grounded(scene, rng, side=9)
            prompt, answer = ask_and_answer(record)
            assert shows(record, [scene], 9) and record["source"] is scene
            if record["kind"] == "caption":
                assert prompt == "describe the picture with boxes." and "phrase" not in record
                groups = [answer[k:k + 6] for k in range(0, len(answer), 6)]
                items = [one(said, scene) for _, said, *_ in groups]
                assert items == sorted(scene.items, key=lambda item: item.x)
                for item, (ref, said, ref_end, *box) in zip(items, groups):
                    assert (ref, ref_end) == (REF, REF_END) and item.name in said
                    assert box == [BOX, coarse(box_of(item)), BOX_END]
                texts = [box_of(item) for item in items]
            else:
                item = one(record["phrase"], scene)
                texts, box = [box_of(item)], (BOX, coarse(box_of(item)), BOX_END)
                if record["kind"] == "ground":
                    name = (REF, f"the {record['phrase']}", REF_END)
                    assert (prompt, answer) == (("give the box of ", *name, "."), box)
                else:
                    assert prompt == ("which object is in the box ", *box, "?")
                    assert answer == record["phrase"] and item.name in answer
            assert ["({},{}),({},{})".format(*box) for box in record["boxes"]] == texts


class TestGlyphs:
    def test_they_can_be_read_from_the_picture(self):
        reader = {dots: letter for letter, dots in GLYPHS.items()}
        for seed in range(60):
            rng = random.Random(seed)
            length, dot = rng.randint(1, 6), rng.randint(1, 3)
            record = glyphs(rng, length, 200, dot)
            picture = np.asarray(record["turns"][0]["images"][0][0].convert("L")).astype(int)
            assert picture.shape == (200, 200)
            dots = np.abs(picture - np.bincount(picture.ravel()).argmax()) > 60
            x1, y1, x2, y2 = (-(-v * 200 // 1000) for v in record["boxes"][0])
            cells = dots[y1:y1 + 7 * dot:dot, x1:x1 + 6 * length * dot:dot]
            read = "".join(reader[bytes(sum(1 << row for row in range(7) if cells[row, 6 * n + c])
                                        for c in range(5))] for n in range(length))
            assert read == ask_and_answer(record)[1] and len(read) == length
            dots[y1:y2 + 1, x1:x2 + 1] = False
            assert not dots.any()             # nothing but the letters, and inside the box
        assert glyphs(rng)["turns"][0]["images"][0][0].size == (224, 224)
        with pytest.raises(ValueError, match="4 letters are 23 x 7 .*22"):
            glyphs(rng, side=22, dot=1)

    def test_the_letters_are_distinct_and_stand_upright(self):
        assert len(set(GLYPHS.values())) == 36
        assert all(len(dots) == 5 and max(dots) < 128 for dots in GLYPHS.values())
        assert [tuple(GLYPHS[letter]) for letter in "LZ"] == [
            (127, 64, 64, 64, 64), (97, 81, 73, 69, 67)]
