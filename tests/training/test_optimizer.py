"""Recipes, what is trained and what is frozen, the two optimizers, the learning rate."""
import copy
import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import clip
import train
from common.training.optimizer import (
    Muon, Recipe, eval_frozen, find_recipe, freeze, learning_rate, make_optimizer,
    parameter_groups, set_learning_rate, store_frozen, vision_depth)
from common.training.options import with_settings
from common.transformer import MLP, Attention, GatedMLP, bert_block
from tests.helpers import assert_close

RESNET = {"image_size": 64, "stages": (1, 1, 2, 1)}


@pytest.fixture
def recipe():
    return Recipe(steps=110, batch_size=1, lr=0.8, warmup=10, weight_decay=0.2)


@pytest.fixture
def muon(recipe):
    return replace(recipe, optimizer="muon", muon_lr_multiplier=4.0, muon_weight_decay=0.3,
                   betas=(0.7, 0.8), eps=1e-3)


def make(**changes):
    return clip.CLIP(clip.CLIPConfig(
        vision_width=12, vision_heads=3, vision_layers=2, text_width=10, text_heads=2,
        text_layers=1, embed_dim=7, vocab_size=31, loss="sigmoid", **changes))


@pytest.fixture
def model():
    return make()


def toy():
    """lm, my_lm: Linear 0, BatchNorm 1, Dropout 2; names that begin and end with one another."""
    model = nn.Sequential(OrderedDict(
        (name, nn.Sequential(nn.Linear(*sizes), nn.BatchNorm1d(sizes[1]), nn.Dropout(0.5)))
        for name, sizes in (("lm", (3, 5)), ("my_lm", (5, 7)))))
    model.lm[0].bias_gain = nn.Parameter(torch.ones(5))
    return model


class TestFindRecipe:
    def find(self, preset, *kinds, **changes):
        table = {"tiny": (7, 2, 0.1), "tiny emoji": (8, 2, 0.2), "tiny lm": (9, 2, 0.4),
                 "": (900, 2, 0.3)}
        unchanged = dict.fromkeys(("steps", "batch_size", "lr", "optimizer"))
        return find_recipe({key: Recipe(*numbers) for key, numbers in table.items()}, preset, kinds,
                           unchanged | changes)

    @pytest.mark.parametrize("preset, kinds, want", [
        ("tiny", "emoji,", (8, 2, 0.2, 1)), ("tiny", "shapes,", (7, 2, 0.1, 1)),
        ("tiny", "coco,lm", (9, 2, 0.4, 1)), ("tiny", "emoji,lm", (8, 2, 0.2, 1)),
        ("huge", "emoji,lm", (900, 2, 0.3, 100))])
    def test_it_is_of_preset_and_data_or_losses_else_of_the_preset_else_the_papers(
            self, preset, kinds, want):
        assert self.find(preset, *kinds.split(",")) == Recipe(*want)

    def test_flags_change_it_and_the_warm_up_is_at_most_a_fifth_of_the_steps(self):
        assert self.find("huge", steps=50, batch_size=8, lr=0.5, optimizer="muon") \
            == Recipe(50, 8, 0.5, warmup=10, optimizer="muon")

    @pytest.mark.parametrize("records, changes, steps, batch_size", [
        (600, {}, 140, 128), (512, {}, 120, 128), (511, {}, 239, 64), (475, {}, 222, 64),
        (10_000, {}, 600, 128), (3, {}, 90, 1), (475, {"steps": 9000}, 9000, 64),
        (475, {"batch_size": 200}, 71, 200), (475, {"batch_size": 3, "steps": 7}, 7, 3)])
    def test_a_quarter_of_ones_own_records_is_a_batch_and_30_epochs_are_the_most(
            self, records, changes, steps, batch_size):
        found = find_recipe({"": Recipe(600, 128, 0.1)}, "tiny", (), changes, records)
        assert (found.steps, found.batch_size) == (steps, batch_size)
        assert (found.warmup, found.lr) == (min(100, steps // 5), 0.1)
        tuned = find_recipe({"": Recipe(600, 128, 0.1)}, "tiny", (), changes, records, tune=True)
        assert tuned == replace(found, lr=0.1 * 0.1), "a start is kept"
        assert find_recipe({"": found}, "", (), {"lr": 0.3}, records, tune=True).lr == 0.3
        assert find_recipe({"": found}, "", (), {}, tune=True).lr == 0.1, "a world's"

    @pytest.mark.parametrize("name, value", [
        ("steps", 0), ("steps", -3), ("batch_size", 0), ("lr", 0.0), ("lr", -0.1), ("lr", math.nan),
        ("lr", math.inf)])
    def test_impossible_numbers_are_refused(self, name, value):
        with pytest.raises(ValueError, match=f"{name} {value}"):
            self.find("tiny", **{name: value})


class TestFreeze:
    @pytest.mark.parametrize("patterns, trained", [
        (["lm.*"], "lm.0.weight lm.0.bias lm.0.bias_gain lm.1.weight lm.1.bias"),   # not my_lm
        (["*.bias"], "lm.0.bias lm.1.bias my_lm.0.bias my_lm.1.bias"),              # not bias_gain
        (["*.1.*", "my_lm.0.bias"], "lm.1.weight lm.1.bias my_lm.1.weight my_lm.1.bias "
                                    "my_lm.0.bias"),
        (["*lm.0.weight", "lm.?.weight"], "lm.0.weight lm.1.weight my_lm.0.weight"), ([], "")])
    def test_patterns_of_whole_names_choose_what_is_trained(self, patterns, trained):
        model = toy()
        freeze(model, ("my_lm.1.*",))  # of an earlier call nothing stays
        freeze(model, patterns)
        assert {name for name, p in model.named_parameters() if p.requires_grad} \
            == set(trained.split())

    @pytest.mark.parametrize("pattern", ["lm", "my_ml.*", "*.bia", "m.*", "0.weight", ""])
    def test_a_pattern_that_matches_no_name_is_refused_by_its_name(self, pattern):
        with pytest.raises(ValueError, match=repr(pattern)):
            freeze(toy(), ("lm.*", pattern))

    def test_the_table_counts_the_parameters_of_each_part(self):
        rows = [freeze(toy(), patterns).split() for patterns in (("lm.0.*",), ("my_lm.*",))]
        assert rows == [["lm", "35", "25", "trained", "my_lm", "56", "frozen"],
                        ["lm", "35", "frozen", "my_lm", "56", "trained"]]


class TestEvalFrozen:
    @pytest.mark.parametrize("patterns, modes", [
        (["my_lm.*"], ["", "my_lm", "my_lm.0", "my_lm.1", "my_lm.2"]),
        (["lm.1.*"], ["", "lm", "lm.1", "lm.2"]), ([], [])])
    def test_modules_without_a_trained_parameter_are_in_eval_mode(self, patterns, modes):
        model = toy().eval()
        freeze(model, patterns)
        for when in ("freeze", "train"):
            found = {name for name, module in model.named_modules() if module.training}
            assert found == set(modes), f"in training after {when}"
            assert eval_frozen(model.train()) is model


class TestStoreFrozen:
    def test_frozen_parameters_of_the_modules_alone_become_half(self):
        model = toy()
        freeze(model, ("lm.0.*",))
        before = {name: p.clone() for name, p in model.named_parameters()}
        store_frozen(model, ("lm",), torch.bfloat16)
        for name, p in model.named_parameters():
            half = name.startswith("lm.") and not name.startswith("lm.0.")
            assert p.dtype == (torch.bfloat16 if half else torch.float32), name
            assert_close(name, p.float(), before[name], 0.01)


class TestVisionDepth:
    @pytest.mark.parametrize("name, depth", [
        ("vision.vit.pos_embed", 0), ("vision.cls_token", 0), ("vision.patch_embed.weight", 0),
        ("vision.vit.ln_pre.bias", 0), ("vision.transformer.blocks.0.mlp.fc1.weight", 1),
        ("vision.vit.transformer.blocks.11.attn_norm.bias", 12), ("vision.norm.weight", None),
        ("lm.transformer.blocks.3.mlp.fc1.weight", None), ("qformer.token_embed.weight", None)])
    def test_it_counts_blocks_of_the_image_encoder_from_its_embeddings(self, name, depth):
        assert vision_depth(name) == depth


def named_groups(model, recipe):
    """{(weight decay, lr multiplier): names}."""
    names = {p: name for name, p in model.named_parameters()}
    return {(group["weight_decay"], group["lr_multiplier"]): {names[p] for p in group["params"]}
            for group in parameter_groups(model, recipe)}


class TestParameterGroups:
    @pytest.mark.parametrize("changes", [{}, RESNET], ids=["ViT", "ResNet"])
    def test_matrices_decay_and_gains_biases_and_scalars_do_not(self, recipe, changes):
        model = make(**changes)
        matrices = {f"{name}.weight" for name, module in model.named_modules()
                    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))}
        matrices |= {name for name, _ in model.named_parameters() if name.endswith("pos_embed")}
        others = {name for name, _ in model.named_parameters()} - matrices
        assert {"logit_scale", "logit_bias", "text.transformer.norm.weight"} < others
        assert named_groups(model, recipe) == {(0.2, 1.0): matrices, (0.0, 1.0): others}

    def test_patterns_choose_other_rates_and_matrices_without_decay(self, model, recipe):
        groups = named_groups(model, replace(recipe, no_decay=("vision.*",), lr_multipliers={
            "logit_*": 10.0, "*_projection.*": 3.0}))
        assert groups[0.2, 3.0] == {"image_projection.weight", "text_projection.weight"}
        assert groups[0.0, 10.0] == {"logit_scale", "logit_bias"}
        assert "vision.patch_embed.weight" in groups[0.0, 1.0]
        assert "text.token_embed.weight" in groups[0.2, 1.0]
        assert sum(map(len, groups.values())) == len(list(model.parameters()))

    def test_each_block_of_the_image_encoder_learns_slower_than_the_one_above(self, model, recipe):
        groups = named_groups(model, replace(recipe, layer_decay=0.5))
        blocks = len(model.vision.transformer.blocks)
        for (_, factor), names in groups.items():
            for name in names:
                depth = vision_depth(name)
                want = 1.0 if depth is None else 0.5 ** (blocks + 1 - depth)
                assert factor == pytest.approx(want), name

    @pytest.mark.parametrize("stage, settings", [
        ("clip", []), ("clip", ["image_size=64", "stages=1,1,1,1", "vision_width=4"]),
        ("lm", []), ("bert", []), ("flamingo", []), ("flamingo", ["resampler=mlp"])])
    def test_muon_gets_the_trained_matrices_of_attention_and_mlps(self, muon, stage, settings):
        if stage == "bert":
            model = nn.ModuleList([bert_block(width=6, heads=2, context_width=5)])
        else:
            file = train.STAGES[stage].file
            model = train.STAGES[stage].model(with_settings(file.PRESETS["tiny"], settings))
            freeze(model, file.TRAINS[stage])
        inside = {p for m in model.modules() if type(m) in (Attention, MLP, GatedMLP)
                  for p in m.parameters() if p.ndim == 2 and p.requires_grad}
        recipe = replace(muon, lr_multipliers={"*.q_proj.*": 7.0}, no_decay=("*.v_proj.*",))
        groups = parameter_groups(model, recipe)
        ours, rest = ([g for g in groups if g["muon"] == kind] for kind in (True, False))
        assert {p for g in ours for p in g["params"]} == inside and inside
        assert {(g["lr_multiplier"], g["weight_decay"]) for g in ours} \
            == {(4.0, 0.3), (28.0, 0.3), (4.0, 0.0)}
        assert {g["weight_decay"] for g in rest} <= {0.2, 0.0} and rest
        assert sum(len(g["params"]) for g in groups) \
            == sum(p.requires_grad for p in model.parameters())


def by_svd(matrices):
    """`orthogonalize` through singular values: each goes through the polynomial five times."""
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.square().sum(dim=-1, keepdim=True).sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    return left @ values.diag_embed() @ right


def matrices(seed):
    """Float64 matrices of three shapes, two of them of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).double()
            for shape in [(5, 7), (7, 5), (5, 7), (6, 6)]]


class TestMuon:
    def stepped(self, kind, **settings):
        """matrices(0) after four steps."""
        parameters = [nn.Parameter(m) for m in matrices(0)]
        optimizer = kind([{"params": parameters, "weight_decay": 0.3}], lr=0.02, **settings)
        for step in range(4):
            for p, grad in zip(parameters, matrices(10 + step)):
                p.grad = grad
            optimizer.step()
        return parameters

    def test_against_a_loop_over_matrices(self):
        got = self.stepped(Muon, half=False)
        for number, p in enumerate(matrices(0)):
            mean = torch.zeros_like(p)
            for step in range(4):
                grad = matrices(10 + step)[number]
                mean = 0.95 * mean + 0.05 * grad
                update = by_svd(0.05 * grad + 0.95 * mean)
                p = p * (1 - 0.02 * 0.3) - 0.02 * 0.2 * max(p.shape) ** 0.5 * update
            assert_close(f"matrix {number}", got[number], p, tolerance=1e-8)

    def test_half_is_torchs_muon_in_bf16(self):
        theirs = self.stepped(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
        half, single = (self.stepped(Muon, half=half) for half in (True, False))
        for ours, other, exact in zip(half, theirs, single):
            assert_close("as torch's", ours, other, tolerance=1e-3)    # both round to bf16
            assert (ours - exact).abs().max() > 1e-6, "not rounded to bf16"

    def test_a_matrix_without_a_gradient_stays_and_each_group_has_its_rate_and_decay(self):
        a, b, c = (nn.Parameter(torch.ones(3, 5)) for _ in range(3))
        optimizer = Muon([{"params": [a, c], "weight_decay": 0.5},
                          {"params": [b], "weight_decay": 0.0}], lr=0.1, half=False)
        optimizer.param_groups[0]["lr"] = 0.4
        a.grad, b.grad = torch.zeros(3, 5), torch.zeros(3, 5)
        optimizer.step()
        for name, p, value in (("decays", a, 0.8), ("no decay", b, 1.0), ("no gradient", c, 1.0)):
            assert_close(name, p, torch.full((3, 5), value))


class TestMakeOptimizer:
    def test_the_parts_have_the_recipes_numbers(self, model, muon):
        freeze(model, ("text.transformer.blocks.0.attn.*",))
        optimizer = make_optimizer(model, muon, half=True)
        assert str(optimizer) == "Muon (400 parameters) and AdamW (40 parameters)"
        first, second = optimizer.param_groups
        assert (first["lr"], first["half"]) == (0.8, True)
        assert (second["lr"], second["betas"], second["eps"]) == (0.8, (0.7, 0.8), 1e-3)
        assert not make_optimizer(model, muon).param_groups[0]["half"]

    def test_without_muon_it_is_adamw_alone(self, model, recipe, muon):
        assert [type(part) for part in make_optimizer(model, recipe).parts] == [torch.optim.AdamW]
        freeze(model, ("vision.transformer.blocks.*.mlp.fc?.weight",))
        assert [type(part) for part in make_optimizer(model, muon).parts] == [Muon]


class TestOptimizers:
    def trained(self, model, optimizer, recipe, first, last):
        for step in range(first, last):
            set_learning_rate(optimizer, recipe, step)
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return model

    def test_restored_it_goes_on_to_the_same_bits(self, model, muon):
        optimizer = make_optimizer(model, muon)
        self.trained(model, optimizer, muon, 0, 3)
        other, twin = copy.deepcopy(model), copy.deepcopy(model)
        again = make_optimizer(other, muon)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self.trained(model, optimizer, muon, 3, 6)
        self.trained(other, again, muon, 3, 6)
        self.trained(twin, make_optimizer(twin, muon), muon, 3, 6)       # without its state
        for (name, want), got, lost in zip(model.named_parameters(), other.parameters(),
                                           twin.parameters()):
            assert_close(name, got, want, tolerance=0)
            assert (lost != want).any(), f"{name} does not depend on the state"
        again.zero_grad()
        assert all(p.grad is None for p in other.parameters()), "a gradient after zero_grad"


class TestLearningRate:
    @pytest.mark.parametrize("schedule, after", [
        ("cosine", {35: 0.4 + 0.2 * 2 ** 0.5, 60: 0.4, 85: 0.4 - 0.2 * 2 ** 0.5, 110: 0}),
        ("linear", {35: 0.6, 60: 0.4, 85: 0.2, 109: 0.008, 110: 0})])
    def test_it_rises_over_the_warm_up_and_falls_to_zero(self, recipe, schedule, after):
        want = {0: 0.08, 4: 0.4, 9: 0.8, 10: 0.8} | after
        got = [learning_rate(replace(recipe, schedule=schedule), step) for step in want]
        assert_close(f"rates at the steps {list(want)}", got, list(want.values()))

    @pytest.mark.parametrize("warmup", [0, 4])
    def test_after_no_warm_up_or_nothing_but_it_the_rate_is_the_peak(self, warmup):
        assert learning_rate(Recipe(4, 1, 0.8, warmup=warmup), warmup) == 0.8


class TestSetLearningRate:
    def test_each_group_has_its_multiple(self, model, muon):
        recipe = replace(muon, lr_multipliers={"logit_scale": 10.0})
        optimizer = make_optimizer(model, recipe)
        set_learning_rate(optimizer, recipe, 4)
        assert {group["lr_multiplier"]: group["lr"] for group in optimizer.param_groups} \
            == {factor: pytest.approx(0.4 * factor) for factor in (1.0, 4.0, 10.0)}
