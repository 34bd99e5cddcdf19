"""Interleaved samples and texts to read of the shapes world."""
import math
import random
import re
from collections import Counter

import pytest

from common.prompts import OUTPUT
from common.data.shapes import interleaved as readings
from common.data.shapes.interleaved import (ASKED, ENDS, FORMS, KINDS, SHOTS, interleaved,
                                            labels_in_words, reading)
from common.data.shapes.texts import LISTED, READ, labelled
from common.data.shapes.scene import COLOURS, HELD_OUT, SHAPES
from common.data.shapes.words import is_true, phrase
from common.data.shapes.world import Shapes
from common.data.shapes.interleaved import LABELS
from common.data.shapes.questions import FORMS as QUESTIONS
from common.data.shapes.questions import candidates
from common.data.shapes.words import names_held_out

QUESTION = re.compile(r"question: (.+\?) answer:")


def drawn(kind, /, count=60, split="train", side=None, **more):
    return [interleaved(kind, random.Random(i), split, side, **more) for i in range(count)]


def true_answers(scene, kind, question, split):
    """What the question, in one of the split's wordings, has as answers in the scene."""
    return {answer for form, answer, slots in candidates(scene, kind)
            for words in QUESTIONS[kind][form][1 if split == "train" else 2]
            if words.format(**slots) == question}


class TestSamples:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_has_a_clip_or_picture_for_each_text(self, kind):
        for sample in drawn(kind, 20, side=23):
            assert len(sample["images"]) == sum(sample.get("shown", [True] * len(sample["texts"])))
            frames = {len(clip) for clip in sample["images"]}
            assert frames == ({8} if kind == "clip" else {1})
            assert all(p.size == (23, 23) for clip in sample["images"] for p in clip)
            assert len(sample["source"]) == sum(map(len, sample["images"]))
            texts = sample["texts"]
            if kind == "names":
                assert re.fullmatch(r" \w+", texts[0][0]) and texts[0][1] == ""
                texts = texts[1:]
            if kind == "glossary":
                assert not any(learned for (_, learned), seen in zip(texts, sample["shown"])
                               if not seen)
                texts = [text for text, seen in zip(texts, sample["shown"]) if seen]
            for told, learned in texts:
                if kind in ("names", "episode", "glossary"):
                    assert told == ""
                else:
                    assert told == OUTPUT or QUESTION.fullmatch(told)
                assert re.fullmatch(r" \S.*\S", learned)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_answer_is_what_the_asked_text_says(self, kind):
        for sample in drawn(kind):
            assert sample["texts"][sample.get("at", -1)][1] == f" {sample['answer']}"

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_sample_is_a_function_of_its_rng_and_pictures_draw_nothing_from_it(self, kind):
        for i in range(9):
            one, other, bare = (interleaved(kind, random.Random(i), side=side)
                                for side in (16, 16, None))
            assert one == other and one["texts"] == bare["texts"]
            assert one["source"] == bare["source"]
        assert len({str(sample["texts"]) for sample in drawn(kind)}) > 20

    @pytest.mark.parametrize("kind", KINDS)
    def test_training_shows_and_names_no_held_out_pair(self, kind):
        for sample in drawn(kind, 200):
            assert not any(names_held_out(told + learned) for told, learned in sample["texts"])
            assert not {(item.colour, item.shape) for scene in sample["source"]
                        for item in scene.items} & set(HELD_OUT)

    def test_a_caption_is_true_of_its_scene(self):
        for sample in drawn("caption"):
            assert is_true(sample["answer"], sample["source"][0])

    def test_an_album_is_pictures_with_a_true_caption_each(self):
        for sample in drawn("album"):
            for (told, learned), scene in zip(sample["texts"], sample["source"], strict=True):
                assert told == OUTPUT and is_true(learned[1:], scene)
        assert {len(sample["texts"]) for sample in drawn("album")} == {2, 3}
        assert {len(sample["texts"]) for sample in drawn("album", 5, images=4)} == {4}

    def test_names_are_all_colours_or_all_shapes_as_the_first_one_tells(self):
        sorts, both = set(), 0
        for sample in drawn("names"):
            said = [(told + learned).strip() for told, learned in sample["texts"]]
            items = [scene.items for scene in sample["source"]]
            assert all(len(own) == 1 for own in items)
            by = "colour" if said[0] in COLOURS else "shape"
            assert said == [getattr(own[0], by) for own in items]
            both += min(len({getattr(own[0], name) for own in items})
                        for name in ("colour", "shape")) > 1
            sorts.add((by, len(said)))
        assert sorts == {(by, n) for by in ("colour", "shape") for n in (4, 5, 6, 7, 8)} and both > 40
        assert {len(s["texts"]) for s in drawn("names", 5, images=9)} == {9}
        assert all(s["answer"] in SHAPES for s in drawn("names", 9, by="shape"))

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_question_is_worded_as_its_split_words_it_and_has_one_answer(self, split):
        kinds, sizes = set(), set()
        for sample in drawn("question", 120, split):
            (scene,), kind = sample["source"], sample["kind"]
            fits = [{k for k in ASKED if true_answers(
                scene, k, QUESTION.fullmatch(told).group(1), split) == {learned[1:]}}
                for told, learned in sample["texts"]]
            assert all(len(own) == 1 for own in fits) and fits[-1] == {kind}
            assert len(set.union(*fits)) == len(fits)             # no kind twice
            assert sample["shown"] == [True] + [False] * (len(fits) - 1)
            kinds.add(kind), sizes.add(len(fits))
        assert kinds == set(ASKED) and sizes == ({1, 2, 3} if split == "train" else {1})

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_pages_question_is_of_its_own_picture_alone(self, split):
        places = set()
        for sample in drawn("document", 80, split):
            at = sample["at"]
            places.add((at, len(sample["texts"])))
            for number, ((told, learned), scene) in enumerate(
                    zip(sample["texts"], sample["source"], strict=True)):
                if number != at:
                    assert told == OUTPUT and is_true(learned[1:], scene)
                asks = QUESTION.fullmatch(sample["texts"][at][0]).group(1)
                found = true_answers(scene, sample["kind"], asks, split)
                assert found == {sample["answer"]} if number == at \
                    else sample["answer"] not in found
        assert {count for _, count in places} == {2, 3, 4} and (0, 4) in places and (3, 4) in places

    def test_a_page_has_so_many_pictures(self):
        assert {len(s["texts"]) for s in drawn("document", 20, images=3)} == {3}
        assert {s["kind"] for s in drawn("document", 5, kind="count")} == {"count"}

    def test_the_shots_of_an_episode_tell_its_labels(self):
        for sample in drawn("episode"):
            said = [learned[1:] for _, learned in sample["texts"]]
            shown = [(s.items[0].colour, s.items[0].shape) for s in sample["source"]]
            assert all(told == "" for told, _ in sample["texts"])
            assert len(set(zip(shown, said))) == len(set(said)) == len(set(shown)) == 2
            assert set(said) == set(sample["candidates"]) <= set(LABELS)
            assert len(said) - 1 in SHOTS
        assert {len(s["texts"]) - 1 for s in drawn("episode")} == set(SHOTS)

    def test_an_episode_has_so_many_shots_and_they_can_be_shuffled(self):
        assert {len(s["texts"]) for s in drawn("episode", 5, shots=4)} == {5}
        assert {len(s["texts"]) for s in drawn("episode", 5, shots=0)} == {1}
        plain, mixed = drawn("episode", 9, shots=8), drawn("episode", 9, shots=8, shuffled=True)
        assert all(a["source"] == b["source"] for a, b in zip(plain, mixed))
        assert sum(a["texts"] != b["texts"] for a, b in zip(plain, mixed)) > 5

    def test_a_glossary_is_an_episode_in_words_but_for_its_last_picture(self):
        for i in range(40):
            sample = interleaved("glossary", random.Random(i), side=9, shots=6, classes=2)
            whole = interleaved("episode", random.Random(i), side=9, shots=6)
            *told, last = zip(sample["texts"], sample["shown"], strict=True)
            assert last == (whole["texts"][-1], True)
            assert told == [((f"{said}{label}", ""), False)
                            for said, label in labels_in_words(whole, "bare")[:-1]]
            assert sample["images"] == whole["images"][-1:]
            assert sample["source"] == whole["source"][-1:]
            assert sample["candidates"] == whole["candidates"]

    def test_a_glossary_tells_two_to_four_classes_once_each(self):
        found = drawn("glossary", 60)
        assert {len(s["texts"]) - 1 for s in found} == {2, 3, 4}
        for sample in found:
            *told, (_, answer) = sample["texts"]
            labels = [words.split()[-1] for words, _ in told]
            assert sorted(labels) == sorted(sample["candidates"]) and answer[1:] in labels
            assert len({words.split()[0] for words, _ in told}) == len(told)

    def test_a_clip_is_one_text_with_so_many_frames(self):
        for sample in drawn("clip", 9, side=16, frames=16, kind="direction"):
            assert [len(clip) for clip in sample["images"]] == [16] and len(sample["texts"]) == 1
            assert sample["kind"] == "direction"
            before, after = (sample["source"][i].items[0] for i in (0, -1))
            dx, dy = after.x - before.x, after.y - before.y
            way = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else \
                ("down" if dy > 0 else "up")
            assert sample["answer"] == way


class TestReading:
    def test_it_is_a_page_with_every_picture_in_words(self):
        for kind in set(KINDS) & set(READ):
            for i in range(20):
                sample = interleaved(kind, random.Random(i), side=None)
                told = readings.in_words(kind, sample, random.Random(i))
                assert len(told) == len(sample["texts"])
                if kind == "clip":
                    assert told == [f"the answer is {sample['answer']}. "]
                    continue
                assert not any(told[len(sample["source"]):])     # a picture is told once
                for words, scene in zip(told, sample["source"]):
                    assert words.endswith(". ") and is_true(words[:-2], scene)
                    assert all(phrase(item) in words for item in scene.items) \
                        or len({phrase(item) for item in scene.items}) < len(scene.items)

    def test_a_name_follows_its_prompt(self):
        sample = interleaved("names", random.Random(1), by="shape", images=3)
        words = readings.in_words("names", sample, random.Random(2))
        shapes = [scene.items[0].shape for scene in sample["source"]]
        assert ["".join(part) for part in readings.paged("names", sample, random.Random(2))] == [
            f"{said}{OUTPUT} {shape}" for said, shape in zip(words, shapes)]

    def test_what_is_learned_follows_what_is_told_in_every_text(self):
        texts = [reading(random.Random(i)) for i in range(400)]
        page = r"(([^.]+\.? )?(output:|question: [^?]+\? answer:) [^.?:]+[.,;!?]?( |$))+"
        paged = [text for text in texts if re.fullmatch(page, text)]
        asked = [text for text in texts if OUTPUT in text or "answer:" in text]
        assert len(paged) == len(asked) and 0.5 < len(paged) / 400 < 0.75
        for text in texts:
            assert text == text.strip() and "  " not in text and ".." not in text

    def test_every_kind_is_read_as_often_as_its_weight_says(self):
        assert set(READ) == {"list", *KINDS} - {"album", "glossary"} and sum(READ.values()) == 100
        lists, ends = [], set()
        for i in range(1000):
            words = re.findall(r"\w+", text := reading(random.Random(i)))
            size, rest = divmod(len(words), 3)
            if not rest and words == 3 * words[:size] and any(set(words) <= set(n) for n in LISTED):
                lists.append(size)
                ends.add(text[-1])
                assert len(set(words)) == size
        assert abs(len(lists) / 1000 - 0.25) < 0.05 and set(lists) == {3, 4, 5, 6, 7, 8}
        assert {*filter(None, ENDS)} < ends           # and letters, of those without an end

    def test_an_episodes_labels_follow_what_tells_its_class(self):
        for form in FORMS:
            for i in range(9):
                episode = interleaved("episode", random.Random(i), side=None, shots=4)
                by = "colour" if episode["source"][0].items[0].shape == \
                    episode["source"][-1].items[0].shape and len(
                        {scene.items[0].shape for scene in episode["source"]}) == 1 else "shape"
                for (said, label), scene, (_, own) in zip(
                        labels_in_words(episode, form), episode["source"], episode["texts"],
                        strict=True):
                    item = scene.items[0]
                    name = getattr(item, by)
                    assert label == own and said == {
                        "phrase": f"{phrase(item)}. output:", "word": f"{name} output:",
                        "bare": name}[form]

    def test_a_label_is_certain_once_told_and_the_second_class_has_any_other(self):
        for form in FORMS:
            parts, nats = labelled(random.Random(3), form)
            assert nats == pytest.approx(math.log(11)) and len(LABELS) == 12
            assert len(parts) == 18 and not any(learn for _, learn in parts[::2])
            assert [learn for _, learn in parts[1::2]] == [False] + [True] * 8
            labels = [text for text, _ in parts[1::2]]
            assert len(set(labels)) == 2
            assert all(re.fullmatch(r" \w+\.", text) and text[1:-1] in LABELS for text in labels)

    def test_the_second_classes_label_is_drawn_evenly_from_the_others(self):
        drawn = Counter()
        for i in range(2200):
            labels = list(dict.fromkeys(text for text, learn in labelled(random.Random(i))[0][1::2]))
            drawn[(LABELS.index(labels[1][1:-1]) - LABELS.index(labels[0][1:-1])) % 12] += 1
        assert set(drawn) == set(range(1, 12))
        assert sum((n - 200) ** 2 / 200 for n in drawn.values()) < 29.6      # chi-square, p = 0.001

    def test_it_is_a_function_of_the_rng_and_names_no_held_out_pair(self):
        texts = [reading(random.Random(i)) for i in range(200)]
        assert texts == [reading(random.Random(i)) for i in range(200)]
        assert len(set(texts)) > 180
        assert not any(map(names_held_out, texts))

    def test_the_labels_of_an_episode_stay_the_same_in_it(self):
        for i in range(400):
            text = reading(random.Random(i))
            said = re.findall(r"(a[n]? \w+ \w+)\. output: (\w+)\.", text)
            if len(said) > 2 and said[0][1] in LABELS:
                assert len(set(said)) == len({what for what, _ in said})
                break
        else:
            raise AssertionError("no episode among 400 texts")


class TestShapes:
    def test_samples_have_the_worlds_dials_and_size(self):
        world = Shapes(objects=4, noise=0.25, clutter=3, image_size=20)
        counts = set()
        for kind in ("caption", "question", "document"):
            for i in range(12):
                sample = world.interleaved(kind, random.Random(i))
                counts |= {len(scene.items) for scene in sample["source"]}
                assert {(s.noise, len(s.clutter)) for s in sample["source"]} == {(0.25, 3)}
                assert sample["images"][0][0].size == (20, 20)
        assert max(counts) == 4 and min(counts) == 1
        for kind in ("episode", "clip"):
            assert world.interleaved(kind, random.Random(0))["images"][0][0].size == (20, 20)

    def test_a_dial_that_is_given_goes_before_the_worlds(self):
        sample = Shapes(objects=4).interleaved("caption", random.Random(0), "test", objects=(3, 3))
        assert len(sample["source"][0].items) == 3

    def test_the_kind_of_a_clip_or_page_can_be_given_too(self):
        sample = Shapes().interleaved("clip", random.Random(0), "test", kind="growth", frames=4)
        assert sample["kind"] == "growth" and len(sample["images"][0]) == 4

    def test_the_split_and_the_reading_are_those_of_the_readings(self):
        world = Shapes()
        for i in range(9):
            assert world.reading(random.Random(i)) == reading(random.Random(i))
            test = world.interleaved("question", random.Random(i), "test")
            want = interleaved("question", random.Random(i), "test", 32, objects=(1, 2))
            assert test["texts"] == want["texts"]

    def test_a_caption_describes_when_it_is_true_and_names_an_object(self):
        world = Shapes()
        record = world.record("single", 0)
        name = phrase(record["source"].items[0])
        assert world.describes(f"there is {name}", record["source"])
        assert world.is_true("one object", record["source"])
        assert not world.describes("one object", record["source"])
        other = next(world.record("single", i) for i in range(9)
                     if phrase(world.record("single", i)["source"].items[0]) != name)
        assert not world.describes(f"there is {name}", other["source"])

    def test_the_vocabulary_has_read_what_there_is_to_read(self):
        corpus = " ".join(Shapes().corpus())
        for word in (*LABELS, "output:", "question:", "answer:", "grew", "shrank"):
            assert word in corpus
