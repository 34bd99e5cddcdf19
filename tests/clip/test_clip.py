"""CLIP: two encoders, the loss of their cosines, its parts, and the sizes that the paper fixes."""
import copy
import json
import math
from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from clip import (CLIP, PRESETS, CLIPConfig, FeatureGradients, image_tower, init_weights,
                  paper_resnet, paper_vit)
from tests.helpers import (ACTS, CLIP_EOS, assert_close, assert_same, attend_by_hand, block_by_hand,
                           clip_batch, layer_norm, loop_pixels, loop_text, loss_by_hand,
                           mlp_by_hand, randomize, refused, texts, toy_clip, unchanged)

RESNET = {"image_size": 64, "stages": (1, 2, 3, 1), "vision_width": 4, "vision_heads": 8}
PAPER = {"context_length": 77, "vocab_size": 49408, "eos_id": 49407, "act": "quick_gelu",
         "text_layers": 12, "loss": "softmax"}


def count(config, device="meta"):
    """The parameters of a CLIP of this config."""
    with torch.device(device):
        return sum(p.numel() for p in CLIP(config).parameters())


class TestCLIPConfig:
    @pytest.mark.parametrize("field, value", [
        ("loss", "cosine"), ("act", "tanh"), ("context_length", 2), ("eos_id", -1),
        ("vision_layers", 0), ("embed_dim", -3)])
    def test_a_value_that_no_model_can_have_is_refused(self, field, value):
        with refused(f"{field}.*{value}"):
            CLIPConfig(**{field: value})

    def test_it_survives_json(self):
        config = CLIPConfig(**RESNET, context_length=3, eos_id=0)      # the least
        again = CLIPConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config and again.stages == (1, 2, 3, 1), f"{again}"


def ragged(ends, T=11):
    """Ids (B, T), first 0, with the first end token at these places and others behind it."""
    ids = torch.randint(CLIP_EOS + 1, 29, (len(ends), T))
    ids[:, 0] = 0
    for row, end in zip(ids, ends):
        row[[end, *range(end + 2, T, 3)]] = CLIP_EOS
    return ids


class TestTextTower:
    @pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
    def test_it_is_the_loop_read_at_the_first_end_token(self, act):
        tower, ids = toy_clip(act=act).text, ragged((4, 10, 1, 7))
        expected = loop_text(tower, ids, 2, act)
        with unchanged(ids=ids):
            assert_same("features at the first EOS (B, D)", tower(ids), expected, tower)
        got = tower(ids[[0, 2], :6])
        assert_close("features with less behind EOS (B, D)", got, expected[[0, 2]])

    def test_a_text_longer_than_the_context_is_refused(self):
        toy_clip().text(texts(1, 11))
        with refused("12.*11"):
            toy_clip().text(texts(1, 12))


class TestImageTower:
    @pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
    def test_a_vit_has_norms_before_and_after_its_blocks_and_is_read_at_the_class_token(self, act):
        sizes = {"image_size": 15, "patch_size": 5, "vision_width": 12}
        config = CLIPConfig(**sizes, vision_layers=3, vision_heads=4, act=act)
        tower, images = randomize(image_tower(config)).double(), torch.randn(2, 3, 15, 15).double()
        patches = F.conv2d(images, tower.patch_embed.weight.unflatten(1, (3, 5, 5)), stride=5)
        x = torch.cat([tower.cls_token.expand(2, 1, 12), patches.flatten(2).mT], dim=1)
        x = layer_norm(tower.ln_pre, x + tower.pos_embed)
        for block in tower.transformer.blocks:
            x = block_by_hand(block, x, heads=4, mlp=partial(mlp_by_hand, act=ACTS[act]))
        expected = layer_norm(tower.ln_post, x[:, 0])
        assert_close("image features (B, D)", tower.pooled(images), expected)
        assert len(tower.transformer.blocks) == 3, "blocks"

    def test_with_stages_it_is_a_resnet_whose_pool_is_in_the_joint_space(self):
        tower = randomize(image_tower(CLIPConfig(**RESNET, embed_dim=7))).double().eval()
        images = torch.randn(2, 3, 64, 64).double()
        assert [len(getattr(tower, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 2, 3, 1], "blocks"
        cells = tower.hidden(images)                                  # (B, 2 * 2, 32 * 4)
        x = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1) + tower.pool.pos_embed
        expected = attend_by_hand(tower.pool, x[:, :1], x, heads=8)[:, 0]
        assert_close("image features (B, E)", tower.pooled(images), expected)
        assert expected.shape == (2, 7), "embed_dim"


class TestFeatureGradients:
    def test_the_loss_is_a_part_of_the_whole_with_the_stored_gradients(self):
        given = [torch.randn(shape).double() for shape in ((3, 7), (3, 7), (), ())]
        part = FeatureGradients(given[0], given[1], tuple(given[2:]), torch.tensor(6.5), parts=5)
        features = [torch.randn_like(g).requires_grad_() for g in given]
        loss = part.loss(features[0], features[1], features[2:])
        assert_close("loss", loss, 6.5 / 5)
        loss.backward()
        for name, x, g, parts in zip(("image features", "text features", "scale", "bias"), features,
                                     given, (1, 1, 5, 5)):
            assert x.grad is not None, f"no gradient of {name}"
            assert_close(f"gradient of {name}", x.grad, g / parts)


def features(model, batch):
    """Unit vectors of both sides, (B, E) each."""
    return (model.encode_image(loop_pixels(batch["images"])), model.encode_text(batch["ids"]))


def whole_loss(model, image, text):
    return loss_by_hand(image, text, model.logit_scale.exp(), model.logit_bias)


def split(batch, sizes):
    """A batch in micro-batches."""
    return [dict(zip(batch, part)) for part in zip(*(x.split(sizes) for x in batch.values()))]


def cached(model, parts, **more):
    """The sum of the losses of micro-batches, as training computes them."""
    return sum(model(part | {"feature_gradients": share}, **more)["contrastive"]
               for part, share in zip(parts, model.cache_features(parts, **more), strict=True))


class TestCLIP:
    def test_a_new_model_has_a_loss_of_about_log_b(self):
        batch = {"images": torch.randint(256, (31, 3, 32, 32), dtype=torch.uint8),
                 "ids": F.pad(torch.randint(3, 1024, (31, 7)), (0, 1), value=2)}
        assert_close("loss", CLIP(CLIPConfig())(batch)["contrastive"], math.log(31), 0.15)

    @pytest.mark.parametrize("changes", [{}, RESNET])
    def test_an_image_is_projected_once_to_a_unit_vector(self, changes):
        model = toy_clip(**changes).eval()
        images = torch.randn(3, 3, *[model.config.image_size] * 2).double()
        expected = pooled = model.vision.pooled(images)      # a ResNet's pool ends in a projection
        assert_close("before the projection (B, D)", model.image_features(images), pooled)
        if not changes:
            expected = pooled @ model.image_projection.weight.T
        assert_close("image embeddings (B, E)", model.encode_image(images),
                     expected / expected.norm(dim=1, keepdim=True))

    @pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
    def test_a_text_is_its_end_token_projected_to_a_unit_vector(self, act):
        model, ids = toy_clip(act=act), texts()
        expected = loop_text(model.text, ids, 2, act) @ model.text_projection.weight.T
        assert_close("text embeddings (B, E)", model.encode_text(ids),
                     expected / expected.norm(dim=1, keepdim=True))

    @pytest.mark.parametrize("name, expected", [("tiny", 1_385_217), ("RN-tiny", 1_910_553)])
    def test_the_presets_have_so_many_parameters(self, name, expected):
        assert count(PRESETS[name], "cpu") == expected, "parameters"

    @pytest.mark.parametrize("loss, start", [("softmax", [1 / 0.07]), ("sigmoid", [10, -10])])
    def test_the_scale_and_siglips_bias_start_as_in_the_papers(self, loss, start):
        scale, *bias = CLIP(CLIPConfig(image_size=8, loss=loss)).scalars()
        found = [scale.exp().item(), *(b.item() for b in bias)]
        assert_close("exp(logit_scale) and logit_bias", found, start)

    def test_a_new_model_has_the_initial_weights(self):
        model = CLIP(PRESETS["tiny"])
        assert_close("std of token embeddings", model.text.token_embed.weight.std(), 0.02, 0.002)
        assert_close("biases of attention", model.text.transformer.blocks[1].attn.out_proj.bias,
                     torch.zeros(128))

    @pytest.mark.parametrize("changes", [{}, {"loss": "sigmoid"}, RESNET])
    def test_the_loss_is_of_all_pairs_and_reaches_every_parameter(self, changes):
        model = toy_clip(**changes)
        batch = clip_batch(5, model.config.image_size)
        with unchanged(**batch):
            loss = model(batch)["contrastive"]
        assert_same("loss", loss, whole_loss(model, *features(model, batch)), model, 1e-5)
        loss.backward()
        for name, p in model.named_parameters():
            if not name.endswith("k_proj.bias"):      # softmax does not depend on it
                assert p.grad is not None and p.grad.any(), f"no gradient of {name}"

    @pytest.mark.parametrize("changes", [{}, RESNET])
    def test_under_bf16_embeddings_are_unit_vectors_in_float32(self, changes):
        model = toy_clip(**changes).float()
        batch = clip_batch(5, model.config.image_size)
        with torch.autocast("cpu", torch.bfloat16):
            sides, loss = features(model, batch), model(batch)["contrastive"]
        for name, side in zip(("image", "text"), sides):
            assert side.dtype == torch.float32, f"{name} embeddings are {side.dtype}"
            assert_close(f"norms of {name} embeddings (B,)", side.norm(dim=1), torch.ones(5))
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters()), "gradients"

    @pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("sizes", [[6], [2, 1, 3]])
    def test_with_a_gather_the_mean_over_processes_is_the_whole_batch(self, loss, sizes):
        model, batch = toy_clip(loss=loss), clip_batch(12)
        sides, losses = features(model, batch), []
        for first in (0, 6):
            def gather(x):
                """All rows of the side of which x has six."""
                side = min(sides, key=lambda side: (side[first:first + 6] - x).abs().max()).detach()
                return torch.cat([side[:first], x, side[first + 6:]]), first
            own = {name: x[first:first + 6] for name, x in batch.items()}
            losses.append(cached(model, split(own, sizes), gather=gather) if len(sizes) > 1
                          else model(own, gather)["contrastive"])
        scalars = dict(zip(("logit_scale", "logit_bias"), model.scalars()))
        assert_same("mean loss", sum(losses) / 2, whole_loss(model, *sides), None, 1e-5, **scalars)

    @pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("sizes, changes", [
        ([2, 2, 3], {}), ([7], {}), ([1] * 7, {}), ([2, 3, 2], RESNET)])
    def test_cached_micro_batches_have_the_loss_and_gradients_of_the_whole_batch(
            self, loss, sizes, changes):
        model = toy_clip(loss=loss, **changes)
        parts = split(clip_batch(7, model.config.image_size), sizes)
        # BatchNorm normalizes each micro-batch by itself.
        image, text = (torch.cat(side) for side in zip(*(features(model, part) for part in parts)))
        expected = whole_loss(model, image, text)
        assert_same("sum of the losses", cached(model, parts), expected, model, 1e-5)

    def test_accumulation_moves_a_resnets_statistics_once(self):
        model = toy_clip(**RESNET)
        once, parts = copy.deepcopy(model), split(clip_batch(6, 64), [2, 4])
        for part in parts:
            features(once, part)
        cached(model, parts)
        for name, expected in once.named_buffers():
            assert_close(name, dict(model.named_buffers())[name], expected, 1e-6)

    @pytest.mark.parametrize("loss, value, expected", [
        ("softmax", 9.0, math.log(100)), ("softmax", -4.0, -4.0), ("sigmoid", 9.0, 9.0)])
    def test_after_a_step_softmaxs_scale_is_at_most_100(self, loss, value, expected):
        model = toy_clip(loss=loss)
        model.logit_scale.data.fill_(value)
        model.after_step(0)
        assert_close("logit_scale", model.logit_scale, expected)

    @pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
    def test_class_probabilities_are_of_the_scaled_cosines_with_a_classifier_of_two_templates(
            self, loss):
        model, image = toy_clip(loss=loss), F.normalize(torch.randn(3, 7).double(), dim=-1)
        columns = []
        for _ in range(5):                            # classes, each in two templates
            mean = model.encode_text(texts(2)).mean(dim=0)
            columns.append(mean / mean.norm())
        logits = math.exp(1.7) * image @ torch.stack(columns, dim=1)
        expected = 1 / (1 + (1.3 - logits).exp()) if loss == "sigmoid" else \
            logits.exp() / logits.exp().sum(dim=1, keepdim=True)
        assert_close("probabilities (B, C)",
                     model.class_probabilities(image, torch.stack(columns, dim=1)), expected)


class TestInitWeights:
    @pytest.mark.parametrize("changes", [{}, RESNET | {"vision_heads": 4}])
    def test_it_follows_the_released_code_and_leaves_all_other_weights(self, changes):
        W, D, L = 96, 88, 3              # enough numbers for a standard deviation within 6%
        model = toy_clip(**{"text_width": W, "vision_width": D, "vision_heads": 2, "embed_dim": 40,
                            "text_layers": L, "context_length": 50} | changes)
        for p in model.parameters():
            p.data.fill_(7.0)
        init_weights(model)
        stds = {"text.token_embed.weight": 0.02, "text.pos_embed": 0.01,
                "text_projection.weight": W ** -0.5, "image_projection.weight": D ** -0.5,
                "text.*.[qkv]_proj.weight": W ** -0.5, "text.*.fc1.weight": (2 * W) ** -0.5,
                "text.*.out_proj.weight": W ** -0.5 * (2 * L) ** -0.5,
                "text.*.fc2.weight": W ** -0.5 * (2 * L) ** -0.5,
                # Xavier's, for torch's layer with q, k and v in one matrix
                "vision.transformer.*.[qkv]_proj.weight": (2 / (4 * D)) ** 0.5,
                "*.attn.*.bias": 0.0}
        for name, p in model.named_parameters():
            std = next((std for pattern, std in stds.items() if fnmatch(name, pattern)), None)
            if std is None:
                assert_close(name, p, torch.full_like(p, 7.0))
                continue
            assert p.std().item() == pytest.approx(std, rel=0.06), f"standard deviation of {name}"
            assert p.mean().abs() <= 0.1 * std, f"mean of {name}"


class TestPaperVit:
    @pytest.mark.parametrize("name, image_size, patch_size, width, layers, text_width, expected", [
        ("ViT-B/32", 224, 32, 768, 12, 512, 151_277_313),
        ("ViT-B/16", 224, 16, 768, 12, 512, 149_620_737),
        ("ViT-L/14", 224, 14, 1024, 24, 768, 427_616_513),
        ("ViT-L/14@336", 336, 14, 1024, 24, 768, 427_944_193)])
    def test_it_is_the_published_model(
            self, name, image_size, patch_size, width, layers, text_width, expected):
        config = paper_vit(image_size, patch_size, width, layers, text_width, text_width)
        assert config == PRESETS[name] == replace(
            config, **PAPER, image_size=image_size, patch_size=patch_size, vision_layers=layers,
            vision_heads=width // 64, text_heads=text_width // 64, embed_dim=text_width, stages=())
        assert count(config) == expected, "parameters"


class TestPaperResnet:
    @pytest.mark.parametrize("name, image_size, stages, width, text_width, embed_dim, expected", [
        ("RN50", 224, (3, 4, 6, 3), 64, 512, 1024, 102_007_137),
        ("RN101", 224, (3, 4, 23, 3), 64, 512, 512, 119_688_033),
        ("RN50x4", 288, (4, 6, 10, 6), 80, 640, 640, 178_300_601),
        ("RN50x16", 384, (6, 8, 18, 8), 96, 768, 768, 290_979_217),
        ("RN50x64", 448, (3, 15, 36, 10), 128, 1024, 1024, 623_258_305)])
    def test_it_is_the_published_model(
            self, name, image_size, stages, width, text_width, embed_dim, expected):
        config = paper_resnet(image_size, stages, width, text_width, embed_dim)
        assert config == PRESETS[name] == replace(
            config, **PAPER, image_size=image_size, stages=stages, text_heads=text_width // 64,
            vision_heads=32 * width // 64, embed_dim=embed_dim)       # heads of the pool
        assert count(config) == expected, "parameters"
