"""What a writing model is asked, on worlds and models whose answers are known."""
import math
from types import SimpleNamespace

import pytest
import torch

from common.data.shapes.world import Shapes
from common.evaluation.questions import (captions, clips, documents, draw_tasks, episodes,
                                         evaluate, exact, latest_image, ranked_answers,
                                         ranked_tasks, retrieved_shots, text_perplexity,
                                         unseen_kinds, visual_questions)
from tests.helpers import Numbers, assert_close, toy_lm


@pytest.fixture
def world():
    return Shapes(image_size=16)


class Strict(Numbers):
    """Its captions must also be long enough to say something."""

    def describes(self, text, source):
        return len(text) > 1 and self.is_true(text, source)


def number_of(frames):
    return frames[0].getpixel((0, 0))[0] // 20


def look(record):
    """What a picture or clip looks like: that of the last turn with images."""
    frames = [own for turn in record["turns"] for own in turn["images"]][-1]
    return tuple(frame.tobytes() for frame in frames)


class Writes:
    """A writer whose texts a function of a record says; `asked` has the records of each call."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def generate(self, records, **options):
        self.asked.append(records)
        return [self.say(record) for record in records]

    def choose(self, records, candidates):
        said = map(self.say, records)
        return [text if text in own else own[0] for text, own in zip(said, candidates)]


def reads():
    """A writer of the number of each image, in two digits."""
    return Writes(lambda record: f"{number_of(record['images']):02d}")


def knows(records):
    """A writer that has learned the answer to each picture or clip by heart; "?" to any other."""
    answers = {look(record): record["turns"][-1]["answer"] for record in records}
    return Writes(lambda record: answers.get(look(record), "?"))


class TestEvaluate:
    def test_a_world_of_captions_alone_is_measured_by_them(self):
        world = Strict()
        world.zero_shot = "test"
        assert evaluate(reads(), SimpleNamespace(world=world), 4) == {"caption_accuracy": 1}

    def test_a_world_with_tasks_has_all_figures(self):
        class Few(Shapes):
            splits = Shapes.splits | {"test": 3, "single": 8}
        data, writer = SimpleNamespace(world=Few(image_size=16)), Writes(lambda record: "?")
        figures = evaluate(writer, data, 8)
        assert {"caption_accuracy", "two_images_latest", "vqa_accuracy", "document_accuracy",
                "video_accuracy", "shots_8"} <= set(figures)
        more = evaluate(writer, data, 8, lambda images, support, k: [support[:k]] * len(images))
        assert set(more) - set(figures) == {"vqa_accuracy_4_random_shots",
                                            "vqa_accuracy_4_retrieved_shots"}
        assert len(writer.asked[-1]) == 2            # a quarter of the questions


class TestExact:
    @pytest.mark.parametrize("texts, share", [
        (["red", "two."], 1), (["red.", "two"], 1), (["red..", "two"], 0.5), (["Red", "two!"], 0)])
    def test_a_full_stop_at_the_end_does_not_count(self, texts, share):
        records = [{"turns": [{"answer": "no"}, {"answer": "red"}]}, {"turns": [{"answer": "two."}]}]
        assert exact(texts, records) == share


class TestCaptions:
    def test_they_are_right_when_they_describe_their_image(self):
        writer = reads()
        assert captions(writer, Strict(), 500) == pytest.approx({
            "caption_accuracy": 1, "caption_accuracy_single": 1,
            # Of the images of other records, below, the first two captions are true.
            "caption_accuracy_single_wrong_image": 2 / 5, "caption_accuracy_single_chance": 1 / 3})
        assert [[number_of(r["images"]) for r in records] for records in writer.asked] == [
            [*range(13)], [0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
        for world, share in ((Strict(), 0), (Numbers(), 2 / 13)):
            found = captions(Writes(lambda record: "4"), world, 500)
            assert found["caption_accuracy"] == pytest.approx(share)

    @pytest.mark.parametrize("split", [None, "test"])
    def test_a_world_without_single_objects_has_one_figure_of_the_first_images(self, split):
        world, writer = Strict(), reads()
        world.zero_shot = split
        assert captions(writer, world, 3) == {"caption_accuracy": 1}
        assert [number_of(record["images"]) for record in writer.asked[0]] == [0, 1, 2]


class TestLatestImage:
    @pytest.mark.parametrize("place, first, latest", [(0, 1, 0), (-1, 0, 1)])
    def test_it_is_told_whose_caption_was_written(self, place, first, latest):
        class Cards(Numbers):
            def record(self, split, index):
                return super().record("test", index)

            def describes(self, text, source):
                return int(text) == source
        writer = Writes(lambda r: str(number_of(r["turns"][place]["images"][0])))
        figures = latest_image(writer, Cards(), 13)
        assert figures == {"two_images_first": first, "two_images_latest": latest}
        for shot, query in (record["turns"] for record in writer.asked[0]):
            assert shot["answer"] == str(number_of(shot["images"][0]))
            assert shot["caption"] and query["caption"]


class TestVisualQuestions:
    def test_with_the_right_image_and_with_that_of_another_record(self, world):
        records = draw_tasks(world, "question", 13)
        figures = visual_questions(knows(records), world, 13)
        answers = [record["turns"][0]["answer"] for record in records]
        blind = sum(a == b for a, b in zip(answers, answers[1:] + answers[:1])) / 13
        assert blind != 1 and figures == pytest.approx({
            "vqa_accuracy": 1, "vqa_accuracy_blind": blind, "vqa_accuracy_trained_wordings": 1,
            **{f"vqa_accuracy/{record['kind']}": 1 for record in records}})

    def test_each_kind_counts_its_own(self, world):
        records = draw_tasks(world, "question", 60)
        colour = [record for record in records if record["kind"] == "colour"]
        figures = visual_questions(knows(colour), world, 60)
        assert {name: value for name, value in figures.items() if "/" in name} == {
            f"vqa_accuracy/{record['kind']}": record["kind"] == "colour" for record in records}
        assert figures["vqa_accuracy"] == len(colour) / 60

    def test_all_questions_are_in_the_template(self, world):
        writer = Writes(lambda record: "yes")
        visual_questions(writer, world, 13, "question: {} answer:")
        asked = [record["turns"][0]["prompt"] for own in writer.asked for record in own]
        assert len(asked) == 39 and len({*asked}) > 20
        assert all(text.startswith("question: ") and text.endswith("? answer:") for text in asked)
        assert not any("{}" in text or text.count("answer:") > 1 for text in asked)


class TestUnseenKinds:
    def test_each_is_asked_for_itself_in_the_template(self, world):
        asked = {kind: draw_tasks(world, "question", 13, kinds=(kind,))
                 for kind in ("comparison", "size")}
        writer = knows(asked["size"])
        figures = unseen_kinds(writer, world, 13, "question: {} answer:")
        assert figures == {"vqa_accuracy/comparison": 0, "vqa_accuracy/comparison_chance": 0.5,
                           "vqa_accuracy/size": 1, "vqa_accuracy/size_chance": 0.5}
        assert [[r["turns"][0]["prompt"] for r in own] for own in writer.asked] == [
            [f"question: {r['turns'][0]['prompt']} answer:" for r in own]
            for own in asked.values()]


class TestRankedTasks:
    def test_the_chosen_candidate_is_the_answer_to_the_last_question(self, world):
        kinds = ("statement", "dialogue", "choice")
        records = [r for kind in kinds for r in draw_tasks(world, kind, 13)]
        figures, writer = {}, knows(records)
        for kind in kinds:
            figures[f"vqa_accuracy/{kind}"] = 1
            figures[f"vqa_accuracy/{kind}_chance"] = {"statement": 1 / 2, "dialogue": 1 / 6,
                                                      "choice": 1 / 4}[kind]
        assert ranked_tasks(writer, world, 13, kinds) == pytest.approx(figures)
        wrong = ranked_tasks(Writes(lambda record: "?"), world, 13, ("choice",))
        assert wrong["vqa_accuracy/choice"] < 0.7

    def test_the_last_prompt_alone_is_in_the_template(self, world):
        asked = []

        def say(record):
            asked.append([turn["prompt"] for turn in record["turns"]])
        ranked_tasks(Writes(say), world, 5, ("dialogue",), "question: {} answer:")
        want = [[turn["prompt"] for turn in r["turns"]] for r in draw_tasks(world, "dialogue", 5)]
        assert asked == [[*first, f"question: {last} answer:"] for *first, last in want]


class TestDocuments:
    def test_of_a_document_of_three_images_the_prompt_ends_with_the_question(self, world):
        records = [r | {"turns": r["turns"][:r["asked"] + 1]}
                     for r in draw_tasks(world, "document", 13, images=3)]
        writer = knows(records)
        assert documents(writer, world, 13) == {"document_accuracy": 1.0}
        asked, = (own for own in writer.asked if "asked" in own[0])
        assert {len(record["turns"]) for record in asked} == {1, 2, 3}


class TestRankedAnswers:
    def test_the_candidates_are_the_answers_of_all_questions(self, world):
        records = draw_tasks(world, "question", 13)
        answers = sorted({record["turns"][0]["answer"] for record in records})
        writer = knows(records)
        assert ranked_answers(writer, world, 13) == {
            "vqa_accuracy_ranked": 1.0, "vqa_accuracy_ranked_chance": 1 / len(answers)}

    def test_questions_are_asked_in_both_wordings(self, world):
        writer = Writes(lambda record: "")
        visual_questions(writer, world, 13)
        asked = [[record["turns"][-1]["prompt"] for record in own] for own in writer.asked]
        for split in ("test", "train"):
            records = draw_tasks(world, "question", 13, split, asks=1)
            assert [record["turns"][0]["prompt"] for record in records] in asked


class TestRetrievedShots:
    def test_shots_stand_before_the_query_as_they_were_retrieved(self, world):
        support = draw_tasks(world, "question", 30, "train", asks=1)       # 2 * 13 + 4
        queries = draw_tasks(world, "question", 13)

        def all_of(name, records):
            return [[turn[name] for turn in record["turns"]] for record in records]

        def select(images, given, count):
            assert images == [query["turns"][0]["images"][0] for query in queries]
            assert all_of("prompt", given) == all_of("prompt", support)
            return [[given[i], *given[:count - 1]] for i in range(13)]
        writer = Writes(lambda record: record["turns"][0]["answer"])      # as the first shot does
        figures = retrieved_shots(writer, world, 13, select)
        drawn, retrieved = (all_of("prompt", own) for own in writer.asked)
        said, asked = (sum(all_of("prompt", own), []) for own in (support, queries))
        assert retrieved == [[said[i], *said[:3], asked[i]] for i in range(13)]
        assert [turns[-1] for turns in drawn] == asked and {len(turns) for turns in drawn} == {5}
        assert len({str(turns[:-1]) for turns in drawn}) > 9
        right = [a == b for a, b in zip(all_of("answer", support), all_of("answer", queries))]
        assert figures["vqa_accuracy_4_retrieved_shots"] == sum(right) / 13
        assert figures == retrieved_shots(writer, world, 13, select)
        assert all_of("prompt", writer.asked[2]) == drawn          # the same in each evaluation


class TestClips:
    @pytest.mark.parametrize("frames", [8, 16])
    def test_they_are_shown_in_order_longer_and_shuffled(self, world, frames):
        writer = knows(draw_tasks(world, "clip", 13, frames=frames))
        figures = clips(writer, world, 13)
        assert figures.pop("video_accuracy_shuffled") < 0.5
        assert figures == {"video_accuracy": frames == 8, "video_accuracy_16_frames": frames == 16,
                           "video_accuracy_chance": 0.5}
        plain, _, shuffled = ([look(record) for record in own] for own in writer.asked)
        assert [sorted(own) for own in plain] == [sorted(own) for own in shuffled]
        assert sum(a != b for a, b in zip(plain, shuffled)) > 9


class TestEpisodes:
    def test_they_are_solved_by_their_shots_unless_these_are_shuffled(self, world):
        class Copies:
            """Chooses the label of the first shot that shows the same as the query."""

            def choose(self, records, candidates):
                chosen = []
                for record, own in zip(records, candidates):
                    labels = [shot["answer"] for shot in record["turns"][:-1]]
                    what = [(s.items[0].colour, s.items[0].shape) for s in record["source"]]
                    assert len(what) == len(labels) + 1
                    chosen.append(labels[what.index(what[-1])] if labels else own[0])
                return chosen
        figures = episodes(Copies(), world, 40)
        assert [figures.pop(f"shots_{k}") for k in (2, 4, 8)] == [1, 1, 1]
        assert 0.25 < figures.pop("shots_0") < 0.75 and 0.2 < figures.pop("shots_8_shuffled") < 0.8
        assert figures == {"shots_chance": 0.5}


class TestTextPerplexity:
    @pytest.mark.parametrize("bias", [0.0, torch.linspace(0, 3, 13)])
    @torch.no_grad()
    def test_it_is_of_the_whole_model_and_of_its_language_model(self, bias):
        class Model:
            """The whole adds a bias to its language model's logits; it has no image."""
            lm, vision = toy_lm(), SimpleNamespace(width=5)

            def logits(self, ids, visual):
                assert visual.shape == (len(ids), 1, 1, 5) and not visual.any()
                return self.lm(ids) + bias

        class Data:
            world = SimpleNamespace(text=lambda rng: {"texts": [str(rng.randint(3, 9))]})

            def ids(self, texts):
                self.found = torch.tensor([[1, int(n), 2] if n < "8" else [1, 2, 0] for n in texts])
                return self.found
        data = Data()
        figures = text_perplexity(Model(), data, 7)
        ids = data.found
        assert len(ids) == 7 and len(ids.unique(dim=0)) > 2
        for name, added in (("perplexity_lm", 0.0), ("perplexity", bias)):
            logs = (Model.lm(ids) + added).log_softmax(-1)
            own = [-logs[b, t - 1, ids[b, t]] for b, t in (ids != 0).nonzero().tolist() if t]
            assert_close(name, figures[name], math.exp(sum(own) / len(own)), 1e-4)
        assert figures == text_perplexity(Model(), data, 7)

    def test_a_world_without_texts_has_none(self):
        assert text_perplexity(None, SimpleNamespace(world=Numbers()), 7) == {}
