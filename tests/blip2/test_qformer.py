"""BLIP-2's image encoder and Q-Former: which positions attend to which, and what they share."""
from dataclasses import asdict

import pytest
import torch

from blip2 import BLIP2, BLIP2Config, EVAConfig, ImageEncoder, QFormerBlock, init_weights
from tests.helpers import (BLIP_PAD, assert_close, assert_same, blip_ids, loop_image_tokens,
                           loop_qformer, loop_qformer_block, make_cache, randomize, refused,
                           toy_blip2)

Q = 3


def image_tokens(B=2):
    return torch.randn(B, 10, 12).double()


RULES = {                                # the paper's Figure 2: query, key
    "contrast": lambda q, k: (q < Q) == (k < Q), "matching": lambda q, k: True,
    "generation": lambda q, k: k < Q or q >= k}


def mask_of(rule, rows=Q + 5):
    """The rule over Q queries and 5 tokens, of the last `rows` positions: (rows, Q + 5)."""
    return torch.tensor([[bool(rule(q, k)) for k in range(Q + 5)]
                         for q in range(Q + 5 - rows, Q + 5)])


class TestEVAConfig:
    def test_it_is_the_papers_vit_without_its_last_block(self):
        with torch.device("meta"):
            encoder = ImageEncoder(BLIP2Config(vision=EVAConfig()))
        count = sum(p.numel() for p in encoder.vit.parameters())
        assert (len(encoder.vit.transformer.blocks), count) == (39, 985_949_440), count
        assert encoder.vit.ln_pre is None and encoder.vit.ln_post is None, "a norm of the ViT"
        assert encoder.vit.transformer.blocks[0].attn.heads == 16, "heads are 88 wide"


class TestBLIP2Config:
    @pytest.mark.parametrize("changes, values", [
        ({"losses": "itg"}, "losses=itg"), ({"num_queries": 0}, "num_queries=0"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"vision": {"stages": [1, 1, 1, 1]}}, "vision: a ResNet"), ({"hardness": -1}, "hardness=-1")])
    def test_a_value_that_no_model_can_have_is_refused(self, changes, values):
        with refused(values):
            BLIP2Config(**changes)

    def test_parts_may_be_dicts_as_json_has_them(self):
        for config in (toy_blip2("t5").config, toy_blip2("gpt2").config,
                       BLIP2Config(vision=EVAConfig(vision_layers=3))):
            assert BLIP2Config(**asdict(config)) == config

    def test_sizes_follow_the_frozen_models(self):
        assert BLIP2Config(vision=EVAConfig(image_size=28)).image_size == 28
        assert BLIP2Config(vision=EVAConfig(image_size=28), resize_to=42).image_size == 42
        assert toy_blip2("gpt2").config.context_length == 31, "the language model's"
        assert toy_blip2().config.context_length == 11, "the Q-Former's"

    @pytest.mark.parametrize("losses, asks", [
        ("vqa", True), ("instruct", True), ("captions", False), ("lm", False)])
    def test_the_qformer_gets_questions_and_instructions_if_it_has_text(self, losses, asks):
        assert BLIP2Config(losses=losses).asks_qformer == asks
        assert not BLIP2Config(losses=losses, qformer_text=False).asks_qformer

    @pytest.mark.parametrize("losses, prompt, expected", [
        ("lm", "what?", "question: what? answer:"), ("lm", "", "a photo of"),
        ("instruct", "what?", "what?"), ("instruct", "", "a photo of")])
    def test_questions_and_captions_have_their_wording(self, losses, prompt, expected):
        assert BLIP2Config(losses=losses, prompt="a photo of").wording(prompt) == expected


class TestImageEncoder:
    def test_tokens_are_those_of_the_second_last_layer_under_a_norm_of_its_own(self):
        model, images = toy_blip2(), torch.randn(2, 3, 15, 15).double()
        assert len(model.vision.vit.transformer.blocks) == 2, "of the CLIP's 3 blocks"
        assert_same("tokens (B, S, C)", model.vision(images),
                    loop_image_tokens(model.vision, images), model.vision.norm)


class TestQFormerBlock:
    @pytest.mark.parametrize("sees_image", [True, False])
    @pytest.mark.parametrize("queries, text", [(Q, 4), (Q, 0), (0, 4)])
    def test_queries_and_text_share_the_self_attention_alone(self, queries, text, sees_image):
        block = QFormerBlock(width=10, heads=2, context_width=12 if sees_image else None).double()
        randomize(block)
        x, image = torch.randn(2, queries + text, 10).double(), image_tokens()
        mask = torch.ones(queries + text, queries + text).tril().bool()
        seen = image if sees_image and queries else None
        assert_same("outputs (B, Q + T, D)", block(x, queries, image, mask=mask),
                    loop_qformer_block(block, x, queries, seen, mask), block)

    def test_text_has_its_own_mlp_and_never_attends_to_the_image(self):
        block, x = randomize(QFormerBlock(width=10, heads=2, context_width=12).double()), \
            torch.randn(2, Q + 4, 10).double()
        image = image_tokens()
        out = block(x, Q, image)
        assert_close("text without queries", block(x[:, Q:], 0), block(x[:, Q:], 0, image))
        block.text_mlp.fc1.weight.data.mul_(2.0)
        assert_close("queries (B, Q, D)", block(x, Q, image)[:, :Q], out[:, :Q])
        changed = block(x, Q, image.flip(0))
        assert (changed - out)[:, :Q].abs().min(dim=-1).values.gt(0).all(), "queries see the image"
        block.text_mlp.fc1.weight.data.div_(2.0)
        assert_close("text (B, T, D)", block(x, Q, image.flip(0))[:, Q:], out[:, Q:])


class TestQFormer:
    def test_every_second_block_has_cross_attention(self):
        assert [block.cross is not None for block in toy_blip2().qformer.blocks] == [
            True, False, True]

    @pytest.mark.parametrize("name", RULES)
    def test_each_mask_is_that_of_the_papers_figure(self, name):
        qformer, ids, image = toy_blip2().qformer, blip_ids(5, 5), image_tokens()
        got = qformer(image, ids, mask=mask_of(RULES[name]))
        assert_close("outputs (B, Q + T, D)", got, torch.stack(
            [loop_qformer(qformer, image[b], ids[b], RULES[name]) for b in range(2)]))

    def test_padding_is_no_key(self):
        qformer, ids, image = toy_blip2().qformer, blip_ids(5, 3), image_tokens()
        mask = qformer.text_mask(ids, BLIP_PAD)
        assert_close("mask (B, 1, 1, Q + T)", mask[1, 0, 0], [True] * 6 + [False] * 2)
        assert_close("outputs", qformer(image, ids, mask=mask)[1, :6],
                     loop_qformer(qformer, image[1], ids[1, :3]))

    @pytest.mark.parametrize("has_image, keep", [(True, Q), (True, Q + 2), (False, 1)])
    def test_the_first_outputs_are_those_of_the_whole_pass(self, has_image, keep):
        qformer, ids, image = toy_blip2().qformer, blip_ids(5, 3), image_tokens()
        mask = qformer.text_mask(ids, BLIP_PAD)
        given = (image, ids) if has_image else (None, ids)
        mask = mask if has_image else mask[..., Q:]
        assert_close("outputs (B, keep, D)", qformer(*given, mask=mask, keep=keep),
                     qformer(*given, mask=mask)[:, :keep])

    def test_queries_alone_and_text_alone_are_the_unimodal_pass(self):
        qformer, ids, image = toy_blip2().qformer, blip_ids(5, 5), image_tokens()
        both = qformer(image, ids, mask=mask_of(RULES["contrast"]))
        assert_close("queries (B, Q, D)", qformer(image), both[:, :Q])
        assert_close("text (B, T, D)", qformer(ids=ids), both[:, Q:])

    def test_text_behind_cached_queries_is_the_pass_of_generation(self):
        qformer, ids, image, cache = toy_blip2().qformer, blip_ids(5, 3), image_tokens(), \
            make_cache()
        keys = qformer.text_mask(ids, BLIP_PAD)
        both = qformer(image, ids, mask=mask_of(RULES["generation"]) & keys)
        assert_close("queries (B, Q, D)", qformer(image, cache=cache), both[:, :Q])
        lengths = [k.shape[2] for k, _ in cache.entries.values()]
        assert lengths == [Q] * len(qformer.blocks), f"cached keys of the layers: {lengths}"
        text = qformer(ids=ids, mask=mask_of(RULES["generation"], rows=5) & keys, cache=cache)
        real = ids != BLIP_PAD
        assert_close("text (N, D)", text[real], both[:, Q:][real])

    def test_without_text_it_has_the_same_queries_and_fewer_weights(self):
        whole = toy_blip2("gpt2")
        bare = toy_blip2("gpt2", qformer_text=False)
        bare.load_state_dict({name: whole.state_dict()[name] for name in bare.state_dict()})
        image = image_tokens()
        assert_close("queries", bare.qformer(image), whole.qformer(image))
        names = {name.split(".")[-2] for name in bare.qformer.state_dict() if "." in name}
        assert not names & {"token_embed", "pos_embed", "text_mlp_norm"}, f"{names}"


class TestBLIP2:
    def test_in_training_the_frozen_image_encoder_stays_in_eval_mode(self):
        model = toy_blip2()
        for p in model.vision.vit.parameters():
            p.requires_grad = False
        model.train()
        assert not model.vision.vit.training and model.qformer.training

    def test_another_run_gives_what_it_has_and_its_positions_are_resized(self):
        first, second = toy_blip2(), toy_blip2("gpt2", resize_to=25)
        own = {name: value.clone() for name, value in second.state_dict().items()}
        found = second.adapt(first.state_dict())
        assert found.keys() == own.keys()
        for name in found:
            if name == "vision.vit.pos_embed":
                assert found[name].shape == (26, 12), f"{name} {tuple(found[name].shape)}"
                assert_close("class token", found[name][0], first.vision.vit.pos_embed[0])
            else:
                given = first.state_dict() if name.startswith(("vision.", "qformer.")) else own
                assert_close(name, found[name], given[name])


class TestInitWeights:
    def test_linear_layers_are_wider_than_berts_and_the_text_mlps_copies(self):
        torch.manual_seed(0)
        model = BLIP2(BLIP2Config(qformer_width=192, qformer_heads=3))
        vit = {name: p.clone() for name, p in model.vision.named_parameters()}
        init_weights(model)
        for name, p in model.vision.named_parameters():
            assert_close(name, p, vit[name])
        for name, p in model.qformer.named_parameters():
            if p.ndim == 2:
                assert_close(f"deviation of {name}", p.std(), 0.04, 4e-3)
            elif name.endswith("proj.bias") or ".fc" in name:
                assert_close(name, p, torch.zeros_like(p))
        for block in model.qformer.blocks:
            for (name, p), text in zip(block.mlp.named_parameters(), block.text_mlp.parameters()):
                assert_close(f"text_mlp.{name}", text, p)
                assert text.data_ptr() != p.data_ptr(), f"{name} is shared"
