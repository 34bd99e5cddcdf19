"""BLIP-2's second stage and InstructBLIP: visual prompts of frozen language models, their texts."""
import random
from dataclasses import replace
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch

import blip2
from blip2 import (CAPTION_TEMPLATES, SHORT_TEMPLATES, TRAINS, VISUAL, BLIP2Config, Stage1, Stage2,
                   instruction, make_model, open_trained, prompt_segments, stage_of,
                   training_rows)
from tests.helpers import (BLIP_CLS, BLIP_EOS, BLIP_PAD, Words, assert_close, blip_ids, drawing,
                           linear, loop_image_tokens, loop_pixels, loop_qformer, refused, toy_blip2,
                           unchanged)

Q, BOS = 3, 1
KINDS = pytest.mark.parametrize("kind", ["gpt2", "t5"])


class ToyWords(Words):
    """With the toy models' padding."""

    def batch(self, texts, context_length):
        ids = super().batch(texts, context_length)
        return ids.masked_fill(ids == 0, BLIP_PAD)


class AnyWords(Words):
    """An id for every word, 14 to 42."""

    def encode(self, text):
        return [14 + sum(map(ord, word)) % 29 for word in text.split()]


def turn(prompt="what is this", answer="red dog", images=1):
    return {"prompt": prompt, "answer": answer, "images": [[None]] * images}


def visual_by_hand(model, images, questions=None):
    """The visual prompt of each image, (Q, D of the language model)."""
    assert model.projection.bias is not None, "the projection has no bias"
    tokens = loop_image_tokens(model.vision, images)
    ids = [None] * len(tokens) if questions is None else [
        torch.tensor([BLIP_CLS, *row[row != BLIP_PAD][1:]]) for row in questions]
    return [linear(model.projection, loop_qformer(model.qformer, x, row)[:Q])
            for x, row in zip(tokens, ids)]


def batch_of(kind, prompts=(4, 2), answers=(3, 5)):
    """A batch as of PromptBatch and its rows [(prompt ids, answer ids), ...] without padding."""
    rows = [(torch.randint(14, 43, (p,)), torch.randint(14, 43, (a,)))
            for p, a in zip(prompts, answers)]
    slots = torch.full((Q,), VISUAL)
    if kind == "t5":
        inputs = [torch.cat([slots, prompt]) for prompt, _ in rows]
        labels = [torch.cat([torch.tensor([-100]), answer]) for _, answer in rows]
        answer_ids = [torch.cat([torch.tensor([BLIP_PAD]), answer]) for _, answer in rows]
    else:
        inputs = [torch.cat([slots, *row]) for row in rows]
        labels = [torch.cat([torch.full((Q + len(p),), -100), answer]) for p, answer in rows]

    def padded(parts, value):
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)
    mask = padded([torch.ones(len(row)) for row in inputs], 0).bool()
    batch = {"images": torch.randint(256, (2, 3, 15, 15), dtype=torch.uint8),
             "ids": padded(inputs, BLIP_PAD), "mask": mask, "labels": padded(labels, -100)}
    return batch | ({"answer_ids": padded(answer_ids, BLIP_PAD)} if kind == "t5" else {}), rows


def loss_by_hand(model, batch, rows, questions=None):
    """The mean over all answers' tokens, each row alone."""
    visuals, terms = visual_by_hand(model, loop_pixels(batch["images"]), questions), []
    for visual, (prompt, answer) in zip(visuals, rows):
        before = torch.cat([visual, model.lm.embed(prompt)])[None]
        if model.has_encoder:
            start = torch.tensor([[BLIP_PAD, *answer[:-1]]])
            logits = model.lm.logits(start, context=model.lm.encode(before))[0]
        else:
            x = torch.cat([before, model.lm.embed(answer)[None]], dim=1)
            logits = model.lm(x)[0, before.shape[1] - 1:-1]
        terms += [-row.log_softmax(dim=0)[token] for row, token in zip(logits, answer)]
    return sum(terms) / len(terms)


class TestStage2:
    @KINDS
    def test_the_loss_is_of_the_answers_alone_behind_the_visual_prompt(self, kind):
        model = toy_blip2(kind)
        batch, rows = batch_of(kind)
        with unchanged(**batch):
            got = model(batch)
        assert_close("loss", got["lm"], loss_by_hand(model, batch, rows), 1e-6)
        more = model(batch | {"label_count": torch.tensor(16.0)})["lm"]
        assert_close("share of a step of 16 labels", more, got["lm"] / 2, 1e-6)

    @KINDS
    def test_the_queries_attend_to_a_question_that_is_given(self, kind):
        model, questions = toy_blip2(kind, losses="vqa"), blip_ids(5, 3)
        batch, rows = batch_of(kind)
        with unchanged(questions=questions):
            got = model(batch | {"question_ids": questions})["lm"]
        assert_close("loss", got, loss_by_hand(model, batch, rows, questions), 1e-6)
        assert (got - model(batch)["lm"]).abs() > 1e-4, "without the question it is the same"

    @KINDS
    def test_the_gradient_passes_the_frozen_language_model(self, kind):
        model = toy_blip2(kind)
        for name, p in model.named_parameters():
            p.requires_grad = any(fnmatch(name, q) for q in TRAINS["blip2-stage2"])
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1,
                                      weight_decay=0.5)
        for _ in range(2):
            model.train()
            loss = model(batch_of(kind)[0])["lm"]
            assert loss.requires_grad, "no gradient passes the language model"
            loss.backward()
            optimizer.step()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert not name.startswith(("lm.", "vision.vit.")) and ".text_" not in name, name
                assert name.endswith("k_proj.bias") or not p.equal(before[name]), f"{name} stays"
            else:
                assert p.grad is None, f"{name} has a gradient"
                assert_close(name, p, before[name], 0)
        assert not model.lm.training and not model.vision.vit.training, "train mode"

    @KINDS
    @pytest.mark.parametrize("losses", ["lm", "vqa", "instruct"])
    def test_records_become_a_visual_prompt_and_a_text_that_is_open(self, kind, losses):
        model, texts = toy_blip2(kind, losses=losses), ("what is this", "what")
        records = [{"turns": [turn(prompt=text) | {"images": [drawing(colour)]}]}
                   for colour, text in zip(("red", "blue"), texts)]
        tokenizer = Words() if losses == "instruct" else ToyWords()
        if losses == "instruct":
            tokenizer.qformer = ToyWords()               # the Q-Former has a vocabulary of its own
        x, mask, state = model.prepare(records, tokenizer)
        pixels = torch.tensor([[255, 0, 0], [0, 0, 255]], dtype=torch.uint8)[:, :, None, None]
        asked = None if losses == "lm" else ToyWords().batch(texts, 11)
        visuals = visual_by_hand(model, loop_pixels(pixels.expand(2, 3, 15, 15)), asked)
        for row, record in enumerate(records):
            segments = prompt_segments(record["turns"], model.config, BOS)
            text = [i for s in segments[1:] for i in
                    (Words().encode(s.content) if isinstance(s.content, str) else s.content)]
            expected = torch.cat([visuals[row], model.lm.embed(torch.tensor(text))])
            if kind == "t5":             # padding must not stand between image and text
                assert_close("start", x[row], [BLIP_PAD])
                assert mask is None and state["context_mask"][row].tolist() == \
                    [i < len(expected) for i in range(state["context"].shape[1])]
                assert_close("states (S, D)", state["context"][row, :len(expected)],
                             model.lm.encode(expected[None])[0], 1e-5)
            else:
                real = mask[row]
                assert bool(real[-1]) and state == {}, "the newest token is padding"
                assert_close("prompt (S, D)", x[row][real], expected, 1e-5)

    def test_each_image_of_a_page_or_clip_has_its_own_tokens(self):
        model, clip = toy_blip2("gpt2"), drawing("red") + drawing("blue")
        pages = [{"turns": [turn() | {"images": [clip]}, turn() | {"images": [drawing("red")]}]}]
        x, mask, _ = model.prepare(pages, AnyWords())
        first, bos, prompt, answer, second, _ = (
            s.content for s in prompt_segments(pages[0]["turns"], model.config, BOS))
        assert (len(first), len(second), bool(mask.all())) == (2 * Q, Q, True)
        start = 2 * Q + 1 + sum(len(AnyWords().encode(text)) for text in (prompt, answer))
        red, blue, again = x[0, :Q], x[0, Q:2 * Q], x[0, start:start + Q]
        assert_close("the same image again", again, red, 1e-5)
        assert (blue - red).abs().max() > 1e-3, "another image has the same tokens"

    def test_a_new_language_model_keeps_its_own_weights(self):
        model = Stage2(toy_blip2("t5").config)
        assert_close("deviation of T5's embeddings", model.lm.token_embed.weight.std(), 1, 0.1)

    @KINDS
    def test_its_texts_end_at_eos(self, kind):
        assert toy_blip2(kind).stop_ids == (BLIP_EOS,)


class TestMakeModel:
    def test_the_language_model_and_the_losses_say_which(self):
        assert isinstance(make_model(toy_blip2().config), Stage1)
        assert isinstance(make_model(toy_blip2("t5").config), Stage2)


class TestStageOf:
    def config(self, kind, losses):
        return BLIP2Config(language=kind and {"kind": kind}, losses=losses)

    def test_a_language_model_makes_it_the_second(self):
        for kind, losses, stage in ((None, "itc,itm", Stage1), ("gpt2", "vqa", Stage2),
                                    ("t5", "lm", Stage2)):
            assert stage_of(self.config(kind, losses)) is stage

    @pytest.mark.parametrize("kind, losses", [(None, "vqa"), ("gpt2", "itc,itm")])
    def test_losses_of_the_other_stage_are_refused(self, kind, losses):
        with refused(f"losses={losses}"):
            stage_of(self.config(kind, losses))


class TestOpenTrained:
    @pytest.mark.parametrize("losses, tasks", [
        ("itc,itm,itg", "itc itm"), ("itc,itm", "itc itm"), ("lm", "lm vqa"), ("captions", "lm"),
        ("vqa", "vqa"), ("instruct", "lm vqa")])
    def test_a_model_serves_the_tasks_that_it_has_learned(self, losses, tasks, monkeypatch):
        monkeypatch.setattr(blip2, "from_pretrained", lambda path: (model, path))
        model = toy_blip2("gpt2" if losses.isalpha() else None, losses=losses)

        def serves(*needs):
            try:
                return open_trained("runs/x", needs) == (model, "runs/x")
            except ValueError:
                return False
        assert [task for task in ("itc", "itm", "lm", "vqa") if serves(task)] == tasks.split()
        assert serves("nothing", tasks.split()[0]), "one of two is enough"

    def test_the_message_names_the_run_its_losses_and_what_is_needed(self, monkeypatch):
        model = toy_blip2("gpt2", losses="vqa")
        monkeypatch.setattr(blip2, "from_pretrained", lambda path: (model, path))
        with refused("runs/x.*vqa.*itm.*lm"):
            open_trained("runs/x", ("itm", "lm"))


class TestPromptSegments:
    def contents(self, turns, kind="gpt2", **changes):
        return [s.content for s in prompt_segments(turns, toy_blip2(kind, **changes).config, BOS)]

    def test_a_decoder_has_the_image_then_bos_then_the_prompt(self):
        slots = (VISUAL,) * Q
        assert self.contents([turn()]) == [slots, (BOS,), "question: what is this answer:"]
        assert self.contents([turn("")], prompt="a photo of") == [slots, (BOS,), "a photo of"]
        assert self.contents([turn("")], losses="instruct") == [slots, (BOS,), CAPTION_TEMPLATES[0]]
        begun = turn("") | {"prefix": "a red"}
        assert self.contents([begun], prompt="a photo of")[2] == "a photo of a red"
        assert self.contents([turn(), turn("which")])[2:] == [
            "question: what is this answer:", " red dog. ", slots, "question: which answer:"]

    def test_a_t5_has_no_bos_and_its_prompt_ends(self):
        assert self.contents([turn(images=2)], "t5") == [
            (VISUAL,) * 2 * Q, "question: what is this answer:", (BLIP_EOS,)]


class TestTrainingRows:
    def rows(self, turn, kind="gpt2", seed=0, **changes):
        return training_rows(turn, AnyWords(), random.Random(seed),
                             toy_blip2(kind, **changes).config)

    def test_of_a_decoder_the_answer_and_its_end_are_labels(self):
        ids, labels = self.rows(turn("", "red dog"))["ids"]
        words = AnyWords().encode(" red dog")
        assert ids == [VISUAL] * Q + [BOS, *words, BLIP_EOS]
        assert labels == [-100] * (Q + 1) + [*words, BLIP_EOS]

    @KINDS
    def test_a_space_stands_before_the_answer(self, kind):
        letters = SimpleNamespace(bos_id=BOS, encode=lambda text: [ord(letter) for letter in text])
        config = replace(toy_blip2(kind, losses="vqa").config, question_prompt="{}?")
        rows = training_rows(turn("what", "red dog"), letters, random.Random(0), config)
        text = "".join(chr(i) for name in ("ids", "answer_ids") if name in rows
                       for i in rows[name][0] if i > BLIP_EOS)
        assert text == "what? red dog"

    def test_of_a_t5_the_decoder_starts_with_padding(self):
        rows = self.rows(turn("what", "red dog"), "t5", losses="vqa")
        words = AnyWords().encode(" red dog")
        prompt = AnyWords().encode("question: what answer:")
        assert rows["question_ids"] == "what" and [*rows][-1] == "answer_ids"
        assert rows["ids"][0] == [VISUAL] * Q + [*prompt, BLIP_EOS]
        assert rows["answer_ids"] == ([BLIP_PAD, *words, BLIP_EOS], [-100, *words, BLIP_EOS])

    @pytest.mark.parametrize("prompt", ["", "cat cat"])
    def test_of_a_t5_a_caption_is_split_at_every_word_and_often_not(self, prompt):
        splits, words = [], "a red dog red cat".split()
        config, own = toy_blip2("t5", prompt=prompt).config, AnyWords().encode(prompt)
        for seed in range(200):
            rows = training_rows(turn("", " ".join(words)), AnyWords(), random.Random(seed), config)
            first = rows["ids"][0][Q + len(own):-1]
            assert rows["ids"][0][Q:Q + len(own)] == own, "the prompt of captions"
            assert first + rows["answer_ids"][0][1:-1] == AnyWords().encode(" ".join(words))
            splits.append(len(first))
        assert {*splits} == {0, 1, 2, 3, 4} and 90 < splits.count(0) < 150, f"{splits.count(0)}"

    def test_a_caption_has_an_instruction_too(self):
        found = {self.rows(turn(""), seed=seed, losses="instruct")["question_ids"]
                 for seed in range(30)}
        assert found == {*CAPTION_TEMPLATES}, f"{found}"

    @pytest.mark.parametrize("changes, asks", [({"losses": "instruct"}, True), ({}, False), (
        {"losses": "instruct", "qformer_text": False}, False)])
    def test_the_qformer_gets_the_same_instruction(self, changes, asks):
        rows = self.rows(turn("what is this"), **changes)
        assert ("question_ids" in rows) == asks, f"{[*rows]}"
        if asks:
            text = AnyWords().encode(rows["question_ids"])
            assert rows["ids"][0][Q + 1:][:len(text)] == text, "two instructions"


class TestInstruction:
    @pytest.mark.parametrize("prompt, answer, templates", [
        ("", "a red dog", CAPTION_TEMPLATES), ("what", "this is red", ("{}",)),
        ("what", "red", SHORT_TEMPLATES)])
    def test_each_task_has_its_templates(self, prompt, answer, templates):
        found = {instruction(turn(prompt, answer), random.Random(seed)) for seed in range(99)}
        assert found == {template.format(prompt) for template in templates}, f"{found}"
