"""Instructions of a language-only teacher, multiple choice, dialogues, two scenes."""
import json
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from common.data.shapes.conversations import (SURE, TEACHERS, dialogue, in_a_sentence, instruction,
                                              items_from_boxes, multiple_choice, two_scenes)
from common.data.shapes.scene import COLOURS, SHAPES, sample
from common.data.shapes.words import is_true
from tests.shapes.judge import (NUMBERS, ask_and_answer, blind, exceeds, fitting, held_out, many,
                                odd, one, pair, resolve, shows)


class TestInstruction:
    def test_the_teacher_reads_five_captions_and_every_box(self):
        kinds = set()
        for scene, rng in many(200, (1, 4)):
            record = instruction(scene, rng, side=None)
            lines = record["context"].split("\n")
            boxes = [(name, json.loads(box)) for name, box in [s.split(": ") for s in lines[5:]]]
            assert len(set(lines[:5])) == 5 and all(is_true(line, scene) for line in lines[:5])
            assert sorted(name for name, _ in boxes) == sorted(i.name for i in scene.items)
            for (name, box), seen in zip(boxes, items_from_boxes({"boxes": boxes}), strict=True):
                item = one(name, scene)
                assert np.abs(np.subtract(box, item.box)).max() <= 0.0051
                assert max(abs(seen.x - item.x), abs(seen.y - item.y)) < SURE
                assert replace(seen, x=item.x, y=item.y, tint=item.tint) == item
            kinds.add(record["kind"])
            assert not held_out(str(record["turns"]) + record["context"])
        assert kinds == set(TEACHERS)

    @pytest.mark.parametrize("kind", ["conversation", "detail"])
    def test_conversations_and_details_are_true(self, kind):
        for scene, rng in many(400, (1, 4)):
            turns = instruction(scene, rng, kind, side=None)["turns"]
            assert len({turn["prompt"] for turn in turns}) > 1 or kind == "detail"
            assert all(f"{item.size} {item.name}" in turns[0]["answer"] for item in scene.items)
            for turn in turns:
                for sentence in turn["answer"].removesuffix(".").split(". "):
                    assert is_true(sentence, scene), (sentence, scene)
                for name in re.findall(r"(\w+ \w+)(?:, compared|\?)", turn["prompt"]):
                    assert name in turn["answer"] or name.split()[0] not in COLOURS

    @pytest.mark.parametrize("kind, answer, x, sentence", [
        ("existence", "yes", "a red ring", "there is a red ring."),
        ("existence", "no", "an object", "there is no object."),
        ("count", "zero", "crosses", "there are no crosses."),
        ("count", "one", "squares", "there is one square."),
        ("count", "one", "red objects", "there is one red object."),
        ("count", "three", "stars", "there are three stars.")])
    def test_questions_of_the_world_get_sentences(self, kind, answer, x, sentence):
        assert in_a_sentence(kind, ("a form", answer, {"x": x})) == sentence
        asked = {turn["prompt"] for scene, rng in many(100, (1, 2))
                 for turn in instruction(scene, rng, "conversation", side=None)["turns"]}
        assert any(text.startswith(("is there", "how many")) for text in asked)

    def test_reasoning_is_right(self):
        kinds = Counter()
        for scene, rng in many(500, (1, 4)):
            question, answer = ask_and_answer(instruction(scene, rng, "reasoning", side=None))
            name = re.search(rf"the (\w+ (?:{'|'.join(SHAPES)}))", question + answer)[1]
            item, n = one(name, scene), len(scene.items)
            others = [i for i in scene.items if i != item]
            if "taken away" in question:
                assert re.findall(r"(\w+) objects?\b", answer) \
                    == [NUMBERS[n], ("no", *NUMBERS[1:])[n - 1]]
            elif "left to right" in question:
                assert all(item.x < i.x - 0.12 for i in others) and "left of all" in answer
            elif "top to bottom" in question:
                assert all(item.y < i.y - 0.12 for i in others) and "above all" in answer
            else:
                assert item.size == "large" and {i.size for i in others} == {"small"}
                assert answer.startswith(f"the {name} is nearest")
            kinds[question.split()[1]] += 1
        assert min(kinds.values()) > 50, kinds


class TestMultipleChoice:
    def test_the_answer_is_the_sum_and_stands_anywhere(self):
        places = Counter()
        for scene, rng in many(400, (1, 4)):
            record = multiple_choice(scene, rng, side=None)
            worth = dict(re.findall(r"an? (\w+) is worth (\d+)", record["context"]))
            answer = str(sum(int(worth[item.shape]) for item in scene.items))
            assert answer == ask_and_answer(record)[1] and len(set(record["choices"])) == 4
            assert record["explanation"].endswith(f" {answer}.")
            places[record["choices"].index(answer)] += 1
        assert max(places.values()) < 400 * 0.36 and len(places) == 4, places


class TestDialogue:
    def test_four_different_questions_are_answered_right(self):
        its, said = Counter(), {"train": set(), "test": set()}
        for split in said:
            for scene, rng in many(300, (1, 3)):
                record = dialogue(scene, rng, split, side=None)
                assert is_true(record["caption"], scene)
                asked, answers = zip(*[(t["prompt"], t["answer"]) for t in record["turns"]])
                assert len(set(asked)) == len(asked) == 4 and not any(map(held_out, asked))
                has_it = asked[1] == "what colour is it?"
                full = [re.sub(r"^is there an? (.+)\?$", r"what colour is the \1?", asked[0])
                        if n == 1 and has_it else question for n, question in enumerate(asked)]
                assert tuple(resolve(question, scene) for question in full) == answers
                found = [a for q, a in zip(asked, answers) if a in (*COLOURS, *SHAPES)]
                assert len(set(found)) == len(found)        # no colour or shape is asked for twice
                its[answers[0], has_it] += 1
                said[split].update(asked[2:])
        assert set(its) == {("yes", True), ("no", False)} and 0.4 < its["yes", True] / 600 < 0.6
        assert not said["train"] & said["test"]

    def test_the_right_candidate_stands_anywhere_among_likely_ones(self):
        places = Counter()
        for scene, rng in many(400, (1, 3)):
            record = dialogue(scene, rng, side=None)
            answer, shown = record["turns"][-1]["answer"], record["candidates"]
            assert len(set(shown)) == len(shown) == 6
            assert answer not in ("yes", "no") or {"yes", "no"} <= set(shown)
            assert answer not in COLOURS or set(shown) <= set(COLOURS)
            places[shown.index(answer)] += 1
        assert set(places) == set(range(6)) and min(places.values()) > 40


def judged(text, left, right):
    """Whether a statement on two scenes is true, worked out from their objects."""
    if found := re.fullmatch("there are more objects in the (left|right) picture than .+", text):
        return exceeds(len(left.items), len(right.items)) == (found[1] == "left")
    if found := re.fullmatch(r"the two pictures show (\w+) (.+) in all\.", text):
        return NUMBERS.index(found[1]) == sum(len(fitting(found[2], s)) for s in (left, right))
    who, x = re.fullmatch(r"(.+) (?:shows?) (an? .+)\.", text).groups()
    a, b = (bool(fitting(x, s)) for s in (left, right))
    return {"the left picture": a, "the right picture": b, "both pictures": a and b,
            "neither picture": not a and not b, "only one of the pictures": a != b}[who]


class TestTwoScenes:
    def test_statements_are_judged_right_and_the_words_do_not_tell(self):
        forms, asked = defaultdict(Counter), []
        for left, rng in many(1000, (1, 3)):
            right = sample(rng, (1, 3))
            record = two_scenes(left, right, rng, side=None)
            text, answer = ask_and_answer(record)
            assert answer == str(judged(text, left, right)).lower(), text
            assert record["source"] == (left, right) and not held_out(text)
            forms[record["form"]][answer] += 1
            asked.append((text, answer))
        for form, counts in forms.items():
            total = sum(counts.values())
            assert abs(counts["true"] / total - 0.5) < 2.2 / math.sqrt(total), (form, counts)
        assert len(forms) > 15 and "more" in forms and blind(asked) < 0.57
        record = two_scenes(pair(), odd(), random.Random(0), side=9)
        assert shows(record, [pair(), odd()], 9)
