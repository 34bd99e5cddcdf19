"""Instruction data: what the teacher is asked, its replies, choices and ScienceQA."""
import random

import pytest

from common.data.instruct import (CAPTION_REQUEST, CHOICE_ANSWER, DETAIL_REQUESTS, LETTERS,
                                  SHORT_ANSWER, TASKS, ask_short, choice_prompt, lettered,
                                  parse_choice, parse_reply, science_turn, teacher_messages)
from tests.fuzz import one_line

CAPTIONS = ["a dog runs .", "two\n dogs"]
BOXES = [("dog", (0, 0.25, 0.43219, 1)), ("cat", (0.1, 0.2, 0.3, 0.4))]


class TestTeacherMessages:
    @pytest.mark.parametrize("kind", ["conversation", "detail", "reasoning"])
    def test_system_then_examples_then_the_captions_and_boxes_of_this_picture(self, kind):
        examples = [("context 1", "reply 1"), ("context 2", "reply 2")]
        first, *rest = teacher_messages(kind, CAPTIONS, BOXES, examples)
        boxes = "\ndog: [0.000, 0.250, 0.432, 1.000]\ncat: [0.100, 0.200, 0.300, 0.400]"
        assert [(message["role"], message["content"]) for message in rest] == [
            ("user", "context 1"), ("assistant", "reply 1"), ("user", "context 2"),
            ("assistant", "reply 2"),
            ("user", "a dog runs .\ntwo dogs" + boxes * (kind != "conversation"))]
        assert first == {"role": "system", "content": TASKS[kind]}
        assert len(teacher_messages(kind, CAPTIONS, ())) == 2

    def test_the_rules_and_the_form_of_the_output(self):
        asked = {kind: teacher_messages(kind, CAPTIONS, ())[0]["content"] for kind in TASKS}
        for kind, text in asked.items():
            assert "five" in text and "sees the picture" in text
            assert "Never mention captions, boxes or coordinates" in text
            assert ("[x1, y1, x2, y2]" in text) == (kind != "conversation")
            assert ("Question:\n" in text and "\n===\nAnswer:\n" in text) == (kind != "detail")
            assert ("definite answer" in text) == (kind != "detail")
            assert ("give away visual details" in text) == (kind == "reasoning")

    @pytest.mark.parametrize("change, why", [
        ({"kind": "poem"}, "'poem'.* conversation, detail, reasoning"), ({"captions": []}, "no c"),
        ({"boxes": [*BOXES, ("a\nb", (0, 0, 1.001, 1))]}, "1.001.* 0 to 1"),
        ({"boxes": [("dog", (-0.1, 0, 1, 1))]}, "'dog' .*-0.1"),
        ({"boxes": [("dog", (0, 0, 1))]}, "four"), ({"boxes": [("dog", (0, 0, 1, 1, 1))]}, "four"),
        ({"boxes": [("dog", (0, float("nan"), 1, 1))]}, "nan")])
    def test_what_says_nothing_or_too_much_is_refused(self, change, why):
        with one_line(why):
            teacher_messages(**{"kind": "detail", "captions": CAPTIONS, "boxes": BOXES} | change)


class TestParseReply:
    REPLY = "Question:\nHow many: 2?\n===\nAnswer:\nTwo.\n\nYes: two.\n==="

    @pytest.mark.parametrize("end", ["", "\n", "\nQuestion: Why?\n===\nAnswer: So.\n====\n"])
    @pytest.mark.parametrize("kind", ["conversation", "reasoning"])
    def test_blocks_are_pairs_with_or_without_the_last_bar(self, kind, end):
        pairs = [("How many: 2?", "Two.\n\nYes: two.")] + [("Why?", "So.")] * (len(end) > 1)
        assert parse_reply(kind, self.REPLY + end) == pairs
        assert parse_reply(kind, (self.REPLY + end).rstrip("\n=")) == pairs

    def test_a_description_gets_a_request(self):
        assert parse_reply("detail", " A dog.\n\nIt runs. ") == [
            (DETAIL_REQUESTS[0], "A dog.\n\nIt runs.")]
        drawn = {parse_reply("detail", "x", random.Random(seed))[0][0] for seed in range(50)}
        assert drawn == {*DETAIL_REQUESTS}

    @pytest.mark.parametrize("kind, text", [
        ("conversation", ""), ("conversation", "==="), ("reasoning", "Two dogs."),
        ("reasoning", "Question: a"), ("conversation", "Answer: a\n===\nQuestion: b\n==="),
        ("conversation", "Yes\nQuestion: a\n===\nAnswer: b"), ("conversation", REPLY + REPLY[:14]),
        ("conversation", "Question: a\n===\nAnswer:\n===\n"), ("detail", REPLY), ("detail", " \n"),
        ("detail", "A dog.\n===\nA cat."),
        ("conversation", "Question: a\n===\nQuestion: b\n==="), ("detail", "Question: what?")])
    def test_another_form_is_refused(self, kind, text):
        with one_line("expected, not '"):
            parse_reply(kind, text)
        with one_line("'caption'.* conversation, detail, reasoning"):
            parse_reply("caption", "x")


class TestChoicePrompt:
    def test_a_line_for_each_choice_and_the_request_last(self):
        assert choice_prompt("Which?", ["a dog", "a cat", 3]).split("\n") == [
            "Which?", "A. a dog", "B. a cat", "C. 3",
            "Answer with the option's letter from the given choices directly."]
        assert CHOICE_ANSWER == choice_prompt("", ["x"]).split("\n")[-1]

    def test_the_other_requests_are_those_of_the_paper(self):
        assert SHORT_ANSWER == "Answer the question using a single word or phrase."
        assert CAPTION_REQUEST == "Provide a one-sentence caption for the provided image."

    @pytest.mark.parametrize("count", [0, 27])
    def test_no_choices_and_more_than_letters_are_refused(self, count):
        assert lettered("x" * 26)[-1] == ("Z", "x")
        with one_line(f"{count} .* 26"):
            lettered("x" * count)


class TestAskShort:
    @pytest.mark.parametrize("answers, places", [
        (["dog", "cat", "a dog", "cow", ("dog",), "no"], [0, 1, 3, 5]),
        (["dog", "cat", "no"], [0]), (["a dog", "a cat"], [])])
    def test_the_line_stands_behind_each_prompt_or_behind_the_first_of_words_alone(
            self, answers, places):
        turns = [{"prompt": f"{n}?", "answer": answer} for n, answer in enumerate(answers)]
        assert [turn["prompt"] for turn in ask_short(turns)] == [
            f"{n}?\n{SHORT_ANSWER}" if n in places else f"{n}?" for n in range(len(turns))]
        assert [turn["prompt"][-1] for turn in turns] == ["?"] * len(turns), "the turns change"


class TestScienceTurn:
    FULL = {"question": "Which?", "choices": ["ice", "fire"], "answer": 1, "hint": "It is hot.",
            "lecture": "Heat burns.", "solution": "Fire is hot.", "image": "picture"}

    def test_question_context_options_then_reasons_and_answer(self):
        assert science_turn(self.FULL) == {
            "images": [["picture"]],
            "prompt": "Which?\nContext: It is hot.\nOptions: (A) ice (B) fire",
            "answer": "Heat burns. Fire is hot. The answer is B."}

    @pytest.mark.parametrize("empty", [{}, {"hint": "", "lecture": "", "image": None}])
    def test_what_is_missing_is_left_out(self, empty):
        problem = {key: self.FULL[key] for key in ("question", "choices", "solution")}
        assert science_turn(problem | empty | {"answer": 0}) == {
            "images": [], "prompt": "Which?\nContext: N/A\nOptions: (A) ice (B) fire",
            "answer": "Fire is hot. The answer is A."}

    @pytest.mark.parametrize("answer", [-1, 2])
    def test_an_answer_beyond_the_choices_is_refused(self, answer):
        with one_line(f"answer {answer} of 2"):
            science_turn(self.FULL | {"answer": answer})

    def test_its_answer_is_parsed_as_its_choice(self):
        for answer in (0, 1):
            assert parse_choice(science_turn(self.FULL | {"answer": answer})["answer"], 2) == answer


class TestParseChoice:
    @pytest.mark.parametrize("text, wanted", [
        ("B", 1), (" C\n", 2), ("A. ice. The answer is B.", 0), ("B. ", None), ("D", None),
        ("b", None), ("BC", None), ("A dog", None), ("B.fire", None), ("B) fire", None), ("", None),
        ("Hot. The answer is B.", 1), ("The answer is B", None), ("The answer is Bread.", None),
        ("the answer is B.", None), ("The answer is D.", None), ("D. x. The answer is A.", 0),
        ("The answer is A. The answer is B.", None), ("So B. The answer is C. Yes.", 2)])
    def test_a_letter_a_prefix_or_one_sentence(self, text, wanted):
        assert parse_choice(text, 3) == wanted

    def test_as_many_letters_as_choices(self):
        for count in (1, 2, 26):
            assert [parse_choice(letter, count) for letter in LETTERS] == [
                *range(count), *[None] * (26 - count)]
