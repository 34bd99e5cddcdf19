"""The model: its projector, patches among words, its loss, what is trained, what it writes."""
import json
import math
import random
from dataclasses import asdict, replace
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import llava
from common import generation
from llava import (PRESETS, REQUESTS, TRAINS, Adapter, LLaVA, LLaVAConfig, grid_positions,
                   init_weights, make_batch, make_projector)
from tests.helpers import (ACTS, EOS, AnyWords, assert_close, drawing, linear, llava_config,
                           loop_hidden, loop_pixels, page, refused, toy_llava)

P, D, SHORT = 9, 20, "Answer the question using a single word or phrase."
QUESTIONS = "visual_questions unseen_kinds hallucination"


def pages():
    """A dialogue with images in two turns, one without an image, a short one."""
    return [page(("red blue", "what", "a b"), ("", "who", "c"), ("green", "x", "d e")),
            page(("", "what", "b")), page(("white", "what x", "c d"))]


def batch_of(config, records=None, words=None):
    turns = [record["turns"] for record in records or pages()]
    return make_batch(turns, words or AnyWords(), config, [random.Random(1)] * len(turns))


def features_by_hand(model, images):
    """The features of each view, (V, P, D): the ViT's patches through the projector."""
    patches = loop_hidden(model.vision, loop_pixels(images), 2)[:, 1:]
    projector = model.projector
    if isinstance(projector, nn.Sequential):
        return linear(projector[2], ACTS["gelu"](linear(projector[0], patches)))
    return linear(projector, patches)


def loss_by_hand(model, batch):
    """The mean over all labels, each row alone and without its padding."""
    table, terms = features_by_hand(model, batch["images"]).flatten(0, 1), []
    for ids, index, labels, real in zip(*(batch[name] for name in (
            "ids", "feature_index", "labels", "mask"))):
        x = torch.stack([table[i - 1] if i > 0 else model.lm.token_embed.weight[token]
                         for token, i in zip(ids[real], index[real])])
        log_p = model.lm(x[None])[0].log_softmax(dim=-1)
        terms += [-log_p[t - 1, label] for t, label in enumerate(labels[real]) if t and label >= 0]
    return sum(terms) / len(terms)


class TestLLaVAConfig:
    def test_it_comes_back_from_json(self):
        config = llava_config(grids=((1, 2), (3, 1)), views="tiles")
        assert LLaVAConfig(**json.loads(json.dumps(asdict(config)))) == config

    @pytest.mark.parametrize("changes, sizes", [
        ({}, (15, 15, 9)), ({"resize_to": 25}, (25, 25, 25)), ({"draw_size": 40}, (15, 40, 9)),
        ({"projector": "adapter", "resize_to": 25, "draw_size": 7}, (25, 7, 4))])
    def test_sizes_of_views_and_pictures(self, changes, sizes):
        c = llava_config(**changes)
        assert (c.view_size, c.image_size, c.tokens_per_view) == sizes and c.context_length == 53

    def test_the_most_tokens_are_those_of_the_largest_grid_with_its_row_ends(self):
        assert llava_config().most_tokens == 9
        grids = ((1, 1), (3, 1), (1, 2))
        assert llava_config(views="tiles", grids=grids).most_tokens == 9 + 27 + 3
        assert llava_config(views="tiles", grids=grids[:1] + grids[2:]).most_tokens == 9 + 18 + 6

    def test_the_shares_of_a_mix(self):
        assert llava_config(mix="a=3,b=0.5").shares() == {"a": 3.0, "b": 0.5}

    @pytest.mark.parametrize("changes, values", [
        ({"projector": "conv"}, "projector=conv.*adapter"), ({"views": "zoom"}, "views=zoom.*pad"),
        ({"template": "v7"}, "v7.*llama-2"), ({"losses": "itc"}, "losses=itc.*instruct"),
        ({"image_place": "left"}, "image_place=left"), ({"mix": "question"}, "mix=question"),
        ({"mix": "question=many"}, "question=many"), ({"num_queries": 0}, "num_queries=0"),
        ({"resize_to": -1}, "resize_to=-1"), ({"loss_on": "images"}, "loss_on=images"),
        ({"mix": "question=0"}, "question=0.*above 0"), ({"mix": "a=1,b=-1"}, "b=-1.*above 0"),
        ({"mix": "a=inf"}, "a=inf"), ({"grids": ()}, "pairs"), ({"grids": ("2,1",)}, "2.*pairs"),
        ({"grids": ((0, 1),)}, "0, 1.*pairs"), ({"resize_to": 40}, "64 .* 53: no room"),
        ({"views": "tiles", "grids": ((1, 1), (5, 1))}, "57 .* 53: no room"),
        ({"vision": {"stages": (1, 1, 1, 1)}}, "vision")])
    def test_what_no_model_can_have_is_refused(self, changes, values):
        with refused(values):
            llava_config(**changes)


class TestGridPositions:
    def test_half_of_the_features_are_of_the_column_the_others_of_the_row(self):
        got = grid_positions(4, 8)       # four apart: of 16 in the paper
        expected = [[f(4 * place * step) for place in (x, y) for f in (math.sin, math.cos)
                     for step in (1, 0.01)] for y in range(4) for x in range(4)]
        assert_close("positions (G * G, D)", got, expected)


class TestMakeProjector:
    def test_the_mlp_has_an_exact_gelu_between_two_layers_with_biases(self):
        model, patches = toy_llava(), torch.randn(2, P, 14, dtype=torch.float64)
        first, act, second = model.projector
        expected = linear(second, ACTS["gelu"](linear(first, patches)))
        assert_close("embeddings (V, P, D)", model.projector(patches), expected)
        assert first.bias is not None and second.bias is not None and isinstance(act, nn.Module)

    def test_the_first_papers_is_one_layer_with_a_bias(self):
        projector = make_projector(llava_config(projector="linear"))
        assert (type(projector), projector.weight.shape, projector.bias.shape) == (
            nn.Linear, (D, 14), (D,))

    @pytest.mark.parametrize("width, heads", [(20, 4), (128, 4), (256, 2), (384, 3)])
    def test_an_adapter_has_heads_of_128(self, width, heads):
        language = replace(llava_config().language, width=width)
        adapter = make_projector(llava_config(projector="adapter", language=language))
        assert isinstance(adapter, Adapter) and adapter.attn.heads == heads, adapter.attn.heads
        assert adapter(torch.randn(3, 25, 14)).shape == (3, 4, width)

    @pytest.mark.parametrize("preset, count", [("v1-7b", 4_198_400), ("v1.5-7b", 20_979_712),
                                               ("v1.5-13b", 31_467_520)])
    def test_the_papers_numbers_of_parameters(self, preset, count):
        with torch.device("meta"):
            projector = make_projector(PRESETS[preset])
        assert sum(p.numel() for p in projector.parameters()) == count


class TestLLaVA:
    @pytest.mark.parametrize("changes", [{}, {"projector": "linear"}, {"resize_to": 20}])
    def test_the_patches_before_the_last_block_are_projected_without_the_class_token(self, changes):
        model = toy_llava(**changes)
        size = model.config.view_size
        images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
        assert len(model.vision.transformer.blocks) == 2, "the last of 3 blocks is not used"
        got, expected = model.encode_images(images), features_by_hand(model, images)
        assert_close("row 0", got[:1], torch.zeros(1, D))
        assert_close("features (V * P, D)", got[1:], expected.flatten(0, 1), 1e-6)

    def test_row_0_is_the_end_of_a_row_of_tiles(self):
        model, images = toy_llava(views="tiles"), torch.zeros(2, 3, 15, 15, dtype=torch.uint8)
        assert_close("row 0", model.encode_images(images)[0], model.row_end)
        assert toy_llava().row_end is None

    def test_words_and_features_are_at_their_places_and_padding_is_no_feature(self):
        model, features = toy_llava(), torch.randn(7, D).double()
        model.lm.token_embed.weight.data[[k for k in range(61) if k not in (0, 21, 22)]] = math.nan
        ids = torch.tensor([[21, 0, 0, 22], [22, 0, 0, 0]])
        index = torch.tensor([[-1, 3, 0, -1], [-1, 6, -1, -1]])
        x, words = model.embed(ids, index, features), model.lm.token_embed.weight
        assert_close("x (B, T, D)", x, torch.stack([
            torch.stack([words[21], features[3], features[0], words[22]]),
            torch.stack([words[22], features[6], words[0], words[0]])]))

    def test_the_place_of_an_image_is_no_word(self):
        model = toy_llava()
        batch = batch_of(model.config)
        used = batch["ids"].unique()
        rows = model.lm.token_embed.weight.data
        rows[[k for k in range(61) if k not in used]] = math.nan
        assert 4 not in used and model(batch)["lm"].isfinite(), "<image> is embedded"

    @pytest.mark.parametrize("changes", [
        {}, {"kind": "llama"}, {"losses": "captions"}, {"loss_on": "all"},
        {"projector": "linear", "image_place": "last"}])
    def test_the_loss_is_of_the_answers_and_their_ends(self, changes):
        model = toy_llava(**changes)
        batch = batch_of(model.config)
        got = model(batch)["lm"]
        assert_close("loss", got, loss_by_hand(model, batch), 1e-6)
        count = (batch["labels"][:, 1:] >= 0).sum()
        more = model(batch | {"label_count": 3 * count})["lm"]
        assert_close("share of a step of three times the labels", more, got / 3, 1e-6)

    def test_visual_tokens_attend_backwards_alone(self):
        model = toy_llava()
        batch = batch_of(model.config, pages()[2:])
        x = model.embed(batch["ids"], batch["feature_index"], model.encode_images(batch["images"]))
        before, at = model.logits(x), 2 + 4              # the fifth visual token
        x[:, at] += torch.randn(D).double()
        moved = (model.logits(x) - before).abs().amax(dim=2)[0] > 1e-9
        assert moved.tolist() == [t >= at for t in range(len(moved))], f"{moved.tolist()}"

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rows_together_are_as_alone_on_either_side_of_padding(self, kind, side):
        model, words = toy_llava(kind=kind), AnyWords()
        for k in range(3):
            if side == "left":
                x, mask, _ = model.prepare(pages(), words)
                own, none, _ = model.prepare(pages()[k:k + 1], words)
            else:
                both = [batch_of(model.config, records, words)
                        for records in (pages(), pages()[k:k + 1])]
                (x, mask), (own, none) = (
                    (model.embed(b["ids"], b["feature_index"], model.encode_images(b["images"])),
                     b["mask"]) for b in both)
            assert mask is not None and bool(none.all()), "one row has no padding, three have"
            real = mask[k]
            assert bool(real[-1 if side == "left" else 0]), f"not padded on the {side}"
            got = model.logits(x, mask=mask)[k, real]
            assert_close("logits (T, V)", got, model.logits(own, mask=none)[0], 1e-6)

    def test_without_images_the_projector_gets_zeros_for_gradients(self):
        for changes in ({}, {"views": "tiles"}):
            model = toy_llava(**changes)
            model(batch_of(model.config, pages()[1:2]))["lm"].backward()
            parts = [*model.projector.parameters(), *model.vision.parameters()]
            for p in parts + [model.row_end] * ("views" in changes):
                assert p.grad is not None, "a process without images would wait for the others"
                assert_close("gradient", p.grad, torch.zeros_like(p))

    @pytest.mark.parametrize("stage, changes", [
        ("llava-stage1", {"losses": "captions"}), ("llava-stage2", {}),
        ("llava-stage2", {"views": "tiles", "grids": ((2, 1), (1, 1))}),
        ("llava-tiles", {"views": "tiles", "grids": ((2, 1), (1, 1))}), ("qwen-stage2", {
            "projector": "adapter"}), ("qwen-stage1", {"losses": "captions",
                                                       "projector": "adapter"}),
        ("qwen-stage3", {"projector": "adapter"})])
    def test_a_step_moves_what_is_trained_and_nothing_else(self, stage, changes):
        model = toy_llava(language=replace(llava_config().language, context_length=199), **changes)
        trained = {"llava-stage1": "projector", "llava-stage2": "projector lm", "qwen-stage1":
                   "vision projector", "qwen-stage3": "projector lm"}.get(stage)
        trained = (trained or "vision projector lm").split() + ["row_end"]
        for name, p in model.named_parameters():
            p.requires_grad = any(fnmatch(name, pattern) for pattern in TRAINS[stage])
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1,
                                      weight_decay=0.5)
        model.train()
        for part in ("vision", "projector", "lm"):
            assert getattr(model, part).training == (part in trained), f"mode of {part}"
        records = [page(("red", "what", "a b")), page(("blue", "x", "c"))]
        loss = model(batch_of(model.config, records))["lm"]
        assert loss.requires_grad, "no gradient passes the language model"
        loss.backward()
        optimizer.step()
        for name, p in model.named_parameters():
            if name.partition(".")[0] in trained:
                assert p.grad is not None, f"{name} has no gradient"
                if not name.endswith(("k_proj.bias", "cls_token")):
                    assert p.grad.abs().max() > 0, f"gradient of {name} is zero"
                    assert not p.equal(before[name]), f"{name} stays"
            else:
                assert p.grad is None, f"{name} has a gradient"
                assert_close(name, p, before[name], 0)

    def test_records_become_prompts_whose_last_answer_is_open(self):
        model, words = toy_llava(), AnyWords()
        x, mask, state = model.prepare(pages(), words)
        batch = model.prompt_batch(pages(), words)
        assert state == {} and SHORT.split()[0] not in words.words, "evaluation adds its own line"
        assert bool(mask[:, -1].all()) and words.encode("d")[0] not in batch["ids"], "the answer"
        expected = model.embed(batch["ids"], batch["feature_index"],
                               model.encode_images(batch["images"]))
        assert_close("embeddings (B, T, D)", x, expected)
        caption = model.prompt_batch([{"images": drawing("red"), "texts": ["b"]}], words)["ids"][0]
        assert caption.tolist()[2 + P:] == [*words.encode(REQUESTS[0]), 12]

    def test_images_are_encoded_once_for_a_text(self, monkeypatch):
        model, calls = toy_llava(), []
        encode = model.encode_images
        monkeypatch.setattr(model, "encode_images", lambda x: calls.append(len(x)) or encode(x))
        x, mask, state = model.prepare(pages(), AnyWords())
        ids = generation.generate(model.logits, x, mask, max_new_tokens=5, state=state)
        assert ids.shape == (3, 5) and calls == [4], f"views of each call: {calls}"
        for k in range(3):
            x, mask, _ = model.prepare(pages()[k:k + 1], AnyWords())
            tokens = []
            for _ in range(5):               # no cache, no mask
                tokens.append(model.logits(x)[0, -1].argmax().item())
                x = torch.cat([x, model.lm.embed(torch.tensor([tokens[-1:]]))], dim=1)
            assert tokens == ids[k].tolist(), f"row {k}"

    @pytest.mark.parametrize("changes, string", [
        ({}, ""), ({"template": "v0"}, "###"), ({"template": "chatml"}, "<|im_end|>"),
        ({"template": "v1", "losses": "captions"}, "\n")])
    def test_its_texts_end_as_its_template_says(self, changes, string):
        model = toy_llava(**changes)
        assert (model.stop_ids, model.stop_string, model.banned_ids) == ((EOS,), string, ())

    def test_it_adapts_weights_to_a_larger_view_and_keeps_what_is_new(self):
        large = toy_llava(resize_to=25, views="tiles", context_length=199)
        small = toy_llava(context_length=199)
        own = {name: x.clone() for name, x in large.state_dict().items()}
        weights = large.adapt(small.state_dict() | {"other": torch.zeros(3)})
        assert weights.keys() == own.keys() and weights["vision.pos_embed"].shape == (26, 14)
        assert_close("row_end", weights["row_end"], own["row_end"])
        assert_close("projector", weights["projector.0.weight"], small.projector[0].weight)
        assert_close("class token's", weights["vision.pos_embed"][0], small.vision.pos_embed[0])
        same = toy_llava().adapt(small.state_dict())["vision.pos_embed"]
        assert_close("positions of the same size", same, small.vision.pos_embed, 0)

    def test_the_perplexity_of_conversations_is_that_of_their_answers(self):
        model = toy_llava()
        batch, words = batch_of(model.config), AnyWords()
        got = model.perplexity(pages(), words, rows=2)
        assert math.log(got) == pytest.approx(loss_by_hand(model, batch).item(), rel=1e-6)

    @pytest.mark.parametrize("changes, tasks, asked", [
        ({"losses": "captions"}, ("question",), "captions"), ({}, (), "captions"),
        ({"mix": "question=1"}, ("question",), f"captions {QUESTIONS}"),
        ({"mix": "choice=1,reading=1"}, ("choice",), f"captions {QUESTIONS} choices reading"),
        *(({"mix": f"{task}=1,grounding=2"}, ("detail",), f"captions {QUESTIONS} grounding "
           "answer_lengths descriptions relative_scores")
          for task in ("conversation", "detail", "reasoning"))])
    def test_a_stage_is_measured_by_what_it_has_learned(self, changes, tasks, asked, monkeypatch):
        for module, names in ((llava.questions, "captions visual_questions unseen_kinds"),
                              (llava.assistant, "hallucination answer_lengths descriptions "
                               "relative_scores choices reading grounding")):
            for name in names.split():
                monkeypatch.setattr(module, name, lambda *_, name=name: {name: 1}, raising=False)
        world = type("World", (), {"tasks": tasks})()
        data = type("Data", (), {"world": world, "tokenizer": None})()
        assert {*toy_llava(**changes).evaluate(data)} == {*asked.split()}

    def test_conversations_of_ones_own_are_measured_by_their_perplexity(self):
        world = type("World", (), {"tasks": (), "has_turns": True})()
        data = type("Data", (), {"world": world, "tokenizer": AnyWords(),
                                 "records": lambda self, split: pages()})()
        model = toy_llava()
        assert model.evaluate(data) == {"perplexity": model.perplexity(pages(), AnyWords())}

    @pytest.mark.parametrize("preset, side", [("v1-7b", 16), ("v1.5-7b", 24)])
    def test_the_papers_sizes(self, preset, side):
        with torch.device("meta"):
            model = LLaVA(PRESETS[preset])
        assert sum(p.numel() for p in model.lm.parameters()) == 6_738_415_616
        assert len(model.vision.transformer.blocks) == 23
        assert model.vision.pos_embed.shape == (1 + side ** 2, 1024)


class TestInitWeights:
    def test_the_ends_of_rows_and_the_queries_are_small(self):
        language = replace(llava_config(context_length=199).language, width=384)
        model = LLaVA(llava_config(language=language, views="tiles", projector="adapter",
                                   num_queries=25))
        assert_close("deviation of a row's end", model.row_end.std(), 384 ** -0.5, 0.01)
        assert_close("deviation of the queries", model.projector.queries.std(), 0.02, 0.001)

    def test_a_query_of_the_adapter_attends_to_its_own_place(self):
        language = replace(llava_config().language, width=128)
        adapter = LLaVA(llava_config(language=language, projector="adapter",
                                     num_queries=16)).projector
        places = grid_positions(4, 128)
        q = adapter.attn.q_proj(adapter.ln_q(adapter.queries) + places)
        k = adapter.attn.k_proj(torch.randn(97, 16, 128) + places)    # of any patches
        q, k = (x.unflatten(-1, (4, 32)).transpose(-3, -2) for x in (q, k))
        own = (q @ k.mT / 32 ** 0.5).softmax(dim=-1).diagonal(dim1=-2, dim2=-1)       # (97, H, Q)
        assert own.mean() > 0.4 and own.mean(dim=(0, 2)).min() > 0.3, own.mean(dim=(0, 2))

    def test_linear_layers_stay_as_torch_makes_them(self):
        model = LLaVA(llava_config())
        weight = model.projector[0].weight.clone()
        init_weights(model)
        assert_close("weights", model.projector[0].weight, weight, 0)
        assert 0.9 * 14 ** -0.5 < weight.abs().max() <= 14 ** -0.5, f"{weight.abs().max()}"


class TestOpenTrained:
    def test_a_run_of_stage_1_cannot_answer(self, monkeypatch):
        for losses in ("instruct", "captions"):
            model = SimpleNamespace(config=LLaVAConfig(losses=losses))
            monkeypatch.setattr(llava, "from_pretrained", lambda path, m=model: (m, "words"))
            if losses == "instruct":
                assert llava.open_trained("runs/a") == (model, "words")
        with pytest.raises(ValueError, match="runs/a: a run of stage 1.* --init runs/a"):
            llava.open_trained("runs/a")
