"""Interleaved pages: which ids, what is learned of them, and the pictures that go with them."""
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import masks
from common.prompts import ANSWER, OUTPUT
from common.data.collators import InterleavedCollator
from common.data.tokenizer import BOS, EOC, EOS, IMAGE


class Words:
    """A vocabulary of whole words, ids from 16 on."""
    words = "output: question: answer: a red blue cat dog what is this ?".split()

    def encode(self, text):
        return [16 + self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i - 16] for i in ids if 16 <= i < 16 + len(self.words))


OUT, ASK, TELL, A, RED, BLUE, CAT, DOG, WHAT, IS, THIS, MARK = range(16, 28)
NO = -100


def pages(context_length=37, **more):
    return InterleavedCollator(Words(), SimpleNamespace(context_length=context_length, image_size=15), **more)


def drawing(*colours, size=15):
    """A clip of frames in these colours; of one a picture."""
    return [Image.new("RGB", (size, size), colour) for colour in colours]


def rngs(count=1, first=0):
    return [random.Random(i) for i in range(first, first + count)]


DOCUMENT = {"images": [drawing("red"), drawing("blue")],
            "texts": [(OUTPUT, " a red cat"), (ANSWER.format("what is this ?"), " dog")]}


class TestLabels:
    def made(self, record, **more):
        made = pages(**more)([record], rngs())
        return made["ids"][0].tolist(), made["labels"][0].tolist()

    def test_of_a_picture_with_a_caption(self):
        ids, labels = self.made({"images": drawing("red", "blue"), "texts": ["a cat"]})
        assert ids == [BOS, IMAGE, OUT, A, CAT, EOC, EOS]
        assert labels == [NO, NO, NO, A, CAT, EOC, NO]

    def test_of_a_page(self):
        ids, labels = self.made(DOCUMENT)
        assert ids == [BOS, IMAGE, OUT, A, RED, CAT, EOC,
                       IMAGE, ASK, WHAT, IS, THIS, MARK, TELL, DOG, EOC, EOS]
        assert labels == [NO, NO, NO, A, RED, CAT, EOC, *[NO] * 7, DOG, EOC, NO]

    def test_of_a_page_that_begins_in_words(self):
        ids, labels = self.made({"images": [drawing("red")], "shown": [False, True],
                                 "texts": [("a cat", " dog"), ("", " red")]})
        assert ids == [BOS, A, CAT, DOG, EOC, IMAGE, RED, EOC, EOS]
        assert labels == [NO] * 6 + [RED, EOC, NO]

    def test_of_a_page_whose_text_sees_the_next_picture(self):
        ids, labels = self.made(DOCUMENT, next_image=1.0)
        assert ids == [BOS, OUT, A, RED, CAT, EOC, IMAGE,
                       ASK, WHAT, IS, THIS, MARK, TELL, DOG, EOC, IMAGE, EOS]
        assert labels == [NO, NO, A, RED, CAT, EOC, *[NO] * 7, DOG, EOC, NO, NO]
        belongs = masks.image_index(torch.tensor([ids]) == IMAGE,
                                            following=torch.tensor([[True]]))
        assert belongs[0].tolist() == [1] * 7 + [2] * 9 + [0]

    def test_what_the_cut_leaves_without_its_picture_is_not_learned(self):
        for context_length in (14, 15):
            collate = pages(next_image=1.0)
            collate.context_length = context_length
            made = collate([DOCUMENT], rngs())
            assert made["ids"].shape[1] == context_length
            assert made["labels"][0].tolist() == [NO, NO, A, RED, CAT, EOC] + [NO] * (context_length - 6)

    def test_of_a_clip_there_is_one_tag(self):
        clip_ = {"images": [drawing("red", "blue", "red")], "texts": [(OUTPUT, " a cat")]}
        made = pages()([clip_], rngs())
        assert made["ids"][0].tolist() == [BOS, IMAGE, OUT, A, CAT, EOC, EOS]
        assert made["images"].shape == (1, 1, 3, 3, 15, 15)

    def test_padding_is_not_learned(self):
        made = pages()([DOCUMENT, {"images": drawing("red"), "texts": ["a cat"]}], rngs(2))
        assert made["ids"][1].tolist() == [BOS, IMAGE, OUT, A, CAT, EOC, EOS] + [0] * 10
        assert made["labels"][1].tolist() == [NO, NO, NO, A, CAT, EOC, NO] + [NO] * 10

    def test_what_exceeds_the_context_is_cut_and_what_teaches_nothing_is_told(self):
        ids, labels = self.made(DOCUMENT, context_length=5)
        assert ids == [BOS, IMAGE, OUT, A, RED] and labels == [NO, NO, NO, A, RED]
        with pytest.raises(ValueError, match="begins at token 4, behind the context of 3"):
            self.made(DOCUMENT, context_length=3)


class TestPages:
    def test_rows_with_fewer_pictures_end_in_black(self):
        one = {"images": [drawing("blue", size=40)], "texts": [(OUTPUT, " a cat")]}
        made = pages()([DOCUMENT, one], rngs(2))["images"]
        assert made.shape == (2, 2, 1, 3, 15, 15) and made.dtype == torch.uint8
        colours = made[:, :, 0, :, 7, 7].tolist()
        assert colours == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 255], [0, 0, 0]]]

    def test_a_batch_says_of_which_data_set_it_is_and_what_that_weighs(self):
        made = pages(number=3, weight=0.25)([DOCUMENT], rngs())
        assert made["dataset"].item() == 3 and made["weight"].item() == 0.25

    def test_pictures_and_clips_in_one_batch_are_told(self):
        mixed = {"images": [drawing("red"), drawing("red", "blue")], "texts": DOCUMENT["texts"]}
        with pytest.raises(ValueError, match="clips of 1 and 2 frames together: pictures and "):
            pages()([mixed], rngs())

    def test_a_caption_is_chosen_by_the_rng(self):
        record = {"images": drawing("red"), "texts": ["a cat", "a dog", "red"]}
        made = pages()([record] * 30, rngs(30))
        said = [Words().decode(row).removeprefix("output: ") for row in made["ids"].tolist()]
        assert said == [random.Random(i).choice(record["texts"]) for i in range(30)]

    def test_so_many_rows_see_the_next_picture(self):
        for share in (0.0, 0.3, 1.0):
            made = pages(next_image=share)([DOCUMENT] * 400, rngs(400))
            assert made["following"].float().mean().item() == pytest.approx(share, abs=0.07)
            behind = made["ids"][:, 1] != IMAGE
            assert torch.equal(behind, made["following"])
