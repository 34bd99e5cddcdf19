"""Every attention mask, side by side: boolean, True = may attend, broadcastable to (B, H, T, S).

Masks are built by the caller and combined with `&`. `draw` prints one:

    >>> print(draw(causal(3)))
    #..
    ##.
    ###
"""
import torch


def causal(T, past=0, device=None):
    """Each position sees itself and what came before. Returns bool (T, past + T).

    past: keys that a cache already holds; query i stands at position past + i.

    >>> print(draw(causal(2, past=3)))
    ####.
    #####
    """
    keys = torch.arange(past + T, device=device)
    return keys[None, :] <= keys[past:, None]


def padding(token_mask):
    """Nobody sees padding. token_mask: bool (B, S), True at real tokens. Returns bool (B, 1, 1, S).

    >>> print(draw(padding(torch.tensor([[True, True, False]]))))
    ##.
    """
    return token_mask[:, None, None, :]


def prefix(T, length, past=0, device=None):
    """The first `length` positions see each other, the rest is causal. Returns bool (T, past + T).

    length may be an int or an int64 tensor (B,), one for each row; then bool (B, 1, T, past + T).

    >>> print(draw(prefix(4, 2)))
    ##..
    ##..
    ###.
    ####
    """
    keys = torch.arange(past + T, device=device)
    if isinstance(length, torch.Tensor):
        return causal(T, past, device) | (keys < length[:, None, None, None])
    return causal(T, past, device) | (keys < length)


def image_index(is_image, before=0, attend_next=None):
    """The picture that each token belongs to: 1, 2, ... in the order of their tags, 0 for none.

    is_image bool (B, T), True where a picture's tag stands. before: the tags that a cache already
    holds, an int or int64 (B, 1). attend_next: bool (B, 1); where True a token belongs to the tag at
    it or next after it, elsewhere to the tag at it or last before it. Returns int64 (B, T).

    >>> is_image = torch.tensor([[False, True, False, True, False]])
    >>> image_index(is_image).tolist(), image_index(is_image, attend_next=torch.tensor([[True]])).tolist()
    ([[0, 1, 1, 2, 2]], [[1, 1, 2, 2, 0]])
    """
    passed = before + is_image.cumsum(dim=1)
    if attend_next is None:
        return passed
    ahead = passed - is_image.long() + 1
    return torch.where(attend_next, ahead * (ahead <= passed[:, -1:]), passed)


def media(image_index, N, Q, only_latest_image=True):
    """Text sees its own picture's Q tokens; only_latest_image False: those of every picture up to its own.

    image_index int64 (B, T), of the function of that name. Returns bool (B, 1, T, N * Q); a token that belongs to
    no picture sees nothing (Flamingo, 2.3).

    >>> print(draw(media(torch.tensor([[1, 1, 2, 2, 0]]), 2, 3)))
    ###...
    ###...
    ...###
    ...###
    ......
    >>> print(draw(media(torch.tensor([[1, 2, 0]]), 2, 3, only_latest_image=False)))
    ###...
    ######
    ......
    """
    number = torch.arange(1, N + 1, device=image_index.device).repeat_interleave(Q)
    own = image_index[:, None, :, None]
    return number == own if only_latest_image else number <= own


def draw(mask):
    """A mask as text: a row a query, '#' where it may attend, '.' where not.

    Leading axes of size 1 are dropped; larger ones are drawn one below the other.
    """
    grids = mask.reshape(-1, *mask.shape[-2:]).tolist()
    return "\n\n".join("\n".join("".join(".#"[v] for v in row) for row in grid) for grid in grids)
