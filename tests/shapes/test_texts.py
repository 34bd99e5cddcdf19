"""What a language model reads of the shapes world, and the texts for its tokenizer."""
import itertools
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from common.data.shapes.grounding import GLYPHS
from common.data.shapes.interleaved import LABELS, TASKS
from common.data.shapes.questions import FORMS as QUESTIONS, questions
from common.data.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES
from common.data.shapes.texts import (ENDS, FORMS, LISTED, READ, corpus, descriptions, examples,
                                      labelled, text, texts_of)
from common.data.shapes.words import is_true, phrase
from tests.shapes.judge import held_out, many, scenes_of, shows


@pytest.fixture(scope="module")
def drawn():
    return [text(random.Random(i)) for i in range(1000)]


@pytest.fixture(scope="module")
def heard():
    return list(corpus())


def parsed(record):
    """(kind, parts, end) of a text: the names of a list, the (class, label) pairs of an episode."""
    if "turns" in record:
        parts = [(turn["description"], turn["answer"]) for turn in record["turns"]]
        (name, label), *_ = parts
        kind = "page" if label not in LABELS else "phrase" if " " in name else "word"
        return kind, parts, record["end"]
    plain, = record["texts"]
    if found := re.fullmatch(r"(\w+(?: \w+)+)(\W?) \1\2 \1\2", plain):
        return "list", found[1].split(), found[2]
    end = re.search(r"\W?$", plain)[0]
    pairs = [tuple(part.split()) for part in re.findall(r"\w+ \w+", plain)]
    return "bare" if pairs[0][1] in LABELS else "caption", pairs, end


class TestText:
    def test_a_page_has_its_pictures_in_words_and_no_models_wording(self, drawn):
        pages = [record for record in drawn if "turns" in record]
        for record in pages:
            for turn in record["turns"]:
                assert turn["images"] == [] and not turn["description"].endswith(".")
                assert re.fullmatch(r"[^.?:]+", turn["answer"])
                assert re.fullmatch(r"[^?:]+\?|", turn["prompt"])
                # Only further questions on the same picture have no description.
                assert turn["description"] or turn["prompt"] and turn is not record["turns"][0]
        assert 0.75 < len(pages) / len(drawn) < 0.9
        assert sum(bool(record["turns"][-1]["prompt"]) for record in pages) > 250

    def test_lists_and_episodes_have_any_end_and_episodes_three_forms(self, drawn):
        counts, ends = Counter(), defaultdict(set)
        for kind, parts, end in map(parsed, drawn):
            counts[kind] += 1
            ends[kind].add(end)
            if kind == "list":
                assert len(set(parts)) == len(parts) and any(set(parts) <= set(n) for n in LISTED)
            elif kind in FORMS:              # each class keeps its label, and each label its class
                assert [len(set(v)) for v in (parts, *zip(*parts))] == [2, 2, 2]
                assert {name.split()[-1] for name, _ in parts} < {*COLOURS, *SHAPES}
                assert {len(name.split()) for name, _ in parts} == {3 if kind == "phrase" else 1}
        assert ends.pop("page") == {"."} and ends.pop("caption")
        assert {"", ".", ","} < {*ENDS}          # recall must not depend on one end
        assert ends == dict.fromkeys(("list", *FORMS), {*ENDS}) and min(counts.values()) > 10
        assert abs(counts["list"] - 100) < 30 and abs(sum(map(counts.get, FORMS)) - 150) < 35

    def test_a_text_is_a_function_of_the_rng_and_names_no_held_out_pair(self, drawn):
        assert drawn[:200] == [text(random.Random(i)) for i in range(200)]
        assert len({str(record) for record in drawn[:200]}) > 180
        unread = {"album", "glossary", "noisy", "dialogue", "two_pictures", "statement",
                  "instruction", "choice", "question", "text_question", "probe", "grounding",
                  "reading", "conversation", "detail", "reasoning", "chat"}
        assert set(READ) == {"list", *TASKS} - unread and sum(READ.values()) == 100
        for record in drawn:
            described = [turn["description"] for turn in record.get("turns", ())]
            assert not any(map(held_out, texts_of(record) + described))

    @pytest.mark.parametrize("kind", sorted({*TASKS} & {*READ} - {"caption"}))
    def test_every_picture_of_a_page_is_described_once(self, kind):
        for i in range(20):
            record = TASKS[kind](random.Random(i), side=None)
            found = descriptions(kind, record, random.Random(i))
            assert len(found) == len(record["turns"])
            if kind == "clip":
                assert found == [f"the answer is {record['turns'][0]['answer']}"]
                continue
            assert not any(found[len(record["source"]):])
            for words, scene in zip(found, record["source"]):
                assert is_true(words, scene) and all(phrase(item) in words for item in scene.items)


class TestLabelled:
    def test_a_label_is_certain_once_told_and_the_second_class_has_any_other(self):
        steps = Counter()
        for seed in range(2200):
            parts, nats = labelled(random.Random(seed))
            words, counted = zip(*parts)
            assert list(counted) == [False] * 3 + [True, False] * 7 + [True]
            pairs = re.findall(r"(\w+) (\w+)\.(?: |$)", "".join(words))
            assert len(pairs) == 9 and [len(set(x)) for x in (pairs, *zip(*pairs))] == [2, 2, 2]
            told = dict(pairs)
            assert {*told} <= {*COLOURS, *SHAPES}
            first, second = map(LABELS.index, told.values())
            steps[(second - first) % len(LABELS)] += 1
        assert nats == pytest.approx(math.log(11)) and set(steps) == set(range(1, 12))
        assert sum((n - 200) ** 2 / 200 for n in steps.values()) < 29.6      # chi-square, p = 0.001


class TestExamples:
    def test_every_record_shows_its_source_and_leaves_the_wording_to_the_model(self):
        for seed in range(12):
            found = examples(random.Random(seed), 23)
            for record in found:
                assert (record["turns"][0] if "turns" in record else record)["images"]
                assert "source" not in record or shows(record, scenes_of(record), 23)
                assert not any(map(held_out, texts_of(record)))
                said = str(texts_of(record))
                assert not re.search("<|(output|question|answer|context|choices):", said)
            bare = examples(random.Random(seed), side=None)
            assert list(map(texts_of, bare)) == list(map(texts_of, found)) and len(found) > 18

    def test_they_depend_on_the_rng_alone_not_on_the_process(self):
        code = ("import random; from common.data.shapes.texts import examples, texts_of; "
                "print([texts_of(r) for n in range(20) for r in examples(random.Random(n), None)])")
        root, command = Path(__file__).parents[2], [sys.executable, "-c", code]
        one, other = (subprocess.check_output(command, env={
            **os.environ, "PYTHONHASHSEED": seed}, cwd=root) for seed in "12")
        assert one == other and len(one) > 9000


class TestCorpus:
    def test_it_has_every_training_wording_and_no_test_wording(self, heard):
        heard = sorted(set(heard))
        forms = [form for forms in QUESTIONS.values() for form in forms.values()]
        for split in (1, 2):
            for wording in itertools.chain(*(form[split] for form in forms)):
                pattern = re.sub(r"\\{\w\\}", r"[\\w ]+", re.escape(wording)) + "( .*)?"
                count = sum(bool(re.fullmatch(pattern, words)) for words in heard)
                assert count >= 3 if split == 1 else count == 0, wording
        for part in ("give the box", "which object is in the box", "what colour is it?", "grew",
                     "did the .* move", "did the .* grow", "which colour did", "both pictures show",
                     "describe the picture", "nearest to you", "in this game", "read the letters"):
            assert sum(bool(re.search(part, words)) for words in heard) >= 3, part
        assert {*LABELS, *(f"{label}." for label in LABELS)} <= {*heard}

    def test_it_names_no_held_out_pair_and_is_always_the_same(self, heard):
        assert not any(map(held_out, heard)) and len(heard) > 9000
        assert heard[3800:4400] == list(itertools.islice(corpus(), 3800, 4400))

    def test_one_vocabulary_does_for_all(self, heard, drawn):
        asked = [record for scene, rng in many(400, (1, 3))
                 for record in questions(scene, rng, "test", side=None)]
        words, said = (set(re.findall(r"\w+", " ".join(texts))) for texts in (
            heard, itertools.chain(*map(texts_of, drawn + asked))))
        assert said <= words
        assert {*COLOURS, *SHAPES, *BACKGROUNDS, *SIZES} <= words and {*"".join(heard)} >= {*GLYPHS}
