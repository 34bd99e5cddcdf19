"""Questions and probes: every answer is right, unique and not to be guessed from the words."""
import math
import random
import re
from collections import Counter, defaultdict

import pytest

from common.data.shapes.questions import FORMS, balanced_question, probes, questions
from common.data.shapes.scene import HELD_OUT
from tests.shapes.judge import ask_and_answer, blind, held_out, many, odd, pairs_in, resolve

TRAINED = ("colour", "shape", "count", "relation", "existence", "comparison")
KINDS = {"train": TRAINED, "test": (*TRAINED, "size")}


@pytest.fixture(scope="module")
def drawn():
    return {split: [(scene, record) for scene, rng in many(500, (1, 5))
                    for record in questions(scene, rng, split, side=None)] for split in KINDS}


class TestQuestions:
    @pytest.mark.parametrize("split", KINDS)
    def test_an_answer_is_right_unique_and_one_word(self, drawn, split):
        for scene, record in drawn[split]:
            question, answer = ask_and_answer(record)
            assert resolve(question, scene) == answer, (question, scene)
            assert len(answer.split()) == 1 and record["source"] == scene
            assert not held_out(question), question
        kinds = Counter(record["kind"] for _, record in drawn[split])
        assert set(kinds) == set(KINDS[split]) and min(kinds.values()) > 200

    def test_the_splits_share_no_question_and_use_all_their_wordings(self, drawn):
        said = {split: {ask_and_answer(record)[0] for _, record in drawn[split]} for split in KINDS}
        assert not said["train"] & said["test"]
        for _, *wordings in (form for forms in FORMS.values() for form in forms.values()):
            for split, group in zip(said, wordings, strict=True):
                for wording in group:
                    pattern = re.sub(r"\\{\w\\}", ".+", re.escape(wording))
                    assert any(re.fullmatch(pattern, q) for q in said[split]), wording

    def test_forms_and_yes_and_no_are_even(self, drawn):
        answers = defaultdict(Counter)
        for scene, record in drawn["train"] + drawn["test"]:
            answers[record["form"]][ask_and_answer(record)[1]] += 1
        for form, counts in answers.items():
            limit = 4 * math.sqrt(counts.total())
            assert "yes" not in counts or abs(counts["yes"] - counts["no"]) < limit, form
        forms = Counter(r["form"] for _, r in drawn["train"] if r["kind"] == "existence")
        assert max(forms.values()) < 1.4 * min(forms.values()) and len(forms) == 3

    def test_in_composition_a_held_out_name_is_no_sign_of_yes(self):
        records = [record for seed in range(1200)
                   for record in questions(odd(), random.Random(seed), "test", side=None)]
        answers = Counter(record["turns"][0]["answer"] for record in records if
                          record["form"] == "pair" and held_out(record["turns"][0]["prompt"]))
        assert min(answers["yes"], answers["no"]) > 12, answers


class TestBalancedQuestion:
    @pytest.mark.parametrize("split", KINDS)
    def test_blind_guessing_is_near_chance(self, split):
        chance = {"colour": 1 / 7, "shape": 1 / 5, "count": 1 / 3}
        for kind in KINDS[split]:
            rng, limit = random.Random(kind), chance.get(kind, 1 / 2) + 0.08
            records = [balanced_question(rng, kind, split, side=None) for _ in range(700)]
            asked = [ask_and_answer(record) for record in records]
            assert blind([(q.replace(" ", "_"), a) for q, a in asked]) < limit, kind
            if kind != "relation":        # left, right, above, below are told apart by the form
                assert blind(asked) < limit, kind
            counts = defaultdict(Counter)
            for record, (question, answer) in zip(records, asked):
                assert resolve(question, record["source"]) == answer and record["kind"] == kind
                counts[record["form"]][answer] += 1
            assert set(counts) == set(FORMS[kind])
            for form, own in counts.items():
                answers = FORMS[kind][form][0][:3 if kind == "count" else None]
                assert set(own) == set(answers) and max(own.values()) < 1.6 * own.total() / len(own)

    def test_what_it_asks_depends_on_the_number_of_objects(self):
        rng = random.Random(0)
        counts = Counter(ask_and_answer(balanced_question(rng, "count", side=None, objects=3))[1]
                         for _ in range(160))
        assert set(counts) == {"zero", "one", "two", "three"} and min(counts.values()) > 20
        with pytest.raises(ValueError, match="1.*relation"):
            balanced_question(random.Random(0), "relation", objects=1)


class TestProbes:
    def test_each_setting_asks_for_a_present_and_for_an_absent_pair(self):
        hard = Counter()
        for scene, rng in many(300, (1, 4)):
            records = probes(scene, rng, side=None)
            assert [(r["setting"], ask_and_answer(r)[1]) for r in records] == [
                (setting, answer) for setting in ("random", "popular", "adversarial")
                for answer in ("yes", "no")]
            there = pairs_in(scene)
            colours, shapes = zip(*there)
            for record in records:
                question, answer = ask_and_answer(record)
                assert resolve(question, scene) == answer and not held_out(question)
                colour, shape = re.search(r"(\w+) (\w+) in the picture", question).groups()
                if (record["setting"], answer) == ("popular", "no"):
                    assert colour not in {held for held, _ in HELD_OUT}
                if (record["setting"], answer) == ("adversarial", "no"):
                    near = {(c, s) for c in colours for s in shapes} - there - HELD_OUT
                    hard[bool(near)] += 1
                    assert (colour, shape) in near if near else colour in colours or shape in shapes
        assert min(hard[True], hard[False]) > 40
