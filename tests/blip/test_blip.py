"""BLIP: three uses of one text transformer, three losses, momentum encoders and their queues."""
import math
from fnmatch import fnmatch

import pytest
import torch

from blip import MOMENTUM_PARTS, TRAINS, BLIP
from tests.helpers import (BLIP_CLS, BLIP_DEC, BLIP_ENC, BLIP_PAD, Words, assert_close, assert_same,
                           assert_two_equal_one, blip_batch, blip_ids, drawing, linear, loop_bert,
                           loop_head, loop_pixels, loop_vit, refused, toy_blip, unchanged)

ALL = ("itc", "itm", "lm")


def starting(ids, first):
    """The ids with another first id."""
    return torch.stack([torch.tensor([first, *row[1:]]) for row in ids.tolist()])


def states(bert, ids, first, context=None, **more):
    return loop_bert(bert, starting(ids, first), context, ids != BLIP_PAD, **more)


def unit(layer, x):
    x = linear(layer, x)
    return x / x.norm(dim=1, keepdim=True)


def features_by_hand(model, part, batch):
    """Image and text features (B, E) by the encoders of `part`: the model or model.momentum."""
    images = loop_vit(part.vision, loop_pixels(batch["images"]))
    texts = states(part.encoder, batch["ids"], BLIP_CLS)
    return unit(part.image_projection, images[:, 0]), unit(part.text_projection, texts[:, 0])


def itc_by_hand(model, image, text, image_keys, text_keys, image_queue, text_queue):
    """One query after the other -> (loss, scores of texts (B, B), scores of images (B, B))."""
    total, scores, tau, alpha = 0, [], model.temp, model.alpha
    for queries, partners, keys, queue in ((image, image_keys, text_keys, text_queue),
                                           (text, text_keys, image_keys, image_queue)):
        columns = torch.cat([keys, queue]).detach()
        for i, query in enumerate(queries):
            logits = columns @ query / tau
            soft = (columns @ partners[i] / tau).exp()
            target = (alpha * soft / soft.sum()).detach()
            target[i] += 1 - alpha
            total = total - target @ (logits - logits.exp().sum().log())
            scores.append(logits[:len(keys)].detach())
    return total / (2 * len(image)), *torch.stack(scores).chunk(2)


def negative_by_hand(scores, own, draw, hardness):
    """The first other item at which the sum of the weights passes its share of the whole."""
    odds = [math.exp(hardness * s) for s in scores.tolist()]
    shares = [o / sum(odds) + 1e-4 for o in odds]
    shares[own] = 0.0
    past = 0.0
    for item, share in enumerate(shares):
        past += share
        if past > draw * sum(shares):
            return item


def pairs_by_hand(scores, draws, hardness):
    """(image, text, is a pair) of the matching loss, for all images and all texts."""
    texts, images = ([negative_by_hand(row, i, draws[i, side].item(), hardness)
                      for i, row in enumerate(part)] for side, part in enumerate(scores))
    return [(i, i, 1) for i in range(len(texts))] + [(i, t, 0) for i, t in enumerate(texts)] \
        + [(i, t, 0) for t, i in enumerate(images)]


def lm_by_hand(model, image, batch, smoothing):
    """The mean over all labels, each predicted from the state before it."""
    ids, labels, terms = batch["ids"], batch["labels"], []
    logits = loop_head(model.decoder.head,
                       states(model.decoder, ids, BLIP_DEC, image, is_causal=True),
                       model.decoder.token_embed.weight)
    for b in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if labels[b, t] != -100:
                log_p = logits[b, t - 1] - logits[b, t - 1].exp().sum().log()
                terms.append((smoothing - 1) * log_p[labels[b, t]] - smoothing * log_p.mean())
    return sum(terms) / batch.get("label_count", len(terms))


def losses_by_hand(model, batch):
    c, found = model.config, {}
    image = loop_vit(model.vision, loop_pixels(batch["images"]))
    if "itc" in model.losses:
        sides = features_by_hand(model, model, batch)
        keys = features_by_hand(model, model.momentum if c.momentum else model, batch)
        found["itc"], *scores = itc_by_hand(model, *sides, *(k.detach() for k in keys),
                                            model.image_queue.clone(), model.text_queue.clone())
    if "itm" in model.losses:
        terms = []
        for i, t, label in pairs_by_hand(scores, batch["draws"], c.hardness):
            x = states(model.encoder, batch["ids"][t:t + 1], BLIP_ENC, image[i:i + 1])[0, 0]
            terms.append(-linear(model.itm_head, x).log_softmax(dim=0)[label])
        found["itm"] = sum(terms) / len(terms)
    if "lm" in model.losses:
        found["lm"] = lm_by_hand(model, image, batch, c.label_smoothing)
    return found


def momentum(model):
    return {name: p for name, p in model.named_parameters() if name.startswith("momentum.")}


def queue_of(model):
    return {name: x for name, x in model.named_buffers() if "queue" in name}


class TestBLIP:
    # ------------------------------------------------------------ three uses

    def test_an_image_is_its_class_token_projected_to_a_unit_vector(self):
        model, images = toy_blip(), torch.randn(3, 3, 15, 15).double()
        expected = unit(model.image_projection, loop_vit(model.vision, images)[:, 0])
        assert_close("image embeddings (B, E)", model.encode_image(images), expected)

    def test_a_text_is_its_cls_state_alone_projected_to_a_unit_vector(self):
        model, ids = toy_blip(), blip_ids(6, 4, 9)
        with unchanged(ids=ids):
            got = model.encode_text(ids)
        assert_close("text embeddings (B, E)", got,
                     unit(model.text_projection, states(model.encoder, ids, BLIP_CLS)[:, 0]))

    def test_matching_is_of_the_enc_state_of_a_text_that_attends_to_the_image(self):
        model, ids, image = toy_blip(), blip_ids(6, 4, 9), torch.randn(3, 10, 12).double()
        with unchanged(ids=ids):
            got = model.match(image, ids)
        assert_close("logits (B, 2)", got, linear(
            model.itm_head, states(model.encoder, ids, BLIP_ENC, image)[:, 0]))
        assert (model.match(image.flip(0), ids) - got).abs().amax(dim=1)[[0, 2]].min() > 1e-3, \
            "another image gives the same logits"

    @pytest.mark.parametrize("sharing", ["all", "all-but-sa", "all-but-ca", "none"])
    def test_writing_is_causal_and_attends_to_the_image(self, sharing):
        model, ids = toy_blip(sharing=sharing), blip_ids(6, 4, 9)
        image, mask = torch.randn(3, 10, 12).double(), ids != BLIP_PAD
        x = loop_bert(model.decoder, ids, image, mask, is_causal=True)
        expected = loop_head(model.decoder.head, x, model.decoder.token_embed.weight)
        assert_close("logits (N, V)", model.logits(ids, mask, context=image)[mask], expected[mask])
        assert_close("the newest (B, 1, V)", model.logits(ids[:, :4], last=True, context=image),
                     expected[:, 3:4])

    # ------------------------------------------------------------ the losses

    @pytest.mark.parametrize("changes", [
        {}, {"queue_size": 0, "momentum": 0.0}, {"hardness": 0.0, "sharing": "none"},
        {"losses": "itc,lm"}, {"losses": "itc"}, {"losses": "lm", "label_smoothing": 0.0}], ids=str)
    def test_the_losses_and_their_gradients_are_those_of_the_papers(self, changes):
        model, batch = toy_blip(**changes), blip_batch(6, 3, 9, 5)
        batch["label_count"], batch["labels"][:, :2] = torch.tensor(17.0), -100      # a prompt
        expected = losses_by_hand(model, batch)
        with unchanged(**batch | momentum(model)):
            found = model(batch)
        assert list(found) == changes.get("losses", "itc,itm,lm").split(","), f"{list(found)}"
        trained = torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in
                                          model.named_parameters() if p.requires_grad})
        for name, loss in found.items():
            assert_same(name, loss, expected[name], trained, 1e-5)

    def test_every_parameter_but_the_momentum_encoders_learns(self):
        model = toy_blip()
        sum(model(blip_batch(6, 3, 9, 5)).values()).backward()
        for name, p in model.named_parameters():
            if name.startswith("momentum."):
                assert p.grad is None and not p.requires_grad, f"{name} has a gradient"
            elif not name.endswith("k_proj.bias"):       # softmax does not depend on it
                assert p.grad is not None and p.grad.any(), f"no gradient of {name}"
            assert fnmatch(name, *TRAINS["blip"]) == p.requires_grad, f"TRAINS and {name}"

    def test_hard_targets_are_the_partners_before_the_queue(self):
        model, eye = toy_blip(queue_size=4), torch.eye(7).double()
        model.alpha.zero_(), model.temp.data.fill_(1.0)
        for queue in (model.image_queue, model.text_queue):
            queue.copy_(eye[3:])
        loss, _ = model.itc(eye[:3], eye[:3], eye[:3], eye[:3])
        assert_close("loss", loss, math.log(math.e + 6) - 1)

    @pytest.mark.parametrize("hardness", [1.0, 0.3, 0.0])
    def test_no_negative_is_a_pair_and_half_keep_their_image_and_half_their_text(
            self, hardness, monkeypatch):
        model, B, seen = toy_blip(hardness=hardness), 5, []
        ids, image = blip_ids(*[4] * B), torch.arange(B).double()[:, None, None].expand(B, 10, 12)
        ids[:, 1] = torch.arange(14, 14 + B)             # both carry their number

        def match(images, texts):
            seen.extend(zip(images[:, 0, 0].int().tolist(), (texts[:, 1] - 14).tolist()))
            return torch.stack([torch.zeros(len(texts)), torch.arange(len(texts)) / 9.0], dim=1)
        monkeypatch.setattr(model, "match", match)
        scores, draws = [3 * torch.randn(B, B).double() for _ in range(2)], torch.rand(B, 2)
        loss = model.itm(image, ids, *scores, draws)
        expected = pairs_by_hand(scores, draws, hardness)
        assert seen == [(i, t) for i, t, _ in expected], f"pairs {seen}\nexpected {expected}"
        assert all((i == t) == bool(label) for i, t, label in expected)
        terms = [math.log(1 + math.exp((-1) ** label * n / 9)) for n, (*_, label) in
                 enumerate(expected)]
        assert_close("loss", loss, sum(terms) / len(terms))

    def test_under_bf16_the_losses_are_float32_and_finite(self):
        model = toy_blip().float()
        with torch.autocast("cpu", torch.bfloat16):
            found = model(blip_batch(6, 3, 9, 5))
        assert {loss.dtype for loss in found.values()} == {torch.float32}, "dtypes"
        sum(found.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad), "grads"

    # ------------------------------------------------------------ momentum and queues

    def test_the_momentum_encoders_start_as_copies_and_have_the_same_soft_targets(self):
        model = BLIP(toy_blip().config)
        for name, part in model.momentum.named_children():
            pairs = zip(part.named_parameters(), getattr(model, name).parameters(), strict=True)
            for (key, old), new in pairs:
                assert_close(f"{name}.{key}", old, new)
                assert old.data_ptr() != new.data_ptr(), f"{name}.{key} is not a copy"
        assert {name for name, _ in model.momentum.named_children()} == set(MOMENTUM_PARTS) == {
            "vision", "encoder", "image_projection", "text_projection"}, "parts"
        assert not BLIP(toy_blip(momentum=0.0).config).momentum._modules, "momentum 0 has copies"

    @pytest.mark.parametrize("m", [0.9, 1.0])
    def test_after_a_step_a_copy_is_m_of_itself_and_the_rest_of_the_new(self, m):
        model = toy_blip(momentum=m)
        before = {name: p.clone() for name, p in model.named_parameters()}
        model.after_step(0)
        for name, p in model.named_parameters():
            expected = before[name]
            if name.startswith("momentum."):
                expected = m * expected + (1 - m) * before[name.removeprefix("momentum.")]
            assert_close(name, p, expected)
        model.move_momentum()            # whole: they become equal
        for name, p in momentum(model).items():
            assert_close(name, p, model.get_parameter(name.removeprefix("momentum.")))

    @pytest.mark.parametrize("value, expected", [(0.0, 0.001), (0.7, 0.5), (0.2, 0.2)])
    def test_after_a_step_the_temperature_is_in_its_bounds(self, value, expected):
        assert_close("start", BLIP(toy_blip().config).temp, 0.07)
        model = toy_blip()
        model.temp.data.fill_(value)
        model.after_step(0)
        assert_close("temperature", model.temp, expected)

    @pytest.mark.parametrize("step, steps, expected", [
        (0, 100, 0.0), (5, 100, 0.2), (10, 100, 0.4), (50, 100, 0.4), (0, 3, 0.0), (1, 3, 0.4)])
    def test_alpha_rises_over_a_tenth_of_the_steps(self, step, steps, expected):
        model = toy_blip(alpha=0.4)
        model.before_step(step, steps)
        assert_close("alpha", model.alpha, expected)

    def test_a_step_adds_the_momentum_features_to_the_queues(self):
        model, batch = toy_blip(), blip_batch(6, 3, 9, 5)
        expected = features_by_hand(model, model.momentum, batch)
        kept = [model.image_queue[4:].clone(), model.text_queue[4:].clone()]
        model(batch)
        for queue, new, old in zip((model.image_queue, model.text_queue), expected, kept):
            assert_close("queue (K, E)", queue, torch.cat([new, old]), 1e-5)
            assert not queue.requires_grad, "gradient"
        assert_close("next place", model.queue_next, 4)

    def test_the_oldest_keys_leave_the_queue_first(self):
        model, place = toy_blip(), 0
        expected = torch.stack([model.image_queue, model.text_queue])
        for step in range(5):
            keys = torch.randn(2, 4, 7).double()
            model.enqueue(*keys)
            for key in keys.unbind(dim=1):
                expected[:, place % 10] = key
                place += 1
            assert_close(f"queues (2, K, E) after {step + 1} steps",
                         torch.stack([model.image_queue, model.text_queue]), expected)

    def test_a_new_queue_has_unit_vectors_and_starts_at_its_first_place(self):
        model = BLIP(toy_blip().config)
        for queue in (model.image_queue, model.text_queue):
            assert_close("norms (K,)", queue.norm(dim=1), torch.ones(10))
        assert_close("next place", model.queue_next, 0)

    @pytest.mark.parametrize("changes", [{}, {"momentum": 0.0}, {"hardness": 0.0},
                                         {"losses": "itc"}], ids=str)
    def test_two_processes_have_the_losses_gradients_and_queues_of_one(self, changes):
        whole = toy_blip(**changes)
        both = assert_two_equal_one(whole, blip_batch(6, 4, 5, 9, 3, 7))
        for name, queue in queue_of(whole).items():
            for model in both:
                assert_close(name, getattr(model, name), queue, 1e-6)

    # ------------------------------------------------------------ sharing

    def test_after_an_optimizers_step_encoder_and_decoder_still_share(self):
        model = toy_blip()
        sum(model(blip_batch(6, 3, 9, 5)).values()).backward()
        for p in model.parameters():
            p.data -= 0 if p.grad is None else 0.1 * p.grad
        encoder, decoder = model.encoder.state_dict(), model.decoder.state_dict()
        for name in encoder:
            same = encoder[name].equal(decoder[name])
            assert same != (".attn" in name) or name.endswith("k_proj.bias"), name

    def test_the_encoders_self_attention_does_not_change_what_the_decoder_writes(self):
        model, ids, image = toy_blip(), blip_ids(6), torch.randn(1, 10, 12).double()
        before = model.logits(ids, context=image), model.match(image, ids)
        for block in model.encoder.blocks:
            block.attn.v_proj.weight.data.mul_(2.0)
        assert_close("logits (B, T, V)", model.logits(ids, context=image), before[0])
        assert (model.match(image, ids) - before[1]).abs().max() > 1e-3, "encoder"

    # ------------------------------------------------------------ checks and prompts

    @pytest.mark.parametrize("changes, batch_size, accumulate, values", [
        ({}, 4, 1, "queue_size=10.* 4 "), ({}, 1, 1, "queue_size=10.* 1 "),
        ({"queue_size": 0}, 1, 1, " 1 "), ({"queue_size": 0}, 4, 2, "2"),
        ({"losses": "vqa"}, 4, 3, "3")])
    def test_a_batch_that_the_losses_cannot_take_is_refused(self, changes, batch_size, accumulate,
                                                            values):
        with refused(values):
            toy_blip(**changes).check_batch(batch_size, accumulate)

    @pytest.mark.parametrize("changes, batch_size, accumulate", [
        ({}, 2, 1), ({}, 10, 1), ({"queue_size": 0}, 7, 1), ({"losses": "lm"}, 1, 3)])
    def test_other_batches_are_taken(self, changes, batch_size, accumulate):
        try:
            toy_blip(**changes).check_batch(batch_size, accumulate)
        except ValueError as error:
            raise AssertionError(f"refused: {error}") from error

    @pytest.mark.parametrize("losses, prompt, expected", [
        ("lm", "what is", [BLIP_DEC, 24, 25]), ("lm", "", [BLIP_DEC]),
        ("itc,itm,lm", "what is", [BLIP_DEC])])
    def test_a_caption_begins_with_dec_and_a_captioners_prompt(self, losses, prompt, expected):
        model = toy_blip(losses=losses, prompt=prompt)
        records = [{"images": drawing(colour), "texts": [""]} for colour in ("red", "blue")]
        ids, mask, state = model.prepare(records, Words())
        assert_close("ids (B, T)", ids, [expected] * 2)
        assert_close("mask (B, T)", mask, torch.ones(2, len(expected)).bool())
        pixels = torch.tensor([[255, 0, 0], [0, 0, 255]], dtype=torch.uint8)
        pixels = loop_pixels(pixels[:, :, None, None].expand(2, 3, 15, 15))
        expected = loop_vit(model.vision, pixels)
        assert_close("image tokens (B, S, D)", state["context"], expected, 1e-5)
        assert model.stop_ids == (5,), "it stops at <eos>"
