"""LLaVA in train.py: its stages, starts and recipes, what is frozen, and llava.py's commands."""
import functools
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import llava
import train
from common.data.batches import Batches, world_tokenizer
from common.evaluation import retrieval
from common.training.lm import Pretraining
from common.training.optimizer import find_recipe, freeze, learning_rate
from llava import MIX, PAPERS, RECIPES, TRAINS, data_sources
from tests.fuzz import one_line
from tests.helpers import command, drawing, llava_config, mistake, picture, toy_llava
from tests.training.runs import SETTINGS, Toy, assert_same, built, pair, start, weights

LM = ["width=20", "layers=2", "heads=2", "kv_heads=2", "hidden=26"]
# The run of each stage: its settings.
RUNS = {"clip": SETTINGS["clip"], "lm": LM, "llava-stage1": [], "llava-stage2": [],
        "llava-tiles": [], "qwen-stage1": ["num_queries=4"], "qwen-stage2": [], "qwen-stage3": []}


@pytest.fixture(scope="module", autouse=True)
def short_evaluation():
    """Evaluate on 4 records instead of 400, the parts on none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava.LLaVA, "evaluate",
                      functools.partialmethod(llava.LLaVA.evaluate, count=4))
        patch.setattr(retrieval, "zero_shot", lambda model, data: {})
        patch.setattr(Pretraining, "evaluate", lambda self, data: {})
        patch.setattr(Pretraining, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with RUNS, as STAGE-toy."""
    folder = tmp_path_factory.mktemp("llava")
    for stage, settings in RUNS.items():
        assert start(stage, settings, runs=str(folder)) == 0, stage
    return folder


class TestTrains:
    def test_every_pattern_of_every_stage_matches(self):
        for stage, patterns in TRAINS.items():
            views = "tiles" if stage == "llava-tiles" else "pad"
            freeze(toy_llava(views=views), patterns)
        assert {*TRAINS} == {name for name, stage in train.STAGES.items() if stage.file is llava}


class TestRecipes:
    @pytest.mark.parametrize("preset, stage, rows, epochs, batch, lr", [
        ("v1-7b", "stage1", 595_375, 1, 128, 2e-3), ("v1-7b", "stage2", 158_000, 3, 32, 2e-5),
        ("v1.5-7b", "stage1", 558_128, 1, 256, 1e-3), ("v1.5-7b", "stage2", 665_298, 1, 128, 2e-5),
        ("v1.5-13b", "stage2", 665_298, 1, 128, 2e-5)])
    def test_the_papers_numbers(self, preset, stage, rows, epochs, batch, lr):
        recipe = find_recipe(RECIPES, preset, (f"llava-{stage}", "shapes", "captions"), {})
        assert (recipe.batch_size, recipe.lr, recipe.weight_decay) == (batch, lr, 0)
        assert recipe.steps == pytest.approx(rows * epochs / batch, rel=1e-3)
        assert (recipe.optimizer, recipe.schedule, recipe.betas) == ("adamw", "cosine",
                                                                     (0.9, 0.999))
        warmup = -(-3 * recipe.steps // 100)         # 3%, rounded up
        assert recipe.warmup == warmup
        rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
        assert max(rates) == pytest.approx(lr) and rates.index(max(rates)) in (warmup - 1, warmup)
        assert rates[0] <= lr / warmup and rates[-1] < lr / 1e3
        assert rates[recipe.steps // 2] == pytest.approx(lr / 2, rel=0.06)

    @pytest.mark.parametrize("stage, steps, batch, lr, warmup", [
        ("qwen-stage1", 50000, 30720, 2e-4, 500), ("qwen-stage2", 19000, 4096, 5e-5, 400),
        ("qwen-stage3", 8000, 128, 1e-5, 3000)])
    def test_qwens_numbers(self, stage, steps, batch, lr, warmup):
        recipe = PAPERS[stage]
        assert (recipe.steps, recipe.batch_size, recipe.lr, recipe.warmup, recipe.weight_decay,
                recipe.betas, recipe.eps) == (steps, batch, lr, warmup, 0.05, (0.9, 0.98), 1e-6)

    def test_the_image_encoder_of_tiles_has_a_tenth_of_the_rate(self):
        recipe = find_recipe(RECIPES, "next-7b", ("llava-tiles",), {})
        assert (recipe.lr, recipe.lr_multipliers) == (2e-5, {"vision.*": 0.1})


class TestDataSources:
    def source(self, world=None, **changes):
        return data_sources(world or Toy(image_size=15), None, llava_config(**changes))[0]

    def test_stage_1_has_captions_and_stage_2_the_mix(self):
        assert self.source(losses="captions").kinds is None
        assert self.source().kinds == llava_config().shares()
        assert self.source(mix="reading=1").kinds == {"reading": 1}
        assert self.source(SimpleNamespace(tasks=(), name="mine")).kinds is None

    def test_a_task_that_the_world_does_not_have_is_refused(self):
        with one_line("mix=question=1,flying=2: toy has .*question"):
            self.source(mix="question=1,flying=2")

    @pytest.mark.parametrize("mix", [MIX, "reading=1", "grounding=3,question=1,caption=1"])
    def test_every_task_becomes_ids_and_labels(self, mix):
        world = Toy(image_size=15)
        config, tokenizer = llava_config(mix=mix), world_tokenizer(world)
        config = replace(config, language=replace(config.language, context_length=256))
        source, = data_sources(world, tokenizer, config)
        rngs = [random.Random(i) for i in range(40)]
        batch = source.collate([source.record(i, rng) for i, rng in enumerate(rngs)], rngs)
        assert bool((batch["labels"] >= 0).any(dim=1).all()), "a row trains nothing"
        assert batch["images"].shape[1:] == (3, 15, 15)


class TestRuns:
    def test_each_stage_starts_from_the_one_before_and_keeps_what_is_frozen(self, runs):
        of = {stage: weights(runs / f"{stage}-toy") for stage in RUNS}
        for name, value in of["llava-stage1"].items():
            part = name.split(".")[0]
            if part != "projector":          # bit for bit those of its parts
                assert_same(name, value, of["clip" if part == "vision" else "lm"][name])
            second = of["llava-stage2"][name]
            if part == "vision":
                assert_same(name, second, value)
            else:
                assert not torch.equal(second, value), f"{name} is not trained in stage 2"
        for before, stage, trained in (("qwen-stage2", "qwen-stage3", "projector lm"),
                                       ("qwen-stage1", "qwen-stage2", "vision projector lm"),
                                       ("llava-stage1", "llava-tiles", "vision projector lm")):
            for name, value in of[before].items():
                if not name.endswith("k_proj.bias"):         # their gradient is rounding
                    moved, part = not torch.equal(value, of[stage][name]), name.split(".")[0]
                    assert moved == (part in trained), f"{name} in {stage}"
        for name in of["lm"]:
            assert_same(name, of["qwen-stage1"][name], of["lm"][name])

    def test_every_figure_has_a_name(self, runs):
        for run, figures in (
                ("llava-stage1", "caption_accuracy"), ("llava-tiles", "reading_accuracy"),
                ("llava-stage2", "caption_accuracy vqa_accuracy vqa_accuracy_blind")):
            found = json.loads((runs / f"{run}-toy" / "result.json").read_text())
            assert all(0 <= found[name] <= 1 for name in figures.split()), f"{run}: {found}"

    def test_the_stages_settings(self, runs):
        configs = {stage: llava.from_pretrained(runs / f"{stage}-toy")[0].config
                   for stage in RUNS if stage not in ("clip", "lm")}
        assert [c.views for c in configs.values()] == ["pad", "pad", "tiles"] + ["squash"] * 3
        assert [c.projector for c in configs.values()] == ["mlp"] * 3 + ["adapter"] * 3
        assert [c.view_size for c in configs.values()] == [32] * 4 + [64] * 2
        assert configs["llava-tiles"].image_size == 64 and "grounding" in configs[
            "qwen-stage3"].shares()

    def test_a_run_is_read_back_in_eval_mode(self, runs):
        model, tokenizer = llava.from_pretrained(runs / "llava-stage2-toy")
        assert not model.training and len(tokenizer) == model.config.language.vocab_size
        assert_same("weights", dict(model.state_dict()), weights(runs / "llava-stage2-toy"))

    def test_a_stopped_run_goes_on_to_the_same_weights(self, runs, tmp_path, monkeypatch):
        def ended(name, **more):
            run = built("llava-stage2", runs=str(runs), steps=3, out=str(tmp_path / name), **more)
            first = run.step
            train.fit(run)
            return first, run.step
        assert ended("whole") == (0, 3)
        with monkeypatch.context() as patch:
            patch.setattr(train, "update", stopped(train.update))
            assert ended("stopped") == (0, 2)
        assert ended("stopped", resume=True) == (2, 3)
        assert_same("weights", weights(tmp_path / "stopped"), weights(tmp_path / "whole"))

    def test_two_processes_one_without_images_end_with_the_weights_of_one(self, runs, tmp_path,
                                                                          monkeypatch):
        mix = ["mix=question=1,text_question=2"]
        run = built("llava-stage2", mix, runs=str(runs), out=str(tmp_path / "none"))
        shares = [Batches(run.batches.sources, batch_size=6, rank=rank, world_size=2)
                  for rank in range(2)]
        images = [[(share[step][0]["feature_index"] >= 0).any().item() for share in shares]
                  for step in range(2)]
        assert [True, False] in images or [False, True] in images, f"choose another mix: {images}"
        argv = ["llava-stage2", "--data", "toy", "--runs", str(runs), "--steps", "2", "--precision",
                "fp32", "--batch_size", "6", "--set", *mix, "--out", str(tmp_path / "two")]
        for process in pair(argv, tmp_path / "two", (quick_end, quick_end)):
            process.end()
        monkeypatch.setattr(train, "measure", lambda run: None)
        assert start("llava-stage2", mix, runs=str(runs), out=str(tmp_path / "one")) == 0
        assert_same("weights", weights(tmp_path / "two"), weights(tmp_path / "one"), 2e-5)


    def test_conversations_of_ones_own_and_a_language_model_from_the_start(self, tmp_path):
        """Every record but the first has a picture; the vocabulary is not the preset's."""
        said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a red dog"}]
        records = [{"id": str(k), "image": f"{k}.png", "conversations": said} for k in range(40)]
        records[0] = {"id": "0", "conversations": [{"from": "human", "value": "who?"}, said[1]]}
        for k in range(40):
            (tmp_path / f"{k}.png").write_bytes(picture(k))
        (tmp_path / "own.json").write_text(json.dumps(records))
        how = {"data": f"llava:{tmp_path}/own.json", "parts": ["vision=none", "language=none"]}
        assert start("llava-stage1", out=str(tmp_path / "first"), **how) == 0
        assert start("llava-stage2", out=str(tmp_path / "second"), init=str(tmp_path / "first"),
                     data=how["data"]) == 0
        model, tokenizer = llava.from_pretrained(tmp_path / "second")
        assert model.config.language.vocab_size == len(tokenizer)
        assert json.loads((tmp_path / "second/result.json").read_text())["perplexity"] > 1


def quick_end():
    """A trap: the run ends without figures."""
    train.measure = lambda run: None


def stopped(update):
    """A step during which a signal comes, when it is the second."""
    def struck(run, *arguments):
        run.stopped = 15 if run.step == 1 else None
        return update(run, *arguments)
    return struck


class TestMistakes:
    @pytest.mark.parametrize("stage, setting, flags, words", [
        ("llava-stage2", "views=pad", {"runs": "none"}, "train.py llava-stage1"),
        ("llava-stage2", "mix=flying=1", {}, "mix=flying=1: toy has"),
        ("qwen-stage1", "num_queries=5", {}, "num_queries=5.* square"),
        ("llava-stage2", "views=pad", {"init": "clip-toy"}, "a run of 'clip', not of 'llava'")])
    def test_they_are_one_line_before_anything_is_written(self, runs, tmp_path, monkeypatch, stage,
                                                          setting, flags, words):
        monkeypatch.chdir(runs)
        with one_line(words):
            start(stage, [setting], **{"out": str(tmp_path / "new"), "runs": "."} | flags)
        assert not (tmp_path / "new").exists()


class TestMain:
    @pytest.fixture(autouse=True)
    def pictures(self, tmp_path, monkeypatch):
        drawing("red", size=40)[0].save(tmp_path / "red.png")
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("run", ["llava-stage2", "llava-tiles", "qwen-stage3"])
    def test_an_answer_is_one_line(self, runs, run):
        status, out, err = command("llava.py", runs / f"{run}-toy", "ask", "red.png", "what?")
        assert (status, err, out[-1:]) == (0, "", "\n")

    def test_a_chat_ends_with_the_input(self, runs, monkeypatch):
        lines = ["and?", "/show none.png", "what?"]

        def read(prompt):
            if not lines:
                raise EOFError
            return lines.pop()
        monkeypatch.setattr(llava.chat.talk, "__defaults__", (read,))
        status, out, err = command("llava.py", runs / "llava-stage2-toy", "chat", "red.png")
        assert (status, err) == (0, "") and "error: none.png" in out and "/show" in out

    @pytest.mark.parametrize("argv, words", [
        ("llava-stage2-toy ask none.png what?", "none.png"),
        ("llava-stage2-toy ask red.png " + "what?" * 300, "tokens .*context is 256"),
        ("clip-toy ask red.png what?", "a run of 'clip', not of 'llava'")])
    def test_a_mistake_is_told_in_one_line(self, runs, argv, words):
        assert re.search(words, mistake("llava.py", *f"{runs}/{argv}".split()))
