"""What a language model reads of the shapes world, and the texts for its tokenizer."""
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.data.shapes.interleaved import LABELS, TASKS, class_names
from common.data.shapes.questions import FORMS as QUESTIONS, questions
from common.data.shapes.grounding import GLYPHS
from common.data.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, draw
from common.data.shapes.texts import (ENDS, FORMS, LISTED, READ, bare, corpus, descriptions,
                                      examples, labelled, text, texts_of)
from common.data.shapes.words import is_true, names_held_out, phrase
from tests.shapes.judge import held_out, many


def drawn(count):
    return [text(random.Random(i)) for i in range(count)]


# ---------------------------------------------------------------- texts of a language model

def test_every_picture_of_a_page_is_described():
    for kind in set(TASKS) & set(READ) - {"caption"}:
        for i in range(20):
            record = TASKS[kind](random.Random(i), side=None)
            found = descriptions(kind, record, random.Random(i))
            if kind == "clip":
                assert found == [f"the answer is {record['turns'][0]['answer']}"]
                continue
            assert len(found) == len(record["turns"])
            assert not any(found[len(record["source"]):])     # a picture is described once
            for words, scene in zip(found, record["source"]):
                assert is_true(words, scene)
                assert all(phrase(item) in words for item in scene.items)


def test_a_text_is_plain_or_a_page_in_words():
    pages = 0
    for record in drawn(400):
        if "texts" in record:
            words, = record["texts"]
            assert set(record) == {"texts"} and words == words.strip()
            assert "  " not in words and ".." not in words
            continue
        pages += 1
        assert set(record) == {"turns", "end"} and record["end"] in ENDS
        described = [bool(turn["description"]) for turn in record["turns"]]
        for turn in record["turns"]:
            assert set(turn) == {"images", "description", "prompt", "answer"}
            assert not turn["description"].endswith(".")       # the model's wording ends it
            assert turn["images"] == [] and re.fullmatch(r"[^.?:]+", turn["answer"])
            assert re.fullmatch(r"[^?:]+\?|", turn["prompt"])
        # only further questions on the same picture have no description
        assert described[0] and (all(described) or all(t["prompt"] for t in record["turns"]))
        if all(turn["answer"] not in LABELS for turn in record["turns"]):
            assert record["end"] == "."
    assert 0.5 < pages / 400 < 0.75


def test_every_kind_is_read_as_often_as_its_weight_says():
    assert set(READ) == {"list", *TASKS} - {"album", "glossary"} and sum(READ.values()) == 100
    lists, ends, forms = [], set(), Counter()
    for record in drawn(1000):
        if "turns" in record:
            first = record["turns"][0]
            if first["answer"] in LABELS:
                forms["word" if " " not in first["description"] else "phrase"] += 1
                ends.add(record["end"])
            continue
        words = re.findall(r"\w+", record["texts"][0])
        size, rest = divmod(len(words), 3)
        if not rest and words == 3 * words[:size] and any(set(words) <= set(n) for n in LISTED):
            lists.append(size)
            ends.add(record["texts"][0][-1])
            assert len(set(words)) == size
        elif set(words) & set(LABELS):
            forms["bare"] += 1
    assert abs(len(lists) / 1000 - 0.2) < 0.05 and set(lists) == {3, 4, 5, 6, 7, 8}
    assert set(forms) == set(FORMS) and min(forms.values()) > 40
    assert {*ENDS} < ends                         # and letters, of lists without an end


def test_an_episode_in_words_has_three_forms():
    found = Counter()
    for i in range(400):
        record = text(random.Random(i))
        if "texts" in record:
            words = re.findall(r"\w+", plain := record["texts"][0])
            pairs = list(zip(words[::2], words[1::2]))
            if not all(a in (*COLOURS, *SHAPES) and b in LABELS for a, b in pairs) \
                    or words == 3 * words[:len(words) // 3]:
                continue
            found["bare"] += 1
            end = plain[-1] if plain[-1] in ENDS else ""
            assert plain == " ".join(f"{a} {b}{end}" for a, b in pairs)
        elif record["turns"][0]["answer"] in LABELS:
            pairs = [(turn["description"], turn["answer"]) for turn in record["turns"]]
            assert all(turn["prompt"] == "" for turn in record["turns"])
            form = "phrase" if all(re.fullmatch(r"an? \w+ \w+", a) for a, _ in pairs) else "word"
            assert form == "phrase" or all(a in (*COLOURS, *SHAPES) for a, _ in pairs)
            found[form] += 1
        else:
            continue
        # each class keeps its label, and each label its class
        assert len(set(pairs)) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 2
    assert set(found) == set(FORMS)


def test_the_bare_form_is_what_tells_the_classes_and_their_labels():
    for i in range(9):
        record = TASKS["episode"](random.Random(i), side=None, shots=4)
        assert bare(record) == list(zip(class_names(record),
                                        [turn["answer"] for turn in record["turns"]]))


def test_a_text_is_a_function_of_the_rng_and_names_no_held_out_pair():
    texts = [str(record) for record in drawn(200)]
    assert texts == [str(record) for record in drawn(200)]
    assert len(set(texts)) > 180
    assert not any(names_held_out(own) for record in drawn(200) for own in texts_of(record))
    assert not any(names_held_out(turn["description"]) for record in drawn(200)
                   for turn in record.get("turns", ()))


def test_a_label_is_certain_once_told_and_the_second_class_has_any_other():
    for seed in range(9):
        parts, nats = labelled(random.Random(seed))
        assert nats == pytest.approx(math.log(11)) and len(LABELS) == 12
        assert len(parts) == 18 and not any(counted for _, counted in parts[::2])
        assert [counted for _, counted in parts[1::2]] == [False] + [True] * 8
        labels = [words for words, _ in parts[1::2]]
        assert len(set(labels)) == 2
        assert all(re.fullmatch(r" \w+\.", words) and words[1:-1] in LABELS for words in labels)
        assert re.fullmatch(r"(\w+ \w+\. )+\w+ \w+\.", "".join(words for words, _ in parts))
        named = {name.strip(): label for (name, _), label in zip(parts[::2], labels)}
        assert len(named) == 2 and set(named) <= {*COLOURS, *SHAPES}


def test_the_second_classs_label_is_drawn_evenly_from_the_others():
    found = Counter()
    for i in range(2200):
        labels = list(dict.fromkeys(words for words, _ in labelled(random.Random(i))[0][1::2]))
        found[(LABELS.index(labels[1][1:-1]) - LABELS.index(labels[0][1:-1])) % 12] += 1
    assert set(found) == set(range(1, 12))
    assert sum((n - 200) ** 2 / 200 for n in found.values()) < 29.6      # chi-square, p = 0.001


# ---------------------------------------------------------------- records of every kind, the corpus

def test_every_record_has_one_of_the_two_forms():
    for seed in range(12):
        for record in examples(random.Random(seed)):
            assert ("texts" in record) != ("turns" in record)
            for turn in record.get("turns", ()):
                assert set(turn) == {"images", "prompt", "answer"}
                assert all(isinstance(frames, list) for frames in turn["images"])
            images = record["images"] if "texts" in record else [
                p for turn in record["turns"] for frames in turn["images"] for p in frames]
            assert images and all(p.mode == "RGB" for p in images)
            scenes = record.get("source", ())
            scenes = (scenes,) if isinstance(scenes, Scene) else scenes
            assert not scenes or [p.tobytes() for p in images] == [
                draw(scene, 32).tobytes() for scene in scenes]
            for words in texts_of(record):
                assert not held_out(words) and words == words.strip()
                assert not re.search("<|output:|question:|answer:", words)
    assert len(examples(random.Random(0))) >= 21
    quick = examples(random.Random(5), side=None)
    assert list(map(texts_of, quick)) == list(map(texts_of, examples(random.Random(5))))


@pytest.fixture(scope="module")
def heard():
    return list(corpus())


def test_the_corpus_has_every_training_wording_and_no_test_wording(heard):
    def pattern(wording):
        return re.sub(r"\\{\w\\}", r"[\\w ]+", re.escape(wording)) + "( .*)?"
    heard = sorted(set(heard))
    train, test = ({w for forms in QUESTIONS.values() for form in forms.values()
                    for w in form[n]} for n in (1, 2))
    for wording in train:
        assert sum(bool(re.fullmatch(pattern(wording), t)) for t in heard) >= 3, wording
    for wording in test:
        assert not any(re.fullmatch(pattern(wording), t) for t in heard), wording
    for part in ("is there", "give the box of", "which object is in the box", "what colour is it?",
                 "did the .* move", "did the .* grow", "which colour did", "both pictures show",
                 "describe the picture in detail", "nearest to you", "in this game",
                 "read the letters", "grew", "shrank"):
        assert sum(bool(re.search(part, t)) for t in heard) >= 3, part
    assert set(LABELS) | {f"{label}." for label in LABELS} <= set(heard)


def test_the_corpus_names_no_held_out_pair_and_is_always_the_same(heard):
    assert not any(map(held_out, heard))
    assert heard[3500:5500] == list(itertools.islice(corpus(), 3500, 5500)) and len(heard) > 9000
    # every word of the tests is in it, so that one vocabulary does for all
    words = {w for t in heard for w in re.findall(r"\w+", t)}
    for scene, rng in many(400, (1, 3)):
        for record in questions(scene, rng, "test", side=None):
            found = " ".join(texts_of(record))
            assert set(re.findall(r"\w+", found)) <= words, found
    for record in drawn(400):
        assert set(re.findall(r"\w+", " ".join(texts_of(record)))) <= words
    assert set(COLOURS) | set(SHAPES) | set(BACKGROUNDS) | set(SIZES) <= words
    assert {c for t in heard for c in t} >= set(GLYPHS)


def test_no_record_knows_a_models_wording(heard):
    assert not any(re.search("output:|question:|answer:|context:|choices:", t) for t in heard)


def test_records_depend_on_the_rng_alone():
    state = random.getstate(), np.random.get_state()[1].tolist()
    code = ("import random, hashlib\nfrom common.data.shapes.texts import examples, texts_of\n"
            "print(hashlib.md5(repr([texts_of(r) for n in range(20) for r in "
            "examples(random.Random(n), side=None)]).encode()).hexdigest())")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parents[2],
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout
            for seed in ("1", "2")}
    assert len(runs) == 1 and len(runs.pop()) == 33
    assert examples(random.Random(4)) == examples(random.Random(4))        # the pictures too
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
