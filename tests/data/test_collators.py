"""Collators: images, ids and labels of a batch, by hand."""
import random
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common.data.collators import (CaptionBatch, DialogueBatch, ImageTextBatch, InterleavedCollator,
                                    PackedTexts, PairBatch, PromptBatch, QuestionBatch, SplitTexts,
                                    as_text)
from common.data.tokenizer import BOS, EOS, IMAGE, PAD
from common.prompts import collate
from flamingo import render_page
from tests.fuzz import one_line
from tests.helpers import Words, assert_close, drawing, page

NO = -100


def rngs(count=1):
    return [random.Random(i) for i in range(count)]


def pixels(colours):
    """uint8 (..., 3, 15, 15) in these colours."""
    colours = torch.tensor(colours, dtype=torch.uint8)
    return colours[..., None, None].expand(*colours.shape, 15, 15)


def drawn(texts, count=30):
    """The text that each of so many rngs draws first."""
    return [random.Random(i).choice(texts) for i in range(count)]


class Letters:
    """A vocabulary of letters: a is 97."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def batch(self, texts, context_length):
        return torch.tensor([[len(text), ord(text[0]), context_length] for text in texts])


class TestImageTextBatch:
    def test_it_has_the_middle_of_the_first_image_and_one_text_drawn_by_the_rng(self):
        picture = Image.new("RGB", (45, 15), "black")
        picture.paste((250, 9, 7), (15, 0, 30, 15))
        record = {"images": [picture, Image.new("RGB", (8, 8))], "texts": ["a", "red", "blue star"]}
        before = deepcopy(record)
        batch = ImageTextBatch(Letters(), 11, 15)([record] * 30, rngs(30))
        assert_close("images (B, 3, H, W)", batch["images"], pixels([[250, 9, 7]] * 30))
        assert_close("ids (B, T)", batch["ids"], Letters().batch(drawn(record["texts"]), 11))
        assert record == before, "the caller's record is changed"


class Texts(Words):
    """Words, each text as <bos> words <eos>."""

    def batch(self, texts, context_length):
        rows = [[BOS, *self.encode(text)[:context_length - 2], EOS] for text in texts]
        return collate([(row, row) for row in rows])["ids"]


class TestCaptionBatch:
    def batch(self, prompt, records, context_length=11):
        config = SimpleNamespace(context_length=context_length, image_size=15, pad_id=PAD,
                                 eos_id=EOS)
        return CaptionBatch(Texts(), config, prompt)(records, rngs(len(records)))

    @pytest.mark.parametrize("prompt, labels", [
        ("", ["- a cat <eos> - -", "- a red blue dog <eos>"]),
        ("what is ", ["- - - a cat <eos> - -", "- - - a red blue dog <eos>"])])
    def test_neither_prompt_nor_padding_is_counted(self, prompt, labels):
        batch = self.batch(prompt, [caption("a cat"), caption("a red blue dog")])
        assert spelled(batch["ids"]) == [f"<bos> {prompt}a cat <eos> <pad> <pad>",
                                         f"<bos> {prompt}a red blue dog <eos>"]
        assert spelled(batch["labels"]) == labels
        assert_close("images (B, 3, H, W)", batch["images"], pixels([[255, 0, 0]] * 2))

    def test_a_long_text_ends_with_its_end_token_which_is_a_label(self):
        batch = self.batch("a ", [caption("red cat blue dog")], 5)
        assert spelled(batch["ids"]) == ["<bos> a red cat <eos>"]
        assert spelled(batch["labels"]) == ["- - red cat <eos>"]

    def test_captions_and_draws_from_0_to_1_are_functions_of_the_rngs(self):
        texts = ["a cat", "a dog", "a red"]
        batch = self.batch("", [caption(*texts)] * 30)
        assert spelled(batch["ids"]) == [f"<bos> {text} <eos>" for text in drawn(texts)]
        draws = batch["draws"]
        assert draws.shape == (30, 2) and draws.min() >= 0 and draws.max() < 1
        assert len(draws.flatten().unique()) == 60 and draws.std() > 0.2
        assert_close("draws (B, 2)", self.batch("", [caption(*texts)] * 30)["draws"], draws)


class TestPromptBatch:
    def batch(self, records, *names):
        """With rows of prompt and answer, of an encoder-decoder apart."""
        given, seen = rngs(len(records)), []

        def rows(turn, tokenizer, rng, config):
            seen.append(rng)
            prompt, answer = (tokenizer.encode(turn[key]) for key in ("prompt", "answer"))
            made = {"question_ids": turn["prompt"], "answer_ids": (answer, answer),
                    "ids": (prompt, [NO] * len(prompt))}
            if "answer_ids" not in names:
                made["ids"] = prompt + answer, [NO] * len(prompt) + answer
            return {name: made[name] for name in names}
        config = SimpleNamespace(context_length=37, qformer_context_length=5, image_size=15)
        batch = PromptBatch(Texts(), config, rows)(records, given)
        assert seen == given, "each record has its own rng"
        return batch

    def records(self):
        return [page(("red", "what is this ?", "dog")), page(("blue", "what", "red cat dog"))]

    def test_of_a_decoder_prompt_and_answer_are_one_text(self):
        batch = self.batch(self.records(), "ids")
        assert [*batch] == ["images", "ids", "labels", "mask"]
        assert spelled(batch["ids"]) == ["what is this ? dog", "what red cat dog <pad>"]
        assert spelled(batch["labels"]) == ["- - - - dog", "- red cat dog -"]
        assert_close("mask (B, T)", batch["mask"], [[True] * 5, [True] * 4 + [False]])
        assert_close("images (B, 3, H, W)", batch["images"], pixels([[255, 0, 0], [0, 0, 255]]))

    def test_of_an_encoder_decoder_they_are_two_with_the_mask_of_the_first(self):
        batch = self.batch(self.records(), "question_ids", "ids", "answer_ids")
        assert spelled(batch["ids"]) == ["what is this ?", "what <pad> <pad> <pad>"]
        assert spelled(batch["answer_ids"]) == ["dog <pad> <pad>", "red cat dog"]
        assert spelled(batch["labels"]) == ["dog - -", "red cat dog"]
        assert_close("mask (B, T)", batch["mask"], [[True] * 4, [True] + [False] * 3])
        # Of the Q-Former's own context: five ids.
        assert spelled(batch["question_ids"]) == ["<bos> what is this <eos>",
                                                  "<bos> what <eos> <pad> <pad>"]

    def test_the_rng_draws_a_turn_and_a_caption(self):
        turns = page(("red", "a", "dog"), ("red", "what", "cat"), ("red", "?", "blue"))
        batch = self.batch([turns] * 30, "ids")
        assert spelled(batch["ids"]) == [f"{turn['prompt']} {turn['answer']}"
                                         for turn in drawn(turns["turns"])]
        texts = ["a cat", "a dog", "a red"]
        assert spelled(self.batch([caption(*texts)] * 30, "ids")["ids"]) == drawn(texts)


class TestQuestionBatch:
    def test_each_answer_has_its_question_and_its_weight(self):
        one, many = page(("red", "what is this ?", "dog")), page(("blue", "what ?", "cat"))
        many["turns"][0]["answers"] = {"cat": 0.7, "blue dog": 0.3}
        batch = QuestionBatch(Texts(), 11, 15)([many, one], rngs(2))
        assert spelled(batch["ids"]) == ["<bos> what ? <eos> <pad> <pad>",
                                         "<bos> what is this ? <eos>"]
        assert spelled(batch["answer_ids"]) == ["<bos> cat <eos> <pad>", "<bos> blue dog <eos>",
                                                "<bos> dog <eos> <pad>"]
        assert_close("questions (A,)", batch["question_index"], [0, 0, 1])
        assert_close("weights (A,)", batch["weights"], [0.7, 0.3, 1.0])
        assert_close("images (B, 3, H, W)", batch["images"], pixels([[0, 0, 255], [255, 0, 0]]))

    def test_the_rng_draws_one_of_a_pictures_questions(self):
        record = page(("red", "a ?", "dog"), ("red", "what ?", "cat"), ("red", "red ?", "blue"))
        batch = QuestionBatch(Texts(), 11, 15)([record] * 30, rngs(30))
        turns = drawn(record["turns"])
        for name, key in (("ids", "prompt"), ("answer_ids", "answer")):
            assert spelled(batch[name]) == [f"<bos> {turn[key]} <eos>" for turn in turns]


class TestPairBatch:
    def test_a_statement_has_both_its_images_in_order_and_its_truth(self):
        records = [page(("red blue", "this is a cat", "true")), page(("blue red", "a", "false"))]
        batch = PairBatch(Texts(), 11, 15)(records)
        red, blue = [255, 0, 0], [0, 0, 255]
        assert_close("images (B, 2, 3, H, W)", batch["images"], pixels([[red, blue], [blue, red]]))
        assert spelled(batch["ids"]) == ["<bos> this is a cat <eos>",
                                         "<bos> a <eos> <pad> <pad> <pad>"]
        assert_close("truth (B,)", batch["truth"], [1, 0])


class TestDialogueBatch:
    def record(self):
        turns = ("red", "what ?", "dog"), ("", "red ?", "is this"), ("", "what is this ?", "cat")
        return page(*turns) | {"caption": "a red cat", "candidates": ["blue", "cat", "dog"]}

    @pytest.mark.parametrize("context_length, text", [
        (14, "what ? dog red ? is this what is this ? cat"),
        (13, "red ? is this what is this ? cat"), (11, "red ? is this what is this ? cat"),
        (10, "what is this ? cat"), (7, "what is this ? cat")])
    def test_a_short_context_loses_the_first_turns_and_keeps_the_candidate(
            self, context_length, text):
        batch = DialogueBatch(Texts(), context_length, 15).rows([(self.record(), "cat")])
        assert spelled(batch["ids"]) == [f"<bos> {text} <eos>"]

    def test_candidates_have_their_picture_its_caption_and_their_truth(self):
        pairs = [(self.record(), "cat"), (self.record(), "blue")]
        batch = DialogueBatch(Texts(), 37, 15).rows(pairs)
        assert [row.split()[-2] for row in spelled(batch["ids"])] == ["cat", "blue"]
        assert spelled(batch["caption_ids"]) == ["<bos> a red cat <eos>"] * 2
        assert_close("images (B, 3, H, W)", batch["images"], pixels([[255, 0, 0]] * 2))
        assert_close("truth (B,)", batch["truth"], [1, 0])

    def test_half_of_the_candidates_are_right_and_every_wrong_one_occurs(self):
        batch = DialogueBatch(Texts(), 37, 15)([self.record()] * 400, rngs(400))
        said = [row.split()[-2] for row in spelled(batch["ids"])]
        assert_close("truth (B,)", batch["truth"], [int(text == "cat") for text in said])
        shares = {text: said.count(text) / 400 for text in ("cat", "dog", "blue")}
        assert shares == pytest.approx({"cat": 0.5, "dog": 0.25, "blue": 0.25}, abs=0.07)


def packed(texts, context_length=37, length=11):
    """What PackedTexts makes of records with one text each: (ids, labels), lists of lists."""
    records = [{"texts": [text]} for text in texts]
    before = deepcopy(records)
    batch = PackedTexts(Letters(), context_length, length)(records, rngs(len(texts)))
    assert batch["ids"].dtype == batch["labels"].dtype == torch.int64 and records == before
    return batch["ids"].tolist(), batch["labels"].tolist()


class TestPackedTexts:
    def test_texts_share_a_row_while_they_fit(self):
        a, b, c, d = map(ord, "abcd")
        ids, labels = packed(["aaa", "bb", "c", "dddd"])
        assert ids == [[BOS, a, a, a, EOS, BOS, b, b, EOS], [BOS, c, EOS, BOS, d, d, d, d, EOS]]
        assert labels == [[NO if i == BOS else i for i in row] for row in ids]

    def test_a_row_may_be_full_to_the_last_token_and_padding_is_no_label(self):
        ids, labels = packed(["aaa", "bbbb", "c"])
        assert [len(row) for row in ids] == [11, 11] and ids[0][-1] == EOS
        assert ids[1] == [BOS, ord("c"), EOS] + [PAD] * 8
        assert labels[1] == [NO, ord("c"), EOS] + [NO] * 8

    def test_no_text_is_lost_and_their_order_stays(self):
        rng = random.Random(3)
        texts = [rng.choice("abcdef") * rng.randint(0, 9) for _ in range(50)]
        ids, _ = packed(texts)
        assert [i for row in ids for i in row if i not in (BOS, PAD)] == [
            i for text in texts for i in (*map(ord, text), EOS)]
        assert all(len(row) <= 11 and row[0] == BOS for row in ids)

    @pytest.mark.parametrize("context_length, length, letters", [(37, 11, 9), (5, 11, 3)])
    def test_a_longer_text_is_cut_before_its_end_token(self, context_length, length, letters):
        ids, _ = packed(["a" * 30, "b"], context_length, length)
        assert ids == [[BOS] + [97] * letters + [EOS], [BOS, 98, EOS] + [PAD] * (letters - 1)]

    def test_the_rng_draws_one_text_of_a_record(self):
        batch = PackedTexts(Letters(), 200, 200)([{"texts": ["a", "b", "c"]}] * 30, rngs(30))
        assert [chr(i) for i in batch["ids"].flatten().tolist() if i > 90] == drawn("abc")


class TestSplitTexts:
    @pytest.mark.parametrize("context_length, letters", [(37, "abcde"), (6, "abcd")])
    def test_both_parts_end_and_the_second_begins_with_padding(self, context_length, letters):
        places = set()
        for rng in rngs(60):
            batch = SplitTexts(Letters(), context_length, 7)([{"texts": ["abcde"]}], [rng])
            (prompt,), (ids,), (labels,) = [batch[name].tolist()
                                            for name in ("prompt_ids", "ids", "labels")]
            places.add(place := prompt.index(EOS))
            assert prompt == [*map(ord, letters[:place]), EOS]
            assert ids == [PAD, *map(ord, letters[place:]), EOS]
            assert labels == [NO, *map(ord, letters[place:]), EOS]
        assert places == set(range(len(letters))), "not every place occurs"

    def test_texts_share_a_row_while_both_parts_fit(self):
        a, b, c, d = map(ord, "abcd")
        batch = SplitTexts.split([([a, a, EOS], [NO, a, EOS], 1), ([b, EOS], [b, EOS], 0),
                                  ([c, d, EOS], [c, d, EOS], 2), ([d, EOS], [d, EOS], 1)], 7)
        assert {name: value.tolist() for name, value in batch.items()} == {
            "prompt_ids": [[a, EOS, EOS, PAD, PAD], [c, d, EOS, d, EOS]],
            "ids": [[PAD, a, EOS, PAD, b, EOS], [PAD, EOS, PAD, EOS, PAD, PAD]],
            "labels": [[NO, a, EOS, NO, b, EOS], [NO, EOS, NO, EOS, NO, NO]]}
        prompts = SplitTexts.split([([a, b, c, EOS], [NO] * 4, 3)] * 2, 7)["prompt_ids"]
        assert prompts.tolist() == [[a, b, c, EOS]] * 2, "the prompts are too long for one row"

    def test_the_rng_draws_one_text_of_a_record(self):
        batch = SplitTexts(Letters(), 200, 200)([{"texts": ["a", "b", "c"]}] * 30, rngs(30))
        assert [chr(i) for i in batch["ids"].flatten().tolist() if i > 90] == drawn("abc")

    def test_an_empty_text_is_an_end_alone(self):
        batch = SplitTexts(Letters(), 9, 9)([{"texts": [""]}], rngs())
        assert {name: value.tolist() for name, value in batch.items()} == {
            "prompt_ids": [[EOS]], "ids": [[PAD, EOS]], "labels": [[NO, EOS]]}


class TestAsText:
    def test_of_turns_it_is_descriptions_questions_and_answers(self):
        record = {"turns": [{"description": "a red cat", "prompt": "", "answer": "a cat"},
                            {"description": "", "prompt": "what is this?", "answer": "dog"}]}
        want = "a red cat. output: a cat. question: what is this? answer: dog."
        assert as_text({"texts": ["a", "b"]}) == "a", "without an rng it is the first caption"
        assert as_text(record) == want and as_text(record | {"end": "!"}) == (
            "a red cat. output: a cat! question: what is this? answer: dog!")


def document():
    return page(("red", "", "a red cat"), ("blue", "what is this ?", "dog"))


def caption(*texts):
    return {"images": drawing("red", "blue"), "texts": texts}


def clip(*colours, size=15):
    return {"turns": [{"images": [drawing(*colours, size=size)], "prompt": "", "answer": "a cat"}]}


def spelled(rows):
    return [Words().spell(row.tolist()) for row in rows]


class TestInterleavedCollator:
    """With Flamingo's wording of a page (paper, Figures 7 and 8)."""

    def collator(self, context_length=37, **more):
        config = SimpleNamespace(context_length=context_length, image_size=15)
        return InterleavedCollator(Words(), config, render_page, **more)

    def test_ids_and_labels_are_those_of_the_pages_and_padding_is_not_learned(self):
        batch = self.collator()([document(), caption("a cat")], rngs(2))
        assert spelled(batch["ids"]) == [
            "<bos> <image> a red cat <eoc> <image> question: what is this ? answer: dog <eoc> "
            "<eos>", "<bos> <image> output: a cat <eoc> <eos>" + " <pad>" * 9]
        assert spelled(batch["labels"]) == ["- - a red cat <eoc> - - - - - - - dog <eoc> -",
                                            "- - - a cat <eoc> -" + " -" * 9]
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64

    def test_pages_are_cut_at_the_context_and_keep_their_images(self):
        batch = self.collator(6, p_next_image=1.0)([document()], rngs())
        assert spelled(batch["ids"]) == ["<bos> a red cat <eoc> <image>"]
        assert spelled(batch["labels"]) == ["- a red cat <eoc> -"]
        assert batch["images"].shape == (1, 2, 1, 3, 15, 15)
        with one_line("3.* 2"):                  # no label is left
            self.collator(2)([document()], rngs())

    def test_images_are_cropped_and_rows_with_fewer_end_in_black(self):
        pages = [document(), clip("blue", size=40), page(("red blue", "", "a"), ("", "", "dog")),
                 page(("", "", "a"), ("red", "", "a"))]
        batch = self.collator()(pages, rngs(4))
        red, blue, black = [255, 0, 0], [0, 0, 255], [0, 0, 0]
        want = pixels([[[red], [blue]], [[blue], [black]], [[red], [blue]], [[red], [black]]])
        assert_close("images (B, N, F, 3, H, W)", batch["images"], want)
        assert (batch["ids"] == IMAGE).sum(dim=1).tolist() == [2, 1, 2, 1]
        none = self.collator().images([page(("", "", "a"))["turns"]] * 2)
        assert_close("images of texts", none, pixels([[[black]]] * 2))

    def test_a_clip_has_one_image_token_and_all_its_frames_in_order(self):
        batch = self.collator()([clip("red", "blue", "white")], rngs())
        assert spelled(batch["ids"]) == ["<bos> <image> a cat <eoc> <eos>"]
        assert_close("images (B, N, F, 3, H, W)", batch["images"],
                     pixels([[[[255, 0, 0], [0, 0, 255], [255, 255, 255]]]]))

    def test_images_and_clips_in_one_batch_are_refused(self):
        with one_line("1 .* 2 "):
            self.collator()([document(), clip("red", "blue")], rngs(2))

    def test_the_rng_draws_a_caption(self):
        texts = ["a cat", "a dog", "red"]
        ids = self.collator()([caption(*texts)] * 30, rngs(30))["ids"].tolist()
        assert [Words().decode(row).removeprefix("output: ") for row in ids] == drawn(texts)

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_such_a_share_of_rows_attends_to_the_next_image(self, share):
        batch = self.collator(p_next_image=share)([document()] * 400, rngs(400))
        assert_close("text first (B,)", batch["ids"][:, 1] != IMAGE, batch["attend_next"])
        assert batch["attend_next"].float().mean().item() == pytest.approx(share, abs=0.07)

    def test_prompts_end_where_the_answer_begins_and_are_padded_left_and_never_cut(self):
        long = page(("red", "", "a " * 30), ("blue", "what ?", "dog"))["turns"]
        batch = self.collator(context_length=3).prompts([document()["turns"], long])
        want = "<bos> <image>" + " a" * 30 + " <eoc> <image> question: what ? answer:"
        asked = "<bos> <image> a red cat <eoc> <image> question: what is this ? answer:"
        assert spelled(batch["ids"]) == ["<pad> " * 25 + asked, want]
        assert_close("mask (B, T)", batch["mask"], batch["ids"] != PAD)
        assert batch["images"].shape == (2, 2, 1, 3, 15, 15)

    def test_the_callers_pages_are_never_changed(self):
        records = [document(), caption("a cat", "dog"), clip("red", size=20)]
        before = deepcopy(records)
        self.collator(9, p_next_image=0.5)(records, rngs(3))
        self.collator().prompts([records[0]["turns"], records[2]["turns"]])
        assert records == before
