"""BLIP-2 in train.py: its stages, starts and recipes, what is frozen, and blip2.py's commands."""
import functools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import blip2
import train
from blip2 import INSTRUCT_SIZES, RECIPES, TRAINS, data_sources
from common.data.batches import world_tokenizer
from common.evaluation import retrieval
from common.training.lm import Pretraining
from common.training.optimizer import find_recipe, freeze
from tests.fuzz import one_line
from tests.helpers import command, drawing, mistake, picture, toy_blip2
from tests.training.runs import SETTINGS, Toy, assert_same, built, pair, start, weights

SIZES = ["num_queries=3", "qformer_width=10", "qformer_layers=3", "qformer_heads=2", "embed_dim=7"]
T5_SIZES = ["width=14", "layers=1", "heads=2", "head_width=5", "hidden=19"]
# The run of each stage: its settings.
RUNS = {"clip": SETTINGS["clip"], "lm": SETTINGS["lm"], "blip2-stage1": SIZES, "blip2-stage2": [],
        "blip2-retrieval": [], "blip2-captions": [], "blip2-vqa": [], "blip2-instruct": []}


@pytest.fixture(scope="module", autouse=True)
def short_evaluation():
    """Evaluate on 3 records instead of 400, the language models on none."""
    with pytest.MonkeyPatch.context() as patch:
        for model in (blip2.Stage1, blip2.Stage2):
            patch.setattr(model, "evaluate", functools.partialmethod(model.evaluate, count=3))
        patch.setattr(retrieval, "zero_shot", lambda model, data: {})
        patch.setattr(Pretraining, "evaluate", lambda self, data: {})
        patch.setattr(Pretraining, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with RUNS and stage 2 with a T5, as STAGE-toy."""
    folder = tmp_path_factory.mktemp("blip2")
    for stage, settings in RUNS.items():
        assert start(stage, settings, runs=str(folder)) == 0
    assert start("lm", T5_SIZES, preset="t5-tiny", runs=str(folder)) == 0
    assert start("blip2-stage2-t5", runs=str(folder)) == 0
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def quick_end():
    """A trap: the run ends without figures."""
    train.measure = lambda run: None


class TestTrains:
    def test_every_pattern_of_every_stage_matches(self):
        for stage, patterns in TRAINS.items():
            first = stage in ("blip2-stage1", "blip2-retrieval")
            freeze(toy_blip2(None if first else "t5"), patterns)


class TestRecipes:
    @pytest.mark.parametrize("preset, stage, steps, batch, lr", [
        ("vit-l", "stage1", 250000, 2320, 1e-4), ("vit-g", "stage1", 250000, 1680, 1e-4),
        ("vit-g", "stage2", 80000, 1920, 1e-4), ("vit-l", "stage2-t5", 80000, 1520, 1e-4),
        ("vit-g", "captions", 11000, 256, 1e-5), ("vit-g", "retrieval", 12600, 224, 1e-5),
        ("vit-l", "retrieval", 12600, 224, 5e-6), ("vit-g", "instruct", 60000, 128, 1e-5)])
    def test_the_papers_numbers(self, preset, stage, steps, batch, lr):
        recipe = find_recipe(RECIPES, preset, (f"blip2-{stage}", "shapes", "lm"), {})
        assert (recipe.steps, recipe.batch_size, recipe.lr) == (steps, batch, lr)
        assert (recipe.weight_decay, recipe.optimizer) == (0.05, "adamw")


class TestDataSources:
    def sources(self, kind=None, world=None, **changes):
        world = world or Toy(image_size=15)
        tokenizer = world_tokenizer(world)
        config = replace(toy_blip2(kind, **changes).config, vocab_size=len(tokenizer))
        return data_sources(world, tokenizer, config)

    @pytest.mark.parametrize("kind, losses, kinds, keys", [
        (None, "itc,itm,itg", None, "images ids labels draws"),
        ("gpt2", "lm", {"caption": 4, "question": 1}, "images ids labels mask"),
        ("t5", "lm", {"caption": 4, "question": 1}, "images ids labels mask answer_ids"),
        ("gpt2", "captions", {"caption": 1}, "images ids labels mask"),
        ("gpt2", "vqa", {"question": 1}, "images question_ids ids labels mask")])
    def test_batches_are_of_the_tasks_records(self, kind, losses, kinds, keys):
        source, = self.sources(kind, losses=losses)
        assert source.kinds == kinds
        rngs = [random.Random(i) for i in range(4)]
        batch = source.collate([source.record(i, rng) for i, rng in enumerate(rngs)], rngs)
        assert {*batch} == {*keys.split()} and batch["images"].shape == (4, 3, 15, 15)

    def test_instructions_come_by_the_square_root_of_their_number(self):
        source, = self.sources("t5", losses="instruct")
        for name, size in INSTRUCT_SIZES.items():
            assert source.kinds[name] == pytest.approx(size ** 0.5)
        plain, = self.sources("t5", losses="instruct", balance=1.0)
        assert plain.kinds == INSTRUCT_SIZES == source.sizes
        seen = {str(source.record(0, random.Random(i))["turns"][0]["prompt"]) for i in range(40)
                if "turns" in source.record(0, random.Random(i))}
        assert len(seen) > 5

    def test_a_world_of_captions_has_no_questions(self):
        world = SimpleNamespace(tasks=(), name="mine")
        config = toy_blip2("gpt2").config
        source, = data_sources(world, None, config)
        assert (source.world, source.kinds) == (world, None)
        with one_line("vqa: mine has no question"):
            data_sources(world, None, replace(config, losses="vqa"))


class TestRuns:
    def test_a_run_is_read_back_in_eval_mode(self, runs):
        model, tokenizer = blip2.from_pretrained(runs / "blip2-stage2-toy")
        assert not model.training and len(tokenizer) == model.config.vocab_size
        assert_same("weights", dict(model.state_dict()), weights(runs / "blip2-stage2-toy"))

    def test_every_figure_has_a_name(self, runs):
        for run, figures in (
                ("stage1", "image_to_text_recall@1 text_to_image_recall@1_reranked itm_accuracy"),
                ("retrieval", "image_to_text_recall@1_reranked"),
                ("stage2", "caption_accuracy caption_accuracy_single vqa_accuracy"),
                ("stage2-t5", "caption_accuracy vqa_accuracy vqa_accuracy_blind"),
                ("captions", "caption_accuracy"), ("vqa", "vqa_accuracy vqa_accuracy_blind"),
                ("instruct", "vqa_accuracy vqa_accuracy/statement vqa_accuracy/dialogue "
                 "vqa_accuracy/choice vqa_accuracy/choice_chance")):
            found = result(runs / f"blip2-{run}-toy")
            assert all(0 <= found[name] <= 1 for name in figures.split()), run
        first = result(runs / "blip2-stage1-toy")
        assert first["itg_loss"] > 0 and first["itg_loss_wrong_image"] > 0

    def test_each_stage_starts_from_the_one_before_and_keeps_what_is_frozen(self, runs):
        clip, lm, first, second, vqa, instruct = (weights(runs / f"{name}-toy") for name in (
            "clip", "lm", "blip2-stage1", "blip2-stage2", "blip2-vqa", "blip2-instruct"))
        for name, value in first.items():
            if ".vit." in name:
                theirs = name.replace("vision.vit.", "vision.")
                assert_same(name, value, clip[theirs])
                assert_same(name, second[name], value)
                changed = name.split(".")[2] in ("transformer", "patch_embed", "cls_token")
                assert not changed or name.endswith("k_proj.bias") \
                    or not torch.equal(vqa[name], value), f"{name} is not fine-tuned"
            elif name.startswith("qformer.") and "head" not in name and "k_proj.bias" not in name:
                text = any(part in name for part in ("text_mlp", "token_embed", "pos_embed"))
                assert torch.equal(second[name], value) == text, f"{name} in stage 2"
                if "blocks.2.text_mlp" not in name:          # nothing reads the last text
                    assert not torch.equal(instruct[name], second[name]), f"{name}, InstructBLIP"
        for name, value in lm.items():
            assert_same(name, second[name], value)
            assert_same(name, instruct[name], value)
        assert not {name for name in second if "head" in name or "temp" in name}

    def test_without_a_start_the_qformer_is_new(self, runs, tmp_path):
        run = built("blip2-stage2", SIZES, runs=str(runs), init="none", out=str(tmp_path / "new"))
        clip, first = weights(runs / "clip-toy"), weights(runs / "blip2-stage1-toy")
        assert_same("cls_token", run.model.vision.vit.cls_token.data, clip["vision.cls_token"])
        assert not torch.equal(run.model.qformer.query_tokens.data, first["qformer.query_tokens"])

    def test_a_language_model_is_read_from_the_run_that_is_named(self, runs, tmp_path):
        run = built("blip2-stage2", runs=str(runs), out=str(tmp_path / "new"),
                    parts=[f"language={runs / 'lm-toy-t5-tiny'}"])
        assert_same("lm", run.model.lm.token_embed.weight.data,
                    weights(runs / "lm-toy-t5-tiny")["lm.token_embed.weight"])

    def test_a_larger_image_has_interpolated_positions(self, runs, tmp_path):
        run = built("blip2-vqa", ["resize_to=48"], runs=str(runs), out=str(tmp_path / "new"))
        assert run.model.vision.vit.pos_embed.shape[0] == 1 + 36
        assert run.world.image_size == 48

    def test_images_have_the_size_of_the_clip_run(self, runs, tmp_path):
        train.save(built("clip", ["image_size=48", *SETTINGS["clip"]], out=str(tmp_path / "clip")))
        run = built("blip2-stage1", SIZES, parts=[f"vision={tmp_path / 'clip'}"],
                    out=str(tmp_path / "new"))
        assert run.world.image_size == run.config.image_size == 48

    def test_two_processes_end_with_the_weights_of_one(self, runs, tmp_path, monkeypatch):
        argv = ["blip2-stage1", "--data", "toy", "--runs", str(runs), "--steps", "2", "--precision",
                "fp32", "--batch_size", "6", "--out", str(tmp_path / "two"),
                *(f"--set={size}" for size in SIZES)]
        for process in pair(argv, tmp_path / "two", (quick_end, quick_end)):
            process.end()
        monkeypatch.setattr(train, "measure", lambda run: None)
        assert start("blip2-stage1", SIZES, runs=str(runs), out=str(tmp_path / "one")) == 0
        assert_same("weights", weights(tmp_path / "two"), weights(tmp_path / "one"), 2e-5)


class TestMistakes:
    @pytest.mark.parametrize("stage, flags, words", [
        ("blip2-stage1", {"batch_size": 1}, "batch_size 1 .*hard negatives"),
        ("blip2-stage1", {"accumulate": 2}, "accumulate 2.*hard negatives"),
        ("blip2-stage1", {"losses": "lm"}, "losses=lm: the stage without a language model has itc"),
        ("blip2-stage2", {"runs": "none"}, "train.py blip2-stage1 --data toy --out none"),
        ("blip2-stage2", {"init": "blip2-stage2-toy", "losses": "itc,itm"}, "losses=itc,itm: .* lm"),
        ("blip2-stage2-t5", {"parts": ["language=none"]}, "train.py lm .*--preset t5-tiny.* none"),
        ("blip2-stage2", {"parts": ["vision=wide"]}, "vision.norm.weight is .22,., the model's .26"),
        ("blip2-vqa", {"init": "clip-toy"}, "a run of 'clip', not of 'blip2'"),
        ("blip2-stage2-t5", {"parts": ["language=lm-toy"]}, "lm-toy: a llama; blip2-stage2-t5 needs a t5"),
        ("blip2-vqa", {"data": "emoji", "init": "blip2-stage2-toy"}, "emoji has no question")])
    def test_they_are_one_line_before_anything_is_written(self, runs, tmp_path, monkeypatch, stage,
                                                          flags, words):
        monkeypatch.chdir(runs)
        if "wide" in str(flags):
            train.save(built("clip", ["vision_width=26", *SETTINGS["clip"][1:]], out="wide"))
        with one_line(words):
            start(stage, **{"out": str(tmp_path / "new"), "runs": "."} | flags)
        assert not (tmp_path / "new").exists()


class TestMain:
    @pytest.fixture(autouse=True)
    def pictures(self, tmp_path, monkeypatch):
        """The current folder: a folder of three pictures, a picture."""
        (tmp_path / "many").mkdir()
        for name in ("red", "blue", "green"):
            drawing(name, size=40)[0].save(tmp_path / "many" / f"{name}.png")
        (tmp_path / "red.png").write_bytes(picture(3))
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("argv", [
        "stage2-toy caption red.png", "stage2-toy answer red.png what?",
        "stage2-t5-toy caption red.png", "vqa-toy answer red.png what?",
        "instruct-toy answer red.png what?"])
    def test_a_caption_or_an_answer_is_one_line(self, runs, argv):
        status, out, err = command("blip2.py", *f"{runs}/blip2-{argv}".split())
        assert (status, out.count("\n"), err) == (0, 1, "")

    def test_stage_1_matches_and_searches(self, runs):
        run = runs / "blip2-stage1-toy"
        status, out, err = command("blip2.py", run, "match", "red.png", "a red circle", "a star")
        assert (status, out.count("%  "), err) == (0, 2, "")
        status, out, err = command("blip2.py", run, "search", "a red circle", "many")
        assert (status, out.count("\n"), out.splitlines()[-1]) == (
            0, 4, f"drawn in {run / 'search.png'}"), err

    @pytest.mark.parametrize("argv, words", [
        ("blip2-stage2-toy search star many", "its losses are lm; this needs one with itc"),
        ("blip2-stage1-toy caption red.png", "its losses are itc,itm,itg; .* lm"),
        ("blip2-vqa-toy caption red.png", "its losses are vqa; .* lm"),
        ("blip2-captions-toy answer red.png what?", "its losses are captions; .* vqa"),
        ("blip2-stage2-toy answer red.png " + "what?" * 300, "tokens .*context is 256"),
        ("clip-toy caption red.png", "a run of 'clip', not of 'blip2'")])
    def test_a_mistake_is_told_in_one_line_and_nothing_is_written(self, runs, argv, words):
        assert re.search(words, mistake("blip2.py", *f"{runs}/{argv}".split()))
        assert not Path("search.png").exists()
