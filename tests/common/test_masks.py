"""Masks: the pictures in their docstrings, and each against the rule for one query and one key."""
import doctest

import pytest
import torch

from common import masks
from common.masks import causal, draw, image_index, media, padding, prefix, unimodal
from tests.helpers import assert_close


def test_the_pictures_in_the_docstrings_are_true():
    result = doctest.testmod(masks)
    assert result.attempted and not result.failed


def table(T, S, may_attend):
    """The rule of query t and key s as a mask (T, S)."""
    return torch.tensor([[bool(may_attend(t, s)) for s in range(S)] for t in range(T)])


class TestCausal:
    @pytest.mark.parametrize("T", [1, 2, 5])
    @pytest.mark.parametrize("past", [0, 1, 3])
    def test_query_t_attends_to_the_past_and_up_to_itself(self, T, past):
        assert_close("causal (T, past + T)", causal(T, past),
                     table(T, past + T, lambda t, s: s <= past + t))


class TestPadding:
    def test_every_query_of_a_row_attends_to_its_real_tokens_alone(self):
        real = [[True, True, False, True, False], [True, False, False, False, False]]
        mask = padding(torch.tensor(real))
        assert_close("padding (B, 1, 1, S)", mask, [[[row]] for row in real])
        both = torch.ones(5, 5).tril().bool() & mask
        assert_close("causal & padding (B, 1, T, S)", both, torch.stack(
            [table(5, 5, lambda t, s: s <= t and row[s])[None] for row in real]))


class TestUnimodal:
    @pytest.mark.parametrize("Q, T", [(2, 3), (3, 1), (0, 2)])
    def test_queries_attend_to_queries_and_text_to_text(self, Q, T):
        assert_close("unimodal (Q + T, Q + T)", unimodal(Q, T),
                     table(Q + T, Q + T, lambda t, s: (t < Q) == (s < Q)))


class TestPrefix:
    @pytest.mark.parametrize("length", [0, 2, 5])
    @pytest.mark.parametrize("past", [0, 3])
    def test_it_is_open_up_to_its_length_and_causal_after(self, length, past):
        assert_close("prefix (T, past + T)", prefix(5, length, past),
                     table(5, 5 + past, lambda t, s: s < length or s <= past + t))

    def test_each_row_may_have_its_own_length(self):
        assert_close("prefix (B, 1, T, past + T)", prefix(3, torch.tensor([0, 4, 1]), past=2),
                     torch.stack([table(3, 5, lambda t, s: s < length or s <= 2 + t)[None]
                                  for length in (0, 4, 1)]))


class TestImageIndex:
    texts = ["..I..II.", "I......I", "........"]
    latest = [[0, 0, 1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1, 2], [0] * 8]
    upcoming = [[1, 1, 1, 2, 2, 2, 3, 0], [1, 2, 2, 2, 2, 2, 2, 2], [0] * 8]

    @pytest.fixture
    def tags(self):
        """bool (B, T): True at the letter I."""
        return torch.tensor([[letter == "I" for letter in text] for text in self.texts])

    @pytest.mark.parametrize("ahead", [None, [True] * 3, [True, False, False], [False, True, True]])
    @pytest.mark.parametrize("cut", range(8))
    def test_a_token_belongs_to_the_latest_or_else_the_next_image(self, tags, ahead, cut):
        numbers = [self.upcoming[b] if ahead and ahead[b] else self.latest[b] for b in range(3)]
        before = torch.tensor([[text[:cut].count("I")] for text in self.texts]) if cut else 0
        ahead_rows = None if ahead is None else torch.tensor(ahead)[:, None]
        got = image_index(tags[:, cut:], before, attend_next=ahead_rows)
        assert got.dtype == torch.int64
        name = f"images of {self.texts} with attend_next {ahead}, {cut} tokens cached (B, T)"
        assert_close(name, got, torch.tensor(numbers)[:, cut:])

    def test_one_number_of_cached_images_counts_in_all_rows(self, tags):
        assert_close("images (B, T)", image_index(tags, before=3), 3 + torch.tensor(self.latest))


class TestMedia:
    @pytest.mark.parametrize("arguments, may_attend", [
        ([], int.__eq__), ([True], int.__eq__), ([False], int.__le__)])
    def test_a_token_attends_to_its_own_image_or_to_all_up_to_it(self, arguments, may_attend):
        numbers, N, Q = [[0, 1, 1, 3, 2], [2, 0, 0, 1, 3]], 3, 7
        expected = [table(5, N * Q, lambda t, s: may_attend(1 + s // Q, row[t])) for row in numbers]
        got = media(torch.tensor(numbers), N, Q, *arguments)
        assert_close("media (B, 1, T, N * Q)", got, torch.stack(expected)[:, None])


class TestDraw:
    def test_each_head_stands_below_the_other(self):
        mask = torch.tensor([[[[1, 0, 0], [0, 1, 1]], [[0, 0, 1], [1, 1, 1]]]]).bool()
        assert draw(mask) == "#..\n.##\n\n..#\n###" and draw(mask[0, 0]) == "#..\n.##"
