"""Sheets of samples: every picture is drawn whole, right and wrong are told without colours too."""
import numpy as np
import pytest
from PIL import Image

from common.evaluation.sheet import FONT, GREEN, INK, LINE, RED, sheet, stack, wrap

CELL = 40


def page(rows, title="what is shown here"):
    return np.asarray(sheet(title, rows, cell=CELL), int)


def plain(colour="white", size=(5, 5)):
    return Image.new("RGB", size, colour)


class TestWrap:
    def test_lines_are_no_wider_than_asked_and_lose_nothing(self):
        text = "a few short words, then aVeryLongWordThatDoesNotFitIntoOneLineAtAll and an end"
        lines = wrap(text, 90)
        assert all(FONT.getlength(line) <= 90 for line in lines) and len(lines) > 5
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert {*"a few short words, then and an end".split()} <= {*" ".join(lines).split()}
        assert wrap("W" * 40, 90)[0] and "".join(wrap("W" * 40, 90)) == "W" * 40
        assert wrap("two words", 900) == ["two words"] and wrap("", 90) == [""]


class TestSheet:
    def test_every_picture_is_drawn_whole(self):
        red, green = plain((200, 30, 40), (6, 4)), plain((1, 99, 2), (6, 4))
        made = page([("words", None, [(red, "red", right) for right in (None, True, False)]),
                     ("", green, [(None, "words alone", None)] * 2)])
        assert (made == (200, 30, 40)).all(-1).sum() == 3 * CELL ** 2
        assert (made == (1, 99, 2)).all(-1).sum() == CELL ** 2

    @pytest.mark.parametrize("picture", [plain(), None])
    def test_right_and_wrong_have_colours_and_marks(self, picture):
        good, bad, neither = (page([("", None, [(picture, "", right)])], title="")
                              for right in (True, False, None))
        for made, has, lacks in ((good, GREEN, RED), (bad, RED, GREEN)):
            frame = 4 * CELL if picture else 0
            assert (made == has).all(-1).sum() > frame and not (made == lacks).all(-1).any()
        words = page([("", None, [(picture, "words", None)])])
        for made, colours in ((neither, (GREEN, RED, INK)), (words, (GREEN, RED))):
            assert not any((made == colour).all(-1).any() for colour in colours)
        check, cross = (good == GREEN).all(-1), (bad == RED).all(-1)
        assert check.shape == cross.shape and (check != cross).any()     # another shape is drawn

    def test_a_row_and_the_title_are_as_high_as_their_words(self):
        def height(cell, picture=None, rows=1, title="words"):
            return len(page([("", picture, [cell])] * rows, title))
        word, more, title = (None, "words", None), (None, "many words " * 6, None), "words " * 50
        one = height(word)
        assert height(word, rows=2) - one == LINE + 16
        assert height(more) - one == (len(wrap(more[1], 2 * CELL)) - 1) * LINE
        assert height(word, title=title) - one == (len(wrap(title, 6 * CELL - 16)) - 1) * LINE
        assert height(word, plain()) - one == CELL - LINE     # no room below it for a caption

    @pytest.mark.parametrize("cells", [
        [(None, "a long sentence of many words that has to be broken into lines", True)] * 3,
        [(plain(size=(9, 5)), "caption", False)] * 7,
        [(None, "words", True), (plain(size=(5, 9)), "caption", False)] * 4,
        [(None, "endless " * 999, True)] * 2])
    def test_nothing_touches_the_right_edge_or_the_bottom(self, cells):
        made = page([("left", None, cells), ("", plain("black"), cells[:1]), ("", None, cells)])
        assert (made[:, -1] == 255).all() and (made[-1] == 255).all()

    @pytest.mark.parametrize("picture, columns", [(plain((1, 99, 2)), 3 * CELL), (None, 2 * CELL)])
    def test_words_stay_left_of_the_next_cell(self, picture, columns):
        name = "0.27 IMG_20240101_120000_a_very_long_name_of_a_file and more and more words"
        left = "asked" if picture else ""
        many, few = (page([(left, None, [(picture, name, None), (picture, second, None)])] * 2)
                     for second in (name, ""))
        assert (many[:, :columns] == few[:, :columns]).all() and (many != few).any()
        assert (many == (1, 99, 2)).all(-1).sum() == (4 * CELL ** 2 if picture else 0)

    def test_letters_of_other_scripts_do_not_break_it(self):
        page([("猫 😀 é", None, [(None, "\u200b кот", None)])])


class TestStack:
    def test_sheets_stand_below_one_another_at_the_left_on_white(self):
        sheets = [plain("red", (3, 5)), plain("blue", (7, 2)), plain("black", (5, 4))]
        made = np.asarray(stack(sheets))
        assert made.shape == (11, 7, 3)
        for rows, width, colour in ((slice(0, 5), 3, (255, 0, 0)), (slice(5, 7), 7, (0, 0, 255)),
                                    (slice(7, 11), 5, (0, 0, 0))):
            assert (made[rows, :width] == colour).all() and (made[rows, width:] == 255).all()
