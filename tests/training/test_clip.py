"""CLIP in training: recipes, data, frozen towers, and what a trained one is measured by."""
import math
import random

import pytest
import torch

from clip import PRESETS, RECIPES, data_sources
from common.data.batches import EvalData, world_tokenizer
from common.data.collators import ImageTextBatch
from common.evaluation.retrieval import Retriever
from common.training.optimizer import find_recipe, freeze
from tests.helpers import assert_close, clip_batch, drawing, toy_clip
from tests.training.runs import Toy


class TestRecipes:
    @pytest.mark.parametrize("name, lr", [
        ("ViT-B/32", 5e-4), ("ViT-B/16", 5e-4), ("ViT-L/14", 4e-4), ("ViT-L/14@336", 2e-5),
        ("RN50", 5e-4), ("RN101", 5e-4), ("RN50x4", 5e-4), ("RN50x16", 4e-4), ("RN50x64", 3.6e-4)])
    def test_the_papers_numbers(self, name, lr):
        recipe = find_recipe(RECIPES, name, "shapes", {})
        assert (recipe.lr, recipe.batch_size, recipe.weight_decay) == (lr, 32768, 0.2)
        assert (recipe.warmup, recipe.grad_clip) == (2000, None)
        assert (recipe.betas, recipe.eps) == (((0.9, 0.999), 1e-8) if name.startswith("RN")
                                              else ((0.9, 0.98), 1e-6))
        epochs = recipe.steps * recipe.batch_size / 400e6
        assert epochs == pytest.approx(1 if name.endswith("@336") else 32, rel=0.01)

    def test_our_own_presets_clip_the_gradient(self):
        for name in ("tiny", "small", "RN-tiny"):
            assert find_recipe(RECIPES, name, "shapes", {}).grad_clip == 1.0
        assert (RECIPES["RN-tiny"].betas, RECIPES["RN-tiny"].eps) == ((0.9, 0.999), 1e-8)
        assert find_recipe(RECIPES, "tiny", "emoji", {}).weight_decay == 2.0


class TestDataSources:
    def test_it_is_images_with_one_caption_each_of_the_configs_sizes(self):
        world = Toy(image_size=32)
        source, = data_sources(world, world_tokenizer(world), PRESETS["tiny"])
        assert source.world is world
        batch = source.collate([source.record(i, random.Random(i)) for i in range(3)],
                               [random.Random(i) for i in range(3)])
        assert batch["images"].shape == (3, 3, 32, 32) and batch["images"].dtype == torch.uint8
        assert len(batch["ids"]) == 3 and (batch["ids"] == PRESETS["tiny"].eos_id).any(dim=1).all()


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


class Spaced:
    """Ids 6 and on for the words of a text, then the end token, 5."""

    def batch(self, texts, context_length):
        rows = [[6 + "a red blue picture of".split().index(word) for word in text.split()] + [5]
                for text in texts]
        return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


class TestEvaluate:
    def test_every_figure_has_its_chance(self):
        world = Toy(image_size=15)
        tokenizer = world_tokenizer(world)
        model = toy_clip(vocab_size=len(tokenizer), eos_id=2).float().eval()
        data = EvalData(world, tokenizer, ImageTextBatch(tokenizer, 11, 15), "cpu")
        figures = model.evaluate(data)
        assert set(figures) == {
            *(f"{a}_recall@{k}" for a in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
            "image_to_text_recall@1_chance", "text_to_image_recall@1_chance", "zero_shot_accuracy",
            "zero_shot_accuracy_chance", "composition_accuracy", "composition_accuracy_chance"}
        assert all(0 <= value <= 1 for value in figures.values())
        assert figures["zero_shot_accuracy_chance"] == pytest.approx(1 / 42)
        assert figures["composition_accuracy_chance"] == pytest.approx(1 / 48)
        assert model.samples(data).width > 400

    def test_a_picture_is_classified_by_the_mean_of_unit_vectors_of_two_templates(self):
        model = toy_clip()
        retriever, names = Retriever(model, Spaced()), ("red", "blue")
        found = dict(retriever.classify(drawing("red")[0], names, ["a {}", "picture of a {}"]))
        image, logits = retriever.encode_images(drawing("red"))[0], []
        for name in names:
            ids = Spaced().batch([f"a {name}", f"picture of a {name}"], 11)
            mean = model.encode_text(ids).mean(dim=0)
            logits.append(math.exp(1.7) * image @ mean / mean.norm())
        assert_close("probabilities (C,)", [found[name] for name in names],
                     torch.stack(logits).softmax(dim=0))
