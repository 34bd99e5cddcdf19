"""Pages, questions, episodes, glossaries and clips of the shapes world."""
import math
import random
import re
from collections import Counter, defaultdict

import pytest

from common.data.shapes.interleaved import (CLIPS, DOCUMENT_KINDS, LABELS, QUESTION_KINDS, TASKS,
                                            class_names, clip, episode)
from common.data.shapes.questions import FORMS, decidable
from common.data.shapes.scene import COLOURS, HELD_OUT, SHAPES, SIZES, draw
from common.data.shapes.words import is_true, names_held_out
from tests.shapes.judge import ask_and_answer, blind, held_out, one, resolve

PAGES = tuple(kind for kind in TASKS if kind != "caption")        # records of turns


def drawn(kind, /, count=60, split="train", side=None, **more):
    return [TASKS[kind](random.Random(i), split, side, **more) for i in range(count)]


def answers_of(record):
    return [turn["answer"] for turn in record["turns"]]


def all_texts(record):
    return [text for turn in record["turns"] for text in (turn["prompt"], turn["answer"])] \
        if "turns" in record else record["texts"]


def true_answers(scene, kind, question, split):
    """The answers of the scene to a question in one of the split's wordings."""
    return {answer for form, answer, slots in decidable(scene, kind)
            for words in FORMS[kind][form][1 if split == "train" else 2]
            if words.format(**slots) == question}


# ---------------------------------------------------------------- what all of them share

def test_the_tasks_are_those_that_the_papers_need():
    assert list(TASKS) == ["caption", "album", "names", "question", "document", "episode",
                           "glossary", "clip"]


@pytest.mark.parametrize("kind", PAGES)
def test_turns_have_their_pictures_and_clips(kind):
    for record in drawn(kind, 20, side=23):
        turns = record["turns"]
        counts = [len(turn["images"]) for turn in turns]
        if kind == "question":                           # the later ones are on the same picture
            assert counts == [1] + [0] * (len(turns) - 1)
        elif kind == "glossary":
            assert counts == [0] * (len(turns) - 1) + [1]
        else:
            assert counts == [1] * len(turns)
        clips = [frames for turn in turns for frames in turn["images"]]
        assert {len(frames) for frames in clips} == ({8} if kind == "clip" else {1})
        assert [p.tobytes() for frames in clips for p in frames] == [
            draw(scene, 23).tobytes() for scene in record["source"]]


@pytest.mark.parametrize("kind", PAGES)
def test_turns_have_prompts_and_answers_without_a_models_wording(kind):
    for record in drawn(kind):
        asked = record.get("asked", -1)
        for number, turn in enumerate(record["turns"]):
            has_prompt = kind in ("question", "clip") or kind == "document" and number == asked
            assert turn["prompt"].endswith("?") if has_prompt else turn["prompt"] == ""
            assert turn["answer"] and set(turn) <= {"images", "prompt", "answer", "learn"}
            context = kind == "names" and number == 0 or \
                kind == "glossary" and turn is not record["turns"][-1]
            assert turn.get("learn", True) is not context
        for text in all_texts(record):
            assert text == text.strip() and not re.search("output|question|answer|<|:", text)


@pytest.mark.parametrize("kind", TASKS)
def test_a_record_is_a_function_of_its_rng_and_its_pictures_draw_nothing_from_it(kind):
    for i in range(9):
        first, again, bare = (TASKS[kind](random.Random(i), side=side) for side in (16, 16, None))
        assert first == again and all_texts(first) == all_texts(bare)
        assert first["source"] == bare["source"]
        assert not any(turn["images"] for turn in bare.get("turns", [bare]))
    assert len({str(all_texts(record)) for record in drawn(kind)}) > 20


@pytest.mark.parametrize("kind", TASKS)
def test_training_shows_and_names_no_held_out_pair(kind):
    for record in drawn(kind, 200):
        assert not any(map(names_held_out, all_texts(record)))
        scenes = (record["source"],) if kind == "caption" else record["source"]
        assert not {(item.colour, item.shape) for s in scenes for item in s.items} & HELD_OUT


# ---------------------------------------------------------------- pages and questions

def test_a_caption_is_true_of_its_scene():
    for record in drawn("caption", side=16):
        text, = record["texts"]
        picture, = record["images"]
        assert is_true(text, record["source"])
        assert picture.tobytes() == draw(record["source"], 16).tobytes()


def test_an_album_is_pictures_with_a_true_caption_each():
    for record in drawn("album"):
        for text, scene in zip(answers_of(record), record["source"], strict=True):
            assert is_true(text, scene)
    assert {len(record["turns"]) for record in drawn("album")} == {2, 3}


def test_names_are_all_colours_or_all_shapes_as_the_first_one_tells():
    found, both = set(), 0
    for record in drawn("names"):
        texts, items = answers_of(record), [scene.items for scene in record["source"]]
        assert all(len(own) == 1 for own in items)
        by = "colour" if texts[0] in COLOURS else "shape"
        assert texts == [getattr(own[0], by) for own in items]
        both += min(len({getattr(own[0], name) for own in items})
                    for name in ("colour", "shape")) > 1
        found.add((by, len(texts)))
    assert found == {(by, n) for by in ("colour", "shape") for n in (4, 5, 6, 7, 8)} and both > 40


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_question_has_its_splits_wording_and_one_answer(split):
    kinds, counts = set(), set()
    for record in drawn("question", 120, split):
        scene, = record["source"]
        fits = [{kind for kind in QUESTION_KINDS if true_answers(
            scene, kind, turn["prompt"], split) == {turn["answer"]}} for turn in record["turns"]]
        assert all(len(own) == 1 for own in fits) and fits[-1] == {record["kind"]}
        assert len(set.union(*fits)) == len(fits)             # no kind twice
        kinds.add(record["kind"]), counts.add(len(fits))
    assert kinds == set(QUESTION_KINDS) and counts == ({1, 2, 3} if split == "train" else {1})
    assert {len(record["turns"]) for record in drawn("question", 9, asks=1)} == {1}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_question_of_a_document_is_decided_by_its_own_picture(split):
    kinds, places, existence = Counter(), Counter(), []
    for record in drawn("document", 600, split, images=3):
        asked, turns = record["asked"], record["turns"]
        question, answer = turns[asked]["prompt"], turns[asked]["answer"]
        assert len(turns) == 3 and not held_out(question)
        for number, (turn, scene) in enumerate(zip(turns, record["source"], strict=True)):
            assert (resolve(question, scene) == answer) == (number == asked)
            # none without the form: a scene with no star cannot be asked for a star's colour
            found = true_answers(scene, record["kind"], question, split)
            assert found == {answer} if number == asked else found and answer not in found
            if number != asked:
                assert is_true(turn["answer"], scene)
                assert not set(turn["answer"].split()) & {*COLOURS, *SHAPES}    # would tell a no
        kinds[record["kind"]] += 1
        places[asked] += 1
        if record["kind"] == "existence":
            existence.append((" ".join([question] + [t["answer"] for n, t in enumerate(turns)
                                                     if n != asked]), answer))
    assert set(kinds) == set(DOCUMENT_KINDS) and min(kinds.values()) > 100
    assert set(places) == {0, 1, 2} and min(places.values()) > 150
    assert blind(existence) < 0.7            # no text says what the other pictures show


def test_documents_have_two_to_four_pictures():
    assert {len(record["turns"]) for record in drawn("document", 30)} == {2, 3, 4}


# ---------------------------------------------------------------- episodes

@pytest.mark.parametrize("shots", (0, 2, 4, 8))
def test_the_shots_of_an_episode_tell_its_labels(shots):
    meanings, answers = defaultdict(set), Counter()
    for record in drawn("episode", 200, shots=shots):
        labels, values = answers_of(record), class_names(record)
        assert len(labels) == len(record["source"]) == shots + 1
        assert all(len(scene.items) == 1 for scene in record["source"])
        assert labels[-1] in record["candidates"] and len(set(record["candidates"])) == 2
        assert set(record["candidates"]) <= set(LABELS)
        other = "shape" if record["by"] == "colour" else "colour"
        assert len({getattr(scene.items[0], other) for scene in record["source"]}) == 1
        assert values == [getattr(scene.items[0], record["by"]) for scene in record["source"]]
        told = list(zip(values, labels))
        for value, label in told:
            meanings[label].add(value)
        if shots:
            assert set(Counter(told[:-1]).values()) == {shots // 2}       # as many of each class
            assert len(set(told)) == len(set(labels)) == len(set(values)) == 2
            assert set(labels) == set(record["candidates"])
        answers[record["candidates"].index(labels[-1])] += 1
    assert abs(answers[0] - 100) < 30
    assert not shots or min(map(len, meanings.values())) > 5      # a label means nothing by itself


def test_shuffled_shots_say_nothing():
    """Someone who believes the shots is always right, and with shuffled labels at chance."""
    for shots in (2, 4, 8):
        right, changed = Counter(), 0
        for seed in range(400):
            plain, mixed = (episode(random.Random(seed), side=None, shots=shots, shuffled=shuffled)
                            for shuffled in (False, True))
            assert plain["source"] == mixed["source"]
            assert answers_of(plain)[-1] == answers_of(mixed)[-1]        # the truth stays
            changed += answers_of(plain) != answers_of(mixed)
            for shuffled, record in enumerate((plain, mixed)):
                *values, asked = class_names(record)
                *labels, answer = answers_of(record)
                votes = Counter(label for value, label in zip(values, labels) if value == asked)
                best = max(votes.values())
                liked = sorted(label for label in votes if votes[label] == best)
                right[shuffled] += (answer in liked) / len(liked)
        assert right[0] == 400 and abs(right[1] - 200) < 40 and changed > 150, right


def test_episodes_with_other_classes_and_shots():
    assert {len(record["turns"]) - 1 for record in drawn("episode")} == {2, 4, 6, 8}
    record = episode(random.Random(0), side=None, shots=6, classes=3)
    assert len(set(class_names(record))) == len(record["candidates"]) == 3


def test_a_glossary_is_an_episode_in_words_but_for_its_last_picture():
    for i in range(40):
        rng = random.Random(i)
        record, classes = TASKS["glossary"](random.Random(i), side=9), rng.randint(2, 4)
        whole = episode(rng, side=9, shots=classes, classes=classes)
        assert record["turns"][-1] == whole["turns"][-1]
        assert record["turns"][:-1] == [
            {"images": [], "prompt": "", "answer": f"{name} {label}", "learn": False}
            for name, label in zip(class_names(whole)[:-1], answers_of(whole))]
        assert record["source"] == whole["source"][-1:]
        assert record["candidates"] == whole["candidates"]


def test_a_glossary_tells_two_to_four_classes_once_each():
    found = drawn("glossary", 60)
    assert {len(record["turns"]) - 1 for record in found} == {2, 3, 4}
    for record in found:
        *words, answer = answers_of(record)
        names, labels = zip(*[text.split() for text in words])
        assert sorted(labels) == sorted(record["candidates"]) and answer in labels
        assert len(set(names)) == len(names)
        item = record["source"][0].items[0]
        assert names[labels.index(answer)] in (item.colour, item.shape)


# ---------------------------------------------------------------- clips

def watch(question, frames):
    """The answer to a question on a clip, from the objects of its frames; None if there is none."""
    if question.startswith("which colour"):
        named = re.search(r"first, (\w+) or (\w+)\?", question).groups()
        seen = [[n for n, frame in enumerate(frames) if any(i.colour == c for i in frame.items)]
                for c in named]
        return named[seen[0][0] > seen[1][0]] if seen[0][0] != seen[1][0] else None
    name = re.search(r"did the (\w+ \w+)", question)[1]
    track = [one(name, f) for f in frames]
    if "grow or shrink" in question:
        radii = [SIZES[i.size] for i in track]
        steps = [b - a for a, b in zip(radii, radii[1:]) if a != b]
        return None if len(steps) != 1 else "grew" if steps[0] > 0 else "shrank"
    axis = "x" if "left or right" in question else "y"
    steps = [getattr(b, axis) - getattr(a, axis) for a, b in zip(track, track[1:])]
    if not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        return None
    return {"x": ("left", "right"), "y": ("up", "down")}[axis][steps[0] > 0]


@pytest.mark.parametrize("kind", CLIPS)
def test_clips_are_decided_by_the_order_of_frames(kind):
    pairs = []
    for seed in range(300):
        frames = 8 if seed % 2 else 5
        record = clip(random.Random(seed), side=None, frames=frames, kind=kind)
        question, answer = ask_and_answer(record)
        assert len(record["source"]) == frames and record["kind"] == kind
        assert watch(question, record["source"]) == answer
        other = watch(question, record["source"][::-1])
        assert other is not None and other != answer      # the same frames, the other answer
        assert other in question or kind == "growth"
        assert len({s.background for s in record["source"]}) == 1
        for scene in record["source"]:
            for item in scene.items:
                x1, y1, x2, y2 = item.box
                assert min(x1, y1) > 0 or item.shape == "star" and kind == "first"
                assert max(x2, y2) < 1 or kind == "first"
            for a, b in zip(scene.items, scene.items[1:]):
                assert math.hypot(a.x - b.x, a.y - b.y) > SIZES[a.size] + SIZES[b.size]
        pairs.append((question, answer))
    counts = Counter(a for _, a in pairs)
    if kind == "first":
        assert 110 < sum(q.split()[-3].rstrip(",") == a for q, a in pairs) < 190
    else:
        assert max(counts.values()) < 1.35 * 300 / len(counts), counts
        assert len(counts) == (4 if kind == "direction" else 2)


def test_clips_of_a_given_length():
    (frames,), = [turn["images"] for turn in clip(random.Random(0), frames=16, side=40)["turns"]]
    assert len(frames) == 16 and {frame.size for frame in frames} == {(40, 40)}
