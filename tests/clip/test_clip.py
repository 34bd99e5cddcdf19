"""CLIP: the classic mistakes, one by one, and the figures that the paper fixes."""
import copy
import json
import math
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip import CLIP, PRESETS, RECIPES, CLIPConfig
from common.data.batches import EvalData, world_tokenizer
from common.data.collators import ImageTextBatch
from common.data.images import normalize_pixels
from common.data.shapes.world import Shapes
from common.training.optimizer import find_recipe, freeze

EOS = 5                                     # not the largest id: pooling must go by id
CONFIG = CLIPConfig(image_size=15, patch_size=5, vision_width=12, vision_layers=2, vision_heads=3,
                    text_width=14, text_layers=3, text_heads=2, context_length=11, vocab_size=29,
                    eos_id=EOS, embed_dim=7)


def make(**changes):
    model = CLIP(replace(CONFIG, **changes)).double()
    for name, parameter in model.named_parameters():
        if name not in ("logit_scale", "logit_bias"):
            nn.init.normal_(parameter, std=0.3)
    if model.logit_bias is not None:
        model.logit_bias.data.fill_(-1.5)   # at -10 the negatives would have no say
    return model


def texts(rows=3, length=6):
    """Ids that end in EOS and have no other."""
    ids = torch.randint(6, 29, (rows, length))
    ids[:, -1] = EOS
    return ids


def batch(rows=5):
    return {"images": torch.randint(256, (rows, 3, 15, 15), dtype=torch.uint8), "ids": texts(rows)}


def pictures(rows=3):
    return torch.randn(rows, 3, 15, 15).double()


def features(model, batch):
    return model.encode_image(normalize_pixels(batch["images"])), model.encode_text(batch["ids"])


def parts_of(whole, sizes):
    return [{k: v.split(sizes)[i] for k, v in whole.items()} for i in range(len(sizes))]


def accumulated(model, parts):
    """The losses of micro-batches, as train.update computes them."""
    return [model({**part, "feature_gradients": share})["contrastive"]
            for part, share in zip(parts, model.cache_features(parts))]


class TestSizes:
    @pytest.mark.parametrize("name, count", [
        ("ViT-B/32", 151_277_313), ("ViT-B/16", 149_620_737), ("ViT-L/14", 427_616_513),
        ("ViT-L/14@336", 427_944_193), ("tiny", 1_385_217), ("RN50", 102_007_137),
        ("RN101", 119_688_033), ("RN50x4", 178_300_601), ("RN50x16", 290_979_217),
        ("RN50x64", 623_258_305), ("RN-tiny", 1_910_553)])
    def test_the_published_parameter_counts_are_exact(self, name, count):
        with torch.device("meta"):
            model = CLIP(PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == count

    def test_heads_are_64_wide_in_every_published_config(self):
        for name in PRESETS:
            if "/" in name:
                c = PRESETS[name]
                assert c.vision_width == 64 * c.vision_heads and c.text_width == 64 * c.text_heads
            elif name.startswith("RN") and name != "RN-tiny":
                c = PRESETS[name]                   # the pool's 2048 channels in RN50 are 32 heads
                assert 32 * c.vision_width == 64 * c.vision_heads
                assert c.text_width == 64 * c.text_heads
            else:
                continue
            assert (c.act, c.context_length, c.vocab_size, c.eos_id) \
                == ("quick_gelu", 77, 49408, 49407)

    def test_an_unknown_loss_or_activation_is_told(self):
        with pytest.raises(ValueError, match="loss=cosine is not one of softmax, sigmoid"):
            CLIPConfig(loss="cosine")
        with pytest.raises(ValueError, match="act=tanh is not one of"):
            CLIPConfig(act="tanh")

    def test_presets_cannot_be_changed(self):
        with pytest.raises(FrozenInstanceError):
            PRESETS["tiny"].embed_dim = 3


class TestTowers:
    def test_features_are_unit_vectors_of_the_embedding(self):
        model = make()
        for features in (model.encode_image(pictures()), model.encode_text(texts())):
            assert features.shape == (3, 7)
            torch.testing.assert_close(features.norm(dim=1), torch.ones(3).double())

    def test_features_are_normalised_after_the_projection(self):
        model, images, ids = make(), pictures(), texts()
        before = model.encode_image(images), model.encode_text(ids)
        model.image_projection.weight.data *= 7
        model.text_projection.weight.data *= 7
        torch.testing.assert_close((model.encode_image(images), model.encode_text(ids)), before)

    def test_projections_have_no_bias(self):
        assert make().image_projection.bias is None and make().text_projection.bias is None

    def test_the_picture_is_read_at_the_class_token_after_the_last_norm(self):
        model, images = make(), pictures()
        tokens = model.vision.ln_post(model.vision.hidden(images))
        want = F.normalize(tokens[:, 0] @ model.image_projection.weight.T, dim=-1)
        torch.testing.assert_close(model.encode_image(images), want)
        torch.testing.assert_close(model.image_features(images), tokens[:, 0])

    def test_each_picture_and_text_is_encoded_alone(self):
        model, images, ids = make(), pictures(), texts()
        torch.testing.assert_close(model.encode_image(images[1:2]), model.encode_image(images)[1:2])
        torch.testing.assert_close(model.encode_text(ids[1:2]), model.encode_text(ids)[1:2])


class TestTextTower:
    def test_the_text_is_read_at_the_end_token_and_follows_every_word_before_it(self):
        model, ids = make(), texts(1)
        for position in range(5):
            other = ids.clone()
            other[0, position] = 6 + (other[0, position] - 5) % 23
            assert not torch.allclose(model.encode_text(ids), model.encode_text(other))

    @pytest.mark.parametrize("pad_id", [0, 28, EOS])
    def test_what_follows_the_end_token_is_irrelevant(self, pad_id):
        model, ids = make(), texts()
        padded = F.pad(ids, (0, 4), value=pad_id)
        torch.testing.assert_close(model.encode_text(padded), model.encode_text(ids))

    def test_an_id_above_the_end_token_does_not_move_the_reading(self):
        model, ids = make(), texts(1)
        assert ids.max() > EOS
        state = model.text.transformer(
            model.text.token_embed(ids) + model.text.pos_embed[:6],
            mask=torch.ones(6, 6).tril().bool())
        torch.testing.assert_close(model.text(ids), state[:, -1])

    def test_rows_end_where_each_of_them_ends(self):
        model, ids = make(), texts(2, 8)
        ids[0, 3] = EOS
        torch.testing.assert_close(model.encode_text(ids)[:1], model.encode_text(ids[:1, :4]))

    def test_no_position_sees_a_later_one(self):
        tower = make().text
        states = []
        tower.transformer.blocks[0].register_forward_hook(lambda m, i, out: states.append(out))
        ids = texts(1, 8)
        other = ids.clone()
        other[0, 4] = 6 + (other[0, 4] - 5) % 23
        tower(ids), tower(other)
        same = (states[0] == states[1]).all(-1)[0]
        assert same.tolist() == [True] * 4 + [False] * 4

    def test_a_text_that_is_too_long_is_told(self):
        with pytest.raises(ValueError, match="12 tokens, but the context is 11"):
            make().text(texts(1, 12))

    def test_the_last_norm_comes_before_the_projection(self):
        model, ids = make(), texts()
        hidden = []
        model.text.transformer.norm.register_forward_hook(lambda m, i, out: hidden.append(out))
        want = F.normalize(model.text(ids) @ model.text_projection.weight.T, dim=-1)
        torch.testing.assert_close(model.encode_text(ids), want)
        torch.testing.assert_close(model.text(ids), hidden[-1])


class TestScale:
    def test_it_starts_at_one_over_007(self):
        model = CLIP(CONFIG)
        assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
        assert model.logit_bias is None

    def test_siglip_starts_at_ten_and_minus_ten(self):
        model = CLIP(replace(CONFIG, loss="sigmoid"))
        assert model.logit_scale.exp().item() == pytest.approx(10)
        assert model.logit_bias.item() == -10

    @pytest.mark.parametrize("log_scale, multiplier", [(math.log(1 / 0.07), 14.2857), (0.0, 1.0)])
    def test_it_multiplies_the_cosines_by_its_exponential(self, log_scale, multiplier):
        model = make()
        model.logit_scale.data.fill_(log_scale)
        image, text = F.normalize(torch.randn(2, 4, 7).double(), dim=-1)
        logits = multiplier * image @ text.T
        want = sum(F.cross_entropy(rows, torch.arange(4)) for rows in (logits, logits.T)) / 2
        found = model.loss(image, text, model.scalars())
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("loss, value, want", [
        ("softmax", 9.0, math.log(100)), ("softmax", 4.0, 4.0), ("sigmoid", 9.0, 9.0)])
    def test_softmax_alone_clamps_it_at_100_after_a_step(self, loss, value, want):
        model = make(loss=loss)
        model.logit_scale.data.fill_(value)
        model.after_step(0)
        assert model.logit_scale.item() == pytest.approx(want)

    def test_the_first_loss_is_near_log_of_the_batch(self):
        model = CLIP(replace(PRESETS["tiny"], vocab_size=29, eos_id=EOS))
        images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
        loss = model({"images": images, "ids": texts(32)})["contrastive"].item()
        # Cosines of random features vary, which adds about half the variance of the logits.
        assert math.log(32) - 0.1 < loss < math.log(32) + 0.8

    def test_scaling_the_features_of_a_tower_changes_no_logit(self):
        model, given = make(), batch()
        before = model(given)["contrastive"]
        model.vision.ln_post.weight.data *= 7
        model.vision.ln_post.bias.data *= 7
        torch.testing.assert_close(model(given)["contrastive"], before)


class TestInitialisation:
    def test_it_follows_the_released_code(self):
        model = CLIP(replace(PRESETS["tiny"], text_layers=3, vision_width=192))
        block, eye = model.text.transformer.blocks[1], model.vision.transformer.blocks[1]
        residual = 128 ** -0.5 * 6 ** -0.5
        for tensor, std in ((model.text.token_embed.weight, 0.02), (model.text.pos_embed, 0.01),
                            (model.text_projection.weight, 128 ** -0.5),
                            (model.image_projection.weight, 192 ** -0.5),
                            (block.attn.q_proj.weight, 128 ** -0.5),
                            (block.attn.v_proj.weight, 128 ** -0.5),
                            (block.attn.out_proj.weight, residual),
                            (block.mlp.fc1.weight, 256 ** -0.5),
                            (block.mlp.fc2.weight, residual), (model.vision.pos_embed, 192 ** -0.5),
                            (eye.attn.k_proj.weight, (2 / (4 * 192)) ** 0.5),
                            (eye.attn.out_proj.weight, (3 * 192) ** -0.5),
                            (eye.mlp.fc1.weight, (3 * 192) ** -0.5),
                            (eye.mlp.fc2.weight, (3 * 768) ** -0.5)):
            assert tensor.std().item() == pytest.approx(std, rel=0.06)
        for attn in (block.attn, eye.attn):
            assert all((linear.bias == 0).all() for linear in attn.children())


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
class TestCacheFeatures:
    @pytest.mark.parametrize("sizes", [[2, 2, 3], [7], [1] * 7])
    def test_micro_batches_give_the_gradients_of_the_whole_batch(self, loss, sizes):
        model, whole = make(loss=loss), batch(7)
        want = gradients(model, [model(whole)["contrastive"]])
        losses = accumulated(model, parts_of(whole, sizes))
        got = gradients(model, losses)
        for name in want:                   # logit_scale and logit_bias among them
            torch.testing.assert_close(got[name], want[name], atol=1e-10, rtol=1e-8, msg=name)
        torch.testing.assert_close(sum(losses), model(whole)["contrastive"])

    def test_averaging_micro_batch_losses_is_something_else(self, loss):
        model, whole = make(loss=loss), batch(6)
        want = gradients(model, [model(whole)["contrastive"]])
        got = gradients(model, [model(p)["contrastive"] / 3 for p in parts_of(whole, [2, 2, 2])])
        name = "image_projection.weight"
        assert (got[name] - want[name]).norm() > 0.05 * want[name].norm()

    def test_no_graph_is_kept_between_the_passes(self, loss):
        share = make(loss=loss).cache_features(parts_of(batch(4), [2, 2]))[0]
        assert not share.whole_loss.requires_grad and not share.image.requires_grad


class TestClassProbabilities:
    def test_they_are_a_softmax_over_the_classes(self):
        model = make()
        image, classifier = F.normalize(torch.randn(2, 7).double(), dim=-1), torch.eye(7).double()
        want = (image * model.logit_scale.exp()).softmax(dim=1)
        torch.testing.assert_close(model.class_probabilities(image, classifier), want)

    def test_siglips_are_those_of_each_pair_with_the_bias(self):
        model = make(loss="sigmoid")
        image, classifier = F.normalize(torch.randn(2, 7).double(), dim=-1), torch.eye(7).double()
        want = 1 / (1 + (1.5 - 10 * image).exp())   # the scale starts at 10, `make` sets the bias
        found = model.class_probabilities(image, classifier)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
        assert not torch.allclose(found.sum(dim=1), torch.ones(2).double())


RESNET = dict(image_size=64, stages=(1, 1, 2, 1), vision_width=4, vision_heads=2)


def squares(rows=5):
    return {"images": torch.randint(256, (rows, 3, 64, 64), dtype=torch.uint8), "ids": texts(rows)}


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers()}


class TestResNet:
    def test_the_pools_output_is_in_the_joint_space_and_projected_once(self):
        model, images = make(**RESNET), torch.randn(3, 3, 64, 64).double()
        pool, cells = model.vision.pool, model.vision.patches(images)
        want = F.normalize(pool(cells), dim=-1)
        assert want.shape == (3, 7)
        torch.testing.assert_close(model.encode_image(images), want)
        torch.testing.assert_close(model.image_features(images), pool(cells))
        assert pool.out_proj.bias is not None
        assert not any(name.startswith("image_projection") for name in model.state_dict())

    def test_the_text_tower_is_that_of_the_vit(self):
        model, other = make(**RESNET), make()
        assert {n: p.shape for n, p in model.text.named_parameters()} == \
            {n: p.shape for n, p in other.text.named_parameters()}

    def test_it_is_initialised_as_the_released_code_does(self):
        model = CLIP(replace(PRESETS["RN-tiny"], text_layers=3))
        for linear in (model.vision.pool.k_proj, model.vision.pool.out_proj):
            assert linear.weight.std().item() == pytest.approx(512 ** -0.5, rel=0.05)
            assert (linear.bias != 0).any()
        assert model.vision.pool.pos_embed.std().item() == pytest.approx(512 ** -0.5, rel=0.05)
        assert (model.vision.layer3[0].bn3.weight == 0).all()
        assert model.text_projection.weight.std().item() == pytest.approx(128 ** -0.5, rel=0.05)
        assert all((m.bias == 0).all() for m in model.text.transformer.blocks[0].attn.children())

    @pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
    def test_the_gradient_reaches_every_parameter(self, loss):
        model = make(loss=loss, **RESNET)
        for name, gradient in gradients(model, [model(squares())["contrastive"]]).items():
            if not name.endswith("k_proj.bias") and name != "text.token_embed.weight":
                assert gradient.abs().max() > 1e-9, name

    @pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
    def test_accumulation_is_exact_for_pictures_normalised_in_micro_batches(self, loss):
        model, whole = make(loss=loss, **RESNET), squares(7)
        parts = parts_of(whole, [2, 3, 2])
        image, text = (torch.cat(side) for side in zip(*(features(model, p) for p in parts)))
        want = gradients(model, [model.loss(image, text, model.scalars())])
        got = gradients(model, accumulated(model, parts))
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-9, rtol=1e-7, msg=name)

    def test_accumulation_moves_the_running_statistics_once(self):
        model, whole = make(**RESNET), squares(6)
        parts = parts_of(whole, [2, 2, 2])
        before = statistics(model)
        once = copy.deepcopy(model)
        model.cache_features(parts)
        assert all(torch.equal(b, before[name]) for name, b in statistics(model).items())
        accumulated(model, parts)
        for part in parts:
            features(once, part)
        for name, buffer in statistics(once).items():
            torch.testing.assert_close(statistics(model)[name], buffer, msg=name)
            assert not torch.equal(buffer, before[name]), name

    def moved(self, *patterns):
        """The top of the names of statistics that a step moves when these patterns train."""
        model = make(**RESNET)
        freeze(model, patterns)
        before = statistics(model)
        model(squares())["contrastive"].backward()
        return {name.split(".")[1] for name, b in statistics(model).items()
                if not torch.equal(b, before[name])}

    def test_a_frozen_tower_or_part_of_one_keeps_its_statistics(self):
        assert self.moved("*") == {"bn1", "bn2", "bn3", "layer1", "layer2", "layer3", "layer4"}
        assert self.moved("text.*", "logit_scale") == set()
        assert self.moved("vision.pool.*") == set()
        assert self.moved("vision.layer4.*", "vision.pool.*") == {"layer4"}

    def test_under_bf16_features_are_unit_vectors_in_float32(self):
        model, given = CLIP(replace(CONFIG, **RESNET)), squares()
        with torch.autocast("cpu", torch.bfloat16):
            image, text = features(model, given)
            loss = model(given)["contrastive"]
        loss.backward()
        assert image.dtype == text.dtype == torch.float32
        torch.testing.assert_close(image.norm(dim=1), torch.ones(5))
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_its_config_survives_json(self):
        config = replace(CONFIG, **RESNET)
        again = CLIPConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config and again.stages == (1, 1, 2, 1)


class TestRecipes:
    @pytest.mark.parametrize("name, lr", [
        ("ViT-B/32", 5e-4), ("ViT-B/16", 5e-4), ("ViT-L/14", 4e-4), ("ViT-L/14@336", 2e-5),
        ("RN50", 5e-4), ("RN101", 5e-4), ("RN50x4", 5e-4), ("RN50x16", 4e-4), ("RN50x64", 3.6e-4)])
    def test_the_papers_numbers(self, name, lr):
        recipe = find_recipe(RECIPES, name, "shapes", {})
        assert recipe.lr == lr and recipe.grad_clip is None
        assert (recipe.batch_size, recipe.weight_decay, recipe.warmup) == (32768, 0.2, 2000)
        assert (recipe.betas, recipe.eps) == (((0.9, 0.999), 1e-8) if name.startswith("RN")
                                              else ((0.9, 0.98), 1e-6))
        epochs = recipe.steps * recipe.batch_size / 400e6
        assert epochs == pytest.approx(1 if name.endswith("@336") else 32, rel=0.01)

    def test_our_own_presets_clip_the_gradient(self):
        for name in ("tiny", "small", "RN-tiny"):
            assert find_recipe(RECIPES, name, "shapes", {}).grad_clip == 1.0
        assert (RECIPES["RN-tiny"].betas, RECIPES["RN-tiny"].eps) == ((0.9, 0.999), 1e-8)
        assert find_recipe(RECIPES, "tiny", "emoji", {}).weight_decay == 2.0


class TestEvaluate:
    def test_every_figure_has_its_chance(self):
        world = Shapes(image_size=15)
        world.splits = world.splits | {"test": 40, "single": 42, "composition": 12}
        tokenizer = world_tokenizer(world)
        model = CLIP(replace(CONFIG, vocab_size=len(tokenizer), eos_id=2)).eval()
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
