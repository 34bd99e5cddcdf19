"""Pages, questions, episodes, glossaries and clips of the shapes world."""
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial

import pytest

from common.data.batches import world_tokenizer
from common.data.shapes.conversations import TEACHERS
from common.data.shapes.interleaved import (CLIPS, DOCUMENT_KINDS, LABELS, QUESTION_KINDS, TASKS,
                                            clip, dialogue, document, episode, grounding, noisy,
                                            probe, question, reading, text_question)
from common.data.shapes.questions import SETTINGS
from common.data.shapes.scene import COLOURS, HELD_OUT, SHAPES, SIZES
from common.data.shapes.words import is_true
from common.data.shapes.world import Shapes
from tests.shapes.judge import (NUMBERS, ask_and_answer, blind, held_out, one, pairs_in, resolve,
                                scenes_of, shows)

# How many turns a record has.
LENGTHS = {"caption": {0}, "noisy": {0}, "album": {2, 3}, "names": {4, 5, 6, 7, 8},
           "question": {1, 2, 3}, "text_question": {1, 2, 3}, "probe": {1}, "grounding": {1},
           "reading": {1}, "dialogue": {4}, "two_pictures": {1}, "statement": {1},
           "instruction": {1, 4}, "choice": {1}, "document": {2, 3, 4},
           "episode": {3, 5, 7, 9}, "glossary": {3, 4, 5}, "clip": {1}, "questions": {4, 5},
           "conversation": {4}, "detail": {1}, "reasoning": {1}, "chat": {3}}
# Tasks that are others with an argument.
BASES = {"questions": "question", **dict.fromkeys(TEACHERS, "instruction")}


@pytest.fixture(scope="module")
def drawn():
    """{kind: 60 records}, with pictures of 16 pixels a side."""
    return {kind: [task(random.Random(i), side=16) for i in range(60)]
            for kind, task in TASKS.items()}


def words_of(record):
    return [(turn["prompt"], turn["answer"]) for turn in record.get("turns", ())] or record["texts"]


def answers_of(record):
    return record.get("texts") or [answer for _, answer in words_of(record)]


def named(record, by):
    """The colour or the shape of the one object in each picture."""
    assert all(len(scene.items) == 1 for scene in record["source"])
    return [getattr(scene.items[0], by) for scene in record["source"]]


class TestTasks:
    @pytest.mark.parametrize("kind", TASKS)
    def test_a_record_shows_its_scenes_and_the_model_words_it(self, drawn, kind):
        records, lengths, kind = drawn[kind], LENGTHS[kind], BASES.get(kind, kind)
        for record in records:
            assert shows(record, scenes_of(record), 16) or kind in ("text_question", "reading")
            for number, turn in enumerate(record.get("turns", ()), 1):
                first, last = number == 1, number == len(record["turns"])
                pictured = {"question": first, "dialogue": first, "instruction": first,
                            "chat": first,
                            "glossary": last, "two_pictures": 2,
                            "text_question": 0}.get(kind, True)
                frames = [len(frames) for frames in turn["images"]]
                assert frames == [8 if kind == "clip" else 1] * pictured
                asked = (kind in ("question", "text_question", "probe", "dialogue", "clip",
                                  "statement", "choice") or number - 1 == record.get("asked"))
                end = "?" * asked or "." * (kind == "two_pictures")
                free = kind in ("instruction", "chat", "grounding", "reading")
                assert turn["prompt"][-1:] == end or free
                context = {"names": first, "glossary": not last}.get(kind, False)
                assert turn["answer"] and turn.get("learn", True) is not context
            assert not re.search("output|question|answer|[<:]", str(words_of(record)))
        assert {len(record.get("turns", ())) for record in records} == lengths

    @pytest.mark.parametrize("kind", TASKS)
    def test_a_record_is_a_function_of_its_rng_without_held_out_pairs(self, drawn, kind):
        bare = [TASKS[kind](random.Random(i), side=None) for i in range(200)]
        assert drawn[kind][:9] == [TASKS[kind](random.Random(i), side=16) for i in range(9)]
        for plain, record in zip(bare if kind != "reading" else (), drawn[kind]):    # what fits in
            assert words_of(plain) == words_of(record) and scenes_of(plain) == scenes_of(record)
        assert shows(bare[0], (), 16) and len({str(words_of(record)) for record in bare}) > 70
        for record in bare:
            assert not held_out(str(words_of(record)))
            assert not pairs_in(*scenes_of(record)) & HELD_OUT

    def test_a_caption_and_each_text_of_an_album_are_true(self, drawn):
        for record in drawn["caption"] + drawn["album"]:
            assert all(map(is_true, answers_of(record), scenes_of(record)))

    def test_tasks_of_other_files_get_their_arguments(self, drawn):
        records = [noisy(random.Random(i), side=None, rate=0.8, hardness="shares", objects=3)
                   for i in range(100)]
        assert {record["hardness"] for record in records} == {None, "shares"}
        assert 65 < sum(not record["truth"] for record in records) < 92
        records += [TASKS[kind](random.Random(0), side=None, objects=3)
                    for kind in ("dialogue", "two_pictures")]
        assert {len(scene.items) for r in records for scene in scenes_of(r)} == {3}
        said = [{turn["prompt"] for i in range(60) for turn in dialogue(
            random.Random(i), split, None)["turns"][2:]} for split in ("train", "test")]
        assert not said[0] & said[1], "test wordings"
        assert all(left != right for left, right in map(scenes_of, drawn["two_pictures"]))

    def test_names_are_all_colours_or_all_shapes_as_the_first_one_tells(self, drawn):
        found = Counter()
        for record in drawn["names"]:
            by = "colour" if answers_of(record)[0] in COLOURS else "shape"
            assert answers_of(record) == named(record, by)
            found[by] += 1
        assert min(found["colour"], found["shape"]) > 15

    def test_a_glossary_tells_two_to_four_classes_once_each_before_the_picture(self, drawn):
        for record in drawn["glossary"]:
            *words, answer = answers_of(record)
            names, labels = zip(*map(str.split, words))
            assert sorted(labels) == sorted(record["candidates"]) and len(set(names)) == len(names)
            assert [names[labels.index(answer)]] == named(record, record["by"])


def kind_of(prompt, answer):
    """The kind of a question, told by its answer or its words."""
    for kind, answers in (("colour", COLOURS), ("shape", SHAPES), ("count", NUMBERS)):
        if answer in answers:
            return kind
    return "relation" if re.search("left|right|above|below", prompt) else "existence"


class TestChat:
    def test_it_mixes_words_and_sentences_in_any_order(self, drawn):
        forms = Counter(tuple(" " in answer for answer in answers_of(r)) for r in drawn["chat"])
        assert len(forms) == 8 and all(forms[same] < 15 for same in ((True,) * 3, (False,) * 3))
        asked = {prompt for record in drawn["chat"] for prompt, _ in words_of(record)}
        for part in ("in the picture?", "what can you see", "detail", "would be left", "how many"):
            assert any(part in prompt for prompt in asked), part

    def test_each_answer_is_true_and_no_kind_of_the_tests_is_asked(self, drawn):
        for record in drawn["chat"]:
            for prompt, answer in words_of(record):
                if " " in answer and "would be left" not in prompt and "which" not in prompt:
                    assert all(map(partial(is_true, scene=record["source"]), answer.split(". ")))
                assert not re.search("more|fewer|larger|smaller", prompt), "a comparison"
                if found := re.match("is there an? ([a-z]+ [a-z]+) in the picture", prompt):
                    there = [item.name for item in record["source"].items]
                    assert (answer == "yes") == (found[1] in there)


class TestQuestion:
    def test_answers_are_right_and_kinds_and_wordings_differ(self):
        said = {"train": set(), "test": set()}
        for split in said:
            records = [question(random.Random(i), split, None) for i in range(100)]
            for record in records:
                pairs = words_of(record)
                assert all(resolve(prompt, *record["source"]) == answer for prompt, answer in pairs)
                kinds = [kind_of(*pair) for pair in pairs]
                assert len(set(kinds)) == len(kinds) and kinds[-1] == record["kind"]
                said[split].update(prompt for prompt, _ in pairs)
            assert {record["kind"] for record in records} == set(QUESTION_KINDS)
        assert not said["train"] & said["test"]
        records += [question(random.Random(i), asks=1) for i in range(9)]
        assert {len(record["turns"]) for record in records} == {1}       # in tests, or if asked for


class TestTextQuestion:
    def test_the_prompt_names_the_objects_and_decides_the_questions(self):
        kinds, said = Counter(), {"train": set(), "test": set()}
        for split in said:
            for i in range(200):
                record = text_question(random.Random(i), split, 16, objects=(1, 3))
                assert shows(record, (), 16), "a picture"
                (first, answer), *later = words_of(record)
                told, _, asked = first.partition(". ")
                (scene,), pairs = record["source"], [(asked, answer), *later]
                assert is_true(told, scene) and all(item.name in told for item in scene.items)
                # Other sizes and places change no answer, for the words do not tell them.
                other = replace(scene, items=tuple(replace(
                    item, size="small" if item.size == "large" else "large", x=item.y, y=item.x)
                    for item in scene.items))
                assert all(resolve(q, s) == a for q, a in pairs for s in (scene, other))
                kinds[record["kind"]] += 1
                said[split].update(question for question, _ in pairs)
        assert set(kinds) == set(DOCUMENT_KINDS) and min(kinds.values()) > 40
        assert not said["train"] & said["test"]


class TestProbe:
    def test_settings_and_answers_are_even_unless_they_are_given(self):
        found = Counter()
        for i in range(1200):
            record = probe(random.Random(i), side=None)
            prompt, answer = ask_and_answer(record)
            assert resolve(prompt, *scenes_of(record)) == answer
            found[record["setting"], answer] += 1
        assert len(found) == 6 and min(found.values()) > 160, found
        for setting in SETTINGS:
            assert {probe(random.Random(i), "test", None, setting)["setting"]
                    for i in range(9)} == {setting}
        for answer in ("yes", "no"):
            assert {ask_and_answer(probe(random.Random(i), side=None, answer=answer))[1]
                    for i in range(9)} == {answer}


class TestGrounding:
    def test_every_kind_is_drawn_or_the_one_that_is_given(self):
        found = Counter(grounding(random.Random(i), side=None)["kind"] for i in range(300))
        assert len(found) == 3 and min(found.values()) > 70
        for kind in found:
            assert {grounding(random.Random(i), "test", None, kind, objects=3)["kind"]
                    for i in range(9)} == {kind}


class TestReading:
    def test_letters_are_small_apart_and_the_same_with_and_without_a_picture(self):
        for i, (side, length, dot) in enumerate([(16, 2, 1), (64, 4, 2), (96, 3, 1)]):
            record = reading(random.Random(i), "test", side, length, dot)
            letters = ask_and_answer(record)[1].split(" ")
            assert len(letters) == length and all(len(x) == 1 and x == x.lower() for x in letters)
            (x1, y1, x2, y2), pixel = record["boxes"][0], 1000 / side
            assert abs(x2 - x1 - (6 * length - 1) * dot * pixel) < 2
            assert abs(y2 - y1 - 7 * dot * pixel) < 2 or y2 == 999
            assert record["turns"][0]["images"][0][0].size == (side, side)
            bare = reading(random.Random(i), "test", None, length, dot)
            assert ask_and_answer(bare) == ask_and_answer(record)
        trained = [reading(random.Random(i), side=32) for i in range(200)]
        sizes = Counter((len(ask_and_answer(r)[1].split()), round((y2 - y1) * 32 / 7000))
                        for r in trained for _, y1, _, y2 in r["boxes"])
        assert {*sizes} == {(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 3)}
        asked = {ask_and_answer(reading(random.Random(i), side=None))[0] for i in range(9)}
        assert len(asked) == 2

    def test_each_letter_is_a_token_of_its_own(self):
        tokenizer = world_tokenizer(Shapes())
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        pieces = [tokenizer.pieces.id_to_piece(i) for i in tokenizer.encode(" ".join(letters))]
        assert [piece.lstrip("\u2581") for piece in pieces if piece != "\u2581"] == [*letters]


class TestDocument:
    def test_its_own_picture_alone_decides_the_question(self):
        kinds, places, said = Counter(), Counter(), {"train": {}, "test": {}}
        for i, split in enumerate(500 * ("train", "test")):
            record = document(random.Random(i), split, None, images=3)
            asked, others, captions = record["asked"], [*record["source"]], answers_of(record)
            scene, answer = others.pop(asked), captions.pop(asked)
            prompt = record["turns"][asked]["prompt"]
            # `resolve` fails where another scene has no single answer.
            assert resolve(prompt, scene) == answer not in [resolve(prompt, s) for s in others]
            assert all(map(is_true, captions, others)) and len(captions) == 2
            assert not {*" ".join(captions).split()} & {*COLOURS, *SHAPES}     # would tell a no
            assert kind_of(prompt, answer) == record["kind"]
            kinds[record["kind"]] += 1
            places[asked] += 1
            said[split][prompt] = (" ".join([prompt, *captions]), answer)
        assert set(kinds) == set(DOCUMENT_KINDS) and min(kinds.values()) > 160
        assert len(places) == 3 and min(places.values()) > 270
        assert not {*said["train"]} & {*said["test"]}
        for own in said.values():                # no text says what the other pictures show
            assert blind([text for text in own.values() if text[1] in ("yes", "no")]) < 0.7


class TestEpisode:
    @pytest.mark.parametrize("shots", (2, 4, 8))
    def test_the_shots_alone_tell_the_label_and_shuffled_ones_nothing(self, shots):
        """Someone who believes the shots is always right, and at chance with shuffled labels."""
        right, meanings, places = [0, 0], defaultdict(set), Counter()
        for seed in range(400):
            records = [episode(random.Random(seed), side=None, shots=shots, shuffled=shuffled)
                       for shuffled in (False, True)]
            assert records[0]["source"] == records[1]["source"]
            assert answers_of(records[0])[-1] == answers_of(records[1])[-1]        # the truth stays
            for n, record in enumerate(records):
                *classes, asked = named(record, record["by"])
                *labels, answer = answers_of(record)
                votes = Counter(label for name, label in zip(classes, labels) if name == asked)
                liked = [label for label in votes if votes[label] == max(votes.values())]
                right[n] += (answer in liked) / len(liked)
                for labelled in (classes, labels):
                    assert sorted(Counter(labelled).values()) == [shots // 2, shots // 2]
                assert set(labels) == set(record["candidates"])
            meanings[answer].add(asked)
            places[record["candidates"].index(answer)] += 1
            assert 1 in (len(set(named(record, by))) for by in ("colour", "shape"))
        assert right[0] == 400 and abs(right[1] - 200) < 40 and abs(places[0] - 200) < 45
        assert set(meanings) == set(LABELS) and min(map(len, meanings.values())) > 5

    def test_shots_and_classes_are_as_many_as_asked_for(self):
        for shots, classes in ((0, 2), (6, 3)):
            record = episode(random.Random(0), side=None, shots=shots, classes=classes)
            assert len(record["turns"]) == shots + 1 and len(set(record["candidates"])) == classes


def watch(prompt, frames):
    """The answer to a question on a clip, from the objects of its frames; None if there is none."""
    if colours := re.search(r"did the picture show first, (\w+) or (\w+)\?", prompt):
        first = [[any(i.colour == colour for i in frame.items) for frame in frames].index(True)
                 for colour in colours.groups()]
        return colours[1 + (first[0] > first[1])] if first[0] != first[1] else None
    track = [one(re.search(r"did the (\w+ \w+)", prompt)[1], frame) for frame in frames]
    words = re.search(r"(\w+) or (\w+)\?", prompt).groups()
    values = [{"up": i.y, "left": i.x, "grow": -SIZES[i.size]}[words[0]] for i in track]
    steps = [b > a for a, b in zip(values, values[1:]) if a != b]
    clear = len(set(steps)) == 1 and len(steps) == (1 if "grow" in words else len(frames) - 1)
    return {"grow": "grew", "shrink": "shrank"}.get(w := words[steps[0]], w) if clear else None


class TestClip:
    @pytest.mark.parametrize("kind", CLIPS)
    def test_the_order_of_the_frames_alone_decides(self, kind):
        answers = Counter()
        for seed in range(300):
            count = 8 if seed % 2 else 5
            record = clip(random.Random(seed), side=None, frames=count, kind=kind)
            (prompt, answer), frames = ask_and_answer(record), record["source"]
            assert len(frames) == count and record["kind"] == kind
            backwards = watch(prompt, frames[::-1])
            assert watch(prompt, frames) == answer != backwards and backwards is not None
            assert len({frame.background for frame in frames}) == 1
            for items in [frame.items for frame in frames]:
                assert kind == "first" or all(0 < v < 1 for item in items for v in item.box)
                for a, b in zip(items, items[1:]):
                    assert math.hypot(a.x - b.x, a.y - b.y) > SIZES[a.size] + SIZES[b.size]
            named_first = kind == "first" and prompt.index(answer) < prompt.index(backwards)
            answers[named_first if kind == "first" else answer] += 1
        assert len(answers) == (4 if kind == "direction" else 2)
        assert max(answers.values()) < 1.35 * 300 / len(answers), answers

    def test_every_kind_is_drawn(self, drawn):
        assert {record["kind"] for record in drawn["clip"]} == set(CLIPS)
