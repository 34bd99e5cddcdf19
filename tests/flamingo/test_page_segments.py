"""Pages and prompts: the order of their segments and what is learned (paper, Figures 7 and 8)."""
import pytest

from flamingo import page_segments, render_page
from tests.helpers import BOS, EOC, EOS, IMAGE, Words, page, refused

ASK = "what is this ?"
ASKED = "question: what is this ? answer:"
BEGIN, PICTURE, END = (BOS, False), (IMAGE, False), (EOS, False)


def turns(*given, **more):
    """Turns of (images, prompt, answer), all with these fields."""
    return [turn | more for turn in page(*given)["turns"]]


def two_turns():
    return turns(("red", "", "a red cat"), ("blue", ASK, "dog"))


def segments(*arguments, **more):
    """The page as (text or id, learn)."""
    return [(item, part.learn) for part in page_segments(*arguments, **more) for item in (
        [part.content] if isinstance(part.content, str) else part.content) if item != ""]


def learned(text):
    return [(f" {text}", True), (EOC, True)]


class TestPageSegments:
    def test_answers_and_their_eoc_are_learned(self):
        assert segments(two_turns()) == [BEGIN, PICTURE, *learned("a red cat"), PICTURE,
                                         (ASKED, False), *learned("dog"), END]

    def test_a_caption_has_its_own_prompt(self):
        assert segments(turns(("red", "", "a cat"), caption=True)) == [
            BEGIN, PICTURE, ("output:", False), *learned("a cat"), END]

    def test_a_prompt_is_its_page_without_the_last_answer(self):
        assert segments(two_turns(), is_prompt=True) == [
            BEGIN, PICTURE, *learned("a red cat"), PICTURE, (ASKED, False)]

    def test_with_attend_next_the_image_comes_after_its_text(self):
        assert segments(two_turns(), attend_next=True) == [
            BEGIN, *learned("a red cat"), PICTURE, (ASKED, False), *learned("dog"), PICTURE, END]

    def test_a_turn_has_an_image_token_for_each_image_or_clip_and_none_without(self):
        given = turns(("", "", "a"), ("red blue", "", "cat"), ("", "", "dog"))
        assert segments(given) == [
            BEGIN, (" a", False), (EOC, False),      # no image to attend to
            PICTURE, PICTURE, *learned("cat"), *learned("dog"), END]
        assert segments(given, attend_next=True)[:3] == [BEGIN, *learned("a")]

    def test_a_turn_may_be_left_out_of_the_loss(self):
        first, second = two_turns()
        assert segments([first | {"learn": False}, second]) == [
            BEGIN, PICTURE, (" a red cat", False), (EOC, False),
            PICTURE, (ASKED, False), *learned("dog"), END]

    def test_the_callers_turns_stay_as_they_are(self):
        given = two_turns()
        segments(given, True), segments(given, False, True)
        assert given == two_turns()


def spelled(given, *arguments, **more):
    """The ids and the labels of a page, as words; "-" is an ignored label."""
    return [Words().spell(row) for row in render_page(given, Words(), *arguments, **more)]


class TestRenderPage:
    def test_it_is_the_segments_as_tokens_cut_at_the_context_which_needs_a_label(self):
        ids = f"<bos> <image> a red cat <eoc> <image> {ASKED} dog <eoc> <eos>"
        labels = "- - a red cat <eoc> - - - - - - - dog <eoc> -"
        for length in (16, 15, 13, 3):
            assert spelled(two_turns(), length) == [
                " ".join(text.split()[:length]) for text in (ids, labels)]
        assert spelled(two_turns()) == [ids, labels]
        before_an_image = turns(("", "", "a cat"), ("red", "", "a"))
        for given, first, length in ((two_turns(), 3, 2), (before_an_image, 6, 4)):
            with refused(f"{first}.*{length}"):
                spelled(given, length)

    def test_a_prompt_ends_where_its_answer_begins(self):
        assert spelled(two_turns(), is_prompt=True)[0] == \
            f"<bos> <image> a red cat <eoc> <image> {ASKED}"

    def test_a_vocabulary_without_our_special_tokens_is_refused(self):
        foreign = Words()
        foreign.image_id = -200
        with refused("ids 4 and 5"):
            render_page(two_turns(), foreign)

    def test_with_attend_next_text_behind_the_last_image_is_not_learned(self):
        given = turns(("red", "", "red"), ("", "", "a cat"))
        assert spelled(given, None, True) == ["<bos> red <eoc> <image> a cat <eoc> <eos>",
                                              "- red <eoc> - - - - -"]
        assert spelled(given)[1] == "- - red <eoc> a cat <eoc> -"

    @pytest.mark.parametrize("context_length, labels", [
        (16, "- a red cat <eoc> - - - - - - - dog <eoc> - -"),
        (15, "- a red cat <eoc> - - - - - - - dog <eoc> -"),
        (14, "- a red cat <eoc> - - - - - - - - -"), (6, "- a red cat <eoc> -"),
        (5, "- - - - -")])               # before the first image
    def test_a_cut_that_removes_the_next_image_removes_the_labels_of_its_text(
            self, context_length, labels):
        ids = f"<bos> a red cat <eoc> <image> {ASKED} dog <eoc> <image> <eos>".split()
        cut = " ".join(ids[:context_length])
        assert spelled(two_turns(), context_length, True) == [cut, labels]
