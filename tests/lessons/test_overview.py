"""lessons/overview.py: its figures, its table, its picture, and what a missing run leaves."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import blip2
import clip
import train
from common.data.shapes.world import Shapes
from lessons import overview

RUN = {"parameters": 7000, "trainable_parameters": 40, "seconds": 2.5, "peak_memory_mb": 300}
RECALLS = {"image_to_text_recall@1": 0.5, "text_to_image_recall@1": 0.25}
RESULTS = {
    "clip": RUN | RECALLS,
    "flamingo": RUN | {"caption_accuracy": 0.75, "vqa_accuracy": 0.5, "vqa_accuracy/colour": 1.0,
                       "shots_8": 0.9, "hallucination_accuracy": 0.125},
    "blip": RUN | RECALLS | {"image_to_text_recall@1_reranked": 0.625, "caption_accuracy": 0.25},
    "blip-vqa": RUN | {"parameters": 6500, "seconds": 4, "peak_memory_mb": 200,
                       "vqa_accuracy": 0.375, "vqa_accuracy_blind": 0.1}}


class Writer:
    """A model that writes: answer(record) is the text."""

    def __init__(self, answer):
        self.answer, self.records = answer, []

    def generate(self, records, **options):
        self.records += records
        return [self.answer(record) for record in records]


def retriever(pictures):
    """A CLIP that finds text number i for the i-th of these pictures."""
    vectors = torch.eye(len(pictures))
    return SimpleNamespace(
        encode_images=lambda images: vectors[[pictures.index(image) for image in images]],
        ids=lambda texts: torch.arange(len(texts)),
        model=SimpleNamespace(encode_text=lambda ids: vectors[ids]))


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(Shapes, "splits", Shapes.splits | {"test": 30})
    return Shapes()


@pytest.fixture
def said(world, monkeypatch, tmp_path, capsys):
    """said(runs with a result) -> stdout, stderr, overview.json, the arguments of the sheet.

    Flamingo writes true captions, BLIP false ones; BLIP says yes to each question.
    """
    models = {"clip": retriever([world.record("test", i)["images"][0] for i in range(30)]),
              "flamingo": Writer(lambda record: record["texts"][0]),
              "blip": Writer(lambda record: "a red sky"), "blip-vqa": Writer(lambda record: "yes")}
    sheets, sheet = [], overview.sheet

    def call(*runs):
        for run in runs:
            (tmp_path / run).mkdir()
            (tmp_path / run / "result.json").write_text(json.dumps(RESULTS[run]))
        monkeypatch.setattr(overview, "open_model", lambda name, path: models[path.name])
        monkeypatch.setattr(overview, "sheet", lambda *given, **more: sheets.append(given)
                            or sheet(*given, **more))
        monkeypatch.setattr(sys, "argv", ["overview.py", "--runs", str(tmp_path)])
        overview.main()
        return *capsys.readouterr(), json.loads((tmp_path / "overview.json").read_text()), sheets[0]
    return call


class TestOpenModel:
    def test_a_model_with_its_tokenizer_becomes_a_writer(self, monkeypatch):
        monkeypatch.setattr(blip2, "from_pretrained", lambda path: ("model", path))
        monkeypatch.setattr(clip, "from_pretrained", lambda path: [path])
        assert overview.open_model("BLIP-2", "run").tokenizer == "run"
        assert overview.open_model("CLIP", "run") == ["run"]

    def test_all_trains_every_run_that_there_is_a_stage_for(self):
        needed = {run for model in overview.MODELS.values() for run in model.values()}
        assert needed & {*train.STAGES} <= {*train.LISTS["all"]}


class TestFigures:
    def test_a_row_is_of_all_runs_and_each_figure_of_its_own(self):
        row = overview.figures(overview.MODELS["BLIP"], RESULTS)
        assert {column: value for column, value in row.items() if value is not None} == {
            "parameters": 6500, "trained": 40, "seconds": 6.5, "memory": 300,
            "image to text": 0.625, "text to image": 0.25, "captions": 0.25, "questions": 0.375,
            "wrong image": 0.1}

    def test_a_sum_without_one_of_its_runs_is_none(self):
        row = overview.figures(overview.MODELS["BLIP"], RESULTS | {"blip-vqa": {}})
        missing = ("seconds", "memory", "parameters", "questions")
        assert [row[name] for name in missing] == [None] * 4
        assert row["captions"] == 0.25


class TestTable:
    def test_units_dashes_and_no_column_of_dashes_alone(self):
        none = dict.fromkeys([*overview.UNITS, *overview.FIGURES])
        rows = {"A": none | {"parameters": 1234567, "seconds": 61.7, "memory": 88},
                "B": none | {"captions": 0.9375}}
        assert overview.table(rows).splitlines() == [
            "| model | parameters | seconds | memory | captions |",
            "| --- | ---: | ---: | ---: | ---: |",
            "| A | 1,234,567 | 62 | 88 MB | - |", "| B | - | - | - | 0.938 |"]


class TestMain:
    def test_the_table_is_printed_and_written(self, said, tmp_path):
        out, err, rows, _ = said(*RESULTS)
        assert out.startswith((tmp_path / "overview.md").read_text())
        assert [line.split(" | ")[0] for line in out.splitlines()[2:7]] == [
            "| CLIP", "| Flamingo", "| BLIP", "| BLIP-2", "| LLaVA"]
        assert rows["Flamingo"]["hallucination"] == 0.125, "as its run has measured"
        assert rows["BLIP"]["hallucination"] == 0.5 and rows["CLIP"]["hallucination"] is None
        assert rows["BLIP"]["size"] == 0 and rows["Flamingo"]["size"] is None
        assert {*rows["BLIP-2"].values()} == {None}
        missing = [line for line in err.splitlines() if f"{tmp_path}/blip2" in line]
        assert [line.partition("; ")[2] for line in missing] == [
            f"python train.py blip2-{stage} --runs {tmp_path} --resume makes it"
            for stage in ("stage1", "stage2")]

    def test_the_picture_has_every_models_captions_of_the_same_images(self, said, tmp_path, world):
        _, _, _, (_, (head, *rows)) = said(*RESULTS)
        assert [text for _, text, _ in head[2]] == [
            "CLIP finds", "Flamingo", "BLIP", "BLIP-2", "LLaVA"]
        texts = {world.record("test", i)["images"][0].tobytes(): world.record("test", i)["texts"][0]
                 for i in range(30)}
        for _, image, cells in rows:
            true = texts[image.tobytes()]
            assert [*cells] == [(None, true, True), (None, true, True), (None, "a red sky", False),
                                (None, "-", None), (None, "-", None)]
        assert [(" and a" in texts[row[1].tobytes()]) for row in rows] == [False] * 3 + [True] * 3
        assert Image.open(tmp_path / "overview.png").width <= 820

    def test_without_any_run_there_is_no_table(self, said):
        with pytest.raises(ValueError, match="no finished run of any model$"):
            said()
