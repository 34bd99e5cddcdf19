"""Collators: images, ids and labels of a batch, by hand."""
import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.collators import (ImageTextBatch, InterleavedCollator, PackedTexts, as_text,
                                   as_turns)
from common.data.tokenizer import BOS, EOS, IMAGE, PAD
from flamingo import render_page
from tests.fuzz import one_line
from tests.helpers import Words, assert_close, drawing, page

NO = -100


def rngs(count=1):
    return [random.Random(i) for i in range(count)]


def drawn(texts, count=30):
    """The text that each of so many rngs draws first."""
    return [random.Random(i).choice(texts) for i in range(count)]


def frozen(value):
    """A record as plain values, its pictures as bytes."""
    if isinstance(value, dict):
        return {key: frozen(part) for key, part in value.items()}
    return list(map(frozen, value)) if isinstance(value, (list, tuple)) else \
        (value.size, value.tobytes()) if isinstance(value, Image.Image) else copy.copy(value)


class Letters:
    """A vocabulary of letters: a is 97."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def batch(self, texts, context_length):
        return torch.tensor([[len(text), ord(text[0]), context_length] for text in texts])


class TestImageTextBatch:
    def test_it_has_the_middle_of_the_first_image_and_one_text_drawn_by_the_rng(self):
        collate = ImageTextBatch(Letters(), 11, 8)
        picture = Image.new("RGB", (24, 8), "black")
        picture.paste((250, 9, 7), (8, 0, 16, 8))
        record = {"images": [picture, Image.new("RGB", (8, 8))], "texts": ["a", "red", "blue star"]}
        before = frozen(record)
        batch = collate([record] * 30, rngs(30))
        want = torch.tensor([250, 9, 7], dtype=torch.uint8)[:, None, None].expand(30, 3, 8, 8)
        assert_close("images (B, 3, H, W)", batch["images"], want)
        assert_close("ids (B, T)", batch["ids"], Letters().batch(drawn(record["texts"]), 11))
        assert frozen(record) == before, "the caller's record is changed"


def packed(texts, context_length=37, length=11):
    """What PackedTexts makes of records with one text each: (ids, labels), lists of lists."""
    records = [{"texts": [text]} for text in texts]
    before = frozen(records)
    batch = PackedTexts(Letters(), context_length, length)(records, rngs(len(texts)))
    assert batch["ids"].dtype == batch["labels"].dtype == torch.int64 and frozen(records) == before
    return batch["ids"].tolist(), batch["labels"].tolist()


class TestPackedTexts:
    def test_texts_share_a_row_while_they_fit(self):
        a, b, c, d = map(ord, "abcd")
        ids, labels = packed(["aaa", "bb", "c", "dddd"])
        assert ids == [[BOS, a, a, a, EOS, BOS, b, b, EOS], [BOS, c, EOS, BOS, d, d, d, d, EOS]]
        assert labels == [[NO if i == BOS else i for i in row] for row in ids]

    def test_a_row_may_be_full_to_the_last_token_and_padding_is_no_label(self):
        ids, labels = packed(["aaa", "bbbb", "c"])
        assert [len(row) for row in ids] == [11, 11]
        assert ids[0][-1] == EOS and ids[1] == [BOS, ord("c"), EOS] + [PAD] * 8
        assert labels[1] == [NO, ord("c"), EOS] + [NO] * 8

    def test_no_text_is_lost_and_their_order_stays(self):
        rng = random.Random(3)
        texts = [rng.choice("abcdef") * rng.randint(0, 9) for _ in range(50)]
        ids, _ = packed(texts)
        flat = [i for row in ids for i in row if i not in (BOS, PAD)]
        assert flat == [i for text in texts for i in (*map(ord, text), EOS)]
        assert all(len(row) <= 11 and row[0] == BOS for row in ids)

    @pytest.mark.parametrize("context_length, length, letters", [(37, 11, 9), (5, 11, 3), (11, 11, 9)])
    def test_a_longer_text_is_cut_before_its_end_token(self, context_length, length, letters):
        ids, _ = packed(["a" * 30, "b"], context_length, length)
        assert ids == [[BOS] + [97] * letters + [EOS], [BOS, 98, EOS] + [PAD] * (letters - 1)]

    def test_the_rng_draws_one_text_of_a_record(self):
        batch = PackedTexts(Letters(), 200, 200)([{"texts": ["a", "b", "c"]}] * 30, rngs(30))
        assert [chr(i) for i in batch["ids"].flatten().tolist() if i > 90] == drawn("abc")


class TestAsText:
    def test_of_captions_it_is_one_drawn_by_the_rng_or_the_first(self):
        record = {"texts": ["a", "b", "c"]}
        assert [as_text(record, rng) for rng in rngs(9)] == drawn("abc", 9) and as_text(record) == "a"
        assert record == {"texts": ["a", "b", "c"]}

    def test_of_turns_it_is_descriptions_questions_and_answers(self):
        record = {"turns": [{"description": "a red cat", "prompt": "", "answer": "a cat"},
                            {"description": "", "prompt": "what is this?", "answer": "dog"}]}
        before = frozen(record)
        want = "a red cat. output: a cat. question: what is this? answer: dog."
        assert as_text(record) == want and as_text(record | {"end": "!"}) == (
            "a red cat. output: a cat! question: what is this? answer: dog!")
        assert frozen(record) == before, "the caller's record is changed"


class TestAsTurns:
    def test_a_captioned_image_is_one_turn_with_one_caption(self):
        record = {"images": drawing("red", "blue"), "texts": ["a", "b", "c"]}
        assert as_turns(record) == [{"images": [record["images"][:1]], "prompt": "", "answer": "a",
                                     "caption": True}]
        assert [as_turns(record, rng)[0]["answer"] for rng in rngs(9)] == drawn("abc", 9)

    def test_turns_stay_as_they_are(self):
        record = page(("red", "", "a cat"))
        assert as_turns(record) == record["turns"]


def document():
    return page(("red", "", "a red cat"), ("blue", "what is this ?", "dog"))


def caption(*texts):
    return {"images": drawing("red"), "texts": texts or ["a cat"]}


def clip(*colours):
    return {"turns": [{"images": [drawing(*colours)], "prompt": "", "answer": "a cat"}]}


def spelled(rows):
    return [Words().spell(row.tolist()) for row in rows]


class TestInterleavedCollator:
    """With Flamingo's wording of a page (paper, Figures 7 and 8)."""

    def collator(self, context_length=37, **more):
        config = SimpleNamespace(context_length=context_length, image_size=15)
        return InterleavedCollator(Words(), config, render_page, **more)

    def test_ids_and_labels_are_those_of_the_pages_and_padding_is_not_learned(self):
        batch = self.collator()([document(), caption()], rngs(2))
        assert spelled(batch["ids"]) == [
            "<bos> <image> a red cat <eoc> <image> question: what is this ? answer: dog <eoc> <eos>",
            "<bos> <image> output: a cat <eoc> <eos>" + " <pad>" * 9]
        assert spelled(batch["labels"]) == ["- - a red cat <eoc> - - - - - - - dog <eoc> -",
                                            "- - - a cat <eoc> -" + " -" * 9]
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64

    def test_text_that_attends_to_the_next_image_stands_before_it(self):
        batch = self.collator(p_next_image=1.0)([document()], rngs())
        assert spelled(batch["ids"]) == ["<bos> a red cat <eoc> <image> question: what is this ? "
                                         "answer: dog <eoc> <image> <eos>"]
        assert spelled(batch["labels"]) == ["- a red cat <eoc> - - - - - - - dog <eoc> - -"]

    @pytest.mark.parametrize("context_length, p_next_image, ids, labels", [
        (4, 0.0, "<bos> <image> a red", "- - a red"), (3, 0.0, "<bos> <image> a", "- - a"),
        (6, 1.0, "<bos> a red cat <eoc> <image>", "- a red cat <eoc> -"),
        (13, 1.0, "<bos> a red cat <eoc> <image> question: what is this ? answer: dog",
         "- a red cat <eoc>" + " -" * 8),            # the image of "dog" is cut off
        (5, 1.0, "<bos> a red cat <eoc>", "- - - - -"), (2, 1.0, "<bos> a", "- -")])
    def test_what_exceeds_the_context_is_cut_and_not_learned_without_its_image(
            self, context_length, p_next_image, ids, labels):
        batch = self.collator(context_length, p_next_image=p_next_image)([document()] * 2, rngs(2))
        assert spelled(batch["ids"]) == [ids] * 2 and spelled(batch["labels"]) == [labels] * 2
        assert batch["images"].shape == (2, 2, 1, 3, 15, 15)      # also those that are cut off

    def test_a_page_whose_labels_are_all_cut_off_is_refused(self):
        for record, numbers in ((document(), "3.* 2"), (page(("", "a " * 9, "dog"), ("red", "", "a")), " 2")):
            with one_line(numbers):
                self.collator(context_length=2)([record], rngs())

    def test_images_are_cropped_and_rows_with_fewer_end_in_black(self):
        small = {"turns": [{"images": [drawing("blue", size=40)], "prompt": "", "answer": "a"}]}
        two = page(("red blue", "", "a cat"), ("", "", "dog"))
        batch = self.collator()([document(), small, two, page(("", "", "a"), ("red", "", "a"))], rngs(4))
        images = batch["images"]
        assert images.shape == (4, 2, 1, 3, 15, 15) and images.dtype == torch.uint8
        red, blue, black = [255, 0, 0], [0, 0, 255], [0, 0, 0]
        assert images[:, :, 0, :, 7, 7].tolist() == [[red, blue], [blue, black], [red, blue], [red, black]]
        assert (batch["ids"] == IMAGE).sum(dim=1).tolist() == [2, 1, 2, 1]

    def test_a_clip_has_one_image_token_and_all_its_frames_in_order(self):
        batch = self.collator()([clip("red", "blue", "white")], rngs())
        assert spelled(batch["ids"]) == ["<bos> <image> a cat <eoc> <eos>"]
        assert batch["images"].shape == (1, 1, 3, 3, 15, 15)
        assert batch["images"][0, 0, :, :, 7, 7].tolist() == [[255, 0, 0], [0, 0, 255], [255] * 3]

    def test_a_batch_of_text_has_one_black_image(self):
        images = self.collator().images([page(("", "", "a"))["turns"]] * 2)
        assert_close("images (B, N, F, 3, H, W)", images, np.zeros((2, 1, 1, 3, 15, 15), np.uint8))

    def test_images_and_clips_in_one_batch_are_refused(self):
        both = {"turns": page(("red", "", "a"))["turns"] + clip("red", "blue")["turns"]}
        for records in ([both], [document(), clip("red", "blue")]):
            with one_line("1 .* 2 "):
                self.collator()(records, rngs(2))

    def test_the_rng_draws_a_caption(self):
        texts = ["a cat", "a dog", "red"]
        ids = self.collator()([caption(*texts)] * 30, rngs(30))["ids"]
        assert [Words().decode(row).removeprefix("output: ") for row in ids.tolist()] == drawn(texts)

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_such_a_share_of_rows_attends_to_the_next_image(self, share):
        batch = self.collator(p_next_image=share)([document()] * 400, rngs(400))
        assert batch["attend_next"].dtype == torch.bool
        assert batch["attend_next"].float().mean().item() == pytest.approx(share, abs=0.07)
        assert_close("text before the first image (B,)", batch["ids"][:, 1] != IMAGE, batch["attend_next"])

    def test_prompts_end_where_the_answer_begins_and_are_padded_left_and_never_cut(self):
        long = page(("red", "", "a " * 30), ("blue", "what ?", "dog"))["turns"]
        batch = self.collator(context_length=3).prompts([document()["turns"], long])
        asked = "<bos> <image> a red cat <eoc> <image> question: what is this ? answer:"
        want = "<bos> <image>" + " a" * 30 + " <eoc> <image> question: what ? answer:"
        pads = len(want.split()) - len(asked.split())
        assert spelled(batch["ids"]) == ["<pad> " * pads + asked, want]
        assert_close("mask (B, T)", batch["mask"], batch["ids"] != PAD)
        assert batch["images"].shape == (2, 2, 1, 3, 15, 15)

    def test_the_callers_pages_are_never_changed(self):
        records, collate = [document(), caption("a cat", "dog"), clip("red")], self.collator(9, p_next_image=0.5)
        before = frozen(records)
        first = collate(records, rngs(3))
        collate.prompts([records[0]["turns"], records[2]["turns"]])
        assert frozen(records) == before
        for name, value in collate(records, rngs(3)).items():
            assert_close(f"{name}, once more", value, first[name])
