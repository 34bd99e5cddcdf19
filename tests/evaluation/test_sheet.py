"""Sheets of samples: every picture is drawn whole, right and wrong are told without colours too."""
import numpy as np
import pytest
from PIL import Image

from common.evaluation.sheet import FONT, GREEN, INK, LINE, RED, sheet, wrap

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
        assert not any((neither == colour).all(-1).any() for colour in (GREEN, RED, INK))
        words = page([("", None, [(picture, "words", None)])])
        assert not any((words == colour).all(-1).any() for colour in (GREEN, RED))
        marks = [(made == colour).all(-1) for made, colour in ((good, GREEN), (bad, RED))]
        assert marks[0].shape == marks[1].shape
        assert (marks[0] != marks[1]).any()              # without colours: the drawn shapes differ

    def test_a_row_of_words_is_as_high_as_its_words(self):
        words, more = (None, "words", None), (None, "many words " * 6, None)
        one, two = (len(page([("asked", None, [words])] * count)) for count in (3, 4))
        assert two - one == LINE + 16
        lines = len(wrap(more[1], 2 * CELL))
        assert len(page([("asked", None, [more])])) - len(page([("asked", None, [words])])) \
            == (lines - 1) * LINE
        title = "many words " * 30       # wrapped to the page's width of 6 cells
        assert len(page([("", None, [])], title)) - len(page([("", None, [])], "words")) \
            == (len(wrap(title, 6 * CELL - 16)) - 1) * LINE
        assert len(page([("", plain(), [words])])) - len(page([("", None, [words])])) \
            == CELL - LINE               # a picture alone has no room below it for a caption

    @pytest.mark.parametrize("cells", [
        [(None, "a long sentence of many words that has to be broken into lines", True)] * 3,
        [(plain(size=(9, 5)), "caption", False)] * 7,
        [(None, "words", True), (plain(size=(5, 9)), "caption", False)] * 4,
        [(None, "endless " * 999, True)] * 2])
    def test_nothing_touches_the_right_edge_or_the_bottom(self, cells):
        made = page([("left", None, cells), ("", plain("black"), cells[:1]), ("", None, cells)])
        assert (made[:, -1] == 255).all() and (made[-1] == 255).all()

    def test_long_names_stay_below_their_own_picture(self):
        cell = plain((1, 99, 2))
        name = "0.27 IMG_20240101_120000_a_very_long_name_of_a_file and more and more words"
        many, few = (page([("asked", None, [(cell, name, None), (cell, second, None)])] * 2)
                     for second in (name, ""))
        second = slice(3 * CELL + 6, None)               # columns of the second cell
        assert (many[:, second] != few[:, second]).any()
        assert (many[:, :3 * CELL] == few[:, :3 * CELL]).all()
        assert (many == (1, 99, 2)).all(-1).sum() == 4 * CELL ** 2
        alone = page([("asked", None, [(cell, name, None)])])
        short = page([("asked", None, [(cell, "two words of three", None)])])
        assert len(wrap(name, CELL)) > len(wrap("two words of three", CELL)) >= 2
        assert len(alone) == len(short)                  # two lines below a picture, no more
        assert (alone[:, second] == 255).all() and (alone[-6:] == 255).all()

    def test_words_stay_left_of_the_next_words(self):
        one, two = (page([("", None, [(None, "words " * 9, None), (None, more, None)])])
                    for more in ("", "W " * 9))
        assert (one != two).any() and (one[:, :2 * CELL] == two[:, :2 * CELL]).all()

    def test_letters_of_other_scripts_do_not_break_it(self):
        page([("猫 😀 é", None, [(None, "\u200b кот", None)])])
