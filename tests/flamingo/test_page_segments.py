"""Pages and prompts: the order of their segments and what is learned (paper, Figures 7 and 8)."""
import pytest

from common.data.tokenizer import BOS, EOC, EOS, IMAGE, Tokenizer
from common.prompts import Segment
from flamingo import page_segments, render_page
from tests.helpers import Words, page

TURNS = page(("red", "", "a red cat"), ("blue", "what is this ?", "dog"))["turns"]
CAPTION = [{"images": ["an image"], "prompt": "", "answer": "a cat", "caption": True}]


def learn(text):
    return [Segment(f" {text}", learn=True), Segment((EOC,), learn=True)]


def spelled(turns, *arguments, **more):
    """The ids and the labels of a page, as words."""
    return [Words().spell(row) for row in render_page(turns, Words(), *arguments, **more)]


class TestPageSegments:
    BEGIN, IMG, END = Segment((BOS,)), Segment((IMAGE,)), Segment((EOS,))
    ASKED = Segment("question: what is this ? answer:")

    def test_answers_and_their_eoc_are_learned(self):
        assert page_segments(TURNS) == [
            self.BEGIN, self.IMG, Segment(""), *learn("a red cat"),
            self.IMG, self.ASKED, *learn("dog"), self.END]

    def test_a_caption_has_its_own_prompt(self):
        assert page_segments(CAPTION) == [
            self.BEGIN, self.IMG, Segment("output:"), *learn("a cat"), self.END]

    def test_a_prompt_is_its_page_without_the_last_answer(self):
        assert page_segments(TURNS, is_prompt=True) == [
            self.BEGIN, self.IMG, Segment(""), *learn("a red cat"), self.IMG, self.ASKED]
        assert page_segments(TURNS, is_prompt=True) == page_segments(TURNS)[:-3]

    def test_with_attend_next_the_image_stands_behind_its_text(self):
        assert page_segments(TURNS, attend_next=True) == [
            self.BEGIN, Segment(""), *learn("a red cat"), self.IMG,
            self.ASKED, *learn("dog"), self.IMG, self.END]

    def test_a_turn_may_have_several_images_or_none(self):
        turns = page(("red blue", "", "a cat"), ("", "", "dog"))["turns"]
        assert spelled(turns) == ["<bos> <image> <image> a cat <eoc> dog <eoc> <eos>",
                                  "- - - a cat <eoc> dog <eoc> -"]


class TestRenderPage:
    def test_text_before_the_first_image_is_not_learned(self):
        turns = page(("", "", "a cat"), ("", "what is this ?", "dog"), ("red", "", "red"))["turns"]
        assert spelled(turns) == [
            "<bos> a cat <eoc> question: what is this ? answer: dog <eoc> <image> red <eoc> <eos>",
            "- - - - - - - - - - - - - red <eoc> -"]

    def test_with_attend_next_it_is(self):
        turns = page(("", "", "a cat"), ("red", "", "red"))["turns"]
        assert spelled(turns, None, True) == ["<bos> a cat <eoc> red <eoc> <image> <eos>",
                                              "- a cat <eoc> red <eoc> - -"]

    def test_with_attend_next_text_behind_the_last_image_is_not(self):
        turns = page(("red", "", "red"), ("", "", "a cat"))["turns"]
        assert spelled(turns, None, True) == ["<bos> red <eoc> <image> a cat <eoc> <eos>",
                                              "- red <eoc> - - - - -"]

    def test_turns_may_be_left_out_of_the_learned(self):
        first, second = TURNS
        assert spelled([first | {"learn": False}, second])[1] == "- " * 13 + "dog <eoc> -"
        assert spelled([first | {"learn": True}, second | {"learn": False}])[1] \
            == "- - a red cat <eoc>" + " -" * 10

    @pytest.mark.parametrize("context_length, labels", [
        (16, "- a red cat <eoc> - - - - - - - dog <eoc> - -"),
        (15, "- a red cat <eoc> - - - - - - - dog <eoc> -"),
        (14, "- a red cat <eoc> - - - - - - - - -"), (13, "- a red cat <eoc> - - - - - - - -"),
        (6, "- a red cat <eoc> -"), (5, "- - - - -")])
    def test_a_cut_that_removes_the_next_image_removes_the_labels_of_its_text(
            self, context_length, labels):
        whole = ("<bos> a red cat <eoc> <image> "
                 "question: what is this ? answer: dog <eoc> <image> <eos>").split()
        assert spelled(TURNS, context_length, True) == [" ".join(whole[:context_length]), labels]

    def test_a_page_is_cut_at_the_context_and_needs_a_label_in_it(self):
        assert spelled(TURNS, 6) == ["<bos> <image> a red cat <eoc>", "- - a red cat <eoc>"]
        with pytest.raises(ValueError, match="its first label is token 3, beyond the context of 2"):
            render_page(TURNS, Words(), 2)


class TestPrompts:
    def test_shots_are_whole_and_the_query_is_open(self):
        shots = [CAPTION[0] | {"answer": answer} for answer in ("a cat", "a dog")]
        assert spelled(shots + CAPTION, is_prompt=True)[0] == (
            "<bos> <image> output: a cat <eoc> <image> output: a dog <eoc> <image> output:")
        assert spelled(CAPTION, is_prompt=True)[0] == "<bos> <image> output:"

    def test_a_question_ends_where_its_answer_begins(self):
        assert spelled([TURNS[1]] * 2, is_prompt=True)[0] == (
            "<bos> <image> question: what is this ? answer: dog <eoc> "
            "<image> question: what is this ? answer:")

    def test_shots_of_text_alone_have_no_image_token(self):
        shots = [CAPTION[0] | {"images": [], "answer": answer} for answer in ("a cat", "a dog")]
        assert spelled(shots + CAPTION, is_prompt=True)[0] == (
            "<bos> output: a cat <eoc> output: a dog <eoc> <image> output:")

    @pytest.mark.parametrize("more", [{}, {"learn": False}, {"images": []}])
    def test_a_prompt_has_the_first_ids_of_its_page(self, more):
        tokenizer = Tokenizer.train(["output: question: what is this? answer: a red circle"] * 9)
        turns = [turn | {"prompt": "what is this?", "answer": "a red circle"} | more
                 for turn in CAPTION * 3]
        for turns in (turns, [turn | {"caption": False} for turn in turns]):
            prompt, (ids, _) = (render_page(turns, tokenizer, is_prompt=is_prompt)
                                for is_prompt in (True, False))
            assert ids == prompt[0] + tokenizer.encode("a red circle") + [EOC, EOS]

    def test_a_text_that_spells_an_image_token_has_none(self):
        tokenizer = Tokenizer.train(["output: what is this <image> <eoc>"] * 9)
        ids, _ = render_page([CAPTION[0] | {"answer": "<image> <eoc> <eos>"}], tokenizer)
        assert [i for i in ids if i in (BOS, IMAGE, EOC, EOS)] == [BOS, IMAGE, EOC, EOS]
