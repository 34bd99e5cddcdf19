"""The text tower: a causal transformer, read at the first end token."""
import pytest
import torch

from tests.helpers import CLIP_EOS, assert_close, assert_same, loop_text, texts, toy_clip, unchanged


def ragged(ends, T=11):
    """Ids (B, T), first 0, with the first end token at these places and others behind it."""
    ids = torch.randint(CLIP_EOS + 1, 29, (len(ends), T))
    ids[:, 0] = 0
    for row, end in zip(ids, ends):
        row[[end, *range(end + 2, T, 3)]] = CLIP_EOS
    return ids


class TestTextTower:
    @pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
    def test_it_is_the_loop_read_at_the_first_end_token(self, act):
        tower, ids = toy_clip(act=act).text, ragged((4, 10, 1, 7))
        expected = loop_text(tower, ids, 2, act)
        with unchanged(ids=ids):
            assert_same("text features (B, D)", tower(ids), expected, tower)
        assert_close("of shorter rows (B, D)", tower(ids[[0, 2], :6]), expected[[0, 2]])

    def test_a_text_longer_than_the_context_is_refused(self):
        toy_clip().text(texts(1, 11))
        with pytest.raises(ValueError, match="12.*11"):
            toy_clip().text(texts(1, 12))
