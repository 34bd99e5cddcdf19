"""The text tower: a causal transformer, read at the first end token."""
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import CLIP_EOS, assert_close, loop_text, texts, toy_clip, unchanged


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
            assert_close("text features (B, D)", tower(ids), expected)
        assert_close("of shorter rows (B, D)", tower(ids[[0, 2], :6]), expected[[0, 2]])

    @pytest.mark.parametrize("pad_id", [0, 28, CLIP_EOS])
    def test_what_follows_the_end_token_changes_nothing(self, pad_id):
        tower, ids = toy_clip().text, texts()
        assert_close("text features (B, D)", tower(F.pad(ids, (0, 4), value=pad_id)), tower(ids))

    def test_the_gradient_reaches_positions_up_to_the_last_end_and_none_behind(self):
        tower = toy_clip().text
        tower(ragged((2, 6))).square().sum().backward()
        for name, p in tower.named_parameters():
            if not name.endswith("k_proj.bias"):      # softmax does not depend on it
                assert p.grad.abs().max() > 1e-6, f"no gradient of {name}"
        assert_close("positions with a gradient", tower.pos_embed.grad.abs().amax(dim=1) > 0,
                     torch.arange(11) <= 6)

    def test_a_text_longer_than_the_context_is_refused(self):
        toy_clip().text(texts(1, 11))
        with pytest.raises(ValueError, match="12.*11"):
            toy_clip().text(texts(1, 12))
