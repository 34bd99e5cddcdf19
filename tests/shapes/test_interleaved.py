"""Pages, questions, episodes, glossaries and clips of the shapes world."""
import math
import random
import re
from collections import Counter, defaultdict

import pytest

from common.data.shapes.interleaved import (CLIPS, DOCUMENT_KINDS, LABELS, QUESTION_KINDS, TASKS,
                                            clip, document, episode, question)
from common.data.shapes.scene import COLOURS, HELD_OUT, SHAPES, SIZES
from common.data.shapes.words import is_true
from tests.shapes.judge import (NUMBERS, ask_and_answer, blind, held_out, one, pairs_in, resolve,
                                shows)


@pytest.fixture(scope="module")
def drawn():
    """{kind: 60 records}, with pictures of 16 pixels a side."""
    return {kind: [task(random.Random(i), side=16) for i in range(60)]
            for kind, task in TASKS.items()}


def answers_of(record):
    return [turn["answer"] for turn in record["turns"]]


def words_of(record):
    return record.get("texts") or [(t["prompt"], t["answer"]) for t in record["turns"]]


def scenes_of(record):
    return record["source"] if isinstance(record["source"], tuple) else (record["source"],)


def classes_of(record):
    return [getattr(scene.items[0], record["by"]) for scene in record["source"]]


class TestTasks:
    def test_they_are_those_that_the_papers_need(self):
        assert list(TASKS) == ["caption", "album", "names", "question", "document", "episode",
                               "glossary", "clip"]

    @pytest.mark.parametrize("kind", TASKS)
    def test_a_record_shows_its_scenes_and_a_model_has_to_word_it(self, drawn, kind):
        for record in drawn[kind]:
            assert shows(record, scenes_of(record), 16)
            for number, turn in enumerate(record.get("turns", ()), 1):
                first, last = number == 1, number == len(record["turns"])
                on_it = {"question": first, "glossary": last}.get(kind, True)
                assert [len(frames) for frames in turn["images"]] == [
                    8 if kind == "clip" else 1] * on_it
                asked = kind in ("question", "clip") or number - 1 == record.get("asked")
                assert turn["prompt"].endswith("?") if asked else turn["prompt"] == ""
                learned = not {"names": first, "glossary": not last}.get(kind, False)
                assert turn["answer"] and turn.get("learn", True) is learned
                assert set(turn) <= {"images", "prompt", "answer", "learn"}
            assert not re.search("output|question|answer|[<:]", str(words_of(record)))

    @pytest.mark.parametrize("kind", TASKS)
    def test_a_record_is_a_function_of_its_rng_and_its_pictures_draw_nothing(self, drawn, kind):
        for i, first in enumerate(drawn[kind][:9]):
            again, bare = (TASKS[kind](random.Random(i), side=side) for side in (16, None))
            assert first == again and words_of(first) == words_of(bare)
            assert first["source"] == bare["source"] and shows(bare, (), 16)
        assert len({str(words_of(record)) for record in drawn[kind]}) > 20

    @pytest.mark.parametrize("kind", TASKS)
    def test_training_shows_and_names_no_held_out_pair(self, kind):
        for i in range(200):
            record = TASKS[kind](random.Random(i), side=None)
            assert not held_out(str(words_of(record))) and not pairs_in(*scenes_of(record)) & HELD_OUT


class TestPages:
    def test_a_caption_and_each_text_of_an_album_are_true(self, drawn):
        for record in drawn["caption"] + drawn["album"]:
            texts = record.get("texts") or answers_of(record)
            assert all(map(is_true, texts, scenes_of(record)))
        assert {len(record["turns"]) for record in drawn["album"]} == {2, 3}

    def test_names_are_all_colours_or_all_shapes_as_the_first_one_tells(self, drawn):
        found, open_ended = set(), 0
        for record in drawn["names"]:
            by = "colour" if answers_of(record)[0] in COLOURS else "shape"
            assert [[getattr(item, by)] for scene in record["source"] for item in scene.items] == [
                [name] for name in answers_of(record)]
            open_ended += min(map(len, map(set, zip(*pairs_in(*record["source"]))))) > 1
            found.add((by, len(record["turns"])))
        assert found == {(by, n) for by in ("colour", "shape") for n in range(4, 9)}
        assert open_ended > 40


def kind_of(prompt, answer):
    """The kind of a question, told by its answer or its words."""
    for kind, answers in (("colour", COLOURS), ("shape", SHAPES), ("count", NUMBERS)):
        if answer in answers:
            return kind
    return "relation" if re.search("left|right|above|below", prompt) else "existence"


class TestQuestion:
    def test_answers_are_right_and_kinds_and_wordings_differ(self):
        said = {"train": set(), "test": set()}
        for split, counts in (("train", {1, 2, 3}), ("test", {1})):
            records = [question(random.Random(i), split, None, objects=2) for i in range(100)]
            for record in records:
                pairs = words_of(record)
                assert all(resolve(prompt, *record["source"]) == answer for prompt, answer in pairs)
                kinds = [kind_of(*pair) for pair in pairs]
                assert len(set(kinds)) == len(kinds) and kinds[-1] == record["kind"]
                said[split].update(prompt for prompt, _ in pairs)
            assert {record["kind"] for record in records} == set(QUESTION_KINDS)
            assert {len(record["turns"]) for record in records} == counts
        assert not said["train"] & said["test"]
        assert {len(question(random.Random(i), asks=1)["turns"]) for i in range(9)} == {1}


class TestDocument:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_its_own_picture_alone_decides_the_question(self, split):
        kinds, places, existence = Counter(), Counter(), []
        for i in range(500):
            record = document(random.Random(i), split, None, images=3)
            asked, turns = record["asked"], record["turns"]
            prompt, answer = words_of(record)[asked]
            for number, (turn, scene) in enumerate(zip(turns, record["source"], strict=True)):
                # `resolve` fails where the other scene has no or no single answer.
                assert (resolve(prompt, scene) == answer) == (number == asked)
                if number != asked:
                    assert is_true(turn["answer"], scene)
                    assert not set(turn["answer"].split()) & {*COLOURS, *SHAPES}
            kinds[record["kind"]] += 1
            places[asked] += 1
            if record["kind"] == "existence":
                captions = [turn["answer"] for turn in turns if not turn["prompt"]]
                existence.append((" ".join([prompt, *captions]), answer))
            assert kind_of(prompt, answer) == record["kind"] and not held_out(prompt)
        assert set(kinds) == set(DOCUMENT_KINDS) and min(kinds.values()) > 80
        assert set(places) == {0, 1, 2} and min(places.values()) > 120
        assert blind(existence) < 0.7            # no text says what the other pictures show

    def test_it_has_two_to_four_pictures_and_the_wordings_of_its_split(self, drawn):
        assert {len(record["turns"]) for record in drawn["document"]} == {2, 3, 4}
        said = [{pair[0] for i in range(60) for pair in words_of(
            document(random.Random(i), split, None)) if pair[0]} for split in ("train", "test")]
        assert not said[0] & said[1]


class TestEpisode:
    @pytest.mark.parametrize("shots", (0, 2, 4, 8))
    def test_the_shots_alone_tell_the_labels(self, shots):
        meanings, places = defaultdict(set), Counter()
        for i in range(200):
            record = episode(random.Random(i), side=None, shots=shots)
            labels, classes, candidates = answers_of(record), classes_of(record), record["candidates"]
            assert len(labels) == sum(len(scene.items) for scene in record["source"]) == shots + 1
            constant = "shape" if record["by"] == "colour" else "colour"
            assert len(set(classes_of(record | {"by": constant}))) == 1
            assert len(set(candidates)) == 2 and labels[-1] in candidates
            told = list(zip(classes, labels))
            if shots:
                assert set(Counter(told[:-1]).values()) == {shots // 2}       # as many of each class
                assert len(set(told)) == len(set(classes)) == 2 and set(labels) == set(candidates)
            for name, label in told:
                meanings[label].add(name)
            places[candidates.index(labels[-1])] += 1
        assert abs(places[0] - 100) < 30 and set(meanings) == set(LABELS)
        assert not shots or min(map(len, meanings.values())) > 5      # a label means nothing by itself

    @pytest.mark.parametrize("shots", (2, 4, 8))
    def test_shuffled_shots_say_nothing(self, shots):
        """Someone who believes the shots is always right, and at chance with shuffled labels."""
        right = [0, 0]
        for seed in range(400):
            records = [episode(random.Random(seed), side=None, shots=shots, shuffled=shuffled)
                       for shuffled in (False, True)]
            assert records[0]["source"] == records[1]["source"]
            assert answers_of(records[0])[-1] == answers_of(records[1])[-1]        # the truth stays
            for n, record in enumerate(records):
                *classes, asked = classes_of(record)
                *labels, answer = answers_of(record)
                votes = Counter(label for name, label in zip(classes, labels) if name == asked)
                liked = [label for label in votes if votes[label] == max(votes.values())]
                right[n] += (answer in liked) / len(liked)
        assert right[0] == 400 and abs(right[1] - 200) < 40

    def test_it_has_two_to_eight_shots_and_as_many_classes_as_asked_for(self, drawn):
        assert {len(record["turns"]) - 1 for record in drawn["episode"]} == {2, 4, 6, 8}
        record = episode(random.Random(0), side=None, shots=6, classes=3)
        assert len(set(classes_of(record))) == len(record["candidates"]) == 3


class TestGlossary:
    def test_it_tells_two_to_four_classes_once_each_before_the_picture(self, drawn):
        for record in drawn["glossary"]:
            *words, answer = answers_of(record)
            names, labels = zip(*map(str.split, words))
            assert sorted(labels) == sorted(record["candidates"]) and answer in labels
            assert len(set(names)) == len(names)
            (shown,), = pairs_in(*record["source"]),
            assert names[labels.index(answer)] in shown
        assert {len(record["turns"]) - 1 for record in drawn["glossary"]} == {2, 3, 4}


def watch(prompt, frames):
    """The answer to a question on a clip, from the objects of its frames; None if there is none."""
    if named := re.search(r"did the picture show first, (\w+) or (\w+)\?", prompt):
        first = [[any(i.colour == colour for i in frame.items) for frame in frames].index(True)
                 for colour in named.groups()]
        return named[1 + (first[0] > first[1])] if first[0] != first[1] else None
    track = [one(re.search(r"did the (\w+ \w+)", prompt)[1], frame) for frame in frames]
    values, words = {"grow": ([SIZES[i.size] for i in track], ("shrank", "grew")),
                     "left": ([i.x for i in track], ("left", "right")),
                     "up": ([i.y for i in track], ("up", "down"))}[prompt.split()[-3]]
    steps = [b - a for a, b in zip(values, values[1:]) if a != b]
    enough = len(steps) == (1 if "grow" in prompt else len(frames) - 1)
    return words[steps[0] > 0] if enough and len({step > 0 for step in steps}) == 1 else None


class TestClip:
    @pytest.mark.parametrize("kind", CLIPS)
    def test_the_order_of_the_frames_alone_decides(self, kind):
        answers, firsts = Counter(), 0
        for seed in range(300):
            count = 8 if seed % 2 else 5
            record = clip(random.Random(seed), side=None, frames=count, kind=kind)
            (prompt, answer), frames = ask_and_answer(record), record["source"]
            assert len(frames) == count and record["kind"] == kind
            backwards = watch(prompt, frames[::-1])
            assert watch(prompt, frames) == answer != backwards and backwards is not None
            assert kind == "growth" or backwards in prompt
            assert len({frame.background for frame in frames}) == 1
            for items in [frame.items for frame in frames]:
                assert kind == "first" or all(0 < v < 1 for item in items for v in item.box)
                for a, b in zip(items, items[1:]):
                    assert math.hypot(a.x - b.x, a.y - b.y) > SIZES[a.size] + SIZES[b.size]
            answers[answer] += 1
            firsts += prompt.split()[-3].rstrip(",") == answer
        if kind == "first":
            assert 110 < firsts < 190
        else:
            assert len(answers) == (4 if kind == "direction" else 2)
            assert max(answers.values()) < 1.35 * 300 / len(answers), answers

    def test_kinds_are_drawn_and_frames_are_as_many_as_asked_for(self, drawn):
        assert {record["kind"] for record in drawn["clip"]} == set(CLIPS)
        (frames,), = [turn["images"] for turn in clip(random.Random(0), frames=16)["turns"]]
        assert len(frames) == 16 and {frame.size for frame in frames} == {(32, 32)}
