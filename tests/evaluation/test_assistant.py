"""The figures of a visual assistant, on writers whose texts are known."""
import random

import numpy as np
import pytest

from common.data.instruct import SHORT_ANSWER
from common.data.shapes.scene import Item, Scene
from common.data.shapes.world import Shapes
from common.evaluation import assistant
from common.evaluation.assistant import (answer_lengths, box_of_text, chats, choices, descriptions,
                                         exact_review, grounding, hallucination, iou,
                                         is_true_with_boxes, judge_messages, named_objects,
                                         parse_review, reading, relative_score, relative_scores,
                                         sentences)
from common.evaluation.questions import draw_tasks


class Writes:
    """A writer whose texts a function of a record says; `asked` has the records of each call."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def generate(self, records, max_new_tokens):
        self.asked.append(records)
        return [self.say(record) for record in records]


def answer_of(record):
    """The last answer without ids of special tokens, as a tokenizer decodes it."""
    answer = record["turns"][-1]["answer"]
    return answer if isinstance(answer, str) else " ".join(
        part for part in answer if isinstance(part, str))


def picture_of(record):
    return record["turns"][0]["images"][0][0].tobytes()


def knows(records):
    """A writer that has learned the answer to each picture by heart; "?" to any other."""
    answers = {picture_of(record): answer_of(record) for record in records}
    return Writes(lambda record: answers.get(picture_of(record), "?"))


@pytest.fixture
def world():
    return Shapes(image_size=16)


@pytest.fixture
def scene():
    return Scene((Item("red", "circle", "large", 0.25, 0.3),
                  Item("blue", "square", "small", 0.75, 0.5)), "grey")


class TestHallucination:
    def test_each_setting_counts_its_own(self, world):
        wrong = {"yes": "no", "no": "yes"}
        writer = Writes(lambda record: answer_of(record) if record["setting"] != "adversarial"
                        else wrong[answer_of(record)])
        figures = hallucination(writer, world, 12)
        assert figures == pytest.approx({
            "hallucination_accuracy": 2 / 3, "hallucination_accuracy/random": 1,
            "hallucination_accuracy/popular": 1, "hallucination_accuracy/adversarial": 0,
            "hallucination_accuracy_chance": 0.5, "hallucination_yes_rate": 0.5})
        assert [{r["setting"] for r in own} for own in writer.asked] == [
            {"random"}, {"popular"}, {"adversarial"}]
        assert {len(own) for own in writer.asked} == {12}

    @pytest.mark.parametrize("text, yes", [
        ("yes", 1), ("No.", 0), ("there is no red ring.", 0), ("it is not there", 0),
        ("there is another one", 1), ("a knot, yes", 1)])
    def test_the_same_answer_to_all_is_at_chance(self, world, text, yes):
        figures = hallucination(Writes(lambda record: text), world, 7)
        assert figures.pop("hallucination_yes_rate") == yes
        assert set(figures.values()) == {0.5}

    def test_questions_are_in_the_template(self, world):
        writer = Writes(answer_of)
        hallucination(writer, world, 4, "question: {} answer:")
        asked = {r["turns"][0]["prompt"] for own in writer.asked for r in own}
        assert all(text.startswith("question: is there") and text.endswith("? answer:")
                   for text in asked) and len(asked) > 6


class TestAnswerLengths:
    def test_the_same_questions_are_asked_with_and_without_the_format(self, world):
        def say(record):
            return "two" if record["turns"][0]["prompt"].endswith("?\none word.") else "it is two."
        writer = Writes(say)
        assert answer_lengths(writer, world, 20, "one word.") == {
            "one_word_asked": 1, "one_word_unasked": 0}
        asked, unasked = ([r["turns"][0]["prompt"] for r in own] for own in writer.asked)
        assert asked == [f"{text}\none word." for text in unasked] and len({*unasked}) > 15
        assert {r["kind"] for r in writer.asked[0]} == {"count", "existence", "relation"}

    @pytest.mark.parametrize("text, share", [("", 0), ("two.", 1), ("two three", 0)])
    def test_no_word_is_not_one_word(self, world, text, share):
        figures = answer_lengths(Writes(lambda record: text), world, 1, "now")
        assert set(figures.values()) == {share}


class TestChats:
    def test_the_teacher_is_right_and_gets_its_own_history(self, world):
        writer = Writes(answer_of)
        assert chats(writer, world, 40) == {"chat_accuracy/word": 1, "chat_accuracy/sentence": 1}
        (records,) = writer.asked
        assert len(records) == 40
        for record in records:
            *history, _ = [turn["answer"] for turn in record["turns"]]
            assert len(history) == 2 and all(history)
            asked = [turn["prompt"].endswith(SHORT_ANSWER) for turn in record["turns"]]
            short = [" " not in turn["answer"] for turn in record["turns"]]
            assert asked == ([True] + [False] * 2 if all(short) else short)

    @pytest.mark.parametrize("text, form", [
        ("there is a red circle.", "word"), ("", "sentence"), ("red", "sentence"),
        ("this is nice.", "sentence")])
    def test_a_text_of_the_wrong_form_or_none_is_wrong(self, world, text, form):
        assert chats(Writes(lambda record: text), world, 40)[f"chat_accuracy/{form}"] == 0

    def test_other_sentences_that_are_true_are_right_and_one_false_one_is_wrong(self, world):
        def say(record):
            count = len(record["source"].items)
            return f"there {'is one object' if count == 1 else 'are two objects'}."
        assert chats(Writes(say), world, 40) == {"chat_accuracy/word": 0,
                                                 "chat_accuracy/sentence": 1}
        false = Writes(lambda record: f"{say(record)} there are three objects.")
        assert chats(false, world, 40)["chat_accuracy/sentence"] == 0


class TestNamedObjects:
    @pytest.mark.parametrize("text, pairs", [
        ("there is a red circle and a blue square.", ["red circle", "blue square"]),
        ("there is a red circle. there is a small blue circle.", ["red circle"]),
        ("a large blue square", []), ("the red circle is left of the blue square",
                                      ["red circle", "blue square"]),
        ("the blue square is left of the red circle", []), ("there is a circle", []),
        ("no small red circle", []), ("a red circle at the right", []), ("red circle blue", []),
        ("two red circles", []), ("", []),
        ("there is a pink star. one red circle.", ["red circle"])])
    def test_true_statements_name_them_by_colour_and_shape(self, scene, text, pairs):
        assert named_objects(text, scene) == {tuple(pair.split()) for pair in pairs}


class TestDescriptions:
    def test_the_teachers_are_true_of_their_own_pictures_alone(self, world):
        records = draw_tasks(world, "instruction", 15, kind="detail")
        writer = knows(records)
        figures = descriptions(writer, world, 15)
        assert figures["true_statements"] == figures["described_objects"] == 1
        other = [answer_of(r) for r in records[1:] + records[:1]]
        judged = [world.is_true(s, r["source"]) for text, r in zip(other, records)
                  for s in sentences(text)]
        assert figures["true_statements_blind"] == sum(judged) / len(judged) < 0.7
        assert figures["described_objects_blind"] < 0.4
        assert {r["kind"] for own in writer.asked for r in own} == {"detail"}

    def test_every_sentence_and_every_object_counts_the_same(self, world):
        records = draw_tasks(world, "instruction", 9, kind="detail")
        first = picture_of(records[0])
        names = [f"there is a {i.name}" for i in records[0]["source"].items]
        true = ". ".join(names * 3)
        writer = Writes(lambda record: true if picture_of(record) == first
                        else "there is no object! what a day.")
        figures = descriptions(writer, world, 9)
        n, objects = len(names), sum(len(r["source"].items) for r in records)
        assert figures["true_statements"] == 3 * n / (3 * n + 2 * 8)
        assert figures["described_objects"] == n / objects
        assert set(descriptions(Writes(lambda record: ""), world, 5).values()) == {0}


class TestParseReview:
    @pytest.mark.parametrize("text, scores", [
        ("8 7", (8, 7)), ("8, 7\nThe first one is better.", (8, 7)), (" 9.5  10 ", (9.5, 10)),
        ("8,7", (8, 7)), ("1 1\n10 10", (1, 1)), ("", None), ("8", None), ("8 7 6", None),
        ("Scores: 8 7", None), ("8/10 7/10", None), ("-1 -1", None), ("0 7", None), ("8 11", None),
        ("11 8", None), ("8 0.5", None), ("\n8 7", None), ("87", None), ("nan 8", None)])
    def test_the_first_line_has_two_scores(self, text, scores):
        assert parse_review(text) == scores


class TestRelativeScore:
    def test_it_is_the_ratio_of_the_means(self):
        assert relative_score([(10, 5), (5, 5)]) == pytest.approx(10 / 15)   # of ratios: 0.75
        assert relative_score([(8, 8), (4, 1)]) == pytest.approx(9 / 12)
        assert relative_score([(5, 10)]) == 2

    def test_malformed_reviews_are_left_out(self):
        assert relative_score([(10, 5), None, (10, 6), None]) == pytest.approx(11 / 20)

    @pytest.mark.parametrize("reviews", [[], [None], [(0, 5)]])
    def test_without_a_reference_there_is_none(self, reviews):
        with pytest.raises(ValueError, match=f"{len([r for r in reviews if r])} reviews"):
            relative_score(reviews)


class TestJudgeMessages:
    def test_the_reference_stands_before_the_candidate(self):
        system, user = judge_messages("a star: [0, 1]", "what is it?", "a star", "a ring")
        assert (system["role"], user["role"]) == ("system", "user")
        places = [user["content"].find(text) for text in (
            "a star: [0, 1]", "what is it?", "[Answer 1]\na star", "[Answer 2]\na ring")]
        assert -1 < places[0] and places == sorted(places) and "1 to 10" in system["content"]


class TestExactReview:
    @pytest.mark.parametrize("kind, text, score", [
        ("detail", "there are two objects. there is a red circle.", 10),
        ("conversation", "there is a red circle. it is a star. there is a star. a cyan ring", 3.25),
        ("detail", "", 1), ("reasoning", "the red circle comes first", 10),
        ("reasoning", "there is a red circle.", 1)])
    def test_true_sentences_or_the_teachers_answer(self, world, scene, kind, text, score):
        answer = "the red circle comes first." if kind == "reasoning" else "there is a red circle."
        record = {"kind": kind, "source": scene, "turns": [{"answer": answer}]}
        assert exact_review(world, record, text) == (10, score)


class TestRelativeScores:
    def test_the_world_judges_one_question_of_each_kind_on_a_scene(self, world):
        writer = Writes(answer_of)
        assert relative_scores(writer, world, 8) == {
            "relative_score": 1, **{f"relative_score/{kind}": 1 for kind in (
                "conversation", "detail", "reasoning")}}
        kinds, prompts = zip(*[({r["kind"] for r in own}, {r["turns"][0]["prompt"] for r in own})
                               for own in writer.asked])
        assert kinds == ({"conversation"}, {"detail"}, {"reasoning"}) and len(prompts[0]) > 4
        scenes = [[r["source"] for r in own] for own in writer.asked]
        assert scenes[0] == scenes[1] == scenes[2] and len(scenes[0]) == 8
        assert all(len(r["turns"]) == 1 and len(r["turns"][0]["images"]) == 1
                   for own in writer.asked for r in own)

    def test_false_sentences_cost_points(self, world):
        writer = Writes(lambda r: answer_of(r) + (" what?" if r["kind"] == "conversation" else ""))
        figures = relative_scores(writer, world, 8)
        assert figures["relative_score/conversation"] == pytest.approx(0.55)
        assert figures["relative_score"] == pytest.approx((0.55 + 1 + 1) / 3)

    def test_another_judge_gets_the_context_and_the_reference_first(self, world):
        heard, replies = [], 4 * [(10, 5)] + 2 * [None] + 6 * [(5, 5)] + 6 * [(5, 4)]

        def judge(*given):
            heard.append(given)
            return replies[len(heard) - 1]
        writer = Writes(lambda record: "a ring")
        figures = relative_scores(writer, world, 6, judge)
        assert heard == [(r["context"], r["turns"][0]["prompt"], answer_of(r), "a ring")
                         for own in writer.asked for r in own]
        assert list(figures.values()) == pytest.approx([0.74, 0.5, 1, 0.8])


class TestChoices:
    @staticmethod
    def prompt_of(question, options):
        return f"{question} " + " ".join(options)

    def test_the_first_letter_that_is_written_is_the_answer(self, world):
        def letter(record, form="{}"):
            return form.format("ABCD"[record["candidates"].index(answer_of(record))])
        for form in ("{}", "({})", "{}. 12", " {}, not a d b c"):
            writer = Writes(lambda record: letter(record, form))
            assert choices(writer, world, 12, self.prompt_of) == {
                "choice_accuracy": 1, "choice_accuracy_chance": 1 / 4}
        for text in ("it is b", "", "12"):
            writer = Writes(lambda record: text)
            assert choices(writer, world, 12, self.prompt_of)["choice_accuracy"] == 0
        writer = Writes(lambda record: "b")
        share = choices(writer, world, 30, self.prompt_of)["choice_accuracy"]
        assert share == sum(letter(r) == "B" for r in writer.asked[0]) / 30 > 0

    def test_the_context_stands_before_the_prompt(self, world):
        writer = Writes(answer_of)
        choices(writer, world, 3, self.prompt_of)
        for record in writer.asked[0]:
            context, _, prompt = record["turns"][0]["prompt"].partition("\n")
            assert context.startswith("in this game") and record["turns"][0]["images"]
            assert prompt == f"how much is the picture worth? {' '.join(record['candidates'])}"


class TestSamples:
    def test_a_reply_is_right_when_all_of_it_is_true(self, world, monkeypatch):
        rows = []
        monkeypatch.setattr(assistant, "sheet", lambda title, found, **more: rows.extend(found))
        writer = Writes(lambda record: record["turns"][0]["answer"])
        records = draw_tasks(world, "instruction", 7)
        assistant.samples(writer, world, records)
        assistant.samples(Writes(lambda record: "there are nine objects."), world, records)
        assistant.samples(writer, world, [{"turns": [{"images": [], "prompt": "1 + 1?",
                                                      "answer": "2"}]}])
        *rows, (_, image, [(_, text, right)]) = rows
        assert (image, text, right) == (None, "1 + 1? 2", None), "a text of the user's"
        assert [right for _, _, [(_, _, right)] in rows] == [True] * 7 + [False] * 7
        assert all(text == f"{r['turns'][0]['prompt']} {r['turns'][0]['answer']}"
                   for (_, _, [(_, text, _)]), r in zip(rows, writer.asked[0], strict=False))
        assert [image for _, image, _ in rows[:7]] == [r["turns"][0]["images"][0][0]
                                                       for r in writer.asked[0]]


class TestReading:
    def test_strings_and_letters(self, world):
        writer = Writes(lambda record: answer_of(record).upper().replace(" ", ""))
        assert reading(writer, world, 9) == {
            "reading_accuracy": 1, "reading_accuracy_chance": pytest.approx(0.01),
            "reading_accuracy/letters": 1, "reading_accuracy/letters_chance": 0.1}
        last = Writes(lambda record: "? " + answer_of(record)[2:])
        figures = reading(last, Shapes(image_size=64), 9, length=3, dot=2)
        assert (figures["reading_accuracy"], figures["reading_accuracy/letters"]) == (0, 2 / 3)
        assert {len(answer_of(r).split()) for r in last.asked[0]} == {3}
        short, long = (reading(Writes(say), world, 9) for say in (
            lambda record: answer_of(record)[0], lambda record: answer_of(record) + " 7"))
        assert (short["reading_accuracy"], short["reading_accuracy/letters"]) == (0, 0.5)
        assert (long["reading_accuracy"], long["reading_accuracy/letters"]) == (0, 1)


class TestBoxOfText:
    @pytest.mark.parametrize("text, box", [
        ("(120,340),(355,575)", (120, 340, 355, 575)), ("", None), ("(1,2)", None),
        ("1,2,3,4", None),
        ("a star ( 1, 2 ) , (3 ,4) and (5,6),(7,8)", (1, 2, 3, 4)), ("(1,2) (3,4)", None),
        ("(1,2),(3,x)", None), ("(1,2),(3,4),(5,6)", (1, 2, 3, 4))])
    def test_the_first_box_of_a_text(self, text, box):
        assert box_of_text(text) == box


class TestIou:
    def test_it_counts_the_cells_of_both_and_of_either(self):
        rng, values = random.Random(0), set()
        for _ in range(300):
            boxes, grids = [], np.zeros((2, 11, 13), bool)
            for grid in grids:
                (x1, x2), (y1, y2) = (sorted(rng.sample(range(n), 2)) for n in (13, 11))
                boxes.append((x1, y1, x2, y2))
                grid[y1:y2, x1:x2] = True
            expected = (grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum()
            assert iou(*boxes) == iou(*boxes[::-1]) == pytest.approx(expected)
            values.add(expected)
        assert 0 in values and len(values) > 50

    def test_boxes_without_an_area_share_nothing(self):
        assert iou((2, 2, 2, 5), (2, 2, 2, 5)) == 0 == iou((5, 5, 1, 1), (0, 0, 9, 9))
        assert iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0 == iou((5, 5, 1, 1), (5, 5, 1, 1))


class TestIsTrueWithBoxes:
    CIRCLE, SQUARE = "(0,40),(510,560)", "(622,372),(878,628)"

    @pytest.mark.parametrize("text, true", [
        ("a red circle {0} a blue square {1}", True), ("a red circle {0}, and a square {1}.", True),
        ("the circle {0}", True), ("one red circle {0} and one object {1}", True),
        ("a red circle {1}", False), ("a red circle {1} a blue square {0}", False),
        ("a red circle {0} a blue square {0}", False), ("a red circle {0} a pink star {1}", False),
        ("a red circle {0} a blue square", False), ("a red circle", False), ("", False),
        ("{0}", False), ("something {0}", False), ("no red circle {0}", False),
        ("two red circles {0}", False), ("a small red circle {0}", False),
        ("a red circle (40,0),(560,510)", True), ("a red circle (0,0),(300,400)", False),
        ("a blue square (372,622),(628,878)", False)])
    def test_every_pair_must_be_true(self, scene, text, true):
        assert is_true_with_boxes(text.format(self.CIRCLE, self.SQUARE), scene) is true


class TestGrounding:
    @staticmethod
    def agree(one, other):
        """Whether two boxes share half of what they cover, by counting cells."""
        grids = np.zeros((2, 1000, 1000), bool)
        for grid, (x1, y1, x2, y2) in zip(grids, (one, other)):
            grid[y1:y2, x1:x2] = True
        return 2 * (grids[0] & grids[1]).sum() >= (grids[0] | grids[1]).sum()

    def test_a_writer_that_sees_is_better_than_one_that_does_not(self, world):
        grounds, captions = (draw_tasks(world, "grounding", 12, kind=kind)
                             for kind in ("ground", "caption"))
        boxes = [r["boxes"][0] for r in grounds]
        blind = sum(map(self.agree, boxes, boxes[1:] + boxes[:1])) / 12
        chance = max(sum(self.agree(one, other) for other in boxes) for one in boxes) / 12
        writer = knows(grounds)
        figures = grounding(writer, world, 12)
        assert figures == pytest.approx({
            "grounding_accuracy": 1, "grounding_accuracy_blind": blind,
            "grounding_accuracy_chance": chance, "grounded_caption_accuracy": 0})
        assert blind < 0.5 and 1 / 12 <= chance < 0.5
        assert grounding(knows(captions), world, 12)["grounded_caption_accuracy"] == 1
        assert [{r["kind"] for r in own} for own in writer.asked] == [
            {"ground"}, {"ground"}, {"caption"}]

    def test_swapped_axes_and_texts_without_a_box_are_wrong(self, world):
        def swapped(record):
            x1, y1, x2, y2 = record["boxes"][0]
            return f"({y1},{x1}),({y2},{x2})"
        figures = grounding(Writes(swapped), world, 12)
        boxes = [r["boxes"][0] for r in draw_tasks(world, "grounding", 12, kind="ground")]
        right = sum(self.agree(box, (box[1], box[0], box[3], box[2])) for box in boxes) / 12
        assert figures["grounding_accuracy"] == right < 0.6
        assert grounding(Writes(lambda record: "a star"), world, 5)["grounding_accuracy"] == 0
