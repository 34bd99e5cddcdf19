"""Collators: images, ids and labels of a batch, by hand."""
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import masks
from common.data.collators import (ImageTextBatch, InterleavedCollator, PackedTexts, as_text,
                                   as_turns)
from common.data.tokenizer import BOS, EOS, IMAGE, PAD, Tokenizer
from flamingo import render_page
from tests.helpers import Words, drawing, page

NO = -100


def rngs(count=1):
    return [random.Random(i) for i in range(count)]


class TestImageTextBatch:
    def test_images_are_cropped_and_the_rng_draws_one_text(self):
        collate = ImageTextBatch(Tokenizer.train(["a red circle and a blue star"] * 9), 11, 8)
        picture = Image.new("RGB", (24, 8), "black")
        picture.paste("white", (8, 0, 16, 8))
        texts = ["a", "red", "blue star"]
        batch = collate([{"images": [picture], "texts": texts}] * 30, rngs(30))
        assert batch["images"].shape == (30, 3, 8, 8) and batch["images"].min() == 255
        found = [collate.tokenizer.decode(row) for row in batch["ids"].tolist()]
        assert found == [random.Random(i).choice(texts) for i in range(30)]
        assert set(found) == set(texts)


class Letters:
    """A vocabulary of letters: a is 97."""

    def encode(self, text):
        return [ord(letter) for letter in text]


def packed(texts, context_length=37, length=11):
    """What PackedTexts makes of records with one text each: (ids, labels), lists of lists."""
    batch = PackedTexts(Letters(), context_length, length)(
        [{"texts": [text]} for text in texts], [random.Random(0)] * len(texts))
    assert batch["ids"].dtype == batch["labels"].dtype == torch.int64
    return batch["ids"].tolist(), batch["labels"].tolist()


class TestPackedTexts:
    def test_texts_share_a_row_while_they_fit(self):
        a, b, c, d = map(ord, "abcd")
        ids, labels = packed(["aaa", "bb", "c", "dddd"])
        assert ids == [[BOS, a, a, a, EOS, BOS, b, b, EOS], [BOS, c, EOS, BOS, d, d, d, d, EOS]]
        assert labels == [[NO if i == BOS else i for i in row] for row in ids]

    def test_a_row_may_be_full_to_the_last_token(self):
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
        assert all(len(row) <= 11 for row in ids)

    def test_a_longer_text_is_cut_before_its_end_token(self):
        assert packed(["a" * 30, "b"])[0] == [[BOS] + [97] * 9 + [EOS],
                                             [BOS, 98, EOS] + [PAD] * 8]

    def test_a_row_is_never_longer_than_the_context(self):
        assert packed(["a" * 30], context_length=5)[0] == [[BOS, 97, 97, 97, EOS]]

    def test_the_rng_draws_one_text_of_a_record(self):
        batch = PackedTexts(Letters(), 200, 200)([{"texts": ["a", "b", "c"]}] * 30, rngs(30))
        found = [chr(i) for i in batch["ids"].flatten().tolist() if i > 90]
        assert found == [random.Random(i).choice("abc") for i in range(30)]


class TestAsText:
    def test_of_captions_it_is_one_drawn_by_the_rng_or_the_first(self):
        record = {"texts": ["a", "b", "c"]}
        assert [as_text(record, random.Random(i)) for i in range(9)] == [
            random.Random(i).choice("abc") for i in range(9)]
        assert as_text(record) == "a"

    def test_of_turns_it_is_descriptions_questions_and_answers(self):
        record = {"turns": [{"description": "a red cat", "prompt": "", "answer": "a cat"},
                            {"description": "", "prompt": "what is this?", "answer": "dog"}]}
        want = "a red cat. output: a cat. question: what is this? answer: dog"
        assert as_text(record) == f"{want}." and as_text(record | {"end": "!"}) == (
            "a red cat. output: a cat! question: what is this? answer: dog!")


class TestAsTurns:
    def test_a_captioned_image_is_one_turn_with_one_caption(self):
        record = {"images": drawing("red", "blue"), "texts": ["a", "b", "c"]}
        turn, = as_turns(record)
        assert turn == {"images": [record["images"][:1]], "prompt": "", "answer": "a",
                        "caption": True}
        assert [as_turns(record, random.Random(i))[0]["answer"] for i in range(9)] == [
            random.Random(i).choice("abc") for i in range(9)]

    def test_turns_stay_as_they_are(self):
        record = page(("red", "", "a cat"))
        assert as_turns(record) is record["turns"]


DOCUMENT = page(("red", "", "a red cat"), ("blue", "what is this ?", "dog"))
CAPTION = {"images": drawing("red"), "texts": ["a cat"]}


def collator(context_length=37, **more):
    config = SimpleNamespace(context_length=context_length, image_size=15)
    return InterleavedCollator(Words(), config, render_page, **more)


class TestInterleavedCollator:
    """With Flamingo's wording of a page (paper, Figures 7 and 8)."""

    def spelled(self, record, **more):
        """The ids and the labels of one record, as words."""
        batch = collator(**more)([record], rngs())
        return [Words().spell(batch[key][0].tolist()) for key in ("ids", "labels")]

    def test_a_caption(self):
        assert self.spelled(CAPTION) == [
            "<bos> <image> output: a cat <eoc> <eos>",
            "- - - a cat <eoc> -"]

    def test_a_page(self):
        assert self.spelled(DOCUMENT) == [
            "<bos> <image> a red cat <eoc> "
            "<image> question: what is this ? answer: dog <eoc> <eos>",
            "- - a red cat <eoc> - - - - - - - dog <eoc> -"]

    def test_what_stands_before_the_first_image_is_not_learned(self):
        assert self.spelled(page(("", "", "a cat dog"), ("red", "", "red"))) == [
            "<bos> a cat dog <eoc> <image> red <eoc> <eos>",
            "- - - - - - red <eoc> -"]

    def test_a_turn_may_be_left_unlearned(self):
        record = page(("red", "", "red"), ("blue", "", "blue"))
        record["turns"][0]["learn"] = False
        assert self.spelled(record)[1] == "- - - - - blue <eoc> -"

    def test_text_that_attends_to_the_next_image_stands_before_it(self):
        batch = collator(p_next_image=1.0)([DOCUMENT], rngs())
        assert [Words().spell(batch[key][0].tolist()) for key in ("ids", "labels")] == [
            "<bos> a red cat <eoc> <image> "
            "question: what is this ? answer: dog <eoc> <image> <eos>",
            "- a red cat <eoc> - - - - - - - dog <eoc> - -"]
        index = masks.image_index(batch["ids"] == IMAGE, 0, batch["attend_next"][:, None])
        assert index[0].tolist() == [1] * 6 + [2] * 9 + [0]

    @pytest.mark.parametrize("context_length", [13, 14])
    def test_what_the_cut_leaves_without_its_image_is_not_learned(self, context_length):
        ids, labels = self.spelled(DOCUMENT, p_next_image=1.0, context_length=context_length)
        assert len(ids.split()) == context_length
        assert labels.split() == "- a red cat <eoc>".split() + ["-"] * (context_length - 5)

    def test_a_clip_has_one_image_token(self):
        record = page(("", "", "a cat"))
        record["turns"][0]["images"] = [drawing("red", "blue", "red")]
        batch = collator()([record], rngs())
        assert Words().spell(batch["ids"][0].tolist()) == "<bos> <image> a cat <eoc> <eos>"
        assert batch["images"].shape == (1, 1, 3, 3, 15, 15)

    def test_a_row_has_as_many_image_tokens_as_images(self):
        record = page(("red blue", "", "a cat"), ("", "", "dog"), ("red", "", "cat"))
        batch = collator()([record, CAPTION], rngs(2))
        assert (batch["ids"] == IMAGE).sum(dim=1).tolist() == [3, 1]
        assert batch["images"].shape[1] == 3

    def test_padding_is_not_learned(self):
        batch = collator()([DOCUMENT, CAPTION], rngs(2))
        ids, labels = (Words().spell(batch[key][1].tolist()) for key in ("ids", "labels"))
        assert ids == "<bos> <image> output: a cat <eoc> <eos>" + " <pad>" * 9
        assert labels == "- - - a cat <eoc> -" + " -" * 9
        assert batch["ids"].dtype == batch["labels"].dtype == torch.int64

    def test_what_exceeds_the_context_is_cut_and_a_page_without_labels_is_refused(self):
        assert self.spelled(DOCUMENT, context_length=4) == ["<bos> <image> a red", "- - a red"]
        with pytest.raises(ValueError, match="its first label is token 3, beyond the context of 2"):
            self.spelled(DOCUMENT, context_length=2)

    def test_rows_with_fewer_images_end_in_black(self):
        small = {"turns": [{"images": [drawing("blue", size=40)], "prompt": "", "answer": "a"}]}
        images = collator()([DOCUMENT, small, page(("red", "", "a"))], rngs(3))["images"]
        assert images.shape == (3, 2, 1, 3, 15, 15) and images.dtype == torch.uint8
        red, blue, black = [255, 0, 0], [0, 0, 255], [0, 0, 0]
        assert images[:, :, 0, :, 7, 7].tolist() == [[red, blue], [blue, black], [red, black]]

    def test_a_batch_of_text_has_one_black_image(self):
        images = collator().images([page(("", "", "a"))["turns"]] * 2)
        assert images.shape == (2, 1, 1, 3, 15, 15) and not images.any()

    def test_images_and_clips_in_one_batch_are_refused(self):
        mixed = page(("red", "", "a"), ("", "", "a"))
        mixed["turns"][1]["images"] = [drawing("red", "blue")]
        for records in ([mixed], [DOCUMENT, {"turns": mixed["turns"][1:]}]):
            with pytest.raises(ValueError, match="clips of 1 and 2 frames: all images and clips"):
                collator()(records, rngs(2))

    def test_the_rng_draws_a_caption(self):
        texts = ["a cat", "a dog", "red"]
        batch = collator()([{"images": drawing("red"), "texts": texts}] * 30, rngs(30))
        found = [Words().decode(row).removeprefix("output: ") for row in batch["ids"].tolist()]
        assert found == [random.Random(i).choice(texts) for i in range(30)]

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_such_a_share_of_rows_attends_to_the_next_image(self, share):
        batch = collator(p_next_image=share)([DOCUMENT] * 400, rngs(400))
        assert batch["attend_next"].dtype == torch.bool
        assert batch["attend_next"].float().mean().item() == pytest.approx(share, abs=0.07)
        assert torch.equal(batch["ids"][:, 1] != IMAGE, batch["attend_next"])

    def test_prompts_end_where_the_answer_begins_and_are_padded_left_and_never_cut(self):
        long = page(("red", "", "a " * 30), ("blue", "what ?", "dog"))["turns"]
        batch = collator(context_length=3).prompts([DOCUMENT["turns"], long])
        first, second = (Words().spell(row) for row in batch["ids"].tolist())
        assert second == ("<bos> <image>" + " a" * 30 + " <eoc> "
                          "<image> question: what ? answer:")
        asked = "<bos> <image> a red cat <eoc> <image> question: what is this ? answer:"
        pads = batch["ids"].shape[1] - len(asked.split())
        assert first == "<pad> " * pads + asked
        assert batch["mask"].tolist() == [[False] * pads + [True] * len(asked.split()),
                                          [True] * batch["ids"].shape[1]]
        assert batch["images"].shape == (2, 2, 1, 3, 15, 15)
