"""The KV cache: keys and values that are already computed."""
import torch


def extended(past, new, room):
    """past (B, H, P, K) and new (B, H, T, K) in a row, and the room they stand in or None.

    To copy all of the past for each new token takes a quarter of a tiny model's step, so the new is
    written behind it where there is room. With gradients on it is copied: they need the past.
    """
    if torch.is_grad_enabled():
        return torch.cat([past, new], dim=2), None
    (B, H, P, K), S = past.shape, past.shape[2] + new.shape[2]
    if room is None or room.shape[2] < S:
        room = past.new_empty(B, H, S + 32 + P // 8, K)
        room[:, :, :P] = past
    room[:, :, P:S] = new
    return room[:, :, :S], room


class KVCache:
    """Keys and values already computed by each attention layer of one model, for one batch.

    Pass the same object to every call of a model; a new prompt takes a new object. Self-attention
    appends to its entry; cross-attention fills its entry once and reads it from then on.
    """

    def __init__(self):
        self.entries = {}                # attention module -> (k, v), each (B, H, S, K)
        self.rooms = {}                  # the same with room behind, where they are written
        self.length = 0                  # positions seen so far; masks and positions start here
        self.state = {}                  # name -> tensor (B, ...): what else a model remembers

    def append(self, layer, k, v):
        """Add k, v (B, H, T, K) to the layer's entry; returns all of it, (B, H, S, K)."""
        if layer in self.entries:
            rooms = self.rooms.get(layer, (None, None))
            (k, v), self.rooms[layer] = zip(*map(extended, self.entries[layer], (k, v), rooms))
        self.entries[layer] = k, v
        self.length = k.shape[2]
        return k, v

    def get_or_compute(self, layer, length, compute):
        """The layer's entry; compute() -> (k, v) makes it, and anew for another number of keys."""
        if layer not in self.entries or self.entries[layer][0].shape[2] != length:
            self.entries[layer] = compute()
        return self.entries[layer]

    def invalidate(self, layer):
        """Drop the layer's entry: what it reads has changed."""
        self.entries.pop(layer, None)

    def reorder(self, rows):
        """Keep these batch rows in this order: rows (B',) int64, as beam search chooses them."""
        for layer, entry in self.entries.items():
            rooms = [None if room is None else room[rows]
                     for room in self.rooms.get(layer, (None, None))]
            self.entries[layer] = tuple(x[rows] if room is None else room[:, :, :x.shape[2]]
                                        for x, room in zip(entry, rooms))
            self.rooms[layer] = rooms
        self.state = {name: value[rows] for name, value in self.state.items()}

    def exchange(self, rows, since):
        """`reorder` for rows that are alike before position `since`, as the beams of one prompt.

        Only what came later is moved; what cross-attention reads is alike throughout.
        """
        if torch.is_grad_enabled():
            return self.reorder(rows)
        for room in (room for pair in self.rooms.values() for room in pair if room is not None):
            room[:, :, since:self.length] = room[rows, :, since:self.length]
        self.state = {name: value[rows] for name, value in self.state.items()}

    def select(self, rows):
        """A new cache of these batch rows in this order; rows (B',) int64 may repeat."""
        new = KVCache()
        new.entries, new.rooms = dict(self.entries), dict(self.rooms)
        new.length, new.state = self.length, self.state
        new.reorder(rows)
        return new
