"""Recipes, what is trained and what is frozen, parameter groups, the learning rate."""
import functools
import math

import pytest
import torch
from torch import nn

import clip
from common.training.optimizer import (Recipe, eval_frozen, find_recipe, freeze, learning_rate,
                                       make_optimizer, parameter_groups, set_learning_rate)

RECIPE = Recipe(steps=110, batch_size=1, lr=0.8, warmup=10, weight_decay=0.2)


def make(**changes):
    return clip.CLIP(clip.CLIPConfig(
        vision_width=12, vision_heads=3, vision_layers=2, text_width=10, text_heads=2,
        text_layers=1, embed_dim=7, vocab_size=31, loss="sigmoid", **changes))


@pytest.fixture
def model():
    return make()


def named_groups(model, recipe):
    """{(weight decay, lr multiplier): names}."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {(group["weight_decay"], group["lr_multiplier"]): {names[id(p)] for p in group["params"]}
            for group in parameter_groups(model, recipe)}


class TestFindRecipe:
    RECIPES = {"tiny": Recipe(7, 2, 0.1), "tiny emoji": Recipe(8, 2, 0.2), "": Recipe(900, 2, 0.3)}
    NO_CHANGES = {"steps": None, "batch_size": None, "lr": None}

    def find(self, preset, data="shapes", **changes):
        return find_recipe(self.RECIPES, preset, data, self.NO_CHANGES | changes)

    def test_it_is_that_of_preset_and_data_else_of_the_preset_else_the_papers(self):
        assert [self.find(*keys).lr for keys in (("tiny", "emoji"), ("tiny", "shapes"),
                                                 ("tiny", "coco"), ("huge", "emoji"))] \
            == [0.2, 0.1, 0.1, 0.3]

    def test_flags_change_it(self):
        recipe = self.find("huge", steps=50, batch_size=8, lr=0.5)
        assert (recipe.steps, recipe.batch_size, recipe.lr, recipe.warmup) == (50, 8, 0.5, 10)
        assert self.find("huge").warmup == 100 and self.find("tiny").warmup == 1
        assert self.RECIPES[""] == Recipe(900, 2, 0.3)

    @pytest.mark.parametrize("name, value", [
        ("steps", 0), ("steps", -3), ("batch_size", 0), ("lr", 0.0), ("lr", -0.1), ("lr", math.nan),
        ("lr", math.inf)])
    def test_impossible_numbers_are_refused(self, name, value):
        with pytest.raises(ValueError, match=f"--{name} {value}: must be more than 0"):
            self.find("tiny", **{name: value})


class TestParameterGroups:
    def test_gains_biases_and_scalars_are_not_decayed(self, model):
        groups = named_groups(model, RECIPE)
        assert groups.keys() == {(0.2, 1.0), (0.0, 1.0)}
        plain, alone = groups[0.0, 1.0], {"logit_scale", "logit_bias", "vision.cls_token"}
        assert alone < plain
        assert all(name.endswith((".bias", "norm.weight", "ln_pre.weight", "ln_post.weight"))
                   for name in plain - alone)
        assert any(name.endswith(".bias") for name in plain)
        assert {"text.token_embed.weight", "vision.patch_embed.weight", "text.pos_embed"} \
            < groups[0.2, 1.0]
        assert not any("norm" in name or "bias" in name for name in groups[0.2, 1.0])
        assert groups[0.2, 1.0] | plain == dict(model.named_parameters()).keys()

    def test_patterns_choose_other_rates_and_matrices_without_decay(self, model):
        recipe = Recipe(9, 1, 0.1, no_decay=("vision.*",),
                        lr_multipliers={"logit_*": 10.0, "*_projection.*": 3.0})
        groups = named_groups(model, recipe)
        assert groups[0.2, 3.0] == {"image_projection.weight", "text_projection.weight"}
        assert groups[0.0, 10.0] == {"logit_scale", "logit_bias"}
        assert "vision.patch_embed.weight" in groups[0.0, 1.0]
        assert "text.token_embed.weight" in groups[0.2, 1.0]
        assert sum(map(len, groups.values())) == len(list(model.parameters()))

    def test_what_is_frozen_is_in_no_group(self, model):
        freeze(model, ("text.*", "logit_scale"))
        trained = {name for names in named_groups(model, RECIPE).values() for name in names}
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
        assert "logit_scale" in trained and "logit_bias" not in trained

    def test_gains_of_batch_norm_are_not_decayed_and_convolutions_are(self):
        model = make(image_size=64, stages=(1, 1, 2, 1))
        groups = named_groups(model, RECIPE)
        norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        assert len(norms) == len(convolutions) == 3 + 5 * 3 + 4
        assert {f"{n}.{kind}" for n in norms for kind in ("weight", "bias")} <= groups[0.0, 1.0]
        assert {f"{n}.weight" for n in convolutions} <= groups[0.2, 1.0]

    def test_a_step_without_gradient_decays_matrices_alone(self, model):
        optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), lr=0.5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                torch.testing.assert_close(p, before[name] * 0.9)
            else:
                assert torch.equal(p, before[name]), name

    def test_the_optimizer_has_the_recipes_numbers(self, model):
        optimizer = make_optimizer(model, Recipe(9, 1, 0.25, betas=(0.7, 0.8), eps=1e-3))
        for group in optimizer.param_groups:
            assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.7, 0.8), 1e-3)


class TestLearningRate:
    def test_it_rises_over_the_warm_up_and_falls_as_a_cosine(self):
        rate = functools.partial(learning_rate, RECIPE)
        assert [rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.08, 0.4, 0.8, 0.8])
        assert rate(35) == pytest.approx(0.8 * (2 + 2 ** 0.5) / 4)
        assert rate(60) == pytest.approx(0.4)
        assert rate(85) == pytest.approx(0.8 * (2 - 2 ** 0.5) / 4)
        assert 0 < rate(109) < 0.001 and rate(110) == pytest.approx(0)

    def test_without_a_warm_up_the_first_rate_is_the_peak(self):
        assert learning_rate(Recipe(steps=4, batch_size=1, lr=0.8, warmup=0), 0) == 0.8

    def test_each_group_has_its_multiple(self, model):
        recipe = Recipe(110, 1, 0.8, warmup=10, lr_multipliers={"logit_scale": 10.0})
        optimizer = make_optimizer(model, recipe)
        set_learning_rate(optimizer, recipe, 4)
        assert {group["lr_multiplier"]: group["lr"] for group in optimizer.param_groups} \
            == {1.0: pytest.approx(0.4), 10.0: pytest.approx(4.0)}


class TestFreeze:
    def test_patterns_choose_what_is_trained(self, model):
        chosen = ("text.", "vision.transformer.blocks.1.", "logit_scale")
        table = freeze(model, ("text.*", "vision.transformer.blocks.1.*", "logit_scale"))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in model.named_parameters() if name.startswith(chosen)}
        rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
        assert rows["logit_bias"] == ["1", "frozen"] and rows["logit_scale"] == ["1", "trained"]
        assert rows["text"][1:] == ["trained"] and rows["image_projection"] == ["84", "frozen"]
        assert rows["vision"][-1] == "trained" and len(rows["vision"]) == 3

    def test_frozen_modules_are_in_eval_mode_and_trained_ones_are_not(self, model):
        model.vision.dropout = nn.Dropout(0.5)           # has no parameter of its own
        model.text.dropout = nn.Dropout(0.5)
        freeze(model.eval(), ("text.*", "logit_scale"))
        assert not any(m.training for m in model.vision.modules())
        assert not model.image_projection.training
        assert model.training and all(m.training for m in model.text.modules())

    def test_frozen_parts_of_a_part_are_too(self, model):
        freeze(model, ("vision.transformer.blocks.1.*",))
        first, second = model.vision.transformer.blocks
        assert not any(m.training for m in first.modules())
        assert all(m.training for m in second.modules()) and model.vision.training
        assert not model.vision.ln_pre.training and not model.text.training

    def test_a_model_that_says_so_stays_frozen_after_train(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.frozen = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
                self.head = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))

            def train(self, mode=True):
                super().train(mode)
                return eval_frozen(self)

        model = Model()
        freeze(model, ("head.*",))
        assert model.train() is model and model.training
        assert not any(m.training for m in model.frozen.modules())
        assert all(m.training for m in model.head.modules())
        assert not any(m.training for m in model.eval().modules())
        freeze(model, ())                # all of it: eval_frozen must not call train again
        assert not any(m.training for m in model.train().modules())
