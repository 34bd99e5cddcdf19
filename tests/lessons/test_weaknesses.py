"""lessons/weaknesses.py: its measures on writers whose answers are known."""
import json
import sys
from collections import Counter

import pytest

from common.data.shapes.scene import COLOURS, SHAPES
from common.data.shapes.world import Shapes
from lessons import overview, weaknesses

CHANCES = {"counting": 1 / 3, "relations": 0.5, "hallucination_accuracy": 0.5,
           "same_answer": 1 / 14, "word_order": 0.5, "attribute_binding": 0.5,
           **{f"attribute_binding/{kind}": 0.5 for kind in ("colour", "size", "place")}}


class Writer:
    """answer(record) is the text that it writes, score(text, record) the score of a candidate."""

    def __init__(self, answer=None, score=None):
        self.answer, self.score, self.records = answer, score, []

    def generate(self, records, **options):
        self.records += records
        return [self.answer(record) for record in records]

    def score_candidates(self, records, candidates):
        self.records += records
        return [[self.score(text, record) for text in texts]
                for record, texts in zip(records, candidates)]


def asked(record):
    return record["turns"][0]["prompt"]


@pytest.fixture(scope="module")
def world():
    return Shapes()


def oracle(world):
    """A writer that is always right."""
    return Writer(lambda record: record["turns"][0]["answer"],
                  lambda text, record: world.is_true(text, record["source"]))


class TestWeaknesses:
    def test_a_perfect_writer_has_none_and_every_figure_its_chance(self, world):
        found = weaknesses.weaknesses(oracle(world), world, 20)
        perfect = dict.fromkeys(CHANCES, 1.0) | {"same_answer": 0.0}
        assert {name: found[name] for name in CHANCES} == perfect
        assert {name: found[f"{name}_chance"] for name in CHANCES} == CHANCES
        assert found["hallucination_yes_rate"] == 0.5

    def test_questions_stand_in_the_template(self, world):
        writer = oracle(world)
        weaknesses.of_questions(writer, world, 2, "please, {}")
        assert all(asked(record).startswith("please, ") for record in writer.records)


class TestEvenQuestions:
    def test_each_fixed_answer_has_chance_level(self, world):
        writer = Writer(lambda record: "zero")
        found = weaknesses.even_questions(writer, world, 300)
        assert found["counting"] == pytest.approx(1 / 3, abs=0.08) and found["relations"] == 0
        answers = Counter((r["kind"], r["turns"][0]["answer"]) for r in writer.records)
        assert {word for kind, word in answers if kind == "count"} == {"zero", "one", "two"}
        shares = {word: n / 300 for (kind, word), n in answers.items() if kind == "relation"}
        assert shares["yes"] == pytest.approx(shares["no"], abs=0.08)
        assert shares["left"] == pytest.approx(shares["right"], abs=0.08)

    def test_a_world_with_more_objects_counts_further(self):
        found = weaknesses.even_questions(Writer(lambda record: "three"), Shapes(objects=3), 60)
        assert found["counting_chance"] == 1 / 4 and found["counting"] > 0.1


class TestCaptionPairs:
    def test_a_writer_that_prefers_what_is_false_is_always_wrong(self, world):
        writer = Writer(score=lambda text, record: not world.is_true(text, record["source"]))
        found = weaknesses.caption_pairs(writer, world, 10)
        assert {value for name, value in found.items() if not name.endswith("chance")} == {0.0}

    def test_bags_of_words_bind_nothing(self, world):
        """Equal scores are no preference for what is true."""
        writer = Writer(score=lambda text, record: sum(map(hash, text.split())))
        found = weaknesses.caption_pairs(writer, world, 10)
        assert found["attribute_binding"] == found["word_order"] == 0

    def test_each_kind_counts_alone_and_the_mean_is_over_the_kinds(self, world):
        def score(text, record):         # it sees colours and shapes, nothing else
            words = [word for word in text.split() if word in (*COLOURS, *SHAPES)]
            names = [item.name for item in record["source"].items]
            return all(" ".join(pair) in names for pair in zip(words[::2], words[1::2]))
        writer = Writer(score=score)
        found = weaknesses.caption_pairs(writer, world, 15)
        assert found["attribute_binding/colour"] == 1 and found["word_order"] == 0
        assert found["attribute_binding/size"] == found["attribute_binding/place"] == 0
        assert found["attribute_binding"] == pytest.approx(1 / 3)
        assert Counter(record["kind"] for record in writer.records) == dict.fromkeys(
            ("colour", "size", "place", "reversed"), 15)


class TestSameAnswer:
    def test_only_equal_answers_to_both_questions_count(self, world):
        def answer(record):              # it reads the prompt where the object is small
            item = record["source"].items[0] if not isinstance(record["source"], tuple) else None
            return "red" if item.size == "large" else getattr(item, record["kind"])
        writer = Writer(answer)
        found = weaknesses.same_answer(writer, world, 60)
        large = [r["source"].items[0].size == "large" for r in writer.records]
        assert found["same_answer"] == sum(large[:60]) / 60 and large[:60] == large[60:]
        assert 0.2 < found["same_answer"] < 0.8

    def test_both_questions_are_on_the_same_pictures(self, world):
        writer = Writer(asked)
        assert weaknesses.same_answer(writer, world, 8)["same_answer"] == 0
        pictures = [r["turns"][0]["images"][0][0].tobytes() for r in writer.records]
        assert pictures[:8] == pictures[8:] and len({*pictures}) == 8
        assert all(("colour" in asked(r)) == (k < 8) and "object" in asked(r)
                   for k, r in enumerate(writer.records))


class TestMain:
    def test_a_row_for_each_model_and_the_chances(self, world, tmp_path, monkeypatch, capsys):
        for run in ("flamingo", "blip", "llava-stage2"):
            (tmp_path / run).mkdir()
            (tmp_path / run / "result.json").write_text(json.dumps({}))
        writers = {name: oracle(world) for name in ("Flamingo", "BLIP", "LLaVA")}
        monkeypatch.setattr(overview, "open_model", lambda name, path: writers[name])
        monkeypatch.setattr(sys, "argv", ["weaknesses.py", "--runs", str(tmp_path),
                                          "--count", "4"])
        weaknesses.main()
        head, _, *rows = [line.strip("| ").split(" | ")
                          for line in capsys.readouterr().out.splitlines()]
        rows = {row[0]: dict(zip(head, row)) for row in rows}
        assert [*rows] == ["Flamingo", "BLIP", "LLaVA", "chance"]
        shown = [(row["counting"], row["same_answer"], row["word_order"]) for row in rows.values()]
        assert shown == [("1.000", "0.000", "1.000"), ("-", "-", "1.000"),
                         ("1.000", "0.000", "1.000"), ("0.333", "0.071", "0.500")]
        short = [asked(r).count(weaknesses.SHORT_ANSWER) for name in ("Flamingo", "LLaVA")
                 for r in writers[name].records if "turns" in r]
        assert {*short[:len(short) // 2]} == {0} and {*short[len(short) // 2:]} == {1}

    def test_without_a_run_there_is_no_table(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["weaknesses.py", "--runs", str(tmp_path)])
        with pytest.raises(ValueError, match="no finished run of a model that writes$"):
            weaknesses.main()
