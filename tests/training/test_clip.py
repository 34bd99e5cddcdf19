"""CLIP in training and after it: recipes, data, frozen towers, figures, and the user's commands."""
import json
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip
import train
from clip import RECIPES, CLIPConfig
from common.data.batches import EvalData, world_tokenizer
from common.data.collators import ImageTextBatch
from common.data.safe_read import read_json
from common.training.optimizer import find_recipe, freeze
from tests.helpers import assert_close, clip_batch, command, drawing, mistake, toy_clip
from tests.training.runs import TOY, Toy, build


class TestRecipes:
    @pytest.mark.parametrize("name, lr", [
        ("ViT-B/32", 5e-4), ("ViT-B/16", 5e-4), ("ViT-L/14", 4e-4), ("ViT-L/14@336", 2e-5),
        ("RN50", 5e-4), ("RN101", 5e-4), ("RN50x4", 5e-4), ("RN50x16", 4e-4), ("RN50x64", 3.6e-4)])
    def test_the_papers_numbers(self, name, lr):
        recipe = find_recipe(RECIPES, name, ("shapes", ""), {})
        assert (recipe.lr, recipe.batch_size, recipe.weight_decay) == (lr, 32768, 0.2)
        assert (recipe.warmup, recipe.grad_clip, recipe.optimizer) == (2000, None, "adamw")
        assert (recipe.betas, recipe.eps) == (((0.9, 0.999), 1e-8) if name.startswith("RN")
                                              else ((0.9, 0.98), 1e-6))
        epochs = recipe.steps * recipe.batch_size / 400e6
        assert epochs == pytest.approx(1 if name.endswith("@336") else 32, rel=0.01)

    def test_our_own_presets_clip_the_gradient(self):
        for name in ("tiny", "small", "RN-tiny"):
            assert find_recipe(RECIPES, name, ("shapes", ""), {}).grad_clip == 1.0
        assert find_recipe(RECIPES, "tiny", ("emoji", ""), {}).weight_decay == 2.0


class TestDataSources:
    def test_it_is_images_with_one_caption_each_of_the_configs_sizes(self):
        world, config = Toy(image_size=32), CLIPConfig(image_size=24, context_length=7)
        source, = clip.data_sources(world, world_tokenizer(world), config)
        assert (source.world, source.weight, source.kinds) == (world, 1.0, None)
        batch = source.collate([source.record(i, random.Random(i)) for i in range(3)],
                               [random.Random(i) for i in range(3)])
        assert batch["images"].shape == (3, 3, 24, 24) and batch["images"].dtype == torch.uint8
        assert batch["ids"].shape == (3, 7) and (batch["ids"] == config.eos_id).any(dim=1).all()


class TestFrozen:
    @pytest.mark.parametrize("trained, moved", [
        (["*"], {"bn1", "bn2", "bn3", "layer1", "layer2", "layer3", "layer4"}),
        (["text.*", "logit_scale"], set()), (["vision.pool.*"], set()),
        (["vision.layer4.*", "vision.pool.*"], {"layer4"})])
    def test_a_frozen_resnet_or_part_of_one_keeps_its_statistics(self, trained, moved):
        model = toy_clip(image_size=64, stages=(1, 1, 2, 1), vision_width=4, vision_heads=2)
        freeze(model, trained)
        before = {name: b.clone() for name, b in model.named_buffers()}
        model(clip_batch(5, 64))["contrastive"].backward()
        assert {name.split(".")[1] for name, b in model.named_buffers()
                if not torch.equal(b, before[name])} == moved


class TestEvaluate:
    def test_every_figure_has_its_chance(self):
        world = Toy(image_size=15)
        tokenizer = world_tokenizer(world)
        model = toy_clip(vocab_size=len(tokenizer), eos_id=2).float().eval()
        data = EvalData(world, tokenizer, ImageTextBatch(tokenizer, 11, 15), "cpu")
        figures = model.evaluate(data)
        assert len(figures) == 16 and all(0 <= value <= 1 for value in figures.values())
        assert figures["zero_shot_accuracy_chance"] == pytest.approx(1 / 42)
        assert figures["composition_accuracy_chance"] == pytest.approx(1 / 48)
        assert model.samples(data).width > 400


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run at step 0."""
    made = build(tmp_path_factory.mktemp("runs"))
    train.save(made)
    return made.folder.path


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The current folder: three pictures, a file that is none, and a folder."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red", "red"), ("blue", "blue"), ("a long name of a picture", "green")):
        drawing(colour, size=40)[0].save(f"{name}.png")
    Path("notes.txt").write_text("not a picture")
    Path("inner").mkdir()


@pytest.mark.usefixtures("pictures")
class TestMain:
    def test_classify_prints_the_models_probability_of_each_name_the_likeliest_first(self, run):
        names = ["a red circle", "a <eos> star", "猫"]
        status, out, err = command("clip.py", run, "classify", "red.png", *names)
        assert (status, err) == (0, "")
        shares, printed = zip(*(line.split("%  ") for line in out.splitlines()))
        trained = clip.from_pretrained(run)
        image = trained.encode_images([Image.open("red.png")])
        cosines = image @ trained.model.encode_text(trained.ids(names)).T
        want = (trained.model.logit_scale.exp() * cosines)[0].softmax(dim=0)
        best = want.argsort(descending=True)
        assert list(printed) == [names[i] for i in best]
        assert_close("shares", [float(x) / 100 for x in shares], want[best], tolerance=6e-5)

    def test_search_prints_and_draws_the_best(self, run):
        status, out, err = command("clip.py", run, "search", "a red circle", ".")
        assert status == 0 and err.startswith("passed over 1 of 4 files")
        *lines, last = out.splitlines()
        assert last == f"drawn in {run / 'search.png'}"
        cosines = [float(line.split()[0]) for line in lines]
        assert len(cosines) == 3 and 1 >= cosines[0] >= cosines[1] >= cosines[2] >= -1
        assert "cosines of text and picture, from -1 to 1; only their order counts\n" in err
        assert len(Image.open(run / "search.png").getcolors(1 << 20)) > 3
        (run / "search.png").unlink()

    def test_search_in_a_run_that_cannot_be_written_draws_here(self, run, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        status, out, _ = command("clip.py", run, "search", "a red circle", ".")
        assert status == 0 and out.endswith("drawn in search.png\n")
        Path("search.png").unlink()

    def test_a_resnet_is_trained_resumed_measured_and_used(self):
        flags = [*TOY, "--out", "resnet", "--set", "vision_width=4", "--set", "vision_heads=2",
                 "--steps", "2"]
        stages = ["--set", "stages=1,1,2,1"]
        assert command("train.py", *flags, *stages)[0] == 0
        for flag in ("--resume", "--eval_only"):
            status, out, err = command("train.py", *flags, *stages, flag)
            assert status == 0 and "resumed from step 2\n" in out, err
        assert "stages=[1, 1, 2, 1] (now [2, 1, 1, 1])" in mistake(
            "train.py", *flags, "--set", "stages=2,1,1,1", "--resume")
        config = clip.from_pretrained("resnet").model.config
        assert config == CLIPConfig(**read_json("resnet/config.json")["config"])
        assert config.stages == (1, 1, 2, 1)
        assert command("clip.py", "resnet", "classify", "red.png", "a red ring", "x")[0] == 0

    @pytest.mark.parametrize("argv, words", [
        ("", "RUN"), ("{run}", "COMMAND"), ("{run} sing", "'sing'"),
        ("{run} classify red.png", "NAME"),
        ("{run} classify nothing.png x", "nothing.png: no such picture"),
        ("{run} classify notes.txt x", "notes.txt: not a readable picture"),
        ("{run} classify inner x", "inner: a folder, not a picture"),
        ("{run} search red inner", "inner: no pictures in it"),
        ("{run} search red nothing", "nothing: no such folder"),
        ("nowhere classify red.png x", "nowhere")])
    def test_a_mistake_is_told_in_one_line_and_nothing_is_drawn(self, run, argv, words):
        assert words in mistake("clip.py", *argv.format(run=run).split())
        assert not (run / "search.png").exists() and not Path("search.png").exists()

    @pytest.mark.parametrize("parts, words", [
        ({"model": "blip"}, "a run of 'blip', not of 'clip'"),
        ({"config": {"wings": 2}}, "'wings'"),
        ({"config": {}}, "weights of another model or config")])
    def test_a_run_that_does_not_fit_is_told_in_one_line(self, run, parts, words):
        for name in ("last.pt", "tokenizer.model"):
            Path(name).write_bytes((run / name).read_bytes())
        Path("config.json").write_text(json.dumps(read_json(run / "config.json") | parts))
        assert words in mistake("clip.py", ".", "classify", "red.png", "a red circle")
