"""Every attention mask, side by side: boolean, True = may attend, broadcastable to (B, H, T, S).

The caller builds masks and combines them with `&`. A row is a query, a column is a key, and `draw`
prints '#' where the query may attend to the key:

    >>> print(draw(causal(3)))
    #..
    ##.
    ###
    >>> print(draw(causal(3) & padding(torch.tensor([[True, True, False]]))))
    #..
    ##.
    ##.
"""
import torch


def causal(T, past=0, device=None):
    """Each token attends to itself and to the tokens before it -> bool (T, past + T).

    past: how many keys a cache already holds; query i is at position past + i.

    >>> print(draw(causal(2, past=3)))
    ####.
    #####
    """
    keys = torch.arange(past + T, device=device)
    return keys[None, :] <= keys[past:, None]


def padding(token_mask):
    """No token attends to padding -> bool (B, 1, 1, S). token_mask bool (B, S): True = real token.

    >>> print(draw(padding(torch.tensor([[True, True, False]]))))
    ##.
    """
    return token_mask[:, None, None, :]


def prefix(T, length, past=0, device=None):
    """The first `length` tokens attend to each other, the others causally -> bool (T, past + T).

    length: int, or int64 (B,) with one for each row; then the mask is bool (B, 1, T, past + T).

    >>> print(draw(prefix(4, 2)))
    ##..
    ##..
    ###.
    ####
    """
    keys = torch.arange(past + T, device=device)
    if isinstance(length, torch.Tensor):
        length = length[:, None, None, None]
    return causal(T, past, device) | (keys < length)


def unimodal(Q, T, device=None):
    """Queries attend to queries, text to text -> bool (Q + T, Q + T).

    The first of BLIP-2's three masks over Q queries and T tokens (its Figure 2): contrast. For
    matching all attend to all; for generation the queries do not see the text, which is causal.
    blip2.py gets the same from two passes, and from `causal` behind the queries' cached keys.

    >>> print(draw(unimodal(2, 3)))       # contrast
    ##...
    ##...
    ..###
    ..###
    ..###
    >>> print(draw(prefix(2 + 3, 2)))     # generation
    ##...
    ##...
    ###..
    ####.
    #####
    """
    is_text = torch.arange(Q + T, device=device) >= Q
    return is_text[:, None] == is_text[None, :]


def image_index(is_image, before=0, attend_next=None):
    """The image each token attends to: 1, 2, ... in text order, 0 for none -> int64 (B, T).

    is_image bool (B, T): True at <image>. By default the latest image, at or before the token; in
    rows where attend_next bool (B, 1) is True the next one, at or after it (Flamingo, A.3.2).
    before int or int64 (B, 1): how many <image> tokens the cached text has; they count first.

    >>> is_image = torch.tensor([[False, True, False, True, False]])
    >>> image_index(is_image).tolist()
    [[0, 1, 1, 2, 2]]
    >>> image_index(is_image, attend_next=torch.tensor([[True]])).tolist()
    [[1, 1, 2, 2, 0]]
    """
    latest = before + is_image.cumsum(dim=1)
    if attend_next is None:
        return latest
    upcoming = latest + 1 - is_image.long()            # an <image> token belongs to its own image
    return torch.where(attend_next, upcoming * (upcoming <= latest[:, -1:]), latest)


def media(image_index, N, Q, only_latest_image=True):
    """Text attends to the Q visual tokens of its image -> bool (B, 1, T, N * Q) (Flamingo, 2.3).

    image_index int64 (B, T): each token's image, as `image_index` gives it. only_latest_image
    False: a token attends to the images up to its own. A token of no image attends to nothing.

    >>> belongs = torch.tensor([[1, 1, 2, 2, 0]])
    >>> print(draw(media(belongs, N=2, Q=3)))
    ###...
    ###...
    ...###
    ...###
    ......
    >>> print(draw(media(belongs, N=2, Q=3, only_latest_image=False)))
    ###...
    ###...
    ######
    ######
    ......
    """
    key_image = torch.arange(1, N + 1, device=image_index.device).repeat_interleave(Q)    # (N*Q,)
    query_image = image_index[:, None, :, None]                       # (B, 1, T, 1)
    return key_image == query_image if only_latest_image else key_image <= query_image


def draw(mask):
    """A mask bool (..., T, S) as text, '#' for True; several masks stand below each other."""
    grids = mask.reshape(-1, *mask.shape[-2:]).tolist()
    return "\n\n".join("\n".join("".join(".#"[v] for v in row) for row in grid) for grid in grids)
