"""What a writing model is asked, on worlds and models whose answers are known."""
import math
import random
from types import SimpleNamespace

import pytest
import torch

from common.data.shapes.world import Shapes
from common.evaluation.questions import (captions, clips, describes, draw_tasks, episodes, evaluate,
                                         exact, latest_image, retrieved_shots, text_perplexity,
                                         visual_questions)
from tests.helpers import drawing, toy_lm

WORLD = Shapes(image_size=16)


class Numbers:
    """Images 0 .. 12; caption w is true of the images w and w + 1, and describes one when long."""
    name, zero_shot, tasks, classes = "numbers", "single", (), ["0", "1", "2"]
    sizes = {"test": 13, "single": 5}

    def size(self, split):
        return self.sizes[split]

    def record(self, split, index):
        number = {"test": index, "single": index % 3}[split]
        return {"images": drawing((20 * number, 0, 0)), "texts": [str(number)], "source": number}

    def is_true(self, text, source):
        return int(text) in (source, source - 1)


class Strict(Numbers):
    """Its captions must also be long enough to say something."""

    def describes(self, text, source):
        return len(text) > 1 and self.is_true(text, source)


def number_of(frames):
    return frames[0].getpixel((0, 0))[0] // 20


class Reads:
    """A writer of the number of each image, in two digits, or of `said`."""

    def __init__(self, said=None):
        self.said, self.seen = said, []

    def generate(self, records, **options):
        numbers = [number_of(record["images"]) for record in records]
        self.seen.append(numbers)
        return [self.said or f"{number:02d}" for number in numbers]


class TestCaptions:
    def test_they_are_right_when_they_describe_their_image(self):
        assert captions(Reads(), Strict(), 500) == {
            "caption_accuracy": 1, "caption_accuracy_single": 1,
            # Single images are 0 1 2 0 1; in their place are 0 1 0 1 2, and only the first two
            # captions are true.
            "caption_accuracy_single_wrong_image": 2 / 5, "caption_accuracy_single_chance": 1 / 3}
        assert captions(Reads("4"), Strict(), 500)["caption_accuracy"] == 0

    def test_where_a_world_does_not_say_what_describes_truth_counts(self):
        assert captions(Reads("4"), Numbers(), 500)["caption_accuracy"] == pytest.approx(2 / 13)
        assert describes(Numbers(), "4", 4) and not describes(Strict(), "4", 4)

    def test_images_are_those_of_both_splits_and_of_other_records(self):
        writer = Reads()
        captions(writer, Strict(), 500)
        assert writer.seen == [list(range(13)), [0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
        captions(writer, Strict(), 3)
        assert writer.seen[3:] == [[0, 1, 2], [0, 1, 2], [1, 2, 0]]

    @pytest.mark.parametrize("split", [None, "test"])
    def test_a_world_without_single_objects_has_one_figure(self, split):
        world = Strict()
        world.zero_shot = split
        assert set(captions(Reads(), world, 500)) == {"caption_accuracy"}


@pytest.mark.parametrize("place, figures", [
    (0, {"two_images_first": 1, "two_images_latest": 0}),
    (-1, {"two_images_first": 0, "two_images_latest": 1})])
def test_of_two_images_it_is_told_whose_caption_was_written(place, figures):
    class Cards(Strict):
        def record(self, split, index):
            return {"images": drawing((20 * index, 0, 0)), "texts": [str(index)], "source": index}

        def describes(self, text, source):
            return int(text) == source

    class Writes:
        def generate(self, records):
            turns = [record["turns"] for record in records]
            assert all(first["answer"] == str(number_of(first["images"][0])) and first["caption"]
                       and last["caption"] for first, last in turns)
            return [str(number_of(own[place]["images"][0])) for own in turns]
    assert latest_image(Writes(), Cards(), 13) == figures


def key(record):
    """What a picture or clip looks like: that of the last turn with images."""
    frames = [own for turn in record["turns"] for own in turn["images"]][-1]
    return tuple(frame.tobytes() for frame in frames)


class Knows:
    """A writer that has learned the answer to each picture or clip by heart; "?" to any other."""

    def __init__(self, records):
        self.answers = {key(record): record["turns"][-1]["answer"] for record in records}

    def generate(self, records, max_new_tokens):
        return [self.answers.get(key(record), "?") for record in records]


def cut(documents):
    """Documents up to the turn of their question."""
    return [r | {"turns": r["turns"][:r["asked"] + 1]} for r in documents]


class TestDrawTasks:
    def test_records_are_always_the_same_and_different_from_one_another(self):
        asked = [[str([(t["prompt"], t["answer"]) for t in record["turns"]])
                  for record in draw_tasks(WORLD, "question", 13)] for _ in range(2)]
        assert asked[0] == asked[1] and len(set(asked[0])) > 9

    def test_other_wordings_are_of_the_same_scenes_with_the_same_answers(self):
        for known, other in zip(draw_tasks(WORLD, "question", 13, "train", asks=1),
                                draw_tasks(WORLD, "question", 13), strict=True):
            (a,), (b,) = known["turns"], other["turns"]
            assert known["source"] == other["source"] and a["answer"] == b["answer"]
            assert a["prompt"] != b["prompt"]


class TestVisualQuestions:
    def test_with_the_right_image_and_with_that_of_another_record(self):
        records = draw_tasks(WORLD, "question", 13)
        figures = visual_questions(Knows(records), WORLD, 13)
        answers = [record["turns"][0]["answer"] for record in records]
        blind = sum(a == b for a, b in zip(answers, answers[1:] + answers[:1])) / 13
        assert figures.pop("vqa_accuracy") == 1 and figures.pop("document_accuracy") == 0
        assert figures.pop("vqa_accuracy_blind") == pytest.approx(blind) != 1
        assert figures.pop("vqa_accuracy_trained_wordings") == 1
        assert figures == {f"vqa_accuracy/{record['kind']}": 1 for record in records}

    def test_each_kind_counts_its_own(self):
        records = draw_tasks(WORLD, "question", 60)
        colour = [record for record in records if record["kind"] == "colour"]
        figures = visual_questions(Knows(colour), WORLD, 60)
        assert {name: value for name, value in figures.items() if "/" in name} == {
            f"vqa_accuracy/{record['kind']}": record["kind"] == "colour" for record in records}
        assert figures["vqa_accuracy"] == len(colour) / 60

    def test_of_a_document_the_prompt_ends_with_the_question(self):
        documents = draw_tasks(WORLD, "document", 13, images=3)
        figures = visual_questions(Knows(cut(documents)), WORLD, 13)
        assert figures["document_accuracy"] == 1 and figures["vqa_accuracy"] == 0
        assert {len(record["turns"]) for record in cut(documents)} == {1, 2, 3}
        assert all(record["turns"][-1]["prompt"] for record in cut(documents))

    def test_questions_are_asked_in_both_wordings(self):
        prompts = []

        class Notes:
            def generate(self, records, max_new_tokens):
                prompts.append([record["turns"][-1]["prompt"] for record in records])
                return [""] * len(records)
        visual_questions(Notes(), WORLD, 13)
        for split in ("test", "train"):
            records = draw_tasks(WORLD, "question", 13, split, asks=1)
            assert [record["turns"][0]["prompt"] for record in records] in prompts


@pytest.mark.parametrize("frames", [8, 16])
def test_clips_are_shown_in_order_longer_and_shuffled(frames):
    figures = clips(Knows(draw_tasks(WORLD, "clip", 13, frames=frames)), WORLD, 13)
    assert figures.pop("video_accuracy_shuffled") < 0.5
    assert figures == {"video_accuracy": frames == 8, "video_accuracy_16_frames": frames == 16,
                       "video_accuracy_chance": 0.5}


def test_shuffled_clips_have_the_same_frames_in_another_order():
    shown = []

    class Notes:
        def generate(self, records, max_new_tokens):
            shown.append([key(record) for record in records])
            return [""] * len(records)
    clips(Notes(), WORLD, 13)
    plain, _, shuffled = shown
    assert [sorted(own) for own in plain] == [sorted(own) for own in shuffled]
    assert sum(a != b for a, b in zip(plain, shuffled)) > 9


def test_episodes_are_solved_by_their_shots_unless_these_are_shuffled():
    class Copies:
        """Chooses the label of the first shot that shows the same as the query."""

        def choose(self, records, candidates):
            chosen = []
            for record, own in zip(records, candidates):
                *shots, _ = record["turns"]
                labels = [shot["answer"] for shot in shots]
                what = [(s.items[0].colour, s.items[0].shape) for s in record["source"]]
                assert len(what) == len(labels) + 1
                chosen.append(labels[what.index(what[-1])] if labels else own[0])
            return chosen
    figures = episodes(Copies(), WORLD, 40)
    assert [figures[f"shots_{k}"] for k in (2, 4, 8)] == [1, 1, 1]
    assert 0.25 < figures["shots_0"] < 0.75 and 0.2 < figures["shots_8_shuffled"] < 0.8
    assert figures["shots_chance"] == 0.5 and len(figures) == 6


def test_retrieved_shots_stand_before_the_query_as_they_were_retrieved():
    support = draw_tasks(WORLD, "question", 30, "train", asks=1)       # 2 * 13 + 4
    queries = draw_tasks(WORLD, "question", 13)
    told = []

    def select(images, given, count):
        assert images == [query["turns"][0]["images"][0] for query in queries]
        assert [r["turns"][0]["answer"] for r in given] == [
            r["turns"][0]["answer"] for r in support]
        return [[given[i], *given[:count - 1]] for i in range(13)]

    class Notes:
        """Answers as the first shot does."""

        def generate(self, records, max_new_tokens):
            told.append([[turn["prompt"] for turn in record["turns"]] for record in records])
            return [record["turns"][0]["answer"] for record in records]
    figures = retrieved_shots(Notes(), WORLD, 13, select)
    assert figures == retrieved_shots(Notes(), WORLD, 13, select)
    found, retrieved, again, _ = told
    assert again == found                    # random shots are the same in every evaluation
    assert {len(turns) for turns in found + retrieved} == {5}
    prompts = [r["turns"][0]["prompt"] for r in support]
    asked = [r["turns"][0]["prompt"] for r in queries]
    assert retrieved == [[prompts[i], *prompts[:3], asked[i]] for i in range(13)]
    assert [turns[-1] for turns in found] == asked and len({str(t[:-1]) for t in found}) > 9
    want = sum(support[i]["turns"][0]["answer"] == queries[i]["turns"][0]["answer"]
               for i in range(13)) / 13
    assert figures["vqa_accuracy_4_retrieved_shots"] == want
    assert set(figures) == {"vqa_accuracy_4_retrieved_shots", "vqa_accuracy_4_random_shots"}


def test_exact_compares_with_the_last_answer():
    records = [{"turns": [{"answer": "a"}, {"answer": "b"}]}, {"turns": [{"answer": "b"}]}]
    assert exact(["b", "b"], records) == 1 and exact(["a", "b"], records) == 0.5


class Worded:
    """A model whose whole adds `bias` to its language model's logits; it has no image."""

    def __init__(self, bias):
        self.lm, self.vision, self.bias = toy_lm(), SimpleNamespace(width=5), bias

    def logits(self, ids, visual):
        assert visual.shape == (len(ids), 1, 1, 5) and not visual.any()
        return self.lm(ids) + self.bias


@pytest.mark.parametrize("bias", [0.0, torch.linspace(0, 3, 13)])
def test_text_perplexity_is_of_the_whole_model_and_of_its_language_model(bias):
    class Data:
        world = SimpleNamespace(text=lambda rng: {"texts": [str(rng.randint(3, 9))]})

        def ids(self, texts):
            numbers = [random.Random(f"text/{i}").randint(3, 9) for i in range(7)]
            assert texts == [str(number) for number in numbers]
            return torch.tensor([[1, n, 2] if n < 8 else [1, 2, 0] for n in numbers])
    data, model = Data(), Worded(bias)
    with torch.no_grad():
        found = text_perplexity(model, data, 7)
        ids = data.ids([str(random.Random(f"text/{i}").randint(3, 9)) for i in range(7)])
        for name, added in (("perplexity_lm", 0.0), ("perplexity", bias)):
            logs = (model.lm(ids) + added).log_softmax(-1)
            own = [-logs[b, t - 1, ids[b, t]] for b, t in (ids != 0).nonzero().tolist() if t]
            assert found[name] == pytest.approx(math.exp(sum(own) / len(own)), rel=1e-4)
    assert text_perplexity(model, SimpleNamespace(world=Numbers()), 7) == {}


class TestEvaluate:
    class Mute(Reads):
        def generate(self, records, **options):
            return ["?"] * len(records)

        def choose(self, records, candidates):
            return [own[0] for own in candidates]

    def test_a_world_of_captions_alone_is_measured_by_them(self):
        world = Strict()
        world.zero_shot = "test"
        assert evaluate(Reads(), SimpleNamespace(world=world), 4) == {"caption_accuracy": 1}

    def test_a_world_with_tasks_has_all_figures(self):
        class Few(Shapes):
            splits = Shapes.splits | {"test": 3, "single": 8}
        data = SimpleNamespace(world=Few(image_size=16))
        figures = evaluate(self.Mute(), data, 8)
        assert {"caption_accuracy", "two_images_latest", "vqa_accuracy", "document_accuracy",
                "video_accuracy", "shots_8"} <= set(figures)
        assert not any("retrieved" in name for name in figures)
        sizes = []

        def select(images, support, count):
            sizes.append((len(images), len(support)))
            return [support[:count]] * len(images)
        more = evaluate(self.Mute(), data, 8, select)
        assert set(more) - set(figures) == {"vqa_accuracy_4_random_shots",
                                            "vqa_accuracy_4_retrieved_shots"}
        assert sizes == [(2, 8)]
