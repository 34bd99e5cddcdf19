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


def padding(real):
    """Nobody sees padding. real: bool (B, S), True at real tokens. Returns bool (B, 1, 1, S).

    >>> print(draw(padding(torch.tensor([[True, True, False]]))))
    ##.
    """
    return real[:, None, None, :]


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


def draw(mask):
    """A mask as text: a row a query, '#' where it may attend, '.' where not.

    Leading axes of size 1 are dropped; larger ones are drawn one below the other.
    """
    grids = mask.reshape(-1, *mask.shape[-2:]).tolist()
    return "\n\n".join("\n".join("".join(".#"[v] for v in row) for row in grid) for grid in grids)
