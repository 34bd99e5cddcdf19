"""Instructions of a language-only teacher, multiple choice, dialogues, two scenes."""
import inspect
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from common.data.shapes import conversations
from common.data.shapes.scene import COLOURS, SHAPES, Item, Scene, draw, sample
from common.data.shapes.words import NUMBERS, is_true
from tests.shapes.judge import (ODD, TWO, ask_and_answer, blind, fitting, held_out, many, one,
                                resolve)


def only_first_has_the_picture(record, scene):
    """Whether the first turn has the scene as a still picture and the others have none."""
    first, *others = [turn["images"] for turn in record["turns"]]
    (picture,), = first
    return picture.tobytes() == draw(scene, 32).tobytes() and not any(others)


def sentences(text):
    return [s for s in re.split(r"\. ?", text) if s]


def test_the_teacher_sees_captions_and_boxes_only():
    for scene, rng in many(300, (1, 4)):
        known = conversations.teacher_context(scene, rng)
        assert len(set(known["captions"])) == 5
        assert all(is_true(c, scene) for c in known["captions"])
        assert len(known["boxes"]) == len(scene.items)
        for name, box in known["boxes"]:
            item = one(name, scene)
            assert np.abs(np.subtract(box, item.box)).max() <= 0.0051
        read = {(i.colour, i.shape): i for i in conversations.items_from_boxes(known)}
        for item in scene.items:
            seen = read[item.colour, item.shape]
            assert seen.size == item.size
            assert max(abs(seen.x - item.x), abs(seen.y - item.y)) < conversations.SURE
        context = conversations.instruction(scene, random.Random(7), "detail")["context"]
        known = conversations.teacher_context(scene, random.Random(7))
        assert context.split("\n") == known["captions"] + [
            f"{name}: [{', '.join(map(str, box))}]" for name, box in known["boxes"]]
    for teacher in conversations.TEACHERS.values():
        assert list(inspect.signature(teacher).parameters)[:2] == ["context", "rng"]


def test_conversations_and_details_are_true():
    kinds = Counter()
    for scene, rng in many(500, (1, 4)):
        for kind in ("conversation", "detail"):
            record = conversations.instruction(scene, rng, kind, side=None)
            turns = record["turns"]
            assert len({turn["prompt"] for turn in turns}) > 1 or kind == "detail"
            for item in scene.items:
                assert f"{item.size} {item.colour} {item.shape}" in turns[0]["answer"]
            for turn in turns:
                for sentence in sentences(turn["answer"]):
                    assert is_true(sentence, scene), (sentence, scene)
                    kinds[kind, sentence.split()[0]] += 1
                for name in re.findall(r"the (\w+ \w+)(?=,? compared|\?)", turn["prompt"]):
                    assert name in turn["answer"] or name.split()[0] not in COLOURS
                assert not held_out(turn["prompt"] + " " + turn["answer"])
            assert not held_out(record["context"])
    assert min(kinds.values()) > 100, kinds


def test_reasoning_is_right():
    kinds = Counter()
    for scene, rng in many(600, (1, 4)):
        record = conversations.instruction(scene, rng, "reasoning", side=None)
        question, answer = ask_and_answer(record)
        name = re.search(rf"the (\w+ (?:{'|'.join(SHAPES)}))", question + answer)[1]
        item, n = one(name, scene), len(scene.items)
        others = [i for i in scene.items if i != item]
        if "taken away" in question:
            verb, s = ("is", "") if n == 1 else ("are", "s")
            assert answer == (f"there {verb} {NUMBERS[n]} object{s}. without the {name}, "
                              f"{NUMBERS[n - 1]} object{'' if n == 2 else 's'} would be left.")
        elif "left to right" in question:
            assert all(item.x < i.x - 0.12 for i in others) and "left of all" in answer
        elif "top to bottom" in question:
            assert all(item.y < i.y - 0.12 for i in others) and "above all" in answer
        else:
            assert item.size == "large" and all(i.size == "small" for i in others) and others
            assert "nearest" in question and answer.startswith(f"the {name} is nearest")
        kinds[question.split()[1]] += 1
    assert min(kinds.values()) > 60, kinds


def test_multiple_choice():
    letters, ranks = Counter(), Counter()
    for scene, rng in many(800, (1, 4)):
        record = conversations.multiple_choice(scene, rng, side=None)
        worth = {s: int(n) for s, n in re.findall(r"an? (\w+) is worth (\d+)", record["context"])}
        assert len(set(worth.values())) == len(worth) == 5
        values = [worth[i.shape] for i in scene.items]
        choices = record["choices"]
        assert len(set(choices)) == 4
        prompt, answer = ask_and_answer(record)
        assert prompt == "how much is the picture worth?"
        assert answer == str(sum(values)) in choices
        reasons = re.findall(r"an? (\w+) (\w+) is worth (\d+)", record["explanation"])
        assert [int(n) for *_, n in reasons] == values
        assert [(c, s) for c, s, _ in reasons] == [(i.colour, i.shape) for i in scene.items]
        if len(values) > 1:
            assert f"{' + '.join(map(str, values))} = {sum(values)}." in record["explanation"]
        letters[choices.index(answer)] += 1
        ranks[sorted(map(int, choices)).index(sum(values))] += 1
    for counts in (letters, ranks):       # neither letter nor size betrays the right one
        assert max(counts.values()) < 800 * 0.33 and len(counts) == 4, counts


@pytest.mark.parametrize("split", ("train", "test"))
def test_dialogues(split):
    its, last = Counter(), Counter()
    for scene, rng in many(500, (1, 3)):
        record = conversations.dialogue(scene, rng, split=split, side=None)
        assert is_true(record["caption"], scene)
        asked, answers = zip(*[(turn["prompt"], turn["answer"]) for turn in record["turns"]])
        assert len(set(asked)) == len(asked) == 4
        for n, (question, answer) in enumerate(zip(asked, answers)):
            if question == "what colour is it?":
                assert n == 1 and answers[0] == "yes"
                question = re.sub(r"^is there an? (.+)\?$", r"what colour is the \1?", asked[0])
            assert resolve(question, scene) == answer
            assert not held_out(question)
        open_ended = [a for q, a in zip(asked, answers) if "many" not in q and "number" not in q
                      and a in (*COLOURS, *SHAPES)]
        assert len(set(open_ended)) == len(open_ended)      # nothing is asked of twice
        its[answers[0], asked[1] == "what colour is it?"] += 1
        shown = record["candidates"]
        assert len(set(shown)) == len(shown) == 6
        last[shown.index(answers[-1])] += 1
    assert 0.4 < its["yes", True] / 500 < 0.6 and set(its) == {("yes", True), ("no", False)}
    assert set(last) == set(range(6)) and min(last.values()) > 50
    full = Scene(tuple(replace(TWO.items[0], shape=s) for s in SHAPES if s != "star"))
    full = replace(full, items=full.items + (Item("blue", "star", "small", 0.9, 0.9),))
    assert conversations.dialogue(full, random.Random(0))["turns"][0]["answer"] == "yes"


def test_wrong_candidates_are_of_the_kind_that_is_asked():
    for scene, rng in many(300, 2):
        record = conversations.dialogue(scene, rng, side=None)
        question, answer = record["turns"][-1]["prompt"], record["turns"][-1]["answer"]
        if answer in ("yes", "no"):
            assert {"yes", "no"} <= set(record["candidates"])
        elif answer in COLOURS:
            assert set(record["candidates"]) <= set(COLOURS), question


def judge(text, left, right):
    """Whether a statement on two scenes is true, worked out from their objects."""
    found = re.fullmatch(r"there are more objects in the (\w+) picture than in the \w+ one\.", text)
    if found:
        assert len(left.items) != len(right.items)
        return (len(left.items) > len(right.items)) == (found[1] == "left")
    found = re.fullmatch(r"the two pictures show (\w+) (.+) in all\.", text)
    if found:
        a, b = (len(fitting(found[2], s)) for s in (left, right))
        return a + b == NUMBERS.index(found[1])
    who, x = re.fullmatch(r"(.+) (?:shows?) (an? .+)\.", text).groups()
    a, b = (bool(fitting(x, s)) for s in (left, right))
    return {"the left picture": a, "the right picture": b, "both pictures": a and b,
            "neither picture": not a and not b, "only one of the pictures": a != b}[who]


def test_two_scenes():
    forms, pairs = defaultdict(Counter), []
    for left, rng in many(1200, (1, 3)):
        right = sample(rng, (1, 3))
        record = conversations.two_scenes(left, right, rng, side=None)
        text, answer = ask_and_answer(record)
        assert answer == str(judge(text, left, right)).lower(), text
        assert record["source"] == (left, right) and not held_out(text)
        forms[record["form"]][answer] += 1
        pairs.append((text, answer))
    for form, counts in forms.items():
        total = sum(counts.values())
        assert abs(counts["true"] / total - 0.5) < 2 / math.sqrt(total), (form, counts)
    assert len(forms) > 15 and "more" in forms
    assert 0.45 < sum(a == "true" for _, a in pairs) / 1200 < 0.55
    assert blind(pairs) < 0.57
    turn, = conversations.two_scenes(TWO, ODD, random.Random(0))["turns"]
    assert [[i.tobytes() for i in still] for still in turn["images"]] == [
        [draw(s, 32).tobytes()] for s in (TWO, ODD)]


def test_the_first_turn_alone_has_the_picture():
    rng = random.Random(0)
    for record in (conversations.dialogue(TWO, rng), conversations.multiple_choice(TWO, rng),
                   *(conversations.instruction(TWO, rng, k) for k in conversations.TEACHERS)):
        assert record["source"] == TWO and only_first_has_the_picture(record, TWO)
