"""BLIP-2's first stage: contrast, matching and generation, from one frozen image encoder."""
import math
from fnmatch import fnmatch

import pytest
import torch

from blip2 import TRAINS, Stage1
from tests.helpers import (BLIP_CLS, BLIP_DEC, BLIP_PAD, assert_close, assert_same,
                           assert_two_equal_one, blip_batch, blip_ids, linear, loop_head,
                           loop_image_tokens, loop_pixels, loop_qformer, make_cache, refused,
                           toy_blip2, unchanged)

Q = 3


def unit(layer, x):
    assert layer.bias is not None, "a projection without bias"
    x = linear(layer, x)
    return x / x.norm(dim=-1, keepdim=True)


def starting(row, first):
    """The real ids of a row with another first id."""
    return torch.tensor([first, *row[row != BLIP_PAD][1:]])


def itc_by_hand(model, image, text):
    """One pair after the other -> (loss, scores of texts (B, B), scores of images (B, B))."""
    B, smoothing, total = len(image), model.config.label_smoothing, 0
    scores = torch.stack([torch.stack([max(query @ t for query in queries) / model.temp
                                       for t in text]) for queries in image])
    for rows in (scores, scores.T):
        for i, row in enumerate(rows):
            log_p = row - row.exp().sum().log()
            total = total - (1 - smoothing) * log_p[i] - smoothing * log_p.mean()
    return total / (2 * B), scores, scores.T


def negative_by_hand(scores, own, draw):
    """The first other item at which the sum of the weights passes its share of the whole."""
    odds = [math.exp(s) for s in scores.tolist()]
    shares = [0.0 if i == own else o / sum(odds) + 1e-4 for i, o in enumerate(odds)]
    past = 0.0
    for item, share in enumerate(shares):
        past += share
        if past > draw * sum(shares):
            return item


def match_by_hand(model, image, row):
    """The mean of the queries' logits; all queries and tokens see each other."""
    x = loop_qformer(model.qformer, image, starting(row, BLIP_CLS))
    return sum(linear(model.itm_head, x[q]) for q in range(Q)) / Q


def itg_by_hand(model, image, batch):
    """The mean over all labels, each predicted from the state before it."""
    terms, smoothing = [], model.config.label_smoothing
    for tokens, row, labels in zip(image, batch["ids"], batch["labels"]):
        x = loop_qformer(model.qformer, tokens, starting(row, BLIP_DEC),
                         lambda q, k: k < Q or q >= k)[Q:]
        logits = loop_head(model.qformer.head, x, model.qformer.token_embed.weight)
        for t in range(1, len(x)):
            if labels[t] != -100:
                log_p = logits[t - 1] - logits[t - 1].exp().sum().log()
                terms.append((smoothing - 1) * log_p[labels[t]] - smoothing * log_p.mean())
    return sum(terms) / batch.get("label_count", len(terms))


def losses_by_hand(model, batch):
    c, ids = model.config, batch["ids"]
    image = loop_image_tokens(model.vision, loop_pixels(batch["images"]))
    queries = torch.stack([loop_qformer(model.qformer, x) for x in image])
    text = torch.stack([loop_qformer(model.qformer, ids=starting(row, BLIP_CLS))[0] for row in ids])
    itc, *scores = itc_by_hand(model, unit(model.image_projection, queries),
                               unit(model.text_projection, text))
    texts, images = ([negative_by_hand(c.hardness * row, i, batch["draws"][i, side].item())
                      for i, row in enumerate(part)] for side, part in enumerate(scores))
    pairs = [(i, i, 1) for i in range(len(ids))] + [(i, t, 0) for i, t in enumerate(texts)] \
        + [(i, t, 0) for t, i in enumerate(images)]
    itm = [-match_by_hand(model, image[i], ids[t]).log_softmax(dim=0)[label]
           for i, t, label in pairs]
    found = {"itc": itc, "itm": sum(itm) / len(itm)}
    return found | ({"itg": itg_by_hand(model, image, batch)} if "itg" in c.losses else {})


class TestStage1:
    def test_an_image_has_a_unit_vector_for_each_query(self):
        model, images = toy_blip2(), torch.randn(2, 3, 15, 15).double()
        tokens = loop_image_tokens(model.vision, images)
        assert_close("image embeddings (B, Q, E)", model.encode_image(images), torch.stack(
            [unit(model.image_projection, loop_qformer(model.qformer, x)) for x in tokens]))

    def test_a_text_is_its_cls_state_without_queries_and_padding(self):
        model, ids = toy_blip2(), blip_ids(6, 4, 9)
        with unchanged(ids=ids):
            got = model.encode_text(ids)
        assert_close("text embeddings (B, E)", got, torch.stack(
            [unit(model.text_projection, loop_qformer(
                model.qformer, ids=starting(row, BLIP_CLS))[0]) for row in ids]))

    def test_matching_is_the_mean_over_queries_that_see_the_text(self):
        model, ids, image = toy_blip2(), blip_ids(6, 4, 9), torch.randn(3, 10, 12).double()
        assert_close("logits (B, 2)", model.match(image, ids), torch.stack(
            [match_by_hand(model, *pair) for pair in zip(image, ids)]))

    @pytest.mark.parametrize("changes", [{}, {"hardness": 0.3, "label_smoothing": 0.0},
                                         {"losses": "itc,itm"}], ids=str)
    def test_the_losses_and_their_gradients_are_those_of_the_paper(self, changes):
        model, batch = toy_blip2(**changes), blip_batch(6, 3, 9, 5)
        batch["label_count"], batch["labels"][:, :2] = torch.tensor(17.0), -100
        expected = losses_by_hand(model, batch)
        with unchanged(**batch):
            found = model(batch)
        assert list(found) == model.config.losses.split(","), f"{list(found)}"
        trained = torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in
                                          model.named_parameters() if ".vit." not in name})
        for name, loss in found.items():
            assert_same(name, loss, expected[name], trained, 1e-5)

    def test_all_but_the_image_encoder_learns(self):
        model = toy_blip2()
        sum(model(blip_batch(6, 3, 9, 5)).values()).backward()
        for name, p in model.named_parameters():
            is_trained = any(fnmatch(name, pattern) for pattern in TRAINS["blip2-stage1"])
            assert is_trained == (".vit." not in name), f"TRAINS and {name}"
            if is_trained and not name.endswith("k_proj.bias"):    # softmax does not depend on it
                assert p.grad is not None and p.grad.any(), f"no gradient of {name}"

    def test_the_next_word_does_not_depend_on_later_ones_but_on_the_image(self):
        model, ids = toy_blip2(), blip_ids(9, 9)
        image = torch.randn(2, 10, 12).double()

        def logits(image, ids):
            cache = make_cache()
            model.qformer(image, cache=cache)
            return model.text_logits(ids, cache)
        before, later = logits(image, ids), ids.clone()
        later[:, 6] = 20 + (ids[:, 6] == 20)
        change = (logits(image, later) - before).abs().amax(dim=-1)
        assert change[:, :6].max() == 0 and change[:, 6:].min() > 0, f"changes {change}"
        assert (logits(image.flip(0), ids) - before).abs().amax(dim=-1).min() > 1e-3, "image"

    def test_the_best_query_counts_and_a_small_temperature_sharpens(self):
        model = toy_blip2(label_smoothing=0.0)
        text = torch.eye(7).double()[:2]
        image = torch.stack([torch.stack([-text[0], text[0], text[0] * 0]),
                             torch.stack([text[1], -text[1], text[1] * 0])])
        for temp in (1.0, 0.1):
            model.temp.data.fill_(temp)
            loss, image_scores, _ = model.itc(image, text)
            assert_close("loss", loss, math.log(1 + math.exp(-1 / temp)))
            assert_close("scores", image_scores, torch.eye(2) / temp)
            assert not image_scores.requires_grad, "scores have a gradient"

    def test_scores_are_of_each_image_with_all_texts_and_of_each_text_with_all_images(self):
        model, image, text = toy_blip2(), torch.randn(4, Q, 7).double(), torch.randn(4, 7).double()
        for name, *pair in zip(("loss", "scores of images (B, B_all)", "scores of texts"),
                               model.itc(image, text), itc_by_hand(model, image, text)):
            assert_close(name, *pair)

    @pytest.mark.parametrize("hardness", [1.0, 0.3, 0.0])
    def test_negatives_are_drawn_by_the_scores_times_the_hardness(self, hardness, monkeypatch):
        model, B, seen = toy_blip2(hardness=hardness), 7, []
        ids, image = blip_ids(*[4] * B), torch.arange(B).double()[:, None, None].expand(B, 10, 12)
        ids[:, 1] = torch.arange(14, 14 + B)             # both carry their number

        def match(images, texts):
            seen.extend(zip(images[:, 0, 0].int().tolist(), (texts[:, 1] - 14).tolist()))
            return torch.zeros(len(texts), 2)
        monkeypatch.setattr(model, "match", match)
        scores, draws = [3 * torch.randn(B, B).double() for _ in range(2)], torch.rand(B, 2)
        model.itm(image, ids, *scores, draws)
        texts, images = ([negative_by_hand(hardness * row, i, draws[i, side].item())
                          for i, row in enumerate(part)] for side, part in enumerate(scores))
        assert seen == [*zip(range(B), range(B)), *enumerate(texts), *zip(images, range(B))]

    def test_at_the_start_the_losses_are_those_of_a_guess(self):
        torch.manual_seed(0)
        model = Stage1(toy_blip2().config).double()
        assert_close("temperature", model.temp, 0.07)
        batch = blip_batch(*[6, 3, 9, 5] * 8)
        found = model(batch)
        assert_close("itm", found["itm"], math.log(2), 0.5)
        assert_close("itg", found["itg"], math.log(29), 1.0)

    def test_under_bf16_the_losses_are_float32_and_finite(self):
        model = toy_blip2().float()
        with torch.autocast("cpu", torch.bfloat16):
            found = model(blip_batch(6, 3, 9, 5))
            image, text = torch.randn(3, Q, 7), torch.randn(3, 7)
            itc = model.itc(image, text)[0]
        assert_close("contrast of the same features", itc, model.itc(image, text)[0])
        assert {loss.dtype for loss in found.values()} == {torch.float32}, "dtypes"
        assert all(loss.isfinite() for loss in found.values()), f"{found}"

    def test_two_processes_have_the_losses_and_gradients_of_one(self):
        assert_two_equal_one(toy_blip2(), blip_batch(6, 4, 5, 9, 3, 7))

    @pytest.mark.parametrize("batch_size, accumulate", [(1, 1), (4, 2)])
    def test_a_batch_that_the_losses_cannot_take_is_refused(self, batch_size, accumulate):
        with refused(f" {batch_size}.* {accumulate}"):
            toy_blip2().check_batch(batch_size, accumulate)
        toy_blip2().check_batch(2, 1)
