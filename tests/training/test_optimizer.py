"""Recipes, what is trained and what is frozen, parameter groups, the learning rate."""
import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import clip
import flamingo
from common.training import lm
from common.training.optimizer import (Muon, Recipe, eval_frozen, find_recipe, freeze,
                                       learning_rate, make_optimizer, orthogonalize,
                                       parameter_groups, set_learning_rate)
from common.transformer import MLP, Attention, GatedMLP, bert_block

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
    NO_CHANGES = {"steps": None, "batch_size": None, "lr": None, "optimizer": None}

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
        assert self.find("huge", optimizer="muon") == replace(self.find("huge"), optimizer="muon")
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

    @pytest.mark.parametrize("model, patterns", [
        (make(), ("*",)), (make(), ("vision.*",)),
        (make(image_size=64, stages=(1, 1, 2, 1)), ("*",)),
        (lm.Pretraining(lm.PRESETS["tiny"]), ("*",)),
        (nn.ModuleList([bert_block(width=6, heads=2, context_width=5)]), ("*",)),
        (flamingo.Flamingo(flamingo.FlamingoConfig()), flamingo.TRAINS["flamingo"]),
        (flamingo.Flamingo(flamingo.FlamingoConfig(resampler="mlp")), flamingo.TRAINS["flamingo"])],
        ids=["clip", "a part", "resnet", "lm", "bert", "flamingo", "mlp resampler"])
    def test_muon_gets_the_trained_matrices_of_attention_and_mlps(self, model, patterns):
        freeze(model, patterns)
        inside = {id(p) for m in model.modules() if type(m) in (Attention, MLP, GatedMLP)
                  for p in m.parameters() if p.ndim == 2 and p.requires_grad}
        recipe = Recipe(9, 1, 0.1, optimizer="muon", muon_lr_multiplier=5.0, muon_weight_decay=0.3,
                        lr_multipliers={"*.q_proj.*": 7.0}, no_decay=("*.v_proj.*",))
        groups = parameter_groups(model, recipe)
        muon = [g for g in groups if g["muon"]]
        assert {id(p) for g in muon for p in g["params"]} == inside and inside
        assert {(g["lr_multiplier"], g["weight_decay"]) for g in muon} \
            == {(5.0, 0.3), (35.0, 0.3), (5.0, 0.0)}
        rest = [g for g in groups if not g["muon"]]
        assert {g["weight_decay"] for g in rest} <= {0.2, 0.0} and rest
        assert sum(len(g["params"]) for g in groups) \
            == sum(p.requires_grad for p in model.parameters())
        groups = parameter_groups(model, replace(recipe, optimizer="adamw"))
        assert not any(g["muon"] for g in groups)

    @pytest.mark.parametrize("file, worlds, papers", [
        (clip, ("tiny", "small", "RN-tiny"), ("ViT-B/32", "RN50")),
        (lm, ("tiny", "small"), ("gpt2",)),
        (flamingo, ("tiny", "small"), ("3B",))])
    def test_the_recipes_of_the_worlds_use_muon_and_those_of_the_papers_adamw(self, file, worlds,
                                                                              papers):
        used = {preset: find_recipe(file.RECIPES, preset, "shapes", {}).optimizer
                for preset in worlds + papers}
        assert used == dict.fromkeys(worlds, "muon") | dict.fromkeys(papers, "adamw")


class TestOrthogonalize:
    @pytest.mark.parametrize("shape", [(3, 5, 5), (2, 11, 7), (4, 5, 13), (1, 3, 1)])
    def test_singular_values_go_through_the_polynomial_five_times(self, shape):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
        left, values, right = torch.linalg.svd(matrices, full_matrices=False)
        values = values / values.square().sum(dim=1, keepdim=True).sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
        torch.testing.assert_close(orthogonalize(matrices, half=False),
                                   left @ values.diag_embed() @ right, atol=1e-9, rtol=0)

    def test_they_end_near_one_whatever_the_size(self):
        matrices = torch.randn(3, 17, 31, generator=torch.Generator().manual_seed(2)).double()
        for size in (1e-4, 1.0, 1e4):
            values = torch.linalg.svdvals(orthogonalize(size * matrices, half=False))
            assert 0.6 < values.min() and values.max() < 1.3

    def test_zeros_stay_zeros(self):
        assert orthogonalize(torch.zeros(2, 3, 5), half=False).abs().max() == 0

    def test_half_is_bf16(self):
        matrices = torch.randn(3, 17, 31, generator=torch.Generator().manual_seed(3))
        half = orthogonalize(matrices, half=True)
        single = orthogonalize(matrices, half=False)
        assert half.dtype == torch.bfloat16 and single.dtype == torch.float32
        torch.testing.assert_close(half.float(), single, atol=0.03, rtol=0)


SHAPES = [(5, 7), (7, 5), (5, 7), (6, 6)]


def matrices(seed):
    """A tensor of each of SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def steps_of(optimizer, parameters, count=4):
    """Steps with gradients that a seed gives -> the parameters."""
    for step in range(count):
        for p, grad in zip(parameters, matrices(10 + step)):
            p.grad = grad
        optimizer.step()
    return [p.detach() for p in parameters]


class TestMuon:
    def make(self, half, **group):
        parameters = [nn.Parameter(m) for m in matrices(0)]
        group = {"params": parameters, "weight_decay": 0.3} | group
        return Muon([group], lr=0.02, half=half), parameters

    def test_it_is_torchs_muon(self):
        optimizer, parameters = self.make(half=True)
        theirs = [nn.Parameter(m) for m in matrices(0)]
        want = steps_of(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3,
                                         adjust_lr_fn="match_rms_adamw"), theirs)
        for ours, other in zip(steps_of(optimizer, parameters), want):    # both round to bf16
            torch.testing.assert_close(ours, other, atol=1e-3, rtol=0)

    def test_against_a_loop_over_matrices(self):
        optimizer, parameters = self.make(half=False)
        got = steps_of(optimizer, parameters)
        for number, p in enumerate(matrices(0)):
            mean = torch.zeros_like(p)
            for step in range(4):
                grad = matrices(10 + step)[number]
                mean = 0.95 * mean + 0.05 * grad
                update = orthogonalize((0.05 * grad + 0.95 * mean)[None], half=False)[0]
                p = p * (1 - 0.02 * 0.3) - 0.02 * 0.2 * max(p.shape) ** 0.5 * update
            torch.testing.assert_close(got[number], p, atol=1e-6, rtol=0)

    def test_an_update_has_the_size_of_adamws(self):
        p = nn.Parameter(torch.zeros(64, 48))
        p.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(4))
        Muon([{"params": [p], "weight_decay": 0.1}], lr=0.5, half=False).step()
        assert p.square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.15)

    def test_a_matrix_without_a_gradient_stays(self):
        optimizer, parameters = self.make(half=False)
        before = [p.detach().clone() for p in parameters]
        parameters[0].grad = matrices(1)[0]
        optimizer.step()
        assert [torch.equal(p, old) for p, old in zip(parameters, before)] \
            == [False, True, True, True]

    def test_each_group_has_its_own_rate_and_decay(self):
        a, b = (nn.Parameter(torch.ones(3, 5)) for _ in range(2))
        optimizer = Muon([{"params": [a], "weight_decay": 0.5},
                          {"params": [b], "weight_decay": 0.0}], lr=0.1, half=False)
        optimizer.param_groups[0]["lr"] = 0.4
        a.grad, b.grad = torch.zeros(3, 5), torch.zeros(3, 5)
        optimizer.step()
        torch.testing.assert_close(a.detach(), torch.full((3, 5), 0.8))
        assert torch.equal(b, torch.ones(3, 5))


class TestOptimizers:
    RECIPE = replace(RECIPE, optimizer="muon", muon_lr_multiplier=4.0, betas=(0.7, 0.8), eps=1e-3)

    def trained(self, model, optimizer, first, last):
        for step in range(first, last):
            set_learning_rate(optimizer, self.RECIPE, step)
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return model

    def test_the_parts_have_the_recipes_numbers(self, model):
        muon, adamw = make_optimizer(model, self.RECIPE, half=True).parts
        assert type(muon) is Muon and type(adamw) is torch.optim.AdamW
        assert all(group["half"] and group["momentum"] == 0.95 for group in muon.param_groups)
        for group in adamw.param_groups:
            assert (group["lr"], group["betas"], group["eps"]) == (0.8, (0.7, 0.8), 1e-3)
        assert not make_optimizer(model, self.RECIPE).parts[0].param_groups[0]["half"]

    def test_without_muon_it_is_adamw_alone(self, model):
        assert [type(part) for part in make_optimizer(model, RECIPE).parts] == [torch.optim.AdamW]
        freeze(model, ("vision.transformer.blocks.*.mlp.fc?.weight",))
        assert [type(part) for part in make_optimizer(model, self.RECIPE).parts] == [Muon]

    def test_what_is_printed_counts_the_parameters(self, model):
        freeze(model, ("text.transformer.blocks.0.attn.*",))
        assert str(make_optimizer(model, self.RECIPE)) \
            == "Muon (400 parameters) and AdamW (40 parameters)"

    def test_a_step_and_zero_grad_are_for_all(self, model):
        optimizer = make_optimizer(model, self.RECIPE)
        before = [p.detach().clone() for p in model.parameters()]
        self.trained(model, optimizer, 0, 1)
        assert not any(map(torch.equal, model.parameters(), before))
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_restored_it_goes_on_to_the_same_bits(self, model):
        other, twin = make(), make()
        optimizer = make_optimizer(model, self.RECIPE)
        self.trained(model, optimizer, 0, 3)
        for copied in (other, twin):
            copied.load_state_dict(model.state_dict())
        again = make_optimizer(other, self.RECIPE)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self.trained(model, optimizer, 3, 6)
        self.trained(other, again, 3, 6)
        assert all(map(torch.equal, model.parameters(), other.parameters()))
        self.trained(twin, make_optimizer(twin, self.RECIPE), 3, 6)      # without its state
        assert not any(map(torch.equal, model.parameters(), twin.parameters()))

    def test_states_of_another_recipe_are_refused(self, model):
        muon, adamw = (make_optimizer(model, recipe) for recipe in (self.RECIPE, RECIPE))
        with pytest.raises((KeyError, ValueError)):
            muon.load_state_dict(adamw.state_dict())
        with pytest.raises((KeyError, ValueError)):
            adamw.load_state_dict(muon.state_dict())


class TestLearningRate:
    def test_it_rises_over_the_warm_up_and_falls_as_a_cosine(self):
        rate = functools.partial(learning_rate, RECIPE)
        assert [rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.08, 0.4, 0.8, 0.8])
        assert rate(35) == pytest.approx(0.8 * (2 + 2 ** 0.5) / 4)
        assert rate(60) == pytest.approx(0.4)
        assert rate(85) == pytest.approx(0.8 * (2 - 2 ** 0.5) / 4)
        assert 0 < rate(109) < 0.001 and rate(110) == pytest.approx(0)

    def test_or_as_a_line(self):
        rate = functools.partial(learning_rate, replace(RECIPE, schedule="linear"))
        assert [rate(step) for step in (0, 9, 10, 35, 60, 109, 110)] \
            == pytest.approx([0.08, 0.8, 0.8, 0.6, 0.4, 0.008, 0])

    @pytest.mark.parametrize("schedule", ["cosine", "linear"])
    def test_without_a_warm_up_the_first_rate_is_the_peak(self, schedule):
        recipe = Recipe(steps=4, batch_size=1, lr=0.8, warmup=0, schedule=schedule)
        assert learning_rate(recipe, 0) == 0.8

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
