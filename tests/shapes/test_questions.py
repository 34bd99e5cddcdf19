"""Questions and probes: every answer is right, unique and not to be guessed from the words."""
import math
import random
import re
from collections import Counter, defaultdict

import pytest

from common.data.shapes import questions
from common.data.shapes.scene import HELD_OUT, PAIRS, SHAPES, draw
from tests.shapes.judge import (ODD, TWO, ask_and_answer, blind, held_out, many, picture_of,
                                resolve)

KINDS = ("colour", "shape", "count", "relation", "existence", "comparison", "size")


@pytest.mark.parametrize("split", ("train", "test"))
def test_answers_are_right_and_unique(split):
    kinds = Counter()
    for scene, rng in many(700, (1, 5)):
        for record in questions.questions(scene, rng, split, side=None):
            question, answer = ask_and_answer(record)
            assert resolve(question, scene) == answer, (question, scene)
            assert len(answer.split()) == 1 and record["source"] == scene
            assert not held_out(question), question
            kinds[record["kind"]] += 1
    assert set(kinds) == set(KINDS if split == "test" else KINDS[:-1])
    assert min(kinds.values()) > 300, kinds


def test_the_resolver_tells_wrong_answers():
    """The judge of these tests is itself judged, on a scene worked out by hand."""
    for question, answer in (
            ("what colour is the circle?", "red"), ("what shape is the small object?", "square"),
            ("which shape does the object at the top left have?", "circle"),
            ("how many circles are there?", "one"), ("how many green objects are there?", "zero"),
            ("is the red circle left of the blue square?", "yes"),
            ("is the red circle below the blue square?", "no"),
            ("is the blue square above or below the red circle?", "below"),
            ("is there a blue circle?", "no"), ("is there a blue object?", "yes"),
            ("is the blue square larger than the red circle?", "no"),
            ("are there fewer stars than squares?", "yes"), ("what size is the circle?", "large")):
        assert resolve(question, TWO) == answer
    for bad in ("what colour is the object?", "what colour is the star?", "how are you?",
                "are there more circles than squares?"):
        with pytest.raises(AssertionError):
            resolve(bad, TWO)


def test_test_wordings_and_one_kind_are_disjoint_from_training():
    assert questions.KINDS["test"][-1] == "size" and set(questions.FORMS) == set(KINDS)
    train, test = ({w for forms in questions.FORMS.values() for form in forms.values()
                    for w in form[n]} for n in (1, 2))
    assert not train & test
    heard = {split: Counter() for split in ("train", "test")}
    for scene, rng in many(400, (1, 3)):
        for split in heard:
            heard[split].update(ask_and_answer(r)[0]
                                for r in questions.questions(scene, rng, split, side=None))
    assert not set(heard["train"]) & set(heard["test"])
    assert not any(re.search("what size|small or large", q) for q in heard["train"])
    for kind, forms in questions.FORMS.items():
        for _, *wordings in forms.values():
            for split, group in zip(heard, wordings):
                for wording in group:
                    pattern = re.sub(r"\\{\w\\}", ".+", re.escape(wording))
                    assert any(re.fullmatch(pattern, q) for q in heard[split]), wording


def test_in_composition_a_held_out_name_is_no_sign_of_yes():
    answers = Counter()
    for seed in range(1500):
        for record in questions.questions(ODD, random.Random(seed), "test", side=None):
            question, answer = ask_and_answer(record)
            assert resolve(question, ODD) == answer
            if record["form"] == "pair" and held_out(question):
                answers[answer] += 1
    assert answers["no"] > 15, answers


@pytest.mark.parametrize("split", ("train", "test"))
def test_blind_guessing_is_near_chance(split):
    """Of questions drawn for balance: by their exact words and by any of their words."""
    chance = {"colour": 1 / 7, "shape": 1 / 5, "count": 1 / 3}
    for kind in questions.KINDS[split]:
        rng = random.Random(kind)
        found = [questions.balanced_question(rng, kind, split, side=None) for _ in range(900)]
        for record in found:
            question, answer = ask_and_answer(record)
            assert resolve(question, record["source"]) == answer
        assert {r["kind"] for r in found} == {kind}
        limit = chance.get(kind, 1 / 2) + 0.08
        asked = [ask_and_answer(r) for r in found]
        assert blind([(q.replace(" ", "_"), a) for q, a in asked]) < limit, kind
        if kind != "relation":            # left, right, above, below are told apart by the form
            assert blind(asked) < limit, kind
        for form, (answers, *_) in questions.FORMS[kind].items():
            counts = Counter(ask_and_answer(r)[1] for r in found if r["form"] == form)
            assert set(counts) <= set(answers)
            assert max(counts.values()) < 1.5 * sum(counts.values()) / len(counts), counts
            assert len(counts) == (3 if kind == "count" else len(answers))


def test_yes_and_no_are_even_in_any_scenes():
    for objects in (1, 2, 3):
        answers = defaultdict(Counter)
        for scene, rng in many(300, objects):
            for record in questions.questions(scene, rng, side=None):
                question, answer = ask_and_answer(record)
                if answer in ("yes", "no"):
                    answers[record["form"]][answer] += 1
        for form, counts in answers.items():
            total = sum(counts.values())
            assert abs(counts["yes"] / total - 0.5) < 2 / math.sqrt(total), (objects, form)


def test_counts_of_larger_scenes():
    rng = random.Random(0)
    found = [questions.balanced_question(rng, "count", side=None, objects=3) for _ in range(200)]
    counts = Counter(ask_and_answer(record)[1] for record in found)
    assert set(counts) == {"zero", "one", "two", "three"} and min(counts.values()) > 30
    with pytest.raises(ValueError, match="1 objects"):
        questions.balanced_question(random.Random(0), "relation", objects=1)


def test_probes():
    hard = Counter()
    for scene, rng in many(400, (1, 4)):
        there = {(i.colour, i.shape) for i in scene.items}
        colours, shapes = ({p[i] for p in there} for i in (0, 1))
        records = questions.probes(scene, rng, side=None)
        assert [ask_and_answer(r)[1] for r in records] == ["yes", "no"] * 3
        assert [r["setting"] for r in records[::2]] == ["random", "popular", "adversarial"]
        for record in records:
            question, answer = ask_and_answer(record)
            assert resolve(question, scene) == answer and not held_out(question)
            pair = re.fullmatch(r"is there an? (\w+) (\w+) in the picture\?", question).groups()
            if answer == "no" and record["setting"] == "popular":
                assert pair[0] in ("cyan", "pink")
            if answer == "no" and record["setting"] == "adversarial":
                both = [(c, s) for c in colours for s in shapes if (c, s) not in there | HELD_OUT]
                assert pair in both or (not both and (pair[0] in colours or pair[1] in shapes))
                hard[bool(both)] += 1
    assert min(hard[True], hard[False]) > 50
    assert all((c, s) in PAIRS for c in ("cyan", "pink") for s in SHAPES)


def test_a_record_is_one_turn_with_the_picture_of_its_scene():
    for record in (*questions.questions(TWO, random.Random(0), side=40),
                   *questions.probes(TWO, random.Random(0), side=40)):
        assert len(record["turns"]) == 1 and record["source"] == TWO
        assert picture_of(record).tobytes() == draw(TWO, 40).tobytes()
