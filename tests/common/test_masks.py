"""Masks: the pictures in their docstrings, and what each of them promises."""
import doctest

import torch

from common import masks
from common.masks import causal, draw, media, padding, image_index, prefix


def test_the_pictures_in_the_docstrings_are_true():
    result = doctest.testmod(masks)
    assert result.attempted >= 4 and result.failed == 0


def test_causal_sees_itself_and_the_past_at_every_cache_length():
    for T in (1, 2, 5):
        for past in (0, 1, 3):
            mask = causal(T, past)
            assert mask.shape == (T, past + T) and mask.dtype == torch.bool
            for t in range(T):
                for s in range(past + T):
                    assert mask[t, s] == (s <= past + t), f"query {t}, key {s}:\n{draw(mask)}"


def test_causal_rows_behind_a_cache_are_the_last_rows_of_the_whole():
    assert torch.equal(causal(2, past=5), causal(7)[5:]), draw(causal(2, past=5))


def test_padding_hides_keys_in_every_row_and_head():
    real = torch.tensor([[True, True, False], [True, False, False]])
    mask = padding(real)
    assert mask.shape == (2, 1, 1, 3)
    assert torch.equal((causal(3) & mask)[1, 0], torch.tensor([[1, 0, 0]] * 3).bool()), draw(mask)


def test_prefix_is_open_inside_and_causal_after():
    mask = prefix(5, 2)
    for t in range(5):
        for s in range(5):
            assert mask[t, s] == (s < 2 or s <= t), f"query {t}, key {s}:\n{draw(mask)}"
    assert torch.equal(prefix(5, 0), causal(5)) and prefix(5, 5).all()


def test_prefix_takes_a_length_for_each_row_and_a_cache():
    mask = prefix(3, torch.tensor([0, 4]), past=2)
    assert mask.shape == (2, 1, 3, 5)
    assert torch.equal(mask[0, 0], causal(3, 2)) and torch.equal(mask[1, 0], prefix(3, 4, past=2))


def rows(*texts):
    """Tags from pictures of texts, I where one stands."""
    return torch.tensor([[letter == "I" for letter in text] for text in texts])


def test_a_token_belongs_to_the_last_tag_up_to_it_in_its_own_row():
    tags = rows("..I..II.", "I......I", "........")
    numbers = image_index(tags)
    assert numbers.dtype == torch.int64
    for b in range(3):
        for t in range(8):
            assert numbers[b, t] == tags[b, :t + 1].sum(), (b, t)


def test_the_tags_of_a_cache_count_in_each_row():
    tags = rows("..I..II.", "I......I", "........")
    for cut in range(9):
        before = tags[:, :cut].sum(dim=1, keepdim=True)
        assert torch.equal(image_index(tags[:, cut:], before), image_index(tags)[:, cut:])
    assert image_index(rows(".I"), before=3).tolist() == [[3, 4]]


def test_a_token_belongs_to_the_next_tag_where_its_row_says_so():
    tags = rows("..I..II.", "I......I", "........")
    ahead = [[1, 1, 1, 2, 2, 2, 3, 0], [1] + [2] * 7, [0] * 8]
    assert image_index(tags, attend_next=torch.tensor([[True]] * 3)).tolist() == ahead
    mixed = image_index(tags, attend_next=torch.tensor([[True], [False], [True]]))
    assert mixed.tolist() == [ahead[0], [1] * 7 + [2], ahead[2]]


def test_media_are_seen_by_their_own_text_or_by_all_that_comes_after():
    pictures, N, Q = torch.tensor([[0, 1, 1, 3, 2], [2, 0, 0, 1, 3]]), 3, 5
    for only_latest_image in (True, False):
        mask = media(pictures, N, Q, only_latest_image)
        assert mask.shape == (2, 1, 5, N * Q) and mask.dtype == torch.bool
        for b in range(2):
            for t in range(5):
                for s in range(N * Q):
                    own, number = pictures[b, t].item(), 1 + s // Q
                    want = number == own if only_latest_image else number <= own
                    assert mask[b, 0, t, s] == want, f"row {b}, token {t}, key {s}"


def test_draw_shows_each_head_below_the_other():
    assert draw(torch.eye(2).bool().expand(2, 1, 2, 2)) == "#.\n.#\n\n#.\n.#"
