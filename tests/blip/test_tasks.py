"""BLIP fine-tuned: questions, statements about two images, dialogues."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from blip import PairAttention
from tests.helpers import (BLIP_CLS, BLIP_DEC, BLIP_ENC, BLIP_PAD, assert_close, assert_same,
                           attend_by_hand, blip_ids, layer_norm, linear, loop_bert,
                           loop_head, loop_pixels, loop_vit, mlp_by_hand, page, randomize, refused,
                           toy_blip)


def starting(ids, first):
    return torch.cat([torch.full((len(ids), 1), first), ids[:, 1:]], dim=1)


def pictures(*shape):
    return torch.randint(256, (*shape, 3, 15, 15), dtype=torch.uint8)


def question_states(model, images, ids):
    """[ENC] questions that attend to their images: (B, T, D)."""
    image = loop_vit(model.vision, loop_pixels(images))
    return loop_bert(model.encoder, starting(ids, BLIP_ENC), image, ids != BLIP_PAD)


class TestVQA:
    def batch(self):
        """Three questions with two, one and one answers."""
        return {"images": pictures(3), "ids": blip_ids(6, 4, 8),
                "answer_ids": blip_ids(3, 7, 4, 5), "question_index": torch.tensor([0, 0, 1, 2]),
                "weights": torch.tensor([0.7, 0.3, 1.0, 0.6], dtype=torch.float64)}

    def test_encoder_and_decoder_share_nothing(self):
        model = toy_blip(losses="vqa")
        both = {id(p) for p in model.encoder.parameters()} & {
            id(p) for p in model.decoder.parameters()}
        assert not both, "shared"

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_the_loss_is_each_answers_sum_times_its_weight_by_question(self, smoothing):
        model, batch = toy_blip(losses="vqa", label_smoothing=smoothing), self.batch()
        states = question_states(model, batch["images"], batch["ids"])
        ids, question, total = batch["answer_ids"], batch["question_index"], 0
        x = loop_bert(model.decoder, starting(ids, BLIP_DEC), states[question], ids != BLIP_PAD,
                      (batch["ids"] != BLIP_PAD)[question], is_causal=True)
        log_p = loop_head(model.decoder.head, x, model.decoder.token_embed.weight).log_softmax(-1)
        for a, weight in enumerate(batch["weights"]):
            for t in range(1, int((ids[a] != BLIP_PAD).sum())):
                total = total - weight * ((1 - smoothing) * log_p[a, t - 1, ids[a, t]]
                                          + smoothing * log_p[a, t - 1].mean())
        found = model(batch)
        assert list(found) == ["vqa"], f"{found}"
        assert_same("loss", found["vqa"], total / 3, model, 1e-5)

    def test_an_answer_begins_with_dec_and_attends_to_the_last_question(self):
        model, ids = toy_blip(losses="vqa"), blip_ids(6, 4)
        asked = []
        words = SimpleNamespace(batch=lambda texts, length: asked.append((texts, length)) or ids)
        records = [page(("red", "one", "1"), ("", "two", "2")), page(("blue", "three", "3"))]
        first, mask, state = model.prepare(records, words)
        assert asked == [(["two", "three"], 11)], f"{asked}"
        assert_close("ids (B, T)", first, [[BLIP_DEC]] * 2)
        assert_close("mask (B, T)", mask, [[True]] * 2)
        assert_close("mask of questions (B, S)", state["context_mask"], ids != BLIP_PAD)
        images = torch.zeros(2, 3, 15, 15, dtype=torch.uint8)
        images[0, 0], images[1, 2] = 255, 255
        real = ids != BLIP_PAD
        assert_close("states (N, D)", state["context"][real],
                     question_states(model, images, ids)[real], 1e-5)


def pair_by_hand(layer, x, one, other):
    """Cross-attention to two images, merged by their mean or a linear layer."""
    both = [attend_by_hand(part, x, image, heads=2) for part, image in
            ((layer.first, one), (layer.second, other))]
    return sum(both) / 2 if layer.merge is None else linear(layer.merge, torch.cat(both, dim=-1))


class TestPairAttention:
    def make(self, concat, randomized=True):
        text = toy_blip().encoder.blocks[0].cross
        layer = PairAttention(text, 10, concat).double()
        return randomize(layer) if randomized else layer

    @pytest.mark.parametrize("concat", [False, True])
    def test_the_first_layer_attends_to_the_first_image_and_the_second_to_the_second(self, concat):
        layer, x = self.make(concat), torch.randn(2, 3, 10).double()
        images = torch.randn(2, 14, 12).double().requires_grad_()
        assert_same("x (B, T, D)", layer(x, images),
                    pair_by_hand(layer, x, images[:, :7], images[:, 7:]), layer, images=images)

    def test_the_twins_start_equal_but_are_two(self):
        layer, x = self.make(False, randomized=False), torch.randn(2, 3, 10).double()
        one, other = torch.randn(2, 2, 7, 12).double()
        assert_close("x with the images exchanged (B, T, D)", layer(x, torch.cat([other, one], 1)),
                     layer(x, torch.cat([one, other], dim=1)))
        for p, q in zip(layer.first.parameters(), layer.second.parameters(), strict=True):
            assert_close("weights of the twins", p, q)
            assert p is not q, "the twins share their weights"


class TestJudge:
    def test_its_loss_is_the_mean_surprise_at_the_truth(self, monkeypatch):
        model = toy_blip(losses="two-images")
        logits = torch.randn(5, 2).double().requires_grad_()
        monkeypatch.setattr(model, "predict", lambda batch: logits)
        truth = [0, 1, 1, 0, 1]
        expected = -sum(logits[i].log_softmax(dim=0)[t] for i, t in enumerate(truth)) / 5
        found = model({"truth": torch.tensor(truth)})
        assert_same("loss", found["judge"], expected, logits=logits)
        logits = logits.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert model({"truth": torch.tensor(truth)})["judge"].dtype == torch.float32, "dtype"


class TestTwoImages:
    def test_the_second_half_of_its_blocks_merges_by_a_layer(self):
        for layers, expected in ((4, [False, False, True, True]), (3, [False, True, True])):
            encoder = toy_blip(losses="two-images", text_layers=layers).encoder
            merges = [block.cross.merge is not None for block in encoder.blocks]
            assert merges == expected, f"{merges}"

    def test_it_predicts_from_the_enc_state_that_attends_to_both_images(self):
        model = toy_blip(losses="two-images")
        batch = {"images": pictures(3, 2), "ids": blip_ids(6, 4, 7)}
        norm, rows = partial(layer_norm, eps=1e-12), []
        for images, ids in zip(batch["images"], batch["ids"]):
            one, other = loop_vit(model.vision, loop_pixels(images))[:, None]
            ids = starting(ids[None, ids != BLIP_PAD], BLIP_ENC)
            x = model.encoder.token_embed.weight[ids]
            x = norm(model.encoder.norm, x + model.encoder.pos_embed.weight[:x.shape[1]])
            for block in model.encoder.blocks:
                x = norm(block.attn_norm, x + attend_by_hand(block.attn, x, heads=2))
                x = norm(block.cross_norm, x + pair_by_hand(block.cross, x, one, other))
                x = norm(block.mlp_norm, x + mlp_by_hand(block.mlp, x))
            hidden = linear(model.head[0], x[0, 0]).clamp(min=0)
            rows.append(linear(model.head[2], hidden))
        assert_same("logits (B, 2)", model.predict(batch), torch.stack(rows), model, 1e-5)

    def test_both_twins_take_the_cross_attention_of_a_pre_trained_model(self):
        model, start = toy_blip(losses="two-images"), toy_blip().state_dict()
        found, new = model.adapt(start), model.state_dict()
        assert found.keys() == new.keys(), f"{found.keys() ^ new.keys()}"
        for name, p in found.items():
            old = name.replace(".first.", ".").replace(".second.", ".")
            is_new = name.startswith("head.") or ".merge." in name
            assert_close(name, p, new[name] if is_new else start[old])


class TestDialogue:
    def test_the_text_attends_to_the_image_and_then_to_the_captions_states(self):
        model = toy_blip(losses="dialogue", text_width=12)
        batch = {"images": pictures(3), "ids": blip_ids(6, 4, 9), "caption_ids": blip_ids(3, 7, 4)}
        image = loop_vit(model.vision, loop_pixels(batch["images"]))
        caption, mask = batch["caption_ids"], batch["caption_ids"] != BLIP_PAD
        states = loop_bert(model.encoder, starting(caption, BLIP_CLS), mask=mask)
        x = loop_bert(model.encoder, starting(batch["ids"], BLIP_ENC),
                      torch.cat([image, states], dim=1), batch["ids"] != BLIP_PAD,
                      torch.cat([torch.ones(3, 10).bool(), mask], dim=1))
        assert_same("logits (B, 2)", model.predict(batch), linear(model.itm_head, x[:, 0]), model,
                    1e-5)

    def test_image_and_text_of_different_widths_are_refused(self):
        with refused("vision_width=12.*text_width=10"):
            toy_blip(losses="dialogue")
