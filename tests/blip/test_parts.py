"""BLIP's parts: its config, its towers, what encoder and decoder share, the initial weights."""
import json
from dataclasses import asdict, replace

import pytest
import torch

from blip import (PRESETS, SHARING, BLIPConfig, init_weights, make_model, make_text, make_vision,
                  share)
from tests.helpers import (assert_close, assert_same, loop_bert, loop_head, loop_vit, randomize,
                           refused, toy_blip, toy_clip)

TOY = {"vision_width": 12, "vision_heads": 3, "text_width": 10, "text_heads": 2, "vocab_size": 29}


class TestBLIPConfig:
    @pytest.mark.parametrize("field, value", [
        ("losses", "itm"), ("sharing", "some"), ("hardness", -1.0), ("text_layers", 0),
        ("pad_id", -1), ("enc_id", -1), ("queue_size", -1), ("alpha", 1.5), ("momentum", -0.1),
        ("momentum", 1.1), ("label_smoothing", 2.0), ("embed_dim", 0)])
    def test_a_value_that_no_model_can_have_is_refused(self, field, value):
        with refused(f"{field}.*{value}"):
            BLIPConfig(**{field: value})

    def test_it_survives_json_with_the_image_encoder_of_a_clip(self):
        config = BLIPConfig(image_size=99, patch_size=7, vision_width=5, vision=toy_clip().config,
                            pad_id=0, eos_id=0, queue_size=0, alpha=1.0, momentum=1.0)
        assert BLIPConfig(**json.loads(json.dumps(asdict(config)))) == config
        assert (config.image_size, config.patch_size, config.vision_width) == (15, 5, 12), "CLIP's"

    def test_the_papers_sizes(self):
        base, large = PRESETS["base"], PRESETS["large"]
        assert (base.vision_heads, base.text_heads, base.vision_eps) == (12, 12, 1e-6), f"{base}"
        assert (base.dec_id, base.enc_id, base.queue_size) == (30522, 30523, 57600), f"{base}"
        assert (base.momentum, base.alpha, base.label_smoothing) == (0.995, 0.4, 0.1), f"{base}"
        assert large == replace(base, vision_width=1024, vision_layers=24, vision_heads=16)

    def test_a_part_of_another_version_or_a_resnet_is_refused(self):
        clip = asdict(toy_clip().config)
        with refused("vision.*unheard"):
            BLIPConfig(vision=clip | {"unheard": 1})
        with refused("vision.*ResNet"):
            BLIPConfig(vision=clip | {"stages": (1, 1, 1, 1), "image_size": 64})


class TestMakeVision:
    def test_it_is_a_vit_with_a_patch_bias_and_a_last_norm(self):
        config = BLIPConfig(**TOY, image_size=15, patch_size=5, vision_layers=3)
        tower, images = randomize(make_vision(config).double()), torch.randn(2, 3, 15, 15).double()
        assert tower.patch_embed.bias is not None, "patches have no bias"
        assert_same("tokens (B, S, D)", tower(images), loop_vit(tower, images), tower)
        tower = randomize(make_vision(replace(config, vision_eps=0.3)).double())
        assert_close("tokens (B, S, D)", tower(images), loop_vit(tower, images, eps=0.3))

    def test_it_may_be_that_of_a_clip(self):
        clip = toy_clip()
        tower = make_vision(BLIPConfig(vision=clip.config)).double()
        names = tower.state_dict().keys() ^ clip.vision.state_dict().keys()
        assert not names, f"other weights: {names}"
        tower.load_state_dict(clip.vision.state_dict())
        images = torch.randn(2, 3, 15, 15).double()
        assert_close("class token (B, D)", tower.pooled(images), clip.vision.pooled(images))


class TestMakeText:
    def test_it_has_the_configs_sizes_and_attends_to_a_context_of_any_width(self):
        config = BLIPConfig(**TOY, text_layers=2, context_length=11)
        model = randomize(make_text(config, 17, has_head=True).double())
        assert model.head and model.blocks[1].cross.k_proj.in_features == 17, "head or context"
        ids, context = torch.randint(29, (2, 11)), torch.randn(2, 5, 17).double()
        x = loop_bert(model, ids, context, is_causal=True)
        assert_close("logits (B, T, V)", model.logits(ids, context),
                     loop_head(model.head, x, model.token_embed.weight))
        plain = make_text(config, None)
        assert plain.head is None and plain.blocks[1].cross is None, "head or cross-attention"


class TestShare:
    @pytest.mark.parametrize("sharing, own", [
        ("all", ()), ("all-but-sa", ("attn",)), ("all-but-ca", ("cross",)),
        ("none", ("attn", "cross", "mlp", "token_embed", "pos_embed", "norm"))])
    def test_encoder_and_decoder_share_all_modules_but_these(self, sharing, own):
        model = toy_blip(sharing=sharing)
        encoder, decoder = model.encoder, model.decoder
        for one, other in zip([encoder, *encoder.blocks], [decoder, *decoder.blocks]):
            for name, part in one.named_children():
                if name != "blocks":
                    is_shared = part is getattr(other, name)
                    assert is_shared == (name.removesuffix("_norm") not in own), name

    @pytest.mark.parametrize("sharing, count", [
        ("all", 224_075_071), ("all-but-sa", 252_441_919), ("all-but-ca", 252_441_919),
        ("none", 361_333_567)])
    def test_the_base_model_has_the_papers_number_of_parameters(self, sharing, count):
        with torch.device("meta"):
            model = make_model(replace(PRESETS["base"], sharing=sharing))
        assert count == sum(p.numel() for name, p in model.named_parameters()
                            if not name.startswith("momentum.")), "parameters"

    def test_what_the_encoder_lacks_the_decoder_keeps(self):
        config = BLIPConfig(**TOY)
        encoder, decoder = make_text(config, None), make_text(config, 12, has_head=True)
        share(encoder, decoder, "all-but-sa")
        for one, other in zip(encoder.blocks, decoder.blocks):
            assert one.mlp is other.mlp and other.cross is not None, "cross-attention"
        assert set(SHARING) == {"all", "all-but-sa", "all-but-ca", "none"}, "names"


class TestInitWeights:
    def test_weights_have_berts_deviation_and_biases_are_zero(self):
        model = toy_blip(vision_width=90, text_width=80, vocab_size=99, embed_dim=70,
                         image_size=40, momentum=0.0)
        for p in model.parameters():
            p.data.fill_(7.0)
        init_weights(model)
        for name, p in model.named_parameters():
            kept = ("norm", "ln_post", "temp", "decoder.head.bias", "vision.cls", "vision.pos")
            if any(part in name for part in kept):
                assert_close(name, p, torch.full_like(p, 7.0))
            elif name.endswith("bias"):
                assert_close(name, p, torch.zeros_like(p))
            else:                        # 0.02 at a width of 768
                assert p.std().item() == pytest.approx(0.02 * (768 / 80) ** 0.5, rel=0.2), name
                assert p.mean().abs() < 0.02, f"mean of {name}"


class TestMakeModel:
    @pytest.mark.parametrize("losses, parts", [
        ("itc,itm,lm", {"encoder", "decoder", "image_projection", "text_projection", "temp",
                        "itm_head", "momentum"}),
        ("itc,itm", {"encoder", "image_projection", "text_projection", "temp", "itm_head",
                     "momentum"}),
        ("itc", {"encoder", "image_projection", "text_projection", "temp", "momentum"}),
        ("lm", {"decoder"}), ("vqa", {"encoder", "decoder"}), ("two-images", {"encoder", "head"}),
        ("dialogue", {"encoder", "itm_head"})])
    def test_the_losses_say_which_model_it_is_and_parts_that_none_needs_are_left_out(
            self, losses, parts):
        model = make_model(BLIPConfig(**TOY | {"text_width": 12}, losses=losses))
        names = {name.split(".")[0] for name, _ in model.named_parameters()}
        assert names == parts | {"vision"}, f"{names}"
